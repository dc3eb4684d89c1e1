"""How well clips show their caption, and what encoders are asked: formulas alone, on features of length 1.

Letters: f frame, d feature. Encoders with weights are in `measure_encoders.py`; tests bring stubs.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

Pixels: TypeAlias = UInt8[np.ndarray, "f height width 3"]
Fit: TypeAlias = Literal["crop", "whole", "plain"]
"""How a frame becomes a square: its middle, smoothed (`crop`); all of it with borders (`whole`); its middle with no
smoothing, as VBench has it (`plain`)."""


class ImageTextEncoder(Protocol):
    """CLIP, or anything that puts pictures and texts into one space."""

    def images(self, pixels: Pixels, fit: Fit) -> Float[Tensor, "f d"]: ...

    def text(self, caption: str) -> Float[Tensor, " d"]:
        """InputError for a caption that is too long to be taken whole."""
        ...


class ImageEncoder(Protocol):
    """Anything that puts pictures into a space."""

    def images(self, pixels: Pixels) -> Float[Tensor, "f d"]: ...


def text_similarity(frames: Float[Tensor, "f d"], text: Float[Tensor, " d"]) -> float:
    """Mean cosine of the frames with the caption, -1..1 (DiTFlow's script; logits of others are 100 times this)."""
    return float((frames @ text).mean())


def adjacent_similarity(frames: Float[Tensor, "f d"]) -> float:
    """Mean cosine of each frame with the next, -1..1; a clip that stands still has 1. NaN for a single frame."""
    return float((frames[1:] * frames[:-1]).sum(-1).mean())


def all_pairs_similarity(frames: Float[Tensor, "f d"]) -> float:
    """Mean cosine over all ordered pairs of different frames, -1..1 (LOVEU-TGVE). NaN for a single frame."""
    count = len(frames)
    if count < 2:
        return float("nan")
    return float(((frames @ frames.T).sum() - frames.square().sum()) / (count * (count - 1)))


def paired_similarity(frames: Float[Tensor, "f d"], others: Float[Tensor, "f d"]) -> float:
    """Mean cosine of frames with those of another clip at the same places, as long as both last."""
    shared = min(len(frames), len(others))
    return float((frames[:shared] * others[:shared]).sum(-1).mean())
