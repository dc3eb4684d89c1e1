"""SMM: the mean features of the frames shall differ from each other as the reference's do.

Letters: b batch, c channel of the model, f and g latent frames, h, w places of the token grid.

Source: space-time diffusion features, arXiv 2311.17009 (spatial marginal mean, and the loss of its pairwise
differences), in DiTFlow's form for Transformers, arXiv 2412.07776: block output, no inversion. A mean over the whole
frame cannot say where something moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from motionlora.infer.features import FeatureGuidance, cosine

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from motionlora.infer.features import Features, Target

Means: TypeAlias = "Float[Tensor, 'b c f']"


class SMM(FeatureGuidance):
    """Moves early latents until the mean features of the frames differ from each other as the reference's do."""

    paper: ClassVar[str] = "SMM, arXiv 2311.17009, as in DiTFlow, arXiv 2412.07776"

    variant: Literal["paper", "smm_ditflow_compat"] = "paper"
    """paper: as published. smm_ditflow_compat: as in DiTFlow's public code, which sees the clip's looks, too."""

    def target(self, features: Features) -> Target:
        """The spatial means."""
        return {"means": spatial_means(features)}

    def loss(self, features: Features, target: Target) -> Float[Tensor, " b"]:
        """1 / f at best (paper), 0 at best (compat)."""
        return LOSSES[self.variant](spatial_means(features), target["means"])


def spatial_means(features: Features) -> Means:
    """The mean over the places of each frame."""
    return features.mean((-2, -1))


def paper_loss(ours: Means, theirs: Means) -> Float[Tensor, " b"]:
    """The mean over all pairs of frames (f, g) of 1 - cos over channels of y_g - y_f and x_g - x_f.

    f = g has the cosine 0, as in the paper, so that the best value is 1 / f.
    """
    differences = (means.unsqueeze(-2) - means.unsqueeze(-1) for means in (ours, theirs))
    return 1 - cosine(*differences, dim=1).mean((-2, -1))


def compat_loss(ours: Means, theirs: Means) -> Float[Tensor, " b"]:
    """The mean over f and channels of 1 - cos over g of y_g - x_f and x_g - x_f: the anchor is the reference's."""
    anchor = theirs.unsqueeze(-1)
    differences = (means.unsqueeze(-2) - anchor for means in (ours, theirs))
    return 1 - cosine(*differences, dim=-1).mean((-2, -1))


LOSSES = {"paper": paper_loss, "smm_ditflow_compat": compat_loss}
