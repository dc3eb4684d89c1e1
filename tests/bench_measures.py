"""What a perfect transfer, another motion, a reversed one, stillness and a copy of the reference get in every measure.

    python tests/bench_measures.py        about two minutes on one core; writes results/measures.md and .json

Outputs are rendered by the sprite world itself: no model is needed. Every figure stands twice: measured through pixels
and the point tracker, and expected, the same measure on the scenes' true tracks.
"""

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy import ndimage

from motionlora.data.benchmark import CENTRE, REACH, Reference, played_backwards, protocol_hash, references, target_of
from motionlora.data.clip import Clip, mirrored
from motionlora.data.sprites import SIZE, Scene, random_path, render
from motionlora.infer.check_tracker import check_tracker, sprite_mask, true_tracks
from motionlora.infer.frechet import frechet
from motionlora.infer.measure_camera import phase_camera
from motionlora.infer.measure_direction import selectivity
from motionlora.infer.measure_motion import (
    common_path,
    mf_code,
    mf_frechet,
    mf_moving,
    mf_null,
    mf_star,
    mf_sym,
    track_motion,
    velocity_field,
)
from motionlora.infer.measure_sprites import Observation, is_camera, motion_r2, observe, scores, true_motion
from motionlora.infer.track_points import OpticalFlowTracker, Tracks, grid_points

RESULTS = Path(__file__).resolve().parent.parent / "results"
TRACKER = OpticalFlowTracker(side=20)
CELLS = 8
"""Cells of a velocity field along a side: the tiny Wan's own tokens."""
HALO = TRACKER.window // 2 + 1
"""Pixels around a sprite whose points follow it: no background is asked there."""
NOTE = """\
Means over {count} references of the sprite protocol ({protocol}): measured through pixels, and in brackets expected,
the same measure on the scenes' true tracks. Outputs have the looks that another caption asks for, and the reference's
motion (perfect), a random smooth one, the reference's played backwards, or none; a copy is the reference itself.
Masked: points of what moves (sprites, or the background of a panning camera), known from the scene. R2 to mf_frechet
are of the paths of what moves: sprites by their points, cameras by least squares (`camera_path`); selectivity is of
velocity fields of {cells} x {cells} cells, or of those paths. Points cannot be followed through a turn, behind a bar
or out of the frame; where a measure is undefined for some references, the row says how many are left. Phase
correlation is for natural pictures: on these few plane waves it fails."""


@dataclass(frozen=True, eq=False)
class Shown:
    """One clip and the points followed in it: by the tracker, or in truth. `camera`: the background is what moves."""

    scene: Scene
    clip: Clip
    tracks: Tracks
    camera: bool
    true: bool

    @cached_property
    def groups(self) -> list[Tracks]:
        """The points of each thing that is asked about: the background where the camera is, else inside each sprite."""
        if self.camera:
            return [
                self.tracks.within(np.logical_not(ndimage.binary_dilation(sprite_mask(self.scene), iterations=HALO)))
            ]
        alone = [replace(self.scene, sprites=(sprite,), bar=None) for sprite in self.scene.sprites]
        masks = [ndimage.binary_erosion(sprite_mask(scene), np.ones((3, 3))) for scene in alone]
        return [self.tracks.within(mask) for mask in masks]

    @cached_property
    def masked(self) -> np.ndarray:
        return np.concatenate([group.seen for group in self.groups])

    @cached_property
    def seen(self) -> Observation:
        return observe(self.clip.pixels)

    @cached_property
    def paths(self) -> np.ndarray:
        """What moves, "object frame 2": the camera's path by least squares, sprites' by their points."""
        if self.camera:
            return (self.scene.pan - self.scene.pan[0] if self.true else self.seen.camera)[None]
        return np.stack([common_path(group.seen) for group in self.groups])

    @cached_property
    def field(self) -> np.ndarray:
        return velocity_field(self.tracks.seen, SIZE, SIZE, CELLS)


def shown(scene: Scene, clip: Clip, camera: bool, true: bool) -> Shown:
    tracks = true_tracks(scene, grid_points(SIZE, SIZE, TRACKER.side)) if true else TRACKER.track(clip)
    return Shown(scene, clip, tracks, camera, true)


@dataclass(frozen=True, eq=False)
class Answer:
    """What a method makes of a reference, of its reversal and of its mirror image."""

    plain: Shown
    reversed: Shown
    mirrored: Shown


def answers(reference: Reference, number: int, true: bool) -> dict[str, Answer]:
    """The outputs by name, the reference's own clips first. All but a copy show what the caption asks for."""
    target, camera = target_of(reference, "scene"), is_camera(reference.scene)

    def of(scene: Scene) -> Shown:
        return shown(scene, render(scene), camera, true)

    def in_a_mirror(scene: Scene) -> Shown:
        return shown(seen_in_a_mirror(scene), mirrored(render(scene)), camera, true)

    def following(scene: Scene) -> Answer:
        return Answer(of(scene), of(played_backwards(scene)), in_a_mirror(scene))

    copy, perfect = following(reference.scene), following(target)
    other, still = of(moved_otherwise(target, np.random.default_rng(7000 + number))), of(standing(target))
    return {
        "copy": copy,
        "perfect": perfect,
        "another motion": Answer(other, other, other),
        "reversed": Answer(perfect.reversed, perfect.plain, in_a_mirror(played_backwards(target))),
        "still": Answer(still, still, still),
    }


def seen_in_a_mirror(scene: Scene) -> Scene:
    """The scene with the motion of its mirror image, left and right exchanged; a texture keeps its own picture."""
    flip = np.array([1, -1])
    turned = (replace(s, path=s.path * flip + [0, SIZE - 1], angle=-s.angle) for s in scene.sprites)
    bar = (SIZE - 1 - scene.bar[0], scene.bar[1]) if scene.bar else None
    return replace(scene, sprites=tuple(turned), pan=scene.pan * flip, bar=bar)


def standing(scene: Scene) -> Scene:
    """The scene's first frame, for as long."""
    frames = len(scene.pan)

    def held(values: np.ndarray) -> np.ndarray:
        return np.repeat(values[:1], frames, 0)

    stopped = (replace(s, path=held(s.path), angle=held(s.angle), scale=held(s.scale)) for s in scene.sprites)
    return replace(scene, sprites=tuple(stopped), pan=held(scene.pan))


def moved_otherwise(scene: Scene, generator: np.random.Generator) -> Scene:
    """The scene with a random smooth motion in place of its own, of the camera where only the camera moves."""
    still = standing(scene)
    paths = [random_path(generator, len(scene.pan), reach=REACH, family="smooth") for _ in range(2)]
    if np.ptp(scene.pan, axis=0).any():
        return replace(still, pan=paths[0] - paths[0][0])
    # two sprites keep to the left and the right half, as the references' do
    span, sides = (np.ones(2), [0]) if len(still.sprites) == 1 else (np.array([0.9, 0.36]), [-16, 16])
    moved = (
        replace(sprite, path=path * span + CENTRE + np.array([0, side]))
        for sprite, path, side in zip(still.sprites, paths, sides, strict=False)
    )
    return replace(still, sprites=tuple(moved))


def figures(answer: Answer, reference: Answer, null: float) -> dict[str, float]:
    """Every measure of one output against one reference."""
    made, wanted = answer.plain, reference.plain
    motion = track_motion(made.paths, wanted.paths)
    masked = mf_sym(made.masked, wanted.masked)
    result = {
        "mf_code, all points": mf_code(made.tracks.positions, wanted.tracks.positions),
        "mf_sym, all points": mf_sym(made.tracks.seen, wanted.tracks.seen),
        "mf_moving, all points": mf_moving(made.tracks.seen, wanted.tracks.seen),
        "mf_sym, masked": masked,
        "chance of it (other references)": null,
        "MF* of it": mf_star(masked, null),
        "R2, clipped": motion.r2,
        "gain": motion.gain,
        "velocity cosine": motion.vcos,
        "net direction": motion.net,
        "Frechet distance, px": float(frechet(made.paths, wanted.paths).mean()),
        "mf_frechet": mf_frechet(made.paths, wanted.paths, SIZE, SIZE),
    }
    for turn in ("reversed", "mirrored"):
        fields = [getattr(s, part).field for s in (answer, reference) for part in ("plain", turn)]
        paths = [np.diff(getattr(s, part).paths, axis=1) for s in (answer, reference) for part in ("plain", turn)]
        result[f"selectivity of fields, {turn} reference"], result[f"its gain, {turn}"] = selectivity(*fields)
        result[f"selectivity of paths, {turn} reference"] = selectivity(*paths)[0]
    truth = true_motion(wanted.scene)
    judged = None if made.true else scores(made.seen, made.scene, wanted.scene, motion_of=truth)
    result["SMF (sprite recogniser)"] = judged.smf if judged else motion.r2
    if is_camera(wanted.scene):
        sprite = ndimage.binary_dilation(sprite_mask(made.scene), iterations=2)[None]
        seen = made.scene.pan if made.true else phase_camera(made.clip.pixels, sprite.repeat(made.clip.frames, 0))
        result["R2 of the camera by phase correlation"] = float(np.clip(motion_r2(seen, truth[0])[0], -1, 1))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--references", type=int, default=16)
    parser.add_argument("--results", type=Path, default=RESULTS / "measures")
    chosen = parser.parse_args()
    begun = time.perf_counter()
    check = check_tracker(TRACKER)
    print(check, flush=True)
    cells: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    picked = references()[: chosen.references]
    for kind in ("measured", "expected"):
        everything = [answers(reference, number, kind == "expected") for number, reference in enumerate(picked)]
        for reference, made in zip(picked, everything, strict=True):
            others = [other["copy"].plain.masked for other in everything if other is not made]
            null = mf_null(mf_sym, made["copy"].plain.masked, others)
            cells.setdefault(reference.name, {})[kind] = {
                name: figures(answer, made["copy"], null) for name, answer in made.items()
            }
        print(f"{kind}: {time.perf_counter() - begun:.0f} s", flush=True)
    record = {
        "what": "every motion measure on outputs whose motion is known",
        "protocol": protocol_hash(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", "tests/bench_measures.py", *sys.argv[1:]]),
        "seconds": round(time.perf_counter() - begun),
        "tracker": {"settings": repr(TRACKER), "check": str(check), "by_clip": check.by_clip},
        "cells": cells,
    }
    text = report(record)
    print(text)
    chosen.results.with_suffix(".md").write_text(text)
    chosen.results.with_suffix(".json").write_text(json.dumps(numbers(record), indent=1) + "\n")


def report(record: dict) -> str:
    """The means over references as Markdown: measured, and in brackets expected."""
    cells = record["cells"]
    first = next(iter(cells.values()))["measured"]
    outputs = [*list(first)[1:], "copy"]
    names = list(dict.fromkeys(n for cell in cells.values() for n in cell["measured"]["copy"]))
    rows = []
    for name in names:
        row, counts = [], set()
        for output in outputs:
            pairs = [
                [cell[kind][output].get(name, np.nan) for kind in ("measured", "expected")] for cell in cells.values()
            ]
            known = np.array([pair for pair in pairs if np.isfinite(pair).all()])
            counts.add(len(known))
            row.append("{:.2f} ({:.2f})".format(*known.mean(0)) if len(known) else "undefined")
        defined = "" if counts == {len(cells)} else f", {min(counts)} references"
        rows.append(f"| {name}{defined} | {' | '.join(row)} |")
    kinds = {reference.name: reference.kind for reference in references()}
    by_kind: dict[str, list[float]] = {}
    for name, cell in cells.items():
        by_kind.setdefault(kinds[name], []).append(cell["measured"]["perfect"]["R2, clipped"])
    by_clip = "; ".join(f"{n} {e:.2f} px, {s:.0%}" for n, (e, s) in record["tracker"]["by_clip"].items())
    return "\n".join(
        [
            "# Motion measures on motion that is known",
            "",
            NOTE.format(count=len(cells), protocol=record["protocol"], cells=CELLS),
            "",
            f"{record['machine']}, {record['date']}, {record['seconds']} s, `{record['command']}`.",
            "",
            f"{record['tracker']['check']} {by_clip}.",
            "",
            f"| measure | {' | '.join(outputs)} |",
            f"|---|{'---|' * len(outputs)}",
            *rows,
            "",
            f"R2 of the perfect transfer by kind: {', '.join(f'{k} {np.mean(v):.2f}' for k, v in by_kind.items())}.",
            "",
        ]
    )


def numbers(value):
    """The same with floats rounded to four places, and null where a number is undefined: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: numbers(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [numbers(part) for part in value]
    if isinstance(value, float):
        return round(value, 4) if np.isfinite(value) else None
    return value


if __name__ == "__main__":
    main()
