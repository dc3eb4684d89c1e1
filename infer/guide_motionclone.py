"""MotionClone: where the reference attends most in time, the clip shall attend as much.

Letters: b batch, p place of the token grid, h head, d channel of a head, f frame that asks, g frame that is asked,
k chosen entry of a row.

Source: MotionClone, arXiv 2406.05338 (its sparse temporal attention: the largest entry of each row), in the form
in which DiTFlow, arXiv 2412.07776, compares with it: a Transformer has no temporal attention, so the full attention of
one block is read along the time axis at each place. That is the joint attention restricted to the tokens of a place and
brought back to sum 1; it costs places x heads x frames^2 numbers, never tokens^2. The harness (Adam on early latents, a
reference at time 0) is DiTFlow's, too; published was a gradient in the direction term of DDIM.

Memory: q and k of one block in fp32 and their maps, with gradients about thrice, beside the activations of the blocks
up to it. At 480 x 832 x 81 by the 1.3B q and k are 201 MB each, and the maps 33 MB. Only fixed places are compared:
what moves over a place shows there as a change of looks alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, TypeAlias

from pydantic import Field

from motionlora.infer.features import FeatureGuidance

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from motionlora.heads.backbone import Latent, Prompt, TokenGrid
    from motionlora.infer.features import Target
    from motionlora.infer.guidance import Time, Walk

Heads: TypeAlias = "Float[Tensor, 'b s h d']"
TimeMaps: TypeAlias = "Float[Tensor, 'b p h f g']"

WEIGHT = 2000.0
"""Of the loss (public code: 2000). Adam does not see it, except that it keeps gradients far above Adam's epsilon."""


class MotionClone(FeatureGuidance):
    """Moves early latents until each place attends to its strongest frame as much as the reference's does."""

    paper: ClassVar[str] = "MotionClone, arXiv 2406.05338, as in DiTFlow, arXiv 2412.07776"

    top: int = Field(default=1, ge=1)
    """How many entries of each row count, the reference's largest (paper: 1); all where there are fewer frames."""
    exclude_diagonal: bool = False
    """Leave out how much a frame attends to itself (ours): after rotary positions that is often the largest entry, in
    39 to 56 of 100 rows of three sprite references by the embedded tiny Wan."""

    def features(self, walk: Walk, latent: Latent, time: Time, prompt: Prompt) -> TimeMaps:
        """The maps of `block`, by a forward that ends before its attention."""
        block = self.depth(walk.model.blocks)
        with walk.model.capturing([block], "qk", stop=True) as seen:
            seen.run(lambda: walk.model.velocity(latent, time.expand(latent.shape[0]), prompt))
        q, k = seen[block]
        return time_maps(q, k, walk.model.grid(latent))

    def target(self, features: TimeMaps) -> Target:
        """Which entries count, and how large they are."""
        import torch

        frames = features.shape[-1]
        own = torch.eye(frames, dtype=torch.bool, device=features.device) & self.exclude_diagonal
        chosen = features.masked_fill(own, -1.0).topk(min(self.top, frames - self.exclude_diagonal))
        return {"entries": chosen.indices, "attention": chosen.values}

    def loss(self, features: TimeMaps, target: Target) -> Float[Tensor, " b"]:
        """`WEIGHT` times the mean squared error of the chosen entries; 0 where no entry is left to choose."""
        entries = target["entries"].expand(len(features), -1, -1, -1, -1)
        missed = (features.gather(-1, entries) - target["attention"]).square()
        return WEIGHT * missed.sum((1, 2, 3, 4)) / max(1, missed[0].numel())


def time_maps(q: Heads, k: Heads, grid: TokenGrid) -> TimeMaps:
    """softmax_g(q_f . k_g / sqrt(d)) of the tokens at the same place, per head; rows over g sum to 1."""
    from einops import einsum, rearrange

    q, k = (rearrange(x.float(), "b (f p) h d -> b p h f d", f=grid.frames) for x in (q, k))
    return (einsum(q, k, "b p h f d, b p h g d -> b p h f g") / q.shape[-1] ** 0.5).softmax(-1)
