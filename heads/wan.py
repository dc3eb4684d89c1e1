"""Text-to-video Wan behind the `Backbone` protocol: the transformer stays loaded, VAE and text encoder come and go.

Letters: b batch, c latent channel, f latent frame, h height, w width, l text token, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from motionlora.data.cache import cached, content_key
from motionlora.data.clip import Clip
from motionlora.data.settings import InputError
from motionlora.heads.backbone import Latent, Prompt, TokenGrid
from motionlora.heads.capture import Captured, What, capturing, layers_of, unwrapped
from motionlora.heads.inject import Injected, injecting
from motionlora.heads.positions import Positions, positioned
from motionlora.heads.rotary import Turned, turning
from motionlora.heads.settings import Expert
from motionlora.heads.short_text import shortened
from motionlora.heads.wan_experts import Experts, loaded_experts
from motionlora.heads.wan_folder import found_folder
from motionlora.heads.wan_parts import WanParts


@dataclass(frozen=True, eq=False)
class WanBackbone:
    """A loaded text-to-video Wan, frozen. Time runs from 0 (clean) to 1 (noise).

    `transformer` may be a wrapper that holds the model as `.module`: `dataclasses.replace(model, transformer=wrapped)`
    shares everything else. Of two experts it holds the weights of the one that was last asked (`Experts`).
    """

    transformer: nn.Module
    parts: WanParts
    source: str | Path
    fingerprint: str
    cache: Path | None = None
    experts: Experts = field(default_factory=Experts)

    @classmethod
    def load(
        cls,
        source: str | Path = "tiny",
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        cache: Path | None = None,
        expert: Expert | None = None,
    ) -> WanBackbone:
        """Load the transformer of a diffusers folder or hub id; "tiny" is the embedded one.

        Args:
            dtype: of the transformer and the text encoder, float32 or bfloat16; norms, time embedding and rotary
                tables stay in fp32, and so does the VAE.
            cache: folder for latents and prompts, found again by content; None computes them each time.
            expert: of a model of two the only one to load; None loads both. One network for all is "high", too.

        Raises:
            InputError: not there, damaged, of no supported kind, or without that expert.
        """
        transformer, parts, fingerprint, experts = cls._opened(source, torch.device(device), dtype, expert)
        return cls(transformer, parts, source, fingerprint, None if cache is None else Path(cache), experts)

    @classmethod
    def _opened(
        cls, source: str | Path, device: torch.device, dtype: torch.dtype, expert: Expert | None
    ) -> tuple[nn.Module, WanParts, str, Experts]:
        """What `load` loads: the transformer on its device, the other parts, the weights' fingerprint, the experts."""
        folder = found_folder(source, expert=expert)
        transformer, experts, fingerprint = loaded_experts(folder, device, dtype, expert)
        return transformer, WanParts(folder, device, dtype), fingerprint, experts

    def __post_init__(self) -> None:
        self._refuse_fused()

    @property
    def name(self) -> str:
        """The hub id, "tiny", or the folder's own name (no path of this machine)."""
        if str(self.source) == "tiny" or not Path(self.source).exists():
            return str(self.source)
        return Path(self.source).resolve().name

    @property
    def device(self) -> torch.device:
        return self.parts.device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in."""
        return self.parts.dtype

    @cached_property
    def config(self) -> Any:
        """The transformer's settings, read-only."""
        return unwrapped(self.transformer).config

    @property
    def blocks(self) -> int:
        return self.config.num_layers

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.config.attention_head_dim

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self.config.in_channels

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latents that a token covers in time, height and width."""
        return self.config.patch_size

    @property
    def spatial_factor(self) -> int:
        """Pixels a latent covers in height and in width: 8 for Wan 2.1, 16 for TI2V-5B, 4 for the tiny."""
        return self.parts.vae_config["scale_factor_spatial"]

    @property
    def multiple(self) -> int:
        """Height and width in pixels must be multiples of this: 16 for Wan 2.1, 32 for TI2V-5B, 8 for the tiny."""
        return self.spatial_factor * self.patch[1]

    @property
    def frame_multiple(self) -> int:
        """A clip has k times this plus 1 frames: 4."""
        return self.parts.vae_config["scale_factor_temporal"]

    @property
    def whole_multiple(self) -> int:
        """A clip that is to be decoded has k times this plus 1 frames."""
        return self.frame_multiple

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """For `FlowMatchEulerDiscreteScheduler.from_config`."""
        return self.parts.scheduler_config

    def encode(self, clip: Clip) -> Latent:
        """The clip's normalised latent "1 c f h w", fp32, on the device: `(mode - mean) / std` (methods.md 1.4).

        Raises:
            InputError: frames that are not 4k + 1, or a size that is not a multiple of `multiple`; the VAE would
                drop the rest unseen.
        """
        self._refuse_size(clip)
        key = content_key("latent", self.parts.vae_hash, clip.content_hash())
        return self._remembered("latents", key, lambda: self.parts.encoded(clip)).to(self.device)

    def decode(self, latent: Latent, fps: float) -> Clip:
        """The clip of one normalised latent "1 c f h w"; pixel values are rounded, the caption is empty.

        Raises:
            InputError: more than one latent.
        """
        if latent.ndim != 5 or latent.shape[0] != 1:
            raise InputError(f"decode takes one latent 1 c f h w, got {tuple(latent.shape)}: decode one after another.")
        return Clip(self.parts.decoded(latent).numpy(), fps, "")

    def embed(self, captions: Sequence[str]) -> Prompt:
        """Captions embedded as `WanPipeline.__call__` does for each alone: 512 tokens, zeros after the caption's end.

        Raises:
            InputError: no caption, or one of more than 512 tokens.
        """
        if isinstance(captions, str) or not captions:
            raise InputError(f"embed takes a list of captions, got {captions!r}: put at least one in a list.")
        with self.parts.text() as embedding:
            rows = [
                self._remembered(
                    "prompts",
                    content_key("prompt", self.parts.text_hash, str(self.parts.text_length), caption),
                    lambda caption=caption: embedding(caption),
                )
                for caption in captions
            ]
        return Prompt(torch.cat([row.to(self.device) for row in rows]))

    def velocity(self, latent: Latent, time: Float[Tensor, " b"], prompt: Prompt) -> Latent:
        """What the network says at `time`: the direction from clip to noise, fp32; no guidance.

        Gradients flow where grad is enabled. One caption serves the whole batch.

        Args:
            latent: noisy latents; cast to the model's dtype.
            time: in [0, 1], one for each latent or one for all; the network is fed 1000 times it.

        Raises:
            InputError: noise levels of an expert that was not loaded, or of both.
        """
        self._refuse_fused()
        self.experts.hold_for(time)
        batch = latent.shape[0]
        level = (1000 * time.to(self.device, torch.float32)).expand(batch)
        network = unwrapped(self.transformer)
        velocity = self.transformer(
            hidden_states=latent.to(self.dtype),
            timestep=repeat(level, "b -> b s", s=self.grid(latent).tokens) if self.parts.token_times else level,
            encoder_hidden_states=shortened(network, prompt.to(self.device, self.dtype).expand(batch).embeds),
            return_dict=False,
        )[0]
        return velocity.float()

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Latent:
        """Noise "b c f h w" on the CPU, drawn in the order in which the stock pipeline draws it."""
        return torch.randn(*shape, generator=generator)

    def grid(self, latent: Latent) -> TokenGrid:
        """The token grid of a latent.

        Raises:
            InputError: height or width in latents is not a multiple of the patch.
        """
        sides = [(side // patch, side % patch) for side, patch in zip(latent.shape[2:], self.patch, strict=True)]
        if any(rest for _, rest in sides):
            raise InputError(
                f"A latent of {tuple(latent.shape[2:])} does not divide into patches of {self.patch}: use "
                f"clips whose height and width are multiples of {self.multiple}."
            )
        return TokenGrid(*(side for side, _ in sides))

    def capturing(
        self, blocks: Sequence[int], what: What, *, stop: bool = False
    ) -> AbstractContextManager[Captured[Any]]:
        """Records tensors of `blocks` (`motionlora.heads.capture.capturing`)."""
        return capturing(self.transformer, blocks, what, stop=stop)

    def injecting(self, blocks: Sequence[int]) -> AbstractContextManager[Injected]:
        """Gives `blocks` the keys and values of another forward (`motionlora.heads.inject.injecting`)."""
        return injecting(self.transformer, blocks)

    def positioned(self, positions: Positions) -> AbstractContextManager[None]:
        """Latent frames stand at these times inside the context (`motionlora.heads.positions.positioned`)."""
        return positioned(self.transformer, positions)

    def turning(self) -> AbstractContextManager[Turned]:
        """Gives queries and keys rotary tables of their own (`motionlora.heads.rotary.turning`)."""
        return turning(self.transformer)

    def use_attention(self, backend: str) -> None:
        """Choose the attention backend of this model by diffusers' dispatcher, "native" by default.

        Raises:
            InputError: unknown, or its package is not installed.
        """
        from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

        transformer: Any = unwrapped(self.transformer)
        try:
            with attention_backend("native"):  # diffusers would let all other models of the process follow
                transformer.set_attention_backend(backend)
        except (ValueError, RuntimeError, ImportError) as error:
            allowed = ", ".join(name.value for name in AttentionBackendName)
            reason = "" if backend not in allowed.split(", ") else f" ({error})"
            raise InputError(
                f"Attention backend {backend!r} cannot be used{reason}; allowed are {allowed}: choose one whose "
                "package is installed."
            ) from error

    def _remembered(self, kind: str, key: str, make: Callable[[], Tensor]) -> Tensor:
        if self.cache is None:
            return make()
        return cached(self.cache / kind, key, lambda: {kind: make().cpu().contiguous()})[kind]

    def _refuse_size(self, clip: Clip) -> None:
        frames, height, width = clip.pixels.shape[:3]
        if (frames - 1) % self.frame_multiple:
            nearest = frames - (frames - 1) % self.frame_multiple
            raise InputError(f"The model takes {self.frame_multiple}k + 1 frames, got {frames}: cut to {nearest}.")
        if height % self.multiple or width % self.multiple:
            raise InputError(
                f"The model takes heights and widths that are multiples of {self.multiple}, got {height} x {width}: "
                f"crop to {height // self.multiple * self.multiple} x {width // self.multiple * self.multiple}."
            )

    def _refuse_fused(self) -> None:
        if getattr(layers_of(self.transformer)[0].attn1, "fused_projections", False):
            raise InputError("The qkv projections are fused, which bypasses the LoRA: call unfuse_qkv_projections().")
