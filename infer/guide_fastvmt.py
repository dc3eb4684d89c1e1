"""FastVMT: early latents are moved until the attention finds tokens where the reference's does, within windows.

Letters: b clip, f latent frame, n token of a frame, t tile, e channel in which queries and keys are compared, p pair of
frames, q pair of neighbouring later frames.

Source: FastVMT, arXiv 2602.05551, its equations. Its public code departs from them and is not followed: it averages
over tokens instead of heads, clamps windows place by place, leaves the windows' origin out, multiplies half of the
coordinates by zero, averages keys over channels instead of places and sums where the paper averages. The noised
reference that it starts from is `sdedit.start` at 0.955. Three devices save time: windows instead of whole frames,
gradients used several times, forwards that end before the attention of the block.

Memory: the activations of blocks 0 to `block` of one clip, as for every guidance with a gradient through the network,
and beside them what `attention_windows` holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from motionlora.data.errors import InputError
from motionlora.infer.adam import descended_by, reach_by
from motionlora.infer.features import FeatureGuidance
from motionlora.infer.guidance import guided_steps
from motionlora.infer.guide_sdedit import SDEdit

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from motionlora.heads.backbone import Latent, Prompt
    from motionlora.heads.token_grid import TokenGrid
    from motionlora.infer.attention_flow import Displacements
    from motionlora.infer.attention_windows import Sliding
    from motionlora.infer.features import Target
    from motionlora.infer.guidance import Steer, Time, Walk


class FastVMT(FeatureGuidance):
    """Moves early latents until tokens are found where the reference's are, within windows; gradients are reused."""

    paper: ClassVar[str] = "FastVMT, arXiv 2602.05551"

    lr: float = Field(default=0.003, ge=0, le=1)
    """Of AdamW in the first iteration of a guided step, in units of the latent (paper: 0.003); 0 moves nothing."""
    lr_falls_to: float = Field(default=2 / 3, ge=0, le=1)
    """Share of lr that it falls to, in equal parts, behind the last iteration of a step (paper: 0.002 of 0.003)."""
    iterations: int = Field(default=10, ge=0)
    """Of AdamW in a guided step, a fresh one each (paper: 10); 0 moves nothing."""
    interval: int = Field(default=3, ge=1)
    """A gradient serves so many iterations in a row (paper: 3); 1 takes each anew."""
    decay: float = Field(default=0.01, ge=0, le=1)
    """AdamW's weight decay (code: 0.01, a pull of 0.3 % towards zero in all); with 0 the dose has a bound."""
    block: int | None = Field(default=None, ge=0)
    """Whose queries and keys are compared, from zero; none takes the last of the first half (paper: 14 of 30)."""
    reference_noise: Literal["clean", "matched"] = "matched"
    """matched: noised like the walk, in each guided step (algorithm 1). clean: at time 0, once a call (section 3.2)."""
    tau: float = Field(default=1.0, gt=0)
    """What logits are multiplied by before the softmax (paper: 1)."""
    span: int = Field(default=5, ge=2)
    """Frames that are compared, the one that asks among them (paper: 5; code: 4)."""
    tile: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """Rows and columns of tokens that share a window; none takes a tenth and a thirteenth of the grid's, 2 at least
    (paper: 3 and 4 of 30 x 52)."""
    window: int | None = Field(default=None, ge=1)
    """Side of a window in tokens; none takes 0.7 of the grid's shorter side, made odd, 3 at least (paper: 21 of 30)."""
    seek: Literal["mean", "most"] = "mean"
    """Where a window lies: mean: around the mean of the places attended to (eq. 2). most: around the first (eq. 4)."""
    flow_weight: float = Field(default=5.0, ge=0)
    """Of the error of displacements (paper: 5)."""
    window_weight: float = Field(default=1.0, ge=0)
    """Of the change of windows over time (paper: 1)."""
    window_norm: Literal["squared", "plain"] = "squared"
    """squared: the change's square counts (main text). plain: its length does (appendix)."""
    sdedit: SDEdit = SDEdit(start=1.0)
    """The start: pure noise (paper), or below 1 the noised reference (code: 0.955), which gives layout by itself."""

    def depth(self, blocks: int) -> int:
        """The block, of a model of so many; never the first by itself, where tokens do not know of each other yet."""
        return max(1, blocks // 2 - 1) if self.block is None else self.block

    @property
    def asked(self) -> int:
        """Gradients in a guided step: 4 by default."""
        return -(-self.iterations // self.interval)

    def rates(self, steps: int) -> list[float]:
        """AdamW's rate in each iteration of a guided step, all of which are alike: from `lr` down."""
        del steps
        return [self.lr * (1 + (self.lr_falls_to - 1) * done / self.iterations) for done in range(self.iterations)]

    def dose_bound(self, steps: int) -> float | None:
        """Adam's, 0.26 without `decay` in 50 steps; none with it, nor from a noised reference."""
        if self.decay or self.sdedit.start < 1:
            return None
        return guided_steps(self.share, steps) * reach_by(self.rates(steps))

    @contextmanager
    def steering(self, walk: Walk) -> Iterator[Steer]:
        """Early latents are moved by AdamW.

        Raises:
            InputError: a block that the model does not have or that is injected into; a clip of one latent frame.
        """
        from motionlora.infer.attention_flow import refuse_injected

        refuse_injected(self.inject.blocks, [self.depth(walk.model.blocks)])
        with self.sdedit.steering(walk) as starting, super().steering(walk) as steer:
            yield lambda latent, now: steer(starting(latent, now), now)

    def descent(self, walk: Walk, latent: Latent, now: Time, gradient: Callable[[Latent], Latent]) -> Latent:
        """The latent of a guided step after all of its iterations."""
        del now
        return descended_by(latent, reused(gradient, self.interval), self.rates(len(walk.times) - 1), self.decay)

    def features(self, walk: Walk, latent: Latent, time: Time, prompt: Prompt) -> Sliding:
        """Displacements and drift of `block`, whose queries and keys are averaged over heads."""
        from motionlora.infer.attention_flow import logits_of_means, queries_keys
        from motionlora.infer.attention_windows import by_mean, by_most, cut, sliding

        grid, block = walk.model.grid(latent), self.depth(walk.model.blocks)
        if grid.frames < 2:
            raise InputError("FastVMT compares frames and the clip has one latent frame: take one of 5 frames or more.")
        seen = queries_keys(walk.model, latent, time, prompt, [block], logits_of_means)[block]
        rows, columns = self.tile or default_tile(grid)
        tiles = cut(grid, rows, columns, latent.device)
        seek = {"mean": by_mean, "most": by_most}[self.seek]
        return sliding(seen, self.span, self.tau, tiles, self.window or default_window(grid), seek)

    def target(self, features: Sliding) -> Target:
        """The reference's displacements."""
        return {"displacements": features.displacements}

    def loss(self, features: Sliding, target: Target) -> Float[Tensor, " b"]:
        """5 L_AMF + L_window by default."""
        flow = flow_error(features.displacements, target["displacements"], features.apart, self.span)
        return self.flow_weight * flow + self.window_weight * window_change(features.drift, self.window_norm)


def default_tile(grid: TokenGrid) -> tuple[int, int]:
    """Rows and columns: 3 x 4 on a grid of 30 x 52 (paper), 2 x 2 on one of 8 x 8."""
    return max(2, grid.height // 10), max(2, grid.width // 13)


def default_window(grid: TokenGrid) -> int:
    """The side: 21 on a grid of 30 x 52 (paper), 5 on one of 8 x 8."""
    side = 7 * min(grid.height, grid.width) // 10
    return max(3, side - (side + 1) % 2)


def flow_error(ours: Displacements, theirs: Displacements, apart: Int[Tensor, " p"], span: int) -> Float[Tensor, " b"]:
    """L_AMF: the mean over pairs of w ||theirs - ours||^2, averaged over tokens; w falls with the distance of frames.

    w = 1 - 0.2 (apart - 1) / (span - 1): neighbours count most.
    """
    weight = 1 - 0.2 * (apart - 1) / (span - 1)
    return ((ours - theirs).square().sum(-1).mean(-1) * weight).mean(-1)


def window_change(drift: Float[Tensor, "b q t e"], norm: Literal["squared", "plain"]) -> Float[Tensor, " b"]:
    """L_window: the mean over frames, tiles and neighbouring later frames of the change of a window's mean key.

    0 where no frame has two that follow it within the span.
    """
    import torch

    length = torch.linalg.vector_norm(drift, dim=-1) if norm == "plain" else drift.square().sum(-1)
    return length.sum((1, 2)) / max(1, length[0].numel())


def reused(gradient: Callable[[Latent], Latent], interval: int) -> Callable[[Latent], Latent]:
    """`gradient` at every `interval`-th call, and what it last gave at those between."""
    calls, held = 0, None

    def latest(latent: Latent) -> Latent:
        nonlocal calls, held
        held = gradient(latent) if calls % interval == 0 or held is None else held
        calls += 1
        return held

    return latest
