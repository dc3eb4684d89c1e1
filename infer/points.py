"""Points and boxes that say what moves where: from a file, or found in a clip and followed by the default tracker.

A file of points is a JSON list of marks `{"frame": 0, "x": 12.5, "y": 30}`, in pixels from the top left corner. A mark
alone is a click: the tracker follows it from its frame to both ends of the clip. Marks that share a name, as in
`"point": "left foot"`, are one point whose way is known: straight from mark to mark, not there before the first and
behind the last, and hidden from a mark with `"visible": false` to the next one. A file of boxes is a list of
`{"frame": 0, "x": 4, "y": 8, "w": 20, "h": 16}`, x and y of the top left corner, with `"object": "cat"` where there are
several; boxes move and grow straight from one to the next. Points of several objects may stand in one file.

Positions in memory are (y, x) in pixels. Format and choice of points are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from jaxtyping import Float
from pydantic import Field, TypeAdapter, ValidationError

from motionlora.data.clip import Clip
from motionlora.data.errors import InputError
from motionlora.data.settings import Settings
from motionlora.infer.track_points import OpticalFlowTracker, Points, Tracks

Size: TypeAlias = tuple[int, int, int]
"""Frames, height and width of a clip."""
STILL = 0.1
"""Pixels of motion below which points count alike: a tracker is not more exact."""
LEAST_SALIENCE = 0.25
"""Share of the most salient point's salience below which a point is not taken."""


class Place(Settings):
    """What marks and boxes have in common."""

    frame: int = Field(ge=0)
    x: float = Field(allow_inf_nan=False)
    y: float = Field(allow_inf_nan=False)
    visible: bool = True


class Mark(Place):
    """Where a point is in one frame."""

    point: str | None = None

    @property
    def name(self) -> str | None:
        return self.point

    @property
    def centre(self) -> tuple[float, float]:
        return self.y, self.x


class Box(Place):
    """Where an object is in one frame."""

    w: float = Field(gt=0, allow_inf_nan=False)
    h: float = Field(gt=0, allow_inf_nan=False)
    object: str = ""

    @property
    def name(self) -> str:
        return self.object

    @property
    def centre(self) -> tuple[float, float]:
        return self.y + (self.h - 1) / 2, self.x + (self.w - 1) / 2


Entry = TypeVar("Entry", Mark, Box)


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes followed through a clip: their centres, and height and width in pixels in each frame."""

    tracks: Tracks
    sizes: Float[np.ndarray, "point frame 2"]


def read_marks(path: Path, size: Size) -> list[Mark]:
    """The marks of a file of points, for a clip of that size.

    Raises:
        InputError: the file cannot be read, is of another form, or names a place or a frame outside of the clip.
    """
    return _read(path, Mark, size)


def read_boxes(path: Path, size: Size) -> Boxes:
    """The boxes of a file in every frame of a clip of that size; their centres have to lie inside.

    Raises:
        InputError: as `read_marks`.
    """
    ways = [_way(way, size[0], [[box.h, box.w] for box in way]) for way in _by_name(_read(path, Box, size))]
    tracks = Tracks(np.stack([way[0] for way in ways]), np.stack([way[1] for way in ways]))
    return Boxes(tracks, np.stack([way[2] for way in ways]))


def tracks_of(path: Path, clip: Clip, tracker: OpticalFlowTracker) -> Tracks:
    """The points of a file through a clip: named ones as the file says, clicks as the tracker finds them.

    Raises:
        InputError: as `read_marks`.
    """
    marks = read_marks(path, clip.pixels.shape[:3])
    found = [followed(clip, mark, tracker) for mark in marks if mark.point is None]
    for way in _by_name([mark for mark in marks if mark.point is not None]):
        positions, visible, _ = _way(way, clip.frames, [[0.0, 0.0] for _ in way])
        found.append(Tracks(positions[None], visible[None]))
    return Tracks(*(np.concatenate(parts) for parts in zip(*((t.positions, t.visible) for t in found), strict=True)))


def followed(clip: Clip, click: Mark, tracker: OpticalFlowTracker) -> Tracks:
    """One point followed from the frame of its click to the last frame and to the first."""
    start, point = click.frame, np.array([click.centre])
    on, back = tracker.follow(clip.pixels[start:], point), tracker.follow(clip.pixels[start::-1], point)
    parts = [(back.positions[:, :0:-1], on.positions), (back.visible[:, :0:-1], on.visible)]
    return Tracks(*(np.concatenate(part, 1) for part in parts))


def salient_tracks(clip: Clip, count: int, apart: float, tracker: OpticalFlowTracker) -> Tracks:
    """Up to `count` points that move and can be followed, at least `apart` pixels from each other in frame 0.

    A point's salience is the share of frames in which it is seen, times how far it strays from its mean place (root of
    the mean square, pixels). The most salient one is taken first, then the next that is far enough from all taken.
    Points that are seen in frame 0 alone are not taken: there may be none. On eight references of the sprite protocol
    53 of 60 points found followed their sprite to 2.5 pixels, a third of a token there; the others slid along edges.
    """
    tracks = tracker.track(clip)
    able = tracks.visible[:, 1:].any(1)
    tracks = Tracks(tracks.positions[able], tracks.visible[able])
    salience = tracks.visible.mean(1) * (_stray(tracks) + STILL)
    taken: list[int] = []
    for index in np.argsort(-salience, kind="stable"):
        if len(taken) == count or salience[index] < LEAST_SALIENCE * salience.max():
            break
        gaps = np.linalg.norm(tracks.positions[taken, 0] - tracks.positions[index, 0], axis=1)
        if (gaps >= apart).all():
            taken.append(int(index))
    return Tracks(tracks.positions[taken], tracks.visible[taken])


def by_latent_frame(tracks: Tracks, multiple: int) -> Tracks:
    """Tracks at the time of latent frames: frame 0, then the middle of every `multiple` frames (4: of the second and
    third); between frames in which a point is seen its way is straight. Seen is what is seen in any of the frames.
    """
    frames = tracks.visible.shape[1]
    times = np.arange(frames)
    positions = tracks.positions.copy()
    for way, seen in zip(positions, tracks.visible, strict=True):
        if seen.any():
            way[:] = np.stack([np.interp(times, times[seen], side[seen]) for side in way.T], -1)
    groups = [slice(0, 1), *(slice(start, start + multiple) for start in range(1, frames, multiple))]
    middles = [(group.start + min(group.stop, frames) - 1) / 2 for group in groups]
    centred = [positions[:, [int(np.floor(middle)), int(np.ceil(middle))]].mean(1) for middle in middles]
    return Tracks(np.stack(centred, 1), np.stack([tracks.visible[:, group].any(1) for group in groups], 1))


def box_clip(boxes: Boxes, size: Size, fps: float) -> Clip:
    """Black boxes that move over white: the made-up reference of a trajectory (S2V2V). Edges are smooth."""
    _, height, width = size
    white = np.ones(size)
    for centres, sides, seen in zip(boxes.tracks.positions, boxes.sizes, boxes.tracks.visible, strict=True):
        rows, columns = (
            np.clip((sides[:, axis, None] + 1) / 2 - np.abs(np.arange(length) - centres[:, axis, None]), 0, 1)
            for axis, length in enumerate((height, width))
        )
        white *= 1 - seen[:, None, None] * rows[:, :, None] * columns[:, None, :]
    pixels = np.repeat(np.rint(255 * white).astype(np.uint8)[..., None], 3, -1)
    return Clip(pixels, fps, "")


def _stray(tracks: Tracks) -> Float[np.ndarray, " point"]:
    weights = tracks.visible / np.maximum(tracks.visible.sum(1, keepdims=True), 1)
    mean = np.einsum("pf,pfd->pd", weights, tracks.positions)
    return np.sqrt(np.einsum("pf,pfd->p", weights, (tracks.positions - mean[:, None]) ** 2))


def _by_name(entries: Iterable[Entry]) -> list[list[Entry]]:
    ways: dict[str | None, list[Entry]] = {}
    for entry in entries:
        ways.setdefault(entry.name, []).append(entry)
    return [sorted(way, key=lambda entry: entry.frame) for way in ways.values()]


def _way(way: Sequence[Mark | Box], frames: int, sides: Sequence[Sequence[float]]) -> tuple[Points, np.ndarray, Points]:
    """Positions, visibility and sides of one named point or box in all frames."""
    named = np.array([entry.frame for entry in way])
    times, known = np.arange(frames), np.array([[*entry.centre, *side] for entry, side in zip(way, sides, strict=True)])
    values = np.stack([np.interp(times, named, column) for column in known.T], -1)
    latest = np.searchsorted(named, times, side="right") - 1
    shown = np.array([entry.visible for entry in way])
    return values[:, :2], (latest >= 0) & (times <= named[-1]) & shown[latest], values[:, 2:]


def _read(path: Path, kind: type[Entry], size: Size) -> list[Entry]:
    example = '{"frame": 0, "x": 12, "y": 30}' if kind is Mark else '{"frame": 0, "x": 4, "y": 8, "w": 20, "h": 16}'
    try:
        entries = TypeAdapter(list[kind]).validate_json(path.read_bytes())
    except OSError as fault:
        raise InputError(f"{path} cannot be read ({fault.strerror}): name a JSON file.") from None
    except ValidationError as error:
        raise InputError(f"{path}{_complaint(error.errors()[0])}: give a list of entries like {example}.") from None
    if not entries:
        raise InputError(f"{path} holds no list of places: give one or more of {example}.")
    for number, entry in enumerate(entries, 1):
        _refuse_outside(f"{path}, entry {number}", entry, size)
    for way in _by_name([entry for entry in entries if entry.name is not None]):
        for before, after in pairwise(way):
            if before.frame == after.frame:
                raise InputError(
                    f"{path} has {after.name!r} twice in frame {after.frame}: give each a name of its own."
                )
    return entries


def _complaint(error: Any) -> str:
    """Of pydantic: where in the file, and what."""
    if not error["loc"]:
        return f" is no JSON ({error['msg']})" if error["type"] == "json_invalid" else " holds no list of places"
    entry, *names = error["loc"]
    return f"{', '.join([f', entry {entry + 1}', *names])}, {error['msg']}"


def _refuse_outside(where: str, entry: Mark | Box, size: Size) -> None:
    frames, height, width = size
    y, x = entry.centre
    if entry.frame >= frames or (entry.visible and not (0 <= y < height and 0 <= x < width)):
        raise InputError(
            f"{where}: x {x:g}, y {y:g} in frame {entry.frame} lies outside of the clip, {frames} frames of "
            f"{width} x {height} pixels, counted from zero: take it out or correct it."
        )
