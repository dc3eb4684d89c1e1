"""Where the embedded trained tiny Wan lives, how a Wan small enough for two cores is built, and random twins for tests.

The same classes as the real thing with small numbers. The VAE compresses 4 x 4 x 4 (three levels), not 8 x 8 x 4, so
that a clip of 64 x 64 pixels has 16 x 16 latents and, with the patch (1, 2, 2), 8 x 8 tokens a latent frame.
"""

import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from transformers import T5Tokenizer, UMT5EncoderModel

TINY = Path(str(files("motionlora.heads"))) / "tiny_wan"
"""The embedded trained tiny Wan, a diffusers folder. May be missing in a working copy where it was not made yet."""

TWIN_WORDS = ("a", "on", "over", "red", "green", "blue", "circle", "square", "star", "dark", "light", "background")


def random_twin(
    folder: str | Path,
    *,
    blocks: int = 3,
    heads: int = 4,
    head_dim: int = 12,
    ffn_dim: int = 64,
    text_dim: int = 32,
    base_dim: int = 8,
    words: Iterable[str] = TWIN_WORDS,
    shift: float = 3.0,
    seed: int = 0,
) -> Path:
    """Write a complete Wan pipeline with random weights into `folder`, for tests; returns the folder.

    The architecture is the embedded tiny Wan's (4x spatial VAE, 16 latent channels) with smaller numbers, so that
    everything but quality can be tried in seconds. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = make_tokenizer(words)
        text_encoder = tiny_text_encoder(len(tokenizer), dim=text_dim)
        transformer = tiny_transformer(
            blocks=blocks, heads=heads, head_dim=head_dim, ffn_dim=ffn_dim, text_dim=text_dim, freq_dim=32
        )
        mean = torch.linspace(-0.5, 0.5, 16).tolist()
        std = torch.linspace(0.5, 1.5, 16).tolist()
        vae = tiny_vae(base_dim=base_dim, dim_mult=(1, 1, 1), num_res_blocks=1, latents_mean=mean, latents_std=std)
    return write_pipeline(
        folder, transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, shift=shift
    )


def random_cogvideox(folder: str | Path, *, rotary: bool, blocks: int = 3, seed: int = 0) -> Path:
    """Write a complete CogVideoX pipeline with random weights into `folder`, for tests; returns the folder.

    `rotary` tells the 5B kind (rotary positions, `snr_shift_scale` 1) from the 2B kind (sinusoidal ones, 3); heads of
    16 channels, a VAE of 4 x 4 x 4. The global random state is left as it was.
    """
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = make_tokenizer(TWIN_WORDS)
        config = T5Config(
            vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, is_encoder_decoder=False,
            relative_attention_num_buckets=8,
        )  # fmt: skip
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=4, attention_head_dim=16, time_embed_dim=32, text_embed_dim=32, num_layers=blocks,
            sample_width=8, sample_height=4, sample_frames=9, use_rotary_positional_embeddings=rotary,
        )  # fmt: skip
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 3,  # pyright: ignore[reportArgumentType]
            up_block_types=("CogVideoXUpBlock3D",) * 3,  # pyright: ignore[reportArgumentType]
            block_out_channels=(8, 8, 8),  # pyright: ignore[reportArgumentType]
            layers_per_block=1, norm_num_groups=4, scaling_factor=0.7 if rotary else 1.15258426,
        )  # fmt: skip
        text_encoder = T5EncoderModel(config)
    scheduler = CogVideoXDDIMScheduler(
        clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        snr_shift_scale=1.0 if rotary else 3.0,
    )  # fmt: skip
    parts = (tokenizer, text_encoder.eval(), vae.eval(), transformer.eval(), scheduler)
    CogVideoXPipeline(*parts).save_pretrained(folder, safe_serialization=True)  # pyright: ignore[reportArgumentType]
    _make_portable(Path(folder))
    return Path(folder)


def tiny_transformer(
    *,
    blocks: int = 6,
    heads: int = 4,
    head_dim: int = 32,
    ffn_dim: int = 512,
    text_dim: int = 64,
    freq_dim: int = 64,
    channels: int = 16,
    rope_max_seq_len: int = 64,
) -> "WanTransformer3DModel":
    """A `WanTransformer3DModel` with random weights from the global generator, in eval mode.

    Args:
        head_dim: even; rope splits it into time, height and width lanes, h = w = 2 (head_dim // 6).
        text_dim: equal to the text encoder's width.
        rope_max_seq_len: the longest clip in latent frames, and the largest token grid side.
    """
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=channels,
        out_channels=channels,
        text_dim=text_dim,
        freq_dim=freq_dim,
        ffn_dim=ffn_dim,
        num_layers=blocks,
        rope_max_seq_len=rope_max_seq_len,
    ).eval()


def tiny_vae(
    *,
    base_dim: int = 16,
    dim_mult: Sequence[int] = (1, 2, 2),
    num_res_blocks: int = 1,
    z_dim: int = 16,
    latents_mean: Sequence[float] | None = None,
    latents_std: Sequence[float] | None = None,
    decoder_base_dim: int | None = None,
) -> "AutoencoderKLWan":
    """An `AutoencoderKLWan` that compresses 4 x 4 x 4, random weights from the global generator, in eval mode.

    Args:
        dim_mult: three entries make two spatial halvings; both also halve time.
        latents_mean, latents_std: `z_dim` numbers each, of raw latents; 0 and 1 until they have been measured.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    if len(dim_mult) != 3:
        raise ValueError(f"A 4x spatial VAE has three entries in dim_mult, got {tuple(dim_mult)}: give three.")
    return AutoencoderKLWan(
        base_dim=base_dim,
        decoder_base_dim=decoder_base_dim,
        z_dim=z_dim,
        dim_mult=list(dim_mult),
        num_res_blocks=num_res_blocks,
        temperal_downsample=[True, True],
        latents_mean=list(latents_mean) if latents_mean is not None else [0.0] * z_dim,
        latents_std=list(latents_std) if latents_std is not None else [1.0] * z_dim,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    ).eval()


def tiny_text_encoder(
    vocab_size: int, *, dim: int = 64, layers: int = 2, heads: int = 4, ffn_dim: int | None = None
) -> "UMT5EncoderModel":
    """A `UMT5EncoderModel` for a vocabulary of `vocab_size`, random weights from the global generator, in eval mode."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=dim,
        d_kv=dim // heads,
        d_ff=ffn_dim or 2 * dim,
        num_layers=layers,
        num_heads=heads,
        relative_attention_num_buckets=8,
        is_encoder_decoder=False,
    )
    return UMT5EncoderModel(config).eval()


def make_tokenizer(words: Iterable[str]) -> "T5Tokenizer":
    """A `T5Tokenizer` that knows each of `words` as one token and spells everything else in ASCII letters.

    Made from the list alone, so that the same words always give the same ids: training one is not reproducible
    (two trainings in one process give different ids). Words are used as they are; captions should be lower case.
    """
    from transformers import T5Tokenizer

    whole = sorted({"▁" + word.strip() for word in words if word.strip()})
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(word, -2.0) for word in whole]
    # One token a letter costs far more than one a word, so that the likeliest split keeps words whole.
    vocab += [(chr(code), -10.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=vocab, extra_ids=0)


def write_pipeline(
    folder: str | Path,
    *,
    transformer: "WanTransformer3DModel",
    vae: "AutoencoderKLWan",
    text_encoder: "UMT5EncoderModel",
    tokenizer: "T5Tokenizer",
    shift: float = 3.0,
) -> Path:
    """Write the parts as a diffusers folder that `WanPipeline.from_pretrained(folder)` loads; returns the folder.

    Args:
        shift: time shift of the `FlowMatchEulerDiscreteScheduler` that is written.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    folder = Path(folder)
    pipeline = WanPipeline(
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
        text_encoder=text_encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        transformer=transformer,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    _make_portable(folder)
    return folder


def _make_portable(folder: Path) -> None:
    """Takes the writing machine's path out of every JSON file, and lets everybody read (safetensors writes 0600)."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
