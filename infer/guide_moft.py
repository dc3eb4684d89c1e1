"""MOFT: the motion channels of the features, without what stays in time, shall point where the reference's do.

Letters: b batch, c channel of the model, m motion channel, f latent frame, h, w places of the token grid.

Source: MOFT, arXiv 2405.14864 (content correlation removal and motion channel filter), in DiTFlow's form for
Transformers, arXiv 2412.07776: block output, whole frames, and the principal component of the reference itself rather
than of calibrated pans.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from motionlora.infer.features import FeatureGuidance, cosine

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from motionlora.infer.features import Features, Target


class MOFT(FeatureGuidance):
    """Moves early latents until the motion channels of a block's features point where the reference's do."""

    paper: ClassVar[str] = "MOFT, arXiv 2405.14864, as in DiTFlow, arXiv 2412.07776"

    channels: float = Field(default=0.04, gt=0, le=1)
    """Share of the channels that count as motion channels (paper's ablation: 0.04)."""

    def target(self, features: Features) -> Target:
        """Which channels, and the reference's features in them without their mean over time."""
        chosen = motion_channels(features, self.channels)
        return {"channels": chosen, "motion": without_content(features)[:, chosen]}

    def loss(self, features: Features, target: Target) -> Float[Tensor, " b"]:
        """The mean over frames and places of 1 - cos over motion channels: 0 to 2, blind to amplitude."""
        ours = without_content(features)[:, target["channels"]]
        return 1 - cosine(ours, target["motion"], dim=1).mean((-3, -2, -1))


def without_content(features: Features) -> Features:
    """Content correlation removal: the mean over frames is taken away."""
    return features - features.mean(2, keepdim=True)


def motion_channels(features: Features, share: float) -> Int[Tensor, " m"]:
    """The channels of the largest weights, by size, in the first principal component of the content-free features.

    floor(share * c) of them, at least two (ours: one alone has a sign and no direction). Found from the covariance of
    the channels in fp64, whose first eigenvector is the first right singular vector of the features.
    """
    import torch
    from einops import rearrange

    rows = rearrange(without_content(features), "b c f h w -> (b f h w) c").double()
    weights = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1].abs()
    return weights.topk(max(2, int(share * len(weights)))).indices.sort().values
