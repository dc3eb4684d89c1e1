"""How well sprites keep to boxes that were asked for: mean intersection over union, with the share of frames found.

Boxes are (top, left, bottom, right) in pixels, bottom and right one behind the last. Source: the protocol of Peekaboo
and FreeTraj, which S2V2V names, with sprites found by colour instead of a detector with weights: frames without a
sprite count 0, and a clip in which fewer than half of the frames show one has no score. Specks are taken away, and the
tips of a star with them: its box is found up to two pixels too small on a side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

from motionlora.infer.points import Boxes
from motionlora.infer.recognise_sprites import CROSS, MIN_AREA, MIN_CHROMA, lab_of

BoxRows: TypeAlias = Float[np.ndarray, "box 4"]
LEAST_COVERAGE = 0.5
"""Share of frames with a sprite below which a clip has no score (Peekaboo)."""


@dataclass(frozen=True)
class BoxScores:
    """Means over the frames and objects for which a box was asked.

    Attributes:
        miou: intersection over union, 0 where nothing is found; NaN below `LEAST_COVERAGE`, as the next two.
        ap50: share with an intersection over union of at least a half.
        distance: of the centres where a sprite is found, as a share of the frame's diagonal.
        coverage: share of frames in which a sprite is found, 0..1.
    """

    miou: float
    ap50: float
    distance: float
    coverage: float


def box_scores(pixels: UInt8[np.ndarray, "frame height width 3"], asked: Boxes) -> BoxScores:
    """Of a clip of sprites; as many of its largest sprites as there are objects count, the nearest for each box."""
    found, rows = sprite_boxes(pixels, len(asked.sizes)), asked_boxes(asked)
    overlaps, distances, seen = [], [], []
    for frame, boxes in enumerate(found):
        for box in rows[asked.tracks.visible[:, frame], frame]:
            seen.append(len(boxes) > 0)
            overlaps.append(overlap(boxes, box).max(initial=0.0))
            distances.extend(
                np.linalg.norm(centres(boxes) - centres(box), axis=1).min(keepdims=True) if seen[-1] else []
            )
    coverage = float(np.mean(seen))
    if coverage < LEAST_COVERAGE:
        return BoxScores(math.nan, math.nan, math.nan, coverage)
    diagonal = math.hypot(*pixels.shape[1:3])
    halves = [value >= 0.5 for value in overlaps]
    return BoxScores(float(np.mean(overlaps)), float(np.mean(halves)), float(np.mean(distances)) / diagonal, coverage)


def asked_boxes(asked: Boxes) -> Float[np.ndarray, "object frame 4"]:
    """Every box of a file, in every frame; it ends half a pixel behind the centre of its last pixel."""
    middle, half = asked.tracks.positions + 0.5, asked.sizes / 2
    return np.concatenate([middle - half, middle + half], -1)


def sprite_boxes(pixels: UInt8[np.ndarray, "frame height width 3"], most: int) -> Sequence[BoxRows]:
    """The boxes of the largest coloured spots of each frame, at most so many."""
    lab = lab_of(pixels)
    coloured = np.hypot(lab[..., 1], lab[..., 2]) > MIN_CHROMA
    return [_spots(ndimage.binary_opening(frame, CROSS[0]), most) for frame in coloured]


def overlap(boxes: BoxRows, box: Float[np.ndarray, "4"]) -> Float[np.ndarray, " box"]:
    """Intersection over union: 1 for the same box, 0 for one apart."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    areas = [(either[..., 2:] - either[..., :2]).prod(-1) for either in (boxes, box)]
    return shared / (areas[0] + areas[1] - shared)


def centres(boxes: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, "... 2"]:
    """The middles (y, x)."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def _spots(mask: np.ndarray, most: int) -> BoxRows:
    labels = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, CROSS[0], labels)
    areas = np.bincount(labels.ravel())[1:]
    order = [index for index in np.argsort(-areas, kind="stable")[:most] if areas[index] >= MIN_AREA]
    sides = ndimage.find_objects(labels)
    boxes = [[rows.start, columns.start, rows.stop, columns.stop] for rows, columns in (sides[i] for i in order)]
    return np.array(boxes, float).reshape(-1, 4)
