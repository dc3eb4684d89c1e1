"""The outline of a Wan: what its configuration files say, and the model itself on tensors that have no data.

What a model takes can be counted on it before a single weight is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from motionlora.heads.wan import WanBackbone
from motionlora.heads.wan_folder import boundary_of, found_folder, read_json

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

META = torch.device("meta")
_UMT5_XXL = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False,
}  # fmt: skip
_VAE_5B = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "is_residual": True, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip


@dataclass(frozen=True)
class WanOutline:
    """A Wan by its configurations, each as in its JSON file; what a file leaves out is the class's default.

    Attributes:
        name: what the user called it.
        token_times: the network is fed a time for every token (TI2V-5B).
        experts: networks that share the noise levels, each of this outline; one of them is on the device at a time.
    """

    name: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=lambda: dict(_UMT5_XXL))
    token_times: bool = False
    experts: int = 1

    def without_weights(
        self, dtype: torch.dtype, *, blocks: int | None = None, device: torch.device = META
    ) -> WanBackbone:
        """The frozen model, in the dtypes of a loaded one, on the meta device (or within FakeTensorMode on another).

        `blocks` takes the place of its own number. It has no VAE and no text encoder; the global random state is left
        as it was.
        """
        size = {**self.transformer, **({} if blocks is None else {"num_layers": blocks})}
        with torch.random.fork_rng(devices=[]), device:
            transformer = WanTransformer3DModel(**size).eval().requires_grad_(False)
        kept = tuple(transformer._keep_in_fp32_modules or ())
        for key, weight in transformer.named_parameters():
            if not any(part in key for part in kept):
                weight.data = weight.data.to(dtype)
        config = {"scale_factor_spatial": 8, "scale_factor_temporal": 4, **self.vae}
        parts: Any = SimpleNamespace(device=device, dtype=dtype, vae_config=config, token_times=self.token_times)
        return WanBackbone(transformer, parts, self.name, "")

    def vae_without_weights(self) -> AutoencoderKLWan:
        """The VAE on the meta device in fp32, as it is used."""
        with torch.random.fork_rng(devices=[]), META:
            return AutoencoderKLWan(**self.vae).eval().requires_grad_(False)

    def text_encoder_without_weights(self, dtype: torch.dtype) -> UMT5EncoderModel:
        """The text encoder on the meta device."""
        from transformers import UMT5Config, UMT5EncoderModel

        with torch.random.fork_rng(devices=[]), META:
            encoder: Any = UMT5EncoderModel(UMT5Config(**self.text))  # its annotation of `to` lacks a dtype
            return encoder.eval().requires_grad_(False).to(dtype)


_1_3B = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
_14B = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
_5B = {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
PUBLISHED = {
    outline.name: outline
    for outline in (
        WanOutline("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", _1_3B),
        WanOutline("Wan-AI/Wan2.1-T2V-14B-Diffusers", _14B),
        WanOutline("Wan-AI/Wan2.2-T2V-A14B-Diffusers", _14B, experts=2),
        WanOutline("Wan-AI/Wan2.2-TI2V-5B-Diffusers", _5B, _VAE_5B, token_times=True),
    )
}
"""The published text-to-video models by hub id: known without asking the hub."""


def outline_of(source: str | Path) -> WanOutline:
    """The outline of "tiny", of a diffusers folder, or of a hub id: known, or read from its configuration files.

    Raises:
        InputError: as `found_folder`.
    """
    if str(source) in PUBLISHED:
        return PUBLISHED[str(source)]
    folder = found_folder(source, weights=False)
    index = read_json(folder / "model_index.json")
    transformer, vae, text = (
        {key: value for key, value in read_json(folder / part / "config.json").items() if not key.startswith("_")}
        for part in ("transformer", "vae", "text_encoder")
    )
    experts = 2 if boundary_of(folder) else 1
    return WanOutline(str(source), transformer, vae, text, bool(index.get("expand_timesteps")), experts)
