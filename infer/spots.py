"""Where points and boxes of a clip lie on the token grid, and which tokens around them count.

Letters: p point, f latent frame, k cell (a token of a frame). A cell is `multiple` pixels wide; the centre of the first
is at pixel (multiple - 1) / 2. Source: S2V2V; the disc and its size are our reading of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, Int

from motionlora.infer.points import by_latent_frame, read_boxes, salient_tracks, tracks_of
from motionlora.infer.track_points import OpticalFlowTracker, Tracks

if TYPE_CHECKING:
    from motionlora.heads.backbone import Backbone, Latent, TokenGrid

RADIUS_OF_ROWS = 3 / 30
"""Of the disc around a track, by the shorter side of the grid: 3 tokens at 30 x 52, which are 29 cells."""
LEAST_RADIUS, LEAST_SIDE = 1.5, 2.0
"""Tokens: a smaller disc, or a smaller box, would be a single cell, whose map is always 1."""
TRACKER = OpticalFlowTracker()

CellsAt = Float[np.ndarray, "p f 2"]


@dataclass(frozen=True, eq=False)
class Spots:
    """Points on the token grid.

    Attributes:
        cells: places in a frame, row-major; the point's own first.
        inside: which of them are near the point; at least its own.
        visible: whether the point is seen.
    """

    cells: Int[np.ndarray, "p f k"]
    inside: Bool[np.ndarray, "p f k"]
    visible: Bool[np.ndarray, "p f"]


def spots_of(
    latent: Latent, model: Backbone, *, points: Path | None, boxes: Path | None, count: int, radius: float | None
) -> Spots:
    """The points of a reference of that latent "1 c f h w": of one of the files, or as many as `count` that are found.

    The latent is decoded unless boxes are given. `radius` is that of the disc around a track, in tokens.

    Raises:
        InputError: a file does not fit.
    """
    grid, every = model.grid(latent), model.frame_multiple
    if boxes is not None:
        size = ((grid.frames - 1) * every + 1, grid.height * model.multiple, grid.width * model.multiple)
        read = read_boxes(boxes, size)
        tracks = by_latent_frame(read.tracks, every)
        sides = by_latent_frame(Tracks(read.sizes, read.tracks.visible), every).positions / model.multiple
        at = _cells_at(tracks, model.multiple)
        return spots_near(at, _in_box(at, np.maximum(sides, LEAST_SIDE), grid), tracks.visible, grid)
    clip = model.decode(latent, 1.0)
    if points is not None:
        tracks = tracks_of(points, clip, TRACKER)
    else:
        tracks = salient_tracks(clip, count, model.multiple, TRACKER)
    tracks = by_latent_frame(tracks, every)
    radius = radius or max(LEAST_RADIUS, RADIUS_OF_ROWS * min(grid.height, grid.width))
    at = _cells_at(tracks, model.multiple)
    return spots_near(at, _in_disc(_own_cells(at, grid), radius, grid), tracks.visible, grid)


def spots_near(
    at: CellsAt, near: Bool[np.ndarray, "p f h w"], visible: Bool[np.ndarray, "p f"], grid: TokenGrid
) -> Spots:
    """The spots of points at these places (y, x) in cells, with the cells that are near each of them."""
    y, x = np.moveaxis(_own_cells(at, grid), -1, 0)
    own = np.arange(grid.tokens_per_frame) == (y * grid.width + x)[..., None]
    chosen = own | rearrange(near, "p f h w -> p f (h w)")
    most = int(chosen.sum(-1).max(initial=1))
    cells = np.argsort(2 - chosen.astype(int) - own, axis=-1, kind="stable")[..., :most]
    return Spots(cells, np.take_along_axis(chosen, cells, -1), visible)


def _cells_at(tracks: Tracks, multiple: int) -> CellsAt:
    """Pixels to cells: pixel 0 lies half a pixel behind the edge."""
    return (tracks.positions + 0.5) / multiple - 0.5


def _own_cells(at: CellsAt, grid: TokenGrid) -> Int[np.ndarray, "p f 2"]:
    return np.rint(at).astype(int).clip(0, [grid.height - 1, grid.width - 1])


def _distances(at: np.ndarray, grid: TokenGrid) -> Float[np.ndarray, "two p f h w"]:
    """How far every cell of a frame lies from a place, in rows and in columns."""
    places = np.indices((grid.height, grid.width))[:, None, None]
    return np.abs(places - rearrange(at, "p f two -> two p f 1 1"))


def _in_disc(centres: np.ndarray, radius: float, grid: TokenGrid) -> Bool[np.ndarray, "p f h w"]:
    return (_distances(centres, grid) ** 2).sum(0) <= radius**2


def _in_box(centres: CellsAt, sides: CellsAt, grid: TokenGrid) -> Bool[np.ndarray, "p f h w"]:
    return (_distances(centres, grid) - rearrange(sides, "p f two -> two p f 1 1") / 2).max(0) <= 0
