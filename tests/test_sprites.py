"""The sprite world: exact geometry and pans, captions that never say the motion, one seed one clip."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from motionlora.data.sprites import (
    BACKGROUNDS,
    COLOURS,
    FAMILIES,
    FPS,
    FRAMES,
    RADII,
    SHAPES,
    SIZE,
    TEXTURED,
    Scene,
    Sprite,
    coverage,
    random_path,
    random_scene,
    recaptioned,
    render,
)

WORDS = {"a", "and", "on", "background", "behind", "grey", "bar", *COLOURS, *SHAPES, *BACKGROUNDS}
AREAS = {
    "circle": np.pi,
    "square": 2.0,
    "triangle": 3 * np.sqrt(3) / 4,
    "star": 5 * 0.45 * np.sin(np.pi / 5),
}
"""Of the unit shapes, from their corners; `coverage` never adds up corners."""


def scenes(count: int, *, seed: int = 0, frames: int = 5) -> list[Scene]:
    generator = np.random.default_rng(seed)
    return [random_scene(generator, frames=frames) for _ in range(count)]


def test_a_clip_has_the_promised_form() -> None:
    clip = render(scenes(1, frames=FRAMES)[0])
    assert clip.pixels.shape == (FRAMES, SIZE, SIZE, 3)
    assert clip.pixels.dtype == np.uint8
    assert clip.fps == FPS


def test_same_seed_same_pixels_and_rendering_changes_nothing() -> None:
    for first, second in zip(scenes(8), scenes(8), strict=True):
        once, again = render(first), render(first)
        assert np.array_equal(once.pixels, again.pixels)
        assert np.array_equal(once.pixels, render(second).pixels)
        assert once.caption == second.caption
    assert len({render(scene).content_hash() for scene in scenes(8)}) == 8


def test_the_pretraining_distribution_is_the_one_that_made_the_model() -> None:
    digest = hashlib.sha256()
    for scene in scenes(40, seed=20, frames=9):
        paths = np.concatenate([scene.pan, *(sprite.path for sprite in scene.sprites)])
        digest.update(f"{scene.caption} {scene.bar is None} {np.round(paths, 3).tolist()}".encode())
    assert digest.hexdigest()[:12] == "9b42e07c3d51"


def test_captions_name_looks_and_never_the_motion() -> None:
    drawn = scenes(400, frames=2)
    assert {word for scene in drawn for word in scene.caption.split()} == WORDS
    for scene in drawn:
        for sprite in scene.sprites:
            assert f"a {sprite.colour} {sprite.shape}" in scene.caption
        assert ("behind a grey bar" in scene.caption) == (scene.bar is not None)
        assert scene.caption.endswith(f"on a {scene.background} background")


def test_the_caption_of_a_scene_does_not_depend_on_its_motion() -> None:
    for scene in scenes(20):
        moved = tuple(replace(sprite, path=sprite.path[::-1] + 3.0) for sprite in scene.sprites)
        assert replace(scene, sprites=moved, pan=scene.pan + 1.0).caption == scene.caption


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [RADII[0] * 0.85, *RADII])
def test_coverage_has_the_area_of_the_shape_at_any_angle_and_place(shape: str, radius: float) -> None:
    grid = np.arange(32.0)
    for angle, dy, dx in ((0.0, 0.0, 0.0), (0.4, 0.3, -0.2), (2.0, -0.45, 0.11)):
        offsets = grid[:, None] - 15.5 - dy, grid[None] - 15.5 - dx
        cover = coverage(shape, *offsets, np.array(radius), np.array(angle))
        assert cover.min() >= 0
        assert cover.max() <= 1
        assert cover.sum() == pytest.approx(AREAS[shape] * radius**2, rel=0.02)
        centre = [float((grid @ cover.sum(axis)) / cover.sum()) for axis in (1, 0)]
        assert centre == pytest.approx([15.5 + dy, 15.5 + dx], abs=0.05)


@pytest.mark.parametrize("background", TEXTURED)
def test_a_pan_by_whole_pixels_is_a_shift(background: str) -> None:
    pan = np.array([[0.0, 0.0], [3.0, 5.0]])
    before, after = render(Scene((), background, pan, 7)).pixels.astype(int)
    assert np.abs(after[3:, 5:] - before[:-3, :-5]).max() <= 1
    assert np.abs(after - before).max() > 5


def test_half_a_pan_twice_is_the_pan() -> None:
    pan = np.array([[0.0, 0.0], [0.5, -1.5], [1.0, -3.0]])
    first, _, third = render(Scene((), "checkered", pan, 3)).pixels.astype(int)
    assert np.abs(third[1:, :-3] - first[:-1, 3:]).max() <= 1


def test_a_bar_hides_sprites_and_nothing_else() -> None:
    still = np.zeros(2)
    sprite = Sprite("square", "red", 12.0, np.full((2, 2), 31.5), still, still + 1)
    scene = Scene((sprite,), "dark", np.zeros((2, 2)), 0)
    clear, hidden = render(scene).pixels, render(replace(scene, bar=(31.5, 8.0))).pixels
    assert np.unique(hidden[:, :, 29:35]).size == 1
    assert np.array_equal(hidden[:, :, :26], clear[:, :, :26])
    assert np.array_equal(hidden[:, :, 37:], clear[:, :, 37:])


@pytest.mark.parametrize("family", FAMILIES)
def test_paths_stay_within_reach_at_any_speed(family: str) -> None:
    generator = np.random.default_rng(1)
    for speed in (0.5, 1.0, 3.0):
        for _ in range(20):
            path = random_path(generator, FRAMES, reach=20.0, speed=speed, family=family)
            assert path.shape == (FRAMES, 2)
            assert np.abs(path).max() <= 20.0 + 1e-9


def test_sprites_stay_on_the_canvas_and_two_stay_apart() -> None:
    for scene in scenes(200, frames=FRAMES):
        for sprite in scene.sprites:
            assert sprite.path.min() >= 0
            assert sprite.path.max() <= SIZE - 1
        if len(scene.sprites) == 2:
            left, right = scene.sprites
            assert left.colour != right.colour
            assert left.path[:, 1].max() < SIZE / 2 < right.path[:, 1].min()


def test_every_kind_of_scene_is_drawn() -> None:
    drawn = scenes(400, frames=3)
    assert {len(scene.sprites) for scene in drawn} == {1, 2}
    assert {sprite.shape for scene in drawn for sprite in scene.sprites} == set(SHAPES)
    assert {sprite.colour for scene in drawn for sprite in scene.sprites} == set(COLOURS)
    assert {scene.background for scene in drawn} == set(BACKGROUNDS)
    assert any(scene.bar for scene in drawn)
    assert any(np.ptp(scene.pan) > 0 for scene in drawn)
    assert any(np.ptp(sprite.angle) > 0 for scene in drawn for sprite in scene.sprites)
    assert any(np.ptp(sprite.scale) > 0 for scene in drawn for sprite in scene.sprites)
    assert all(np.ptp(scene.pan) == 0 for scene in drawn if scene.background not in TEXTURED)


@pytest.mark.parametrize("change", ["subject", "background", "scene"])
def test_recaptioning_changes_what_it_says_and_keeps_the_motion(change: str) -> None:
    generator = np.random.default_rng(5)
    for scene in scenes(30):
        other = recaptioned(scene, change, generator)  # pyright: ignore[reportArgumentType]
        assert (other.background != scene.background) == (change in ("background", "scene"))
        assert other.pan is scene.pan
        for before, after in zip(scene.sprites, other.sprites, strict=True):
            assert (after.shape != before.shape) == (change in ("subject", "scene"))
            assert (after.colour != before.colour) == (change in ("subject", "scene"))
            assert after.path is before.path
        colours = {sprite.colour for sprite in other.sprites}
        assert len(colours) == len(other.sprites)
        if change != "background":
            assert not colours & {sprite.colour for sprite in scene.sprites}
