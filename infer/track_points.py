"""Points followed through a clip: what a tracker answers, and one that needs no weights.

`OpticalFlowTracker` is OpenCV's pyramidal Lucas-Kanade with a check forwards and backwards, chosen over one of our own
on scipy because it is compiled, well known and not ours to maintain. How exact it is on clips whose motion is known is
measured by `check_tracker.py`. Positions are (y, x) in pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from motionlora.data.clip import Clip

Points = Float[np.ndarray, "point 2"]
Paths = Float[np.ndarray, "point frame 2"]


@dataclass(frozen=True, eq=False)
class Tracks:
    """Points followed through a clip.

    Attributes:
        positions: (y, x) in pixels, finite everywhere; where a point is not visible, the tracker's guess.
        visible: whether the point was found in the frame. All points start in frame 0.
    """

    positions: Paths
    visible: Bool[np.ndarray, "point frame"]

    @property
    def seen(self) -> Paths:
        """Positions with NaN where the point is not visible: what the measures that skip NaN take."""
        return np.where(self.visible[..., None], self.positions, np.nan)

    def within(self, mask: Bool[np.ndarray, "height width"]) -> "Tracks":
        """The points that start inside a mask of the first frame."""
        y, x = np.rint(self.positions[:, 0]).astype(int).T
        inside = mask[y.clip(0, mask.shape[0] - 1), x.clip(0, mask.shape[1] - 1)]
        return Tracks(self.positions[inside], self.visible[inside])


class Tracker(Protocol):
    """Follows a regular grid of points of the first frame through a clip."""

    def track(self, clip: Clip) -> Tracks: ...


@dataclass(frozen=True)
class OpticalFlowTracker:
    """Pyramidal Lucas-Kanade from frame to frame (Bouguet, "Pyramidal implementation of the Lucas Kanade feature
    tracker", 2000), in colour, without weights.

    A point that is lost stays lost and keeps its last place. Flat areas cannot be followed: their points are lost in
    the first step. Beside an object on a flat background, points within half a window go along with it: choose points
    by a mask (`Tracks.within`) where that matters.

    Attributes:
        side: the grid has side x side points (55 in SMM's and DiTFlow's scripts).
        window: pixels of the square that is compared; 11 was the best of 7 to 21 on 64 x 64, large frames bear more.
        levels: how often the frame is halved: motion up to about window / 2 * 2**levels pixels a frame is found.
        tolerance: pixels by which a point may miss itself when it is followed forwards and back again.
        texture: least eigenvalue of the window's gradients, in OpenCV's unit, below which a point is lost.
        change: levels of 255 by which the colour at a point may differ from that of frame 0, mean over the channels.
    """

    side: int = 55
    window: int = 11
    levels: int = 3
    tolerance: float = 0.5
    texture: float = 1e-4
    change: float = 30.0

    def track(self, clip: Clip) -> Tracks:
        return self.follow(clip.pixels, grid_points(clip.height, clip.width, self.side))

    def follow(self, pixels: UInt8[np.ndarray, "frame height width 3"], points: Points) -> Tracks:
        """Points of the first frame through all frames."""
        first, alive = colours_at(pixels[0], points), np.ones(len(points), bool)
        positions, visible = [points], [alive]
        for before, after in pairwise(pixels):
            points, alive = points.copy(), alive.copy()
            left = np.flatnonzero(alive)
            moved, found = self._step(before, after, points[left])
            inside = ((moved >= -0.5) & (moved <= np.array(before.shape[:2]) - 0.5)).all(1)
            same = np.abs(colours_at(after, moved) - first[left]).mean(1) < self.change
            alive[left] = found & inside & same
            points[alive] = moved[alive[left]]
            positions.append(points)
            visible.append(alive)
        return Tracks(np.stack(positions, 1), np.stack(visible, 1))

    def _step(self, before: np.ndarray, after: np.ndarray, points: Points) -> tuple[Points, Bool[np.ndarray, " point"]]:
        """Where points go in the next frame, and whether they come back from there to where they were."""
        if not len(points):
            return points, np.zeros(0, bool)
        moved, there = self._flow(before, after, points)
        again, back = self._flow(after, before, moved)
        return moved, there & back & (np.linalg.norm(again - points, axis=1) < self.tolerance)

    def _flow(self, before: np.ndarray, after: np.ndarray, points: Points) -> tuple[Points, Bool[np.ndarray, " point"]]:
        where = np.ascontiguousarray(points[:, None, ::-1], np.float32)
        moved, status, _ = cv2.calcOpticalFlowPyrLK(
            np.ascontiguousarray(before),
            np.ascontiguousarray(after),
            where,
            where.copy(),
            winSize=(self.window, self.window),
            maxLevel=self.levels,
            criteria=(cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 20, 0.01),
            flags=cv2.OPTFLOW_USE_INITIAL_FLOW,
            minEigThreshold=self.texture,
        )
        return moved[:, 0, ::-1].astype(np.float64), status[:, 0].astype(bool)


def colours_at(frame: UInt8[np.ndarray, "height width 3"], points: Points) -> Float[np.ndarray, "point 3"]:
    """The frame's colour around points: bilinear between means of 3 x 3 pixels, held beyond the border."""
    if not len(points):
        return np.zeros((0, 3))
    y, x = np.ascontiguousarray(points.T, np.float32)
    smooth = cv2.blur(np.ascontiguousarray(frame), (3, 3)).astype(np.float32)
    return cv2.remap(smooth, x[:, None], y[:, None], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[:, 0]


def dense_flow(
    pixels: UInt8[np.ndarray, "frame height width 3"], size: tuple[int, ...]
) -> Iterator[Float[np.ndarray, "height width 2"]]:
    """Displacement (y, x) of every pixel to the next frame, after the frames are made to be of `size` (height, width).

    Farneback's polynomial expansion (Scandinavian Conference on Image Analysis 2003). To look at, not to measure by: on
    flat areas it is smooth guesswork.
    """
    small = [cv2.cvtColor(cv2.resize(f, size[::-1], interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY) for f in pixels]
    for before, after in pairwise(small):
        blank = np.zeros((*before.shape, 2), np.float32)
        flow = cv2.calcOpticalFlowFarneback(before, after, blank, 0.5, 3, 13, 3, 5, 1.1, 0)
        yield np.asarray(flow, np.float64)[..., ::-1]


def grid_points(height: int, width: int, side: int) -> Points:
    """A regular grid of side x side points, rows first, width / 64 pixels away from the border (as CoTracker's)."""
    margin = width / 64
    rows, columns = (np.linspace(margin, size - 1 - margin, side) for size in (height, width))
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
