"""What a model must answer.

Letters: b batch, c latent channel, f latent frame, h height, w width, l text token, d width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from motionlora.heads.token_grid import TokenGrid as TokenGrid

if TYPE_CHECKING:
    from motionlora.data.clip import Clip
    from motionlora.heads.capture import Captured, What
    from motionlora.heads.inject import Injected
    from motionlora.heads.positions import Positions
    from motionlora.heads.rotary import Turned
    from motionlora.heads.wan_experts import Experts

Latent: TypeAlias = Float[Tensor, "b c f h w"]
"""Normalised latents, near unit scale for a clean clip: `(raw - mean) / std` with the VAE config's mean and std, or
`raw * scaling_factor`. Between clip and noise they lie on the straight path `(1 - time) clean + time noise`, whatever
path the model itself was trained on."""


class Backbone(Protocol):
    """A loaded model. Time runs from 0 (clean) to 1 (noise); velocity points to noise."""

    @property
    def name(self) -> str:
        """What the user called it: a folder, a hub id or "tiny"."""
        ...

    @property
    def fingerprint(self) -> str:
        """Which weights these are: a hash of the configuration and of a sample of the weights."""
        ...

    @property
    def transformer(self) -> nn.Module:
        """The network, or a wrapper that holds it as `.module`."""
        ...

    @property
    def blocks(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...

    @property
    def channels(self) -> int:
        """Latent channels."""
        ...

    @property
    def spatial_factor(self) -> int:
        """Pixels that a latent covers in height and in width."""
        ...

    @property
    def multiple(self) -> int:
        """Height and width in pixels must be multiples of this."""
        ...

    @property
    def frame_multiple(self) -> int:
        """A clip has k * frame_multiple + 1 pixel frames, and k + 1 latent frames."""
        ...

    @property
    def whole_multiple(self) -> int:
        """A clip that is to be decoded has k * whole_multiple + 1 pixel frames; a multiple of `frame_multiple`."""
        ...

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """Settings of the scheduler in the model's folder: where the times of a walk come from, those of training where
        single levels are known alone, and the weight that errors had (`motionlora.heads.schedule`)."""
        ...

    @property
    def experts(self) -> Experts:
        """Which weights answer for which noise levels; a model of one network has none: `Experts()`."""
        ...

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def encode(self, clip: Clip) -> Latent: ...
    def decode(self, latent: Latent, fps: float) -> Clip: ...
    def embed(self, captions: Sequence[str]) -> Prompt: ...
    def velocity(self, latent: Latent, time: Float[Tensor, " b"], prompt: Prompt) -> Latent: ...
    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Latent:
        """Noise "b c f h w", as the stock pipeline draws it with that generator."""
        ...

    def grid(self, latent: Latent) -> TokenGrid: ...
    def capturing(
        self, blocks: Sequence[int], what: What, *, stop: bool = False
    ) -> AbstractContextManager[Captured[Any]]: ...
    def injecting(self, blocks: Sequence[int]) -> AbstractContextManager[Injected]: ...
    def positioned(self, positions: Positions) -> AbstractContextManager[None]: ...
    def turning(self) -> AbstractContextManager[Turned]: ...


@dataclass(frozen=True, eq=False)
class Prompt:
    """Embedded captions of the length that the model attends to: 512 for Wan, zeros after the end; CogVideoX 226."""

    embeds: Float[Tensor, "b l d"]

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def __getitem__(self, index: int | slice) -> Prompt:
        """One caption or several, always with the batch axis."""
        return Prompt(self.embeds[index : index + 1 or None] if isinstance(index, int) else self.embeds[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Prompt:
        """The same prompt elsewhere or in another dtype; None keeps what it is."""
        return Prompt(self.embeds.to(device=device, dtype=dtype))

    def picked(self, rows: Tensor) -> Prompt:
        """The captions of these rows, "b" integers, in their order; a row may come several times."""
        return Prompt(self.embeds[rows.to(self.embeds.device)])

    def expand(self, batch: int) -> Prompt:
        """One caption for a whole batch, without a copy; `batch` captions are returned as they are."""
        return self if len(self) == batch else Prompt(self.embeds.expand(batch, -1, -1))
