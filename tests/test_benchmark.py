"""The sprite protocol is what its description says, and it cannot change unnoticed."""

from collections import Counter
from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest

from motionlora.data.benchmark import (
    CLOSED,
    OPEN,
    Kind,
    Reference,
    cases,
    protocol_hash,
    references,
    target_of,
)
from motionlora.data.errors import InputError
from motionlora.data.manifest import MANIFESTS, Listed, account
from motionlora.data.sprites import FAMILIES, FRAMES, RADII, SIZE, TEXTURED, Change, random_path, render

REFERENCES = references()
IDS = [reference.name for reference in REFERENCES]
each_reference = pytest.mark.parametrize("reference", REFERENCES, ids=IDS)


def motions_of(reference: Reference) -> list[np.ndarray]:
    """What moves, around its mean."""
    scene = reference.scene
    paths = [scene.pan] if reference.kind == "camera" else [sprite.path for sprite in scene.sprites]
    return [path - path.mean(0) for path in paths]


def test_version_2_has_this_hash() -> None:
    assert protocol_hash() == "4a3fbda17652", "the protocol changed: that makes version 3, and old tables incomparable"


def test_sixteen_references_of_the_stated_kinds() -> None:
    kinds = Counter(reference.kind for reference in REFERENCES)
    assert kinds == {"open": 4, "closed": 4, "camera": 4, "pair": 2, "occluded": 1, "turning": 1}
    assert set(kinds) == set(get_args(Kind))
    assert len(set(IDS)) == 16
    for reference in REFERENCES:
        scene = reference.scene
        assert len(scene.sprites) == (2 if reference.kind == "pair" else 1)
        assert (scene.bar is not None) == (reference.kind == "occluded")
        assert (np.ptp(scene.pan) > 0) == (reference.kind == "camera")
        assert any(np.ptp(sprite.angle) > 0 and np.ptp(sprite.scale) > 0 for sprite in scene.sprites) == (
            reference.kind == "turning"
        )


def test_the_forms_have_the_stated_sizes() -> None:
    assert [len(cases(form)) for form in ("short", "objects", "standard", "full")] == [4, 16, 32, 96]
    standard = cases("standard")
    assert {case.seed for case in standard} == {0, 1}
    assert set(Counter(case.change for case in standard)) == set(get_args(Change))
    assert {case.reference.name for case in standard} == set(IDS)
    assert {(case.reference.name, case.change) for case in cases("full")} == {
        (name, change) for name in IDS for change in get_args(Change)
    }


def test_no_family_of_the_references_is_in_pretraining() -> None:
    assert not set(FAMILIES) & {*OPEN, *CLOSED}


@each_reference
def test_a_reference_is_no_line_and_no_parabola(reference: Reference) -> None:
    """So it is outside `static`, `linear`, `ease` (on a line) and `throw` (a parabola in time)."""
    time = np.linspace(-1, 1, FRAMES)
    parabolas = np.stack([time**0, time, time**2], 1)
    for path in motions_of(reference):
        across = np.linalg.svd(path, compute_uv=False)[1] / np.sqrt(FRAMES)
        assert across > 2, "root mean square distance from the best line, in pixels"
        rest = path - parabolas @ np.linalg.lstsq(parabolas, path, rcond=None)[0]
        assert np.sqrt((rest**2).sum(1).mean()) > 2


def test_no_reference_moves_like_a_path_of_pretraining() -> None:
    generator = np.random.default_rng(0)
    drawn = np.stack([random_path(generator, FRAMES, reach=20.0) for _ in range(1500)])
    drawn -= drawn.mean(1, keepdims=True)
    for reference in REFERENCES:
        for path in motions_of(reference):
            farthest = np.linalg.norm(drawn - path, axis=-1).max(1)
            assert farthest.min() > 2, f"{reference.name} is within 2 pixels of a path of pre-training"


@each_reference
def test_sprites_stay_on_the_canvas_at_a_size_that_can_be_recognised(reference: Reference) -> None:
    for sprite in reference.scene.sprites:
        size = sprite.radius * sprite.scale
        assert size.min() >= RADII[0] * 0.85
        assert size.max() <= RADII[1] * 1.05
        assert (sprite.path.min(1) - size).min() > -0.5
        assert (sprite.path.max(1) + size).max() < SIZE - 0.5


@each_reference
def test_reversing_plays_the_pixels_backwards(reference: Reference) -> None:
    backwards = render(reference.reversed().scene).pixels
    assert np.array_equal(backwards, render(reference.scene).pixels[::-1])


@each_reference
def test_targets_change_what_their_class_says(reference: Reference) -> None:
    for change in get_args(Change):
        scene, target = reference.scene, target_of(reference, change)
        assert target.caption == target_of(reference, change).caption
        assert (target.background != scene.background) == (change in ("background", "scene"))
        for before, after in zip(scene.sprites, target.sprites, strict=True):
            assert (after.colour != before.colour) == (after.shape != before.shape) == (change in ("subject", "scene"))
            assert np.array_equal(after.path, before.path)
        if reference.kind == "camera":
            assert target.background in TEXTURED, "a plain background would not show the camera's motion"


def listed(clips: int, kinds: Sequence[str], *, absent: int = 0) -> list[Listed]:
    return [Listed(f"c{n}", kind, f"line {n}", n >= absent) for n in range(clips) for kind in kinds]


def test_a_whole_benchmark_is_told_as_whole_and_a_part_as_a_part() -> None:
    """50 clips x 3 captions are 150 pairs; what is missing is named."""
    kinds = MANIFESTS["davis"].classes
    whole = account("davis", listed(50, kinds))
    assert "50 of 50 clips; 150 of 150 pairs; caption 50; subject 50; scene 50" in whole
    assert "not there" not in whole
    assert "without" not in whole
    part = account("davis", [*listed(12, kinds, absent=2), Listed("late", "scene", "line 99", True)])
    assert "11 of 50 clips; 31 of 150 pairs" in part
    assert "not there: c0, c1;" in part
    assert "37 clips are not in the captions file" in part
    assert part.endswith("clips without all captions: late")
    assert "53 of 53 clips; 53 of 53 pairs" in account("motionbench", listed(53, ("camera",)))
    assert sum(m.clips * m.captions for m in MANIFESTS.values()) == 150 + 53 + 500 + 304
    with pytest.raises(InputError, match=r"line 0: DAVIS-50 x 3 has no class 'scenes'.*did you mean scene\?"):
        account("davis", listed(1, ("scenes",)))
    with pytest.raises(InputError, match="No clip of MTBench is there, of 2"):
        account("mtbench", listed(2, ("easy",), absent=2))
