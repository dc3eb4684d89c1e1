"""CogVideoX 2B and 5B (text-to-video) behind the `Backbone` protocol; arXiv 2408.06072.

Letters: b batch, c latent channel, f latent frame, h height, w width, s token of the video.

Its path is variance-preserving: x = a x0 + b eps with a^2 + b^2 = 1, and its network predicts v = a eps - b x0, so that
x0 = a x - b v and eps = b x + a v. In our terms the time is s = b / (a + b), the latent z = x / (a + b), which is
(1 - s) x0 + s eps, and the velocity eps - x0. At s = 1 (a = 0) nothing is divided by zero: eps - x0 = x + v.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from motionlora.data.clip import Clip
from motionlora.data.settings import InputError
from motionlora.heads.backbone import Latent, Prompt
from motionlora.heads.cogvideox_positions import placed, rotary_tables
from motionlora.heads.rotary import turning
from motionlora.heads.schedule import trained_times
from motionlora.heads.settings import Expert
from motionlora.heads.wan import WanBackbone
from motionlora.heads.wan_experts import Experts
from motionlora.heads.wan_folder import found_folder, is_cogvideox
from motionlora.heads.wan_parts import WanParts, loaded, weights_fingerprint

if TYPE_CHECKING:
    from motionlora.heads.positions import Positions
    from motionlora.heads.rotary import Turned


class CogVideoXParts(WanParts):
    """VAE and text encoder of a CogVideoX folder; raw latents are only scaled."""

    vae_class: ClassVar[Any] = AutoencoderKLCogVideoX
    pipeline_class: ClassVar[Any] = CogVideoXPipeline
    text_length: ClassVar[int] = 226

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return like.new_zeros(()), like.new_tensor(1 / self.vae_config["scaling_factor"])


@dataclass(frozen=True, eq=False)
class CogVideoXBackbone(WanBackbone):
    """A loaded CogVideoX 2B (sinusoidal positions) or 5B (rotary ones), frozen. Time runs from 0 (clean) to 1 (noise).

    What it does not say here it does as Wan: the same caches, the same refusals.
    """

    @classmethod
    def _opened(
        cls, source: str | Path, device: torch.device, dtype: torch.dtype, expert: Expert | None
    ) -> tuple[nn.Module, CogVideoXParts, str, Experts]:
        """As of Wan; InputError for image-to-video, CogVideoX 1.5, or a scheduler of another path, too."""
        folder = found_folder(source, expert=expert, cogvideox=True)
        if not is_cogvideox(folder):
            raise InputError(f"{source} is no CogVideoX; load it by motionlora.heads.load.load_model.")
        parts = CogVideoXParts(folder, device, dtype)
        trained_times(parts.scheduler_config)
        transformer = loaded(CogVideoXTransformer3DModel, folder / "transformer", dtype)
        fingerprint = weights_fingerprint(transformer)
        return transformer.to(device), parts, fingerprint, Experts()

    @property
    def patch(self) -> tuple[int, int, int]:
        return 1, self.config.patch_size, self.config.patch_size

    @property
    def spatial_factor(self) -> int:
        """Pixels a latent covers in height and in width: 8."""
        return 2 ** (len(self.parts.vae_config["block_out_channels"]) - 1)

    @property
    def frame_multiple(self) -> int:
        return self.parts.vae_config["temporal_compression_ratio"]

    @property
    def whole_multiple(self) -> int:
        """Twice `frame_multiple`: an even number of latent frames is decoded to 4 frames each, the first included."""
        return 2 * self.frame_multiple

    @cached_property
    def times(self) -> Float[Tensor, " 1000"]:
        """The noise level of each time step that the network knows, rising to 1, fp32."""
        return trained_times(self.scheduler_config).to(self.device)

    def step_of(self, time: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """What the network is fed at noise levels: time steps 0 to 999, between two of them a fraction.

        Below the lowest level that it knows it is fed step 0.
        """
        after = torch.searchsorted(self.times, time.contiguous()).clamp(1, len(self.times) - 1)
        below, above = self.times[after - 1], self.times[after]
        return (after - 1 + (time - below) / (above - below)).clamp(0, len(self.times) - 1)

    def velocity(self, latent: Latent, time: Float[Tensor, " b"], prompt: Prompt) -> Latent:
        """What the network says at `time`: the direction from clip to noise, fp32; no guidance.

        eps - x0 = (b - a) x + (a + b) v, with a = (1 - s) / n, b = s / n, x = z / n and n^2 = (1 - s)^2 + s^2.

        Args:
            latent: noisy latents (1 - s) x0 + s eps.
            time: s in [0, 1], one for each latent or one for all.
        """
        self._refuse_fused()
        time = time.to(self.device, torch.float32).expand(latent.shape[0])
        s = rearrange(time, "b -> b 1 1 1 1")
        norm = ((1 - s) ** 2 + s**2).sqrt()
        x = latent / norm
        v = self.transformer(
            hidden_states=rearrange(x, "b c f h w -> b f c h w").to(self.dtype),
            encoder_hidden_states=prompt.to(self.device, self.dtype).expand(latent.shape[0]).embeds,
            timestep=self.step_of(time),
            image_rotary_emb=self.rotary(latent) if self.rotates else None,
            return_dict=False,
        )[0]
        return ((2 * s - 1) * x + rearrange(v, "b f c h w -> b c f h w").float()) / norm

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Latent:
        """Noise "b c f h w" on the CPU; the stock pipeline has frames before channels."""
        b, c, f, h, w = shape
        return rearrange(torch.randn(b, f, c, h, w, generator=generator), "b f c h w -> b c f h w")

    @property
    def rotates(self) -> bool:
        """Whether positions turn queries and keys (5B), or are added to the tokens (2B)."""
        return self.config.use_rotary_positional_embeddings

    def rotary(self, latent: Latent) -> tuple[Float[Tensor, "s d"], Float[Tensor, "s d"]]:
        """Cosine and sine for the tokens of a latent."""
        return rotary_tables(self.config, self.grid(latent), latent.device)

    def decode(self, latent: Latent, fps: float) -> Clip:
        """The clip of one normalised latent "1 c f h w"; pixel values are rounded, the caption is empty.

        Raises:
            InputError: more than one latent, or an even number of latent frames.
        """
        if latent.ndim == 5 and latent.shape[2] % 2 == 0:
            raise InputError(
                f"CogVideoX decodes an odd number of latent frames, got {latent.shape[2]}: make clips of "
                f"{self.whole_multiple}k + 1 frames."
            )
        return super().decode(latent, fps)

    def positioned(self, positions: Positions) -> AbstractContextManager[None]:
        """Latent frames stand at these times inside the context (`motionlora.heads.cogvideox_positions.placed`)."""
        return placed(self.transformer, positions)

    def turning(self) -> AbstractContextManager[Turned]:
        """Gives queries and keys rotary tables of their own (`motionlora.heads.rotary.turning`).

        Raises:
            InputError: the 2B model has none.
        """
        if not self.rotates:
            raise InputError(
                f"{self.name} adds its positions to the tokens, so there are no rotary positions to optimise: choose "
                "guidance.optimise latent, or CogVideoX 5B."
            )
        return turning(self.transformer, self._tables)

    def _tables(self, latent: Latent) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(latent)
        return cos[None, :, None], sin[None, :, None]

    def use_attention(self, backend: str) -> None:
        """Only "native": diffusers' CogVideoX calls PyTorch's attention itself.

        Raises:
            InputError: another one.
        """
        if backend != "native":
            raise InputError(f"Attention backend {backend!r} was asked for; CogVideoX has native alone: choose it.")
