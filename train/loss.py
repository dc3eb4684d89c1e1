"""What both stages minimise: a point on the path, the denoising loss, the motion loss, the weight of a noise level.

b samples, c channels, f latent frames, h height, w width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from motionlora.train.noise import shifted
from motionlora.train.settings import Motion, Weighting

if TYPE_CHECKING:
    from motionlora.heads.backbone import Latent

GRID = 1000
"""Noise levels in the grid over which the release's weight has mean 1."""


@dataclass(frozen=True, eq=False)
class PathPoint:
    """A point on the straight path from clip to noise: `latent` at `time` (0 clean, 1 noise), and its velocity."""

    latent: "Latent"
    time: Float[Tensor, " b"]
    target: "Latent"


def path_point(clean: "Latent", noise: "Latent", time: Float[Tensor, " b"]) -> PathPoint:
    """`x_s = (1 - s) x0 + s eps` with velocity `eps - x0` (rectified flow, arXiv 2209.03003 eq. 1)."""
    level = rearrange(time, "b -> b 1 1 1 1")
    return PathPoint(latent=(1 - level) * clean + level * noise, time=time, target=noise - clean)


def denoising_loss(predicted: "Latent", target: "Latent") -> Float[Tensor, " b"]:
    """Mean squared error of the velocity, one number a sample."""
    return reduce((predicted.float() - target.float()).square(), "b c f h w -> b", "mean")


def motion_loss(predicted: "Latent", target: "Latent", kind: Motion) -> Float[Tensor, " b"]:
    """`mean(1 - cos)` between frame differences of two velocities, one number a sample in [0, 2].

    Follow-Your-Motion, temporal stage (methods.md section 2.6). `frame` (the paper): signed differences, one cosine a
    frame. `channel` (ours): one a place. `code` (the release): absolute differences, cosine along time for each channel
    and place, which confines it to [0, 1]. `none`, and a single latent frame, give 0.
    """
    if predicted.shape[2] < 2:
        return predicted.new_zeros(predicted.shape[0], dtype=torch.float32)
    return MOTION_LOSSES[kind](_differences(predicted), _differences(target))


def release_weight(time: Float[Tensor, " b"], shift: float = 5.0) -> Float[Tensor, " b"]:
    """Weight w(t) of a noise level in the release: 0 at pure noise, highest at s = 0.5, mean 1 over the shifted grid.

    `(g - g_min) * 1000 / sum(g - g_min)` with `g = exp(-2 ((t - 500) / 1000)^2)` (methods.md section 2.5).
    """
    grid = shifted(torch.arange(1, GRID + 1, dtype=torch.float64) / GRID, shift)
    return (_bell(time.double()) / _bell(grid).mean()).to(time.dtype)


def weight_of_time(kind: Weighting, shift: float) -> Callable[[Float[Tensor, " b"]], Float[Tensor, " b"]]:
    """The weight of a noise level as a function of time: the release's bell, or 1."""
    return {"release": lambda time: release_weight(time, shift), "none": torch.ones_like}[kind]


@dataclass
class LossByTime:
    """Denoising loss in ten bins of noise level: which part of the range is being learned (as minRF logs it)."""

    sums: list[float] = field(default_factory=lambda: [0.0] * 10)
    counts: list[int] = field(default_factory=lambda: [0] * 10)

    def add(self, time: Float[Tensor, " b"], loss: Float[Tensor, " b"]) -> None:
        """Put each sample's loss into the bin of its noise level."""
        for level, value in zip(time.tolist(), loss.tolist(), strict=True):
            bin_ = min(int(level * 10), 9)
            self.sums[bin_] += value
            self.counts[bin_] += 1

    def means(self) -> list[float | None]:
        """Mean loss of each bin, lowest noise first; None where nothing was drawn."""
        return [total / count if count else None for total, count in zip(self.sums, self.counts, strict=True)]


def _differences(velocity: "Latent") -> "Latent":
    return velocity.float().diff(dim=2)


def _bell(time: Tensor) -> Tensor:
    return torch.exp(-2 * (time - 0.5) ** 2) - math.exp(-0.5)


def _by_frame(predicted: "Latent", target: "Latent") -> Float[Tensor, " b"]:
    rows = "b c f h w -> b f (c h w)"
    return (1 - cosine_similarity(rearrange(predicted, rows), rearrange(target, rows), dim=-1, eps=1e-8)).mean(-1)


def _by_place(predicted: "Latent", target: "Latent") -> Float[Tensor, " b"]:
    return reduce(1 - cosine_similarity(predicted, target, dim=1, eps=1e-8), "b f h w -> b", "mean")


def _along_time(predicted: "Latent", target: "Latent") -> Float[Tensor, " b"]:
    cosine = cosine_similarity(predicted.abs(), target.abs(), dim=2, eps=1e-8)
    return reduce(1 - cosine, "b c h w -> b", "mean")


def _nothing(predicted: "Latent", target: "Latent") -> Float[Tensor, " b"]:
    del target
    return predicted.new_zeros(predicted.shape[0])


MOTION_LOSSES: dict[Motion, Callable[["Latent", "Latent"], Float[Tensor, " b"]]] = {
    "frame": _by_frame,
    "channel": _by_place,
    "code": _along_time,
    "none": _nothing,
}
