"""Laws of the Wan backbone: the stock pipeline's numbers, early refusals, the cache, dtypes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from motionlora.data.clip import Clip
from motionlora.data.settings import InputError
from motionlora.heads import wan_parts
from motionlora.heads.backbone import Backbone, Prompt, TokenGrid
from motionlora.heads.tiny import make_tokenizer, random_twin, tiny_transformer
from motionlora.heads.wan import WanBackbone

CAPTIONS = ["a red circle on a dark background", "  A &amp; blue\n star ", "", "unknown wörds, 3.5 of them!"]
Maker = Callable[..., Clip]


@pytest.fixture(scope="module")
def pipeline(twin: WanBackbone, twin_folder: Path) -> WanPipeline:
    """The stock pipeline over the twin's own loaded parts: weights at other addresses differ in the last digit."""
    twin.embed(["a star"])
    parts: Any = {"transformer": twin.transformer, "text_encoder": twin.parts._kept["text"].text_encoder}
    with twin.parts.vae() as vae:
        stock = WanPipeline.from_pretrained(twin_folder, vae=vae, **parts)
    stock.set_progress_bar_config(disable=True)
    return stock


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_twin_answers_the_protocol(twin: WanBackbone) -> None:
    model: Backbone = twin
    assert (model.blocks, model.heads, model.head_dim) == (3, 4, 12)
    assert (model.multiple, model.frame_multiple) == (8, 4)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.name == "wan"
    assert twin.scheduler_config["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert twin.scheduler_config["shift"] == 3.0
    assert not twin.transformer.training
    assert not any(weight.requires_grad for weight in twin.transformer.parameters())


def test_velocity_is_the_network_fed_a_thousand_times_the_time(twin: WanBackbone) -> None:
    latent, prompt, time = drawn(2, 16, 3, 4, 6), twin.embed(CAPTIONS[:2]), torch.tensor([0.25, 0.875])
    with torch.no_grad():
        direct = twin.transformer(latent, 1000 * time, prompt.embeds, return_dict=False)[0]
        assert torch.equal(twin.velocity(latent, time, prompt), direct)


def test_scheduler_times_times_a_thousand_are_its_timesteps(twin: WanBackbone) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(twin.scheduler_config)
    for steps in (2, 25, 50):
        scheduler.set_timesteps(steps)
        assert torch.equal(1000 * scheduler.sigmas[:-1], scheduler.timesteps)


def test_one_caption_and_one_time_serve_a_whole_batch(twin: WanBackbone) -> None:
    latent, prompt = drawn(3, 16, 2, 4, 4), twin.embed(CAPTIONS[:1])
    with torch.no_grad():
        few = twin.velocity(latent, torch.tensor([0.5]), prompt)
        many = twin.velocity(latent, torch.full((3,), 0.5), Prompt(prompt.embeds.repeat(3, 1, 1)))
    assert torch.equal(few, many)


def test_gradients_flow_to_the_latent_where_grad_is_enabled(twin: WanBackbone) -> None:
    latent = drawn(1, 16, 2, 4, 4).requires_grad_()
    twin.velocity(latent, torch.tensor([0.5]), twin.embed(["a star"])).square().sum().backward()
    assert latent.grad is not None
    assert latent.grad.abs().max() > 0


def test_a_wrapped_transformer_answers_the_same(twin: WanBackbone) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    wrapped = replace(twin, transformer=Wrapper(twin.transformer))
    latent, prompt, time = drawn(1, 16, 2, 4, 4), twin.embed(["a star"]), torch.tensor([0.5])
    with torch.no_grad():
        assert torch.equal(wrapped.velocity(latent, time, prompt), twin.velocity(latent, time, prompt))
    assert (wrapped.blocks, wrapped.multiple, wrapped.grid(latent)) == (3, 8, twin.grid(latent))


def test_embeddings_are_the_stock_pipelines_bit_for_bit(twin: WanBackbone, pipeline: WanPipeline) -> None:
    prompt = twin.embed(CAPTIONS)
    assert prompt.embeds.shape == (4, 512, 32)
    for row, caption in enumerate(CAPTIONS):
        with torch.no_grad():
            stock, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=512)
        torch.testing.assert_close(prompt[row].embeds, stock, atol=0, rtol=0)


def test_a_captions_end_is_followed_by_zeros(twin: WanBackbone) -> None:
    embeds = twin.embed(["a red circle"]).embeds[0]
    assert embeds[:4].abs().amax(dim=1).min() > 0  # three words and the end mark
    assert not embeds[4:].any()


def test_encode_is_the_normalised_mode(twin: WanBackbone, pipeline: WanPipeline, random_clip: Maker) -> None:
    clip = random_clip(9, 16, 24)
    pixels = torch.from_numpy(clip.pixels).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    vae: Any = pipeline.vae
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    latent = twin.encode(clip)
    assert latent.shape == (1, 16, 3, 4, 6)
    assert latent.dtype == torch.float32
    torch.testing.assert_close(latent * std + mean, mode, atol=1e-6, rtol=0)


def test_a_single_frame_is_the_videos_first_latent_and_a_prefix_its_prefix(
    twin: WanBackbone, random_clip: Maker
) -> None:
    clip = random_clip(9)
    whole = twin.encode(clip)
    for frames in (1, 5):
        part = twin.encode(Clip(clip.pixels[:frames], clip.fps, clip.caption))
        torch.testing.assert_close(part, whole[:, :, : part.shape[2]], atol=1e-5, rtol=0)


def test_decoded_pixels_are_the_stock_pipelines(twin: WanBackbone, pipeline: WanPipeline) -> None:
    latent, embeds = drawn(1, 16, 3, 4, 4), twin.embed(["a star"]).embeds
    options: dict[str, Any] = {"height": 16, "width": 16, "num_frames": 9, "num_inference_steps": 1}
    options |= {"guidance_scale": 1.0, "prompt_embeds": embeds, "latents": latent}
    walked = pipeline(**options, output_type="latent").frames  # pyright: ignore[reportAttributeAccessIssue]
    stock = pipeline(**options, output_type="np").frames[0]  # pyright: ignore[reportAttributeAccessIssue]
    clip = twin.decode(walked, 12.0)
    assert clip.pixels.dtype == np.uint8
    assert clip.pixels.shape == (9, 16, 16, 3)
    assert clip.fps == 12.0
    assert np.array_equal(clip.pixels, np.round(stock * 255).astype(np.uint8))


def test_grid_counts_the_networks_tokens(twin: WanBackbone) -> None:
    grid = twin.grid(drawn(1, 16, 13, 16, 16))
    assert grid == TokenGrid(13, 8, 8)
    assert (grid.tokens, grid.tokens_per_frame) == (832, 64)
    transformer: Any = twin.transformer
    cos, _ = transformer.rope(drawn(1, 16, 13, 16, 16))
    assert cos.shape[1] == grid.tokens
    with pytest.raises(InputError, match="multiples of 8"):
        twin.grid(drawn(1, 16, 2, 5, 4))


@pytest.mark.parametrize("frames", [2, 4, 16, 48])
def test_frames_that_the_vae_would_drop_are_refused(twin: WanBackbone, random_clip: Maker, frames: int) -> None:
    with pytest.raises(InputError, match=f"got {frames}: cut to {frames - (frames - 1) % 4}"):
        twin.encode(random_clip(frames))


@pytest.mark.parametrize("size", [(12, 16), (16, 20), (7, 7)])
def test_sizes_that_the_model_would_cut_are_refused(
    twin: WanBackbone, random_clip: Maker, size: tuple[int, int]
) -> None:
    with pytest.raises(InputError, match="multiples of 8"):
        twin.encode(random_clip(5, *size))


def test_wrong_calls_are_refused(twin: WanBackbone) -> None:
    with pytest.raises(InputError, match="one latent"):
        twin.decode(drawn(2, 16, 2, 4, 4), 12.0)
    for captions in ([], "a red circle"):
        with pytest.raises(InputError, match="list of captions"):
            twin.embed(captions)
    with pytest.raises(InputError, match="at most 512"):
        twin.embed(["red " * 600])


def test_a_second_run_with_a_full_cache_loads_neither_vae_nor_text_encoder(
    twin: WanBackbone, twin_folder: Path, random_clip: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = random_clip(5)
    first = WanBackbone.load(twin_folder, cache=tmp_path)
    latent, prompt = first.encode(clip), first.embed(CAPTIONS)
    assert torch.equal(latent, twin.encode(clip))
    assert torch.equal(prompt.embeds, twin.embed(CAPTIONS).embeds)

    second = WanBackbone.load(twin_folder, cache=tmp_path)
    monkeypatch.setattr(wan_parts, "loaded", lambda *_: pytest.fail("loaded a part although the cache is full"))
    assert torch.equal(second.encode(replace(clip, fps=3.0, caption="other")), latent)
    assert torch.equal(second.embed(CAPTIONS[::-1]).embeds, prompt.embeds.flip(0))


def test_the_cache_tells_models_apart(twin_folder: Path, random_clip: Maker, tmp_path: Path) -> None:
    other_folder = random_twin(tmp_path / "other", seed=1)
    clip = random_clip(5)
    one, other = (WanBackbone.load(folder, cache=tmp_path / "cache") for folder in (twin_folder, other_folder))
    assert not torch.equal(one.encode(clip), other.encode(clip))
    assert not torch.equal(one.embed(["a star"]).embeds, other.embed(["a star"]).embeds)
    assert one.fingerprint != other.fingerprint


def test_parts_are_kept_between_uses_and_shared_by_copies(twin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = WanBackbone.load(twin_folder)
    latent = drawn(1, 16, 1, 4, 4)
    model.decode(latent, 12.0)
    model.embed(["a star"])
    monkeypatch.setattr(wan_parts, "loaded", lambda *_: pytest.fail("loaded a part twice"))
    copy = replace(model, transformer=model.transformer)
    copy.decode(latent, 12.0)
    copy.embed(["a circle"])


def test_a_large_text_encoder_is_dropped_after_use(twin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan_parts, "SMALL_BYTES", 0)
    model = WanBackbone.load(twin_folder)
    model.embed(["a star"])
    assert not model.parts._kept


def test_bf16_keeps_what_must_stay_in_fp32(twin: WanBackbone, twin_folder: Path) -> None:
    model = WanBackbone.load(twin_folder, dtype=torch.bfloat16)
    dtypes = {name: weight.dtype for name, weight in model.transformer.named_parameters()}
    kept = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
    for name, dtype in dtypes.items():
        assert dtype == (torch.float32 if any(part in name for part in kept) else torch.bfloat16), name
    rope: Any = model.transformer.rope
    assert rope.freqs_cos.dtype == torch.float32
    assert model.dtype == torch.bfloat16
    assert model.fingerprint == twin.fingerprint

    latent, prompt = drawn(1, 16, 2, 4, 4), model.embed(["a red circle"])
    with torch.no_grad():
        low = model.velocity(latent, torch.tensor([0.5]), prompt)
        high = twin.velocity(latent, torch.tensor([0.5]), twin.embed(["a red circle"]))
    assert low.dtype == torch.float32
    assert (low - high).abs().mean() < 0.05 * high.abs().mean()


def test_the_vae_stays_in_fp32_beside_a_bf16_transformer(
    twin: WanBackbone, twin_folder: Path, random_clip: Maker
) -> None:
    model = WanBackbone.load(twin_folder, dtype=torch.bfloat16)
    torch.testing.assert_close(model.encode(random_clip(5)), twin.encode(random_clip(5)), atol=1e-5, rtol=0)


def test_fused_projections_are_refused(twin_folder: Path) -> None:
    model = WanBackbone.load(twin_folder)
    transformer: Any = model.transformer
    transformer.fuse_qkv_projections()
    with pytest.raises(InputError, match="unfuse"):
        model.velocity(drawn(1, 16, 1, 4, 4), torch.tensor([0.5]), Prompt(drawn(1, 512, 32)))
    with pytest.raises(InputError, match="unfuse"):
        replace(model)


def test_attention_backends(twin: WanBackbone) -> None:
    latent, prompt, time = drawn(1, 16, 2, 4, 4), twin.embed(["a star"]), torch.tensor([0.5])
    with torch.no_grad():
        native = twin.velocity(latent, time, prompt)
        twin.use_attention("_native_math")
        assert _AttentionBackendRegistry.get_active_backend()[0] == "native", "other models keep theirs"
        math = twin.velocity(latent, time, prompt)
    with pytest.raises(InputError, match=r"allowed are .*native"):
        twin.use_attention("nativ")
    with pytest.raises(InputError, match="flash-attn"):
        twin.use_attention("flash")
    twin.use_attention("native")
    torch.testing.assert_close(math, native, atol=1e-5, rtol=0)


def edited(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


WEIGHTS = "diffusion_pytorch_model.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no folder"),
    "no index": (lambda folder: (folder / "model_index.json").unlink(), "model_index.json"),
    "index damaged": (lambda folder: (folder / "model_index.json").write_text("{"), "missing or damaged"),
    "other transformer": (
        lambda folder: edited(folder, "model_index.json", transformer=["diffusers", "CogVideoXTransformer3DModel"]),
        "CogVideoX.*supported is Wan 2.1",
    ),
    "image to video": (lambda folder: edited(folder, "transformer/config.json", in_channels=36), "image-to-video"),
    "image embedding": (lambda folder: edited(folder, "transformer/config.json", image_dim=1280), "image-to-video"),
    "two transformers": (
        lambda folder: edited(folder, "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"]),
        "Wan 2.2",
    ),
    "no vae": (lambda folder: shutil.rmtree(folder / "vae"), "lacks vae"),
    "no weights": (lambda folder: (folder / "transformer" / WEIGHTS).unlink(), "no weights in safetensors"),
    "short transformer": (lambda folder: shortened(folder / "transformer" / WEIGHTS), "transformer.*damaged"),
    "short vae": (lambda folder: shortened(folder / "vae" / WEIGHTS), "vae.*damaged"),
    "short text encoder": (lambda folder: shortened(folder / "text_encoder/model.safetensors"), "text_encoder.*damag"),
    "not safetensors": (lambda folder: (folder / "vae" / WEIGHTS).write_bytes(b"version https"), "vae.*damaged"),
    "another size": (lambda folder: edited(folder, "transformer/config.json", ffn_dim=96), "cannot be loaded"),
    "weights missing": (lambda folder: edited(folder, "transformer/config.json", num_layers=4), "lacks .* weights"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_wan_folder_is_refused_in_one_sentence(twin_folder: Path, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(twin_folder, tmp_path / "copy"))
    harm, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(InputError, match=message) as refusal:
        WanBackbone.load(folder)
    assert "\n" not in str(refusal.value)


def test_a_hub_id_that_is_not_here_is_refused() -> None:
    with pytest.raises(InputError, match="neither a folder here nor a model"):
        WanBackbone.load("nobody/wan-that-never-was")


def test_the_stock_pipeline_loads_the_twin_unchanged_and_draws(twin_folder: Path) -> None:
    pipeline = WanPipeline.from_pretrained(twin_folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    output: Any = pipeline(
        "a star", height=32, width=48, num_frames=5, num_inference_steps=2, generator=generator, output_type="np"
    )
    assert output.frames.shape == (1, 5, 32, 48, 3)
    assert isinstance(pipeline.vae, AutoencoderKLWan)
    assert pipeline.vae_scale_factor_spatial == 4


def test_a_twin_is_the_same_for_the_same_seed_and_leaves_the_random_state(twin: WanBackbone, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    again = WanBackbone.load(random_twin(tmp_path / "again"))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert again.fingerprint == twin.fingerprint
    assert again.parts.vae_hash == twin.parts.vae_hash
    assert again.parts.text_hash == twin.parts.text_hash


def test_the_tokenizer_keeps_words_whole_spells_the_rest_and_reloads(tmp_path: Path) -> None:
    from transformers import T5Tokenizer

    tokenizer = make_tokenizer(["red", "circle", "a"])
    assert tokenizer.tokenize("a red circle, x") == ["▁a", "▁red", "▁circle", ",", "▁", "x"]
    tokenizer.save_pretrained(tmp_path)
    reloaded = T5Tokenizer.from_pretrained(tmp_path)
    text = "a red circle over 3 unknown things"
    assert reloaded(text).input_ids == tokenizer(text).input_ids
    assert make_tokenizer(["circle", "a", "red", "a"])(text).input_ids == tokenizer(text).input_ids


def test_transformer_sizes_are_what_was_asked_for() -> None:
    transformer: Any = tiny_transformer(blocks=2, heads=3, head_dim=16, ffn_dim=40, text_dim=24)
    assert len(transformer.blocks) == 2
    assert transformer.blocks[0].attn1.to_q.weight.shape == (48, 48)
    assert not transformer.training
