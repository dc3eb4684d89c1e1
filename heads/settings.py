"""Settings of this room: which heads count as temporal, and the shape of the LoRA put on them. Imports no torch."""

from typing import Literal, TypeAlias

from pydantic import Field, field_validator

from motionlora.data.settings import Settings

Projection = Literal["q", "k", "v", "o"]
Rule = Literal["code", "paper"]
Expert: TypeAlias = Literal["high", "low"]
"""Of a model of two networks: the one for high noise levels, which set the motion, or the one for the rest."""


class HeadSettings(Settings):
    """How the attention heads are told apart (Follow-Your-Motion, stage 1; methods.md section 2.2)."""

    rule: Rule = "code"
    """`code`: temporal if w_t >= ratio * w_s (the release). `paper`: temporal if w_t > w_s / ratio."""
    ratio: float = Field(default=1.3, gt=0)
    """The factor of the rule; the paper calls it alpha, here alpha belongs to LoRA."""
    times: tuple[float, ...] = (0.9998,)
    """Noise levels in (0, 1] at which the reference is scored; several are averaged. The release uses 0.9998 alone."""
    heads: Literal["split", "all"] = "split"
    """`split`: spatial heads in the spatial stage, temporal ones after. `all`: every head, temporal stage only."""

    @field_validator("times")
    @classmethod
    def _times_are_noise_levels(cls, times: tuple[float, ...]) -> tuple[float, ...]:
        if not times or not all(0 < time <= 1 for time in times):
            raise ValueError("needs at least one noise level, each above 0 and at most 1")
        return times


class LoraSettings(Settings):
    """The low-rank layers of both stages; alpha equals rank, so that every loader reads the right scale."""

    rank: int = Field(default=32, ge=1, le=1024)
    """Rank of every layer (the paper has 128, its release 16; methods.md section 2.9)."""
    projections: tuple[Projection, ...] = ("q", "k", "v", "o")
    """Self-attention projections that get a layer. The paper has q k v o, the release q k v."""
    strength: float = Field(default=0.5, ge=-4, le=4)
    """Strength recommended at inference, written into the file's header (the paper: 0.5, temporal LoRA alone)."""

    @field_validator("projections")
    @classmethod
    def _projections_are_distinct(cls, projections: tuple[Projection, ...]) -> tuple[Projection, ...]:
        if not projections or len(set(projections)) != len(projections):
            raise ValueError("needs at least one of q, k, v, o, each at most once")
        return projections
