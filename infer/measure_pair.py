"""Every measure of one made clip: against its reference's motion and its caption. What cannot be measured says why.

Sprite measures need a caption of the sprite world; the others follow points, and need a tracker.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch

from motionlora.data.cache import content_key, write_text
from motionlora.data.clip import Clip
from motionlora.data.sprites import BACKGROUNDS, COLOURS, SHAPES, SIZE, Scene, Sprite
from motionlora.infer.measure_direction import turning, turning_of_points
from motionlora.infer.measure_encoders import Encoders, found_encoders
from motionlora.infer.measure_frames import FrameJudge, boxes_of_sprites
from motionlora.infer.measure_motion import mf_code, mf_moving, mf_null, mf_star, mf_sym
from motionlora.infer.measure_names import BY_POINTS, BY_REVERSAL, BY_SPRITES, names
from motionlora.infer.measure_sprites import Observation, is_camera, observe, scores, seen_scene
from motionlora.infer.own_code import code_hash
from motionlora.infer.pairs import Pair, Source
from motionlora.infer.track_points import Tracker, Tracks

OTHERS = 8
"""Other clips whose tracks tell the chance level of motion fidelity."""
DRAWN = 30
"""Tracks that the page draws."""


SPRITES, POINTS, TURNING = names(BY_SPRITES), names(BY_POINTS), names(BY_REVERSAL)
UNTURNED = "undefined here: no frames in which both outputs show what moves, or a reference that is its own reversal"
LOOKS = rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
CAPTION = re.compile(rf"{LOOKS}( and {LOOKS})?( behind a grey bar)? o(?:n|ver) a ({'|'.join(BACKGROUNDS)}) background")


@dataclass(frozen=True)
class Measured:
    """One clip's figures by name, the reason of each that is missing, and paths for the page.

    `paths` are "path frame" of (y, x) in tenths of a pixel, None where unseen.
    """

    values: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    paths: list[list[list[int] | None]] = field(default_factory=list)


class Judge:
    """Measures clips of one comparison; what it measured before lies in `folder` and is read again."""

    def __init__(
        self,
        sources: Sequence[Source],
        tracker: Tracker | None,
        folder: Path,
        why_not: str = "",
        encoders: Encoders | None = None,
    ) -> None:
        self.sources, self.tracker, self.folder, self.why_not = list(sources), tracker, folder, why_not
        self.frames = FrameJudge(encoders or found_encoders("", torch.device("cpu")))
        self._scene, self._tracked, self._null = cache(self._scene_of), cache(self._tracks_of), cache(self._null_of)

    def measured(self, clip: Clip, pair: Pair) -> Measured:
        """Everything about a clip that was to have the pair's motion and show its caption."""
        others = [other.content for other in self._others(pair.source)]
        known = "" if pair.target is None else "true scene"
        asked = (clip.content_hash(), pair.source.content, pair.caption, known)
        return self._remembered(
            ("measures", self.frames.encoders.told, *asked, *others), lambda: self._measured(clip, pair)
        )

    def _remembered(self, asked: Sequence[str], measure: Callable[[], Measured]) -> Measured:
        """What lies in the folder for what is asked, by this code and tracker; else it is measured and put there."""
        tracker = repr(self.tracker) if self.tracker else self.why_not
        path = self.folder / f"{content_key(code_hash(__name__), tracker, *asked)}.json"
        stored = _stored(path)
        if stored is None:
            stored = measure()
            write_text(path, json.dumps(asdict(stored)))
        return stored

    def _measured(self, clip: Clip, pair: Pair) -> Measured:
        seen = observe(clip.pixels) if _is_small(clip) else None
        parts = (self._by_sprites(seen, pair), self._by_points(clip, pair.source), self._by_frames(clip, pair))
        values = {name: value for part in parts for name, value in part.values.items()}
        missing = {name: reason for part in parts for name, reason in part.missing.items()}
        finite = {name: round(value, 6) for name, value in values.items() if math.isfinite(value)}
        undefined = "undefined here: nothing of the reference moves, or no point could be followed"
        missing |= dict.fromkeys([name for name in values if name not in finite], undefined)
        return Measured(finite, missing, parts[0].paths or parts[1].paths)

    def _by_sprites(self, seen: Observation | None, pair: Pair) -> Measured:
        target = pair.target or asked_scene(pair.caption)
        if target is None:
            return _none(SPRITES, "the caption is not of the sprite world")
        if seen is None:
            return _none(SPRITES, f"sprites are recognised in clips of {SIZE} x {SIZE} pixels")
        reference = self._scene(pair.source)
        if reference is None:
            return _none(SPRITES, "no sprite and no camera moves in the reference as it was seen")
        found = asdict(scores(seen, target, reference))
        return Measured(found, paths=_centres(seen))

    def _by_points(self, clip: Clip, source: Source) -> Measured:
        if self.tracker is None:
            return _none(POINTS, self.why_not)
        ours, theirs = self.tracker.track(clip), self._tracked(source)
        values = {"mf_code": mf_code(ours.positions, theirs.positions), "mf_sym": mf_sym(ours.seen, theirs.seen)}
        values["mf_moving"] = mf_moving(ours.seen, theirs.seen)
        missing = {}
        if self._others(source):
            values["mf_star"] = mf_star(values["mf_sym"], self._null(source))
        else:
            missing["mf_star"] = "the chance level needs another clip than this one"
        return Measured(values, missing, _drawn(ours))

    def _by_frames(self, clip: Clip, pair: Pair) -> Measured:
        reference = pair.source.read()
        scene = self._scene(pair.source) if _is_small(clip) else None
        boxes = boxes_of_sprites(reference.pixels, len(scene.sprites)) if scene and scene.sprites else None
        return Measured(*self.frames.measured(clip, pair.caption, reference, boxes))

    def turning(self, there: Clip, back: Clip, source: Source) -> Measured:
        """Selectivity and how far the output turned; by the sprite where the true path of one is known, else by points.

        Args:
            there, back: outputs of one seed, with `source` and with that clip backwards.
        """
        asked = ("turning", there.content_hash(), back.content_hash(), source.content)
        return self._remembered(asked, lambda: self._turning(there, back, source))

    def _turning(self, there: Clip, back: Clip, source: Source) -> Measured:
        scene = source.scene
        if scene and len(scene.sprites) == 1 and not is_camera(scene):
            found = turning(observe(there.pixels), observe(back.pixels), scene.sprites[0].path)
        elif self.tracker is None:
            return _none(TURNING, self.why_not)
        else:
            ours, turned = (self.tracker.track(clip).seen for clip in (there, back))
            found = turning_of_points(ours, turned, self._tracked(source).seen, there.height, there.width)
        if not all(map(math.isfinite, found)):
            return _none(TURNING, UNTURNED)
        return Measured({name: round(value, 6) for name, value in zip(TURNING, found, strict=True)})

    def reference_paths(self, source: Source) -> list[list[list[int] | None]]:
        """What the page draws over the reference."""
        clip = source.read()
        if _is_small(clip) and (found := _centres(observe(clip.pixels))):
            return found
        return _drawn(self._tracked(source)) if self.tracker else []

    def _scene_of(self, source: Source) -> Scene | None:
        return source.scene or seen_scene(observe(source.read().pixels))

    def _tracks_of(self, source: Source) -> Tracks:
        assert self.tracker is not None
        return self.tracker.track(source.read())

    def _null_of(self, source: Source) -> float:
        others = [self._tracked(other).seen for other in self._others(source)]
        return mf_null(mf_sym, self._tracked(source).seen, others)

    def _others(self, source: Source) -> list[Source]:
        """The next clips of the comparison after this one."""
        contents = [other.content for other in self.sources]
        at = contents.index(source.content)
        turned = self.sources[at + 1 :] + self.sources[:at]
        return [other for other in turned if other.content != source.content][:OTHERS]


def asked_scene(caption: str) -> Scene | None:
    """What a caption of the sprite world asks for, its sprites standing at 0; None for any other caption."""
    found = CAPTION.fullmatch(caption.strip().rstrip(".").lower())
    if not found:
        return None
    colour, shape, second, colour2, shape2, bar, background = found.groups()
    still, path = np.zeros(2), np.zeros((2, 2))
    looks = [(shape, colour), *([(shape2, colour2)] if second else [])]
    sprites = tuple(Sprite(shape, colour, 10.0, path, still, still + 1) for shape, colour in looks)
    return Scene(sprites, background, path, 0, (SIZE / 2, 8.0) if bar else None)


def _none(names: Sequence[str], reason: str) -> Measured:
    return Measured(missing=dict.fromkeys(names, reason))


def _is_small(clip: Clip) -> bool:
    return (clip.height, clip.width) == (SIZE, SIZE)


def _centres(seen: Observation) -> list[list[list[int] | None]]:
    """The path of the largest sprite of each colour."""
    colours = sorted({blob.colour for blobs in seen.blobs for blob in blobs})
    found = [[next((b for b in blobs if b.colour == colour), None) for blobs in seen.blobs] for colour in colours]
    return [[_tenths(blob.centre) if blob else None for blob in line] for line in found]


def _drawn(tracks: Tracks) -> list[list[list[int] | None]]:
    """Some of the tracks that move most and are seen longest, evenly chosen."""
    length = np.linalg.norm(np.diff(tracks.positions, axis=1), axis=-1).sum(1) * tracks.visible.mean(1)
    able = np.flatnonzero(length >= max(1.0, 0.5 * float(np.quantile(length, 0.95))))
    chosen = able[np.unique(np.linspace(0, len(able) - 1, min(DRAWN, len(able))).astype(int))] if len(able) else able
    ways = zip(tracks.positions[chosen], tracks.visible[chosen], strict=True)
    return [[_tenths(place) if seen else None for place, seen in zip(*way, strict=True)] for way in ways]


def _tenths(place: np.ndarray) -> list[int]:
    return [round(float(side) * 10) for side in place]


def _stored(path: Path) -> Measured | None:
    """What was measured before; None where nothing was, or it cannot be read."""
    try:
        return Measured(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
