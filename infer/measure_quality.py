"""How good clips look: VBench's dimensions by their formulas, a stand-in for its smoothness, diversity over seeds.

Letters: f frame, d feature, n seed. Features have length 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from motionlora.infer.measure_text import Pixels


def consistency(frames: Float[Tensor, "f d"]) -> float:
    """Mean over frames from the second on of half the cosine with the first and half that with the one before, each cut
    off below 0: 0..1.

    VBench 0.1.5, subject consistency (DINO B/16) and background consistency (CLIP B/32). VBench's figure of a set of
    clips counts every frame alike; ours counts every clip alike, which is the same for clips of one length. NaN for one
    frame.
    """
    before = (frames[1:] * frames[:-1]).sum(-1).clamp(min=0)
    first = (frames[1:] @ frames[0]).clamp(min=0)
    return float((before + first).mean() / 2)


def aesthetic(frames: Float[Tensor, "f d"], weight: Float[Tensor, " d"], bias: float) -> float:
    """A tenth of the mean of LAION's linear head on CLIP L/14 features (VBench 0.1.5)."""
    return float((frames @ weight + bias).mean() / 10)


def smoothness_linear(pixels: Pixels) -> float:
    """1 less the mean absolute error, as a share of 255, of the mean of two neighbours for each odd frame between them.

    VBench's smoothness with AMT-S replaced by linear interpolation: 1 for a clip that stands still or fades evenly,
    below VBench's for one in which things move. NaN below three frames.
    """
    between = pixels[1:-1:2].astype(np.float32)
    if not len(between):
        return float("nan")
    before, after = pixels[:-2:2].astype(np.float32), pixels[2::2].astype(np.float32)
    return float(1 - np.abs(between - (before + after) / 2).mean() / 255)


def diversity(clips: Sequence[Pixels]) -> float:
    """Mean over clips of their squared distance to the mean clip, a pixel and colour, colours in 0..1 (as CMC's).

    NaN for fewer than two.
    """
    if len(clips) < 2:
        return float("nan")
    values = np.stack(clips).astype(np.float32) / 255
    return float(((values - values.mean(0)) ** 2).mean())
