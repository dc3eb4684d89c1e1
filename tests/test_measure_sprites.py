"""The recognisers at the sizes, blur and noise that are met, and the measures' known answers."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from motionlora.data.benchmark import Reference, references, target_of
from motionlora.data.sprites import COLOURS, RADII, SHAPES, TEXTURED, Scene, Sprite, random_scene, render
from motionlora.infer.measure_direction import turning
from motionlora.infer.measure_sprites import (
    Blob,
    Observation,
    SpriteScores,
    is_camera,
    motion_r2,
    observe,
    scores,
    true_motion,
)

# Gaussian blur in pixels and noise in steps of 255
LEVELS = pytest.mark.parametrize(("blur", "noise"), [(0.0, 0.0), (1.0, 4.0), (1.5, 8.0)])
TIME = np.arange(17.0)[:, None] - 8
ALONG = 31.5 + TIME * np.array([0.5, 2.0])


def degraded(scene: Scene, blur: float, noise: float, *, seed: int = 0) -> np.ndarray:
    pixels = ndimage.gaussian_filter(render(scene).pixels.astype(np.float32), (0, blur, blur, 0))
    pixels += noise * np.random.default_rng(seed).standard_normal(pixels.shape, dtype=np.float32)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def scene_of(
    path: np.ndarray, *, look: tuple[str, str, str] = ("red", "circle", "dark"), radius: float = 10.5
) -> Scene:
    still = np.zeros(len(path))
    colour, shape, background = look
    return Scene((Sprite(shape, colour, radius, path, still + 0.3, still + 1),), background, np.zeros_like(path), 11)


def nearest(blobs: list[Blob], centre: np.ndarray) -> Blob:
    return min(blobs, key=lambda blob: float(np.linalg.norm(blob.centre - centre)))


@LEVELS
def test_recognisers_on_scenes_as_in_pretraining(blur: float, noise: float) -> None:
    generator = np.random.default_rng(123)
    counts, errors, colours, shapes, backgrounds = [], [], [], [], []
    for number in range(60):
        scene = random_scene(generator, frames=5, speed=3.0)
        seen = observe(degraded(replace(scene, bar=None), blur, noise, seed=number))
        backgrounds.append(seen.background == scene.background)
        for frame, blobs in enumerate(seen.blobs):
            counts.append(len(blobs) == len(scene.sprites))
            for sprite in scene.sprites if blobs else ():
                blob = nearest(blobs, sprite.path[frame])
                errors.append(float(np.linalg.norm(blob.centre - sprite.path[frame])))
                colours.append(blob.colour == sprite.colour)
                shapes.append(blob.shape == sprite.shape)
    assert np.mean(counts) == 1.0
    assert max(errors) < 0.5
    assert np.mean(colours) == 1.0
    assert np.mean(shapes) >= 0.95
    assert np.mean(backgrounds) >= 0.95


def test_a_lumpy_shape_is_still_the_one_that_it_overlaps_most() -> None:
    """Outlines under a smooth random warp of one pixel, as generated clips have them."""
    right: dict[str, list[bool]] = {shape: [] for shape in SHAPES}
    for number in range(40):
        generator = np.random.default_rng(number)
        shape = list(SHAPES)[number % 4]
        pixels = render(scene_of(31.5 + np.zeros((1, 2)), look=("red", shape, "light"), radius=11.5)).pixels
        field = ndimage.gaussian_filter(generator.standard_normal((2, 64, 64)), (0, 4, 4))
        places = np.indices((64, 64)) + field / np.sqrt((field**2).mean())
        warped = [ndimage.map_coordinates(pixels[0, ..., c].astype(float), places, order=1) for c in range(3)]
        seen = observe(np.clip(np.stack(warped, -1), 0, 255).astype(np.uint8)[None])
        right[shape] += [blobs[0].shape == shape for blobs in seen.blobs]
    assert {shape: np.mean(hits) >= 0.9 for shape, hits in right.items()} == dict.fromkeys(SHAPES, True)


@LEVELS
@pytest.mark.parametrize("radius", [RADII[0] * 0.85, RADII[1]], ids=["smallest", "largest"])
def test_every_shape_in_every_colour_at_the_sizes_in_use(radius: float, blur: float, noise: float) -> None:
    right = []
    for number, (colour, shape) in enumerate((colour, shape) for colour in COLOURS for shape in SHAPES):
        path = 31.5 + np.random.default_rng(number).uniform(-9, 9, (3, 2))
        scene = scene_of(path, look=(colour, shape, ("dark", "light", "cloudy")[number % 3]), radius=radius)
        turned = replace(scene, sprites=(replace(scene.sprites[0], angle=np.array([0.1, 0.7, 2.0]) * number),))
        for frame, blobs in enumerate(observe(degraded(turned, blur, noise, seed=number)).blobs):
            assert [blob.colour for blob in blobs] == [colour]
            assert np.linalg.norm(blobs[0].centre - path[frame]) < 0.5
            right.append(blobs[0].shape == shape)
    assert np.mean(right) >= 0.95


@LEVELS
@pytest.mark.parametrize("name", ["camera-v", "camera-s", "camera-circle", "camera-eight"])
def test_the_camera_is_followed(name: str, blur: float, noise: float) -> None:
    scene = next(reference.scene for reference in references() if reference.name == name)
    r2, gain, cosine = motion_r2(observe(degraded(scene, blur, noise)).camera, scene.pan)
    assert r2 > 0.98
    assert gain == pytest.approx(1, abs=0.06)
    assert cosine > 0.95


@pytest.mark.parametrize("background", ["dark", *TEXTURED])
def test_a_moving_sprite_does_not_move_the_camera(background: str) -> None:
    seen = observe(render(scene_of(ALONG, look=("red", "circle", background))).pixels)
    assert np.abs(seen.camera).max() < 0.1
    assert seen.background == background


@pytest.mark.parametrize("background", ["dark", "light", *TEXTURED])
def test_an_empty_scene_shows_no_sprite(background: str) -> None:
    empty = Scene((), background, np.zeros((5, 2)), 3)
    seen = observe(degraded(empty, 1.0, 8.0))
    assert seen.blobs == [[]] * 5
    assert seen.background == background
    verdict = scores(seen, scene_of(ALONG[:5]), scene_of(ALONG[:5]))
    assert (verdict.smf, verdict.coverage, verdict.extra) == (0, 0, 0)


def test_a_bar_changes_neither_background_nor_count_and_the_path_goes_on_behind_it() -> None:
    path = 31.5 + np.stack([0 * TIME[:, 0], 2 * TIME[:, 0]], 1)
    for background in ("dark", "light", "cloudy", "checkered"):
        scene = replace(scene_of(path, look=("yellow", "square", background)), bar=(32.0, 9.0))
        seen = observe(render(scene).pixels)
        verdict = scores(seen, scene, scene)
        assert seen.background == background
        assert verdict.extra == 0, "two halves of a sprite are one sprite"
        assert verdict.coverage == 1
        assert verdict.smf > 0.97
        assert verdict.acc == 1, "nobody is asked for the shape of what is hidden"
        assert any(blob.hidden for blobs in seen.blobs for blob in blobs)
        assert not all(blob.hidden for blobs in seen.blobs for blob in blobs)


def blob_at(centre: np.ndarray, *, area: int = 300, colour: str = "red") -> Blob:
    return Blob(centre, area, colour, "circle")


def test_frames_that_show_a_small_part_of_the_sprite_tell_no_position() -> None:
    blobs = [[blob_at(centre)] for centre in ALONG]
    for frame in (3, 4, 5):
        blobs[frame] = [blob_at(ALONG[frame] + 6.0, area=100)]
    scene = scene_of(ALONG)
    verdict = scores(Observation(blobs, "dark", np.zeros_like(ALONG)), scene, scene)
    assert verdict.smf == pytest.approx(1)
    assert verdict.coverage == 1


@pytest.mark.parametrize(("blank", "smf"), [(8, 1.0), (9, 0.0)])
def test_a_sprite_seen_in_less_than_half_of_the_frames_has_no_motion(blank: int, smf: float) -> None:
    blobs = [[] if frame < blank else [blob_at(centre)] for frame, centre in enumerate(ALONG)]
    scene = scene_of(ALONG)
    verdict = scores(Observation(blobs, "dark", np.zeros_like(ALONG)), scene, scene)
    assert verdict.smf == pytest.approx(smf)
    assert verdict.coverage == pytest.approx(1 - blank / 17)


def test_sprites_that_nobody_asked_for_are_counted() -> None:
    scene = scene_of(ALONG)
    blobs = [[blob_at(centre), blob_at(np.full(2, 8.0), area=60, colour="blue")] for centre in ALONG]
    verdict = scores(Observation(blobs, "dark", np.zeros_like(ALONG)), scene, scene)
    assert verdict.extra == 1
    assert verdict.acc == 1


# evaluation by hand for a reference that moves (2, 9) pixels a frame: R2, gain, cosine
MIRRORED = (4 - 81) / 85
TABLE = {
    "same": (lambda c: c, 1, 1, 1),
    "reversed": (lambda c: -c, -3, -1, -1),
    "static": (lambda c: 0 * c, 0, 0, 0),
    "half speed": (lambda c: c / 2, 0.75, 0.5, 1),
    "shifted start": (lambda c: c + 11.0, 1, 1, 1),
    "mirrored": (lambda c: c * np.array([1, -1]), 1 - 4 * 81 / 85, MIRRORED, MIRRORED),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_measures_of_known_motions(name: str) -> None:
    made, *expected = TABLE[name]
    truth = TIME * np.array([2.0, 9.0])
    assert motion_r2(made(truth) + 32.0, truth) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", TABLE)
def test_the_measures_of_known_motions_through_pixels(name: str) -> None:
    made, r2, gain, _ = TABLE[name]
    centred = ALONG - 31.5
    if name == "mirrored":
        r2, gain = 1 - 4 * 4 / 4.25, (0.25 - 4) / 4.25
    path = 31.5 + np.clip(made(centred), -18, 20)
    if name == "shifted start":
        path = ALONG + np.array([5.0, 3.0])
    verdict = scores(observe(render(scene_of(path)).pixels), scene_of(ALONG), scene_of(ALONG))
    assert verdict.smf == pytest.approx(max(r2, -1), abs=0.02)
    assert verdict.gain == pytest.approx(gain, abs=0.02)


def test_where_nothing_should_move_only_stillness_is_right() -> None:
    still = np.full((17, 2), 31.5)
    assert motion_r2(still + 5, still) == (1, 1, 1)
    assert motion_r2(ALONG, still) == (0, 0, 0)
    assert motion_r2(np.full((17, 2), np.nan), ALONG) == (0, 0, 0)


def test_a_camera_scene_pans_behind_sprites_that_stay() -> None:
    still, pan = np.full((17, 2), 31.5), ALONG - ALONG[0]
    resting, moving = scene_of(still), scene_of(ALONG)
    verdicts = [is_camera(s) for s in (replace(resting, pan=pan), replace(moving, pan=pan), resting, moving)]
    assert verdicts == [True, False, False, False]
    assert np.array_equal(true_motion(replace(resting, pan=pan))[0], pan)
    assert np.array_equal(true_motion(replace(moving, pan=pan))[0], ALONG)
    assert [is_camera(r.scene) for r in references()] == [r.kind == "camera" for r in references()]


@pytest.mark.parametrize("reference", references(), ids=lambda reference: reference.name)
def test_reconstruction_perfect_transfer_and_no_transfer(reference: Reference) -> None:
    target = target_of(reference, "scene")

    def of(scene: Scene) -> SpriteScores:
        return scores(observe(render(scene).pixels), target, reference.scene)

    copy, perfect = of(reference.scene), of(target)
    rested = tuple(replace(sprite, path=np.full_like(sprite.path, sprite.path[0])) for sprite in target.sprites)
    nothing = of(replace(target, sprites=rested, pan=0 * target.pan))
    assert copy.smf > 0.99
    # a pair is asked for some of the shapes that the reference's other sprite has
    asked = {sprite.shape for sprite in target.sprites} & {sprite.shape for sprite in reference.scene.sprites}
    assert copy.acc == pytest.approx(0.2 * len(asked), abs=1e-9)
    assert copy.leak > 0.95
    assert perfect.smf > 0.99
    assert perfect.gain == pytest.approx(1, abs=0.03)
    assert perfect.acc == 1
    assert perfect.leak == 0
    assert perfect.extra == copy.extra == 0
    assert abs(nothing.smf) < 0.02
    assert nothing.acc > 0.99
    assert nothing.leak == 0


def test_leak_is_judged_only_where_the_caption_differs() -> None:
    reference = scene_of(ALONG)
    target = scene_of(ALONG, look=("blue", "circle", "dark"))
    verdict = scores(observe(render(reference).pixels), target, reference)
    assert verdict.acc == pytest.approx(2 / 3)
    assert verdict.leak == 1
    assert scores(observe(render(reference).pixels), reference, reference).leak == 0


def test_two_sprites_are_matched_by_their_motion_whichever_is_larger() -> None:
    left, right = np.array([31.5, 15.5]) + TIME * [1.0, 0.0], np.array([31.5, 47.5]) - TIME * [1.0, 0.0]
    pair = replace(scene_of(left), sprites=scene_of(left, radius=8).sprites + scene_of(right, radius=9).sprites)
    other = replace(pair.sprites[1], colour="blue", shape="star")
    target = replace(pair, sprites=(pair.sprites[0], other))
    swapped = replace(target, sprites=target.sprites[::-1])
    for scene in (target, swapped):
        verdict = scores(observe(render(scene).pixels), target, target)
        assert verdict.smf > 0.99
        assert verdict.acc == 1


def test_who_turns_round_with_the_reference_is_selective_and_a_tremble_of_frames_does_not_count() -> None:
    reference = next(r for r in references() if r.name == "zigzag")
    path = reference.scene.sprites[0].path
    there, back = (observe(render(r.scene).pixels) for r in (reference, reference.reversed()))
    assert turning(there, back, path) == pytest.approx((1, 1), abs=0.05)
    assert turning(back, there, path) == pytest.approx((-1, -1), abs=0.05)
    assert turning(there, there, path) == (0, 0)
    shaking = np.where(np.arange(len(path)) % 2, 1.5, -1.5)[:, None]  # is where it was after each four frames
    moved = [replace(b[0], centre=tuple(np.add(b[0].centre, s))) for b, s in zip(there.blobs, shaking, strict=True)]
    trembling = replace(there, blobs=[[blob] for blob in moved])
    assert turning(trembling, back, path)[0] == pytest.approx(1, abs=0.05)
    assert turning(trembling, back, path, pooled=1)[0] < 0.8
    hidden = replace(there, blobs=[[] if frame in (9, 30) else b for frame, b in enumerate(there.blobs)])
    assert turning(hidden, back, path)[0] == pytest.approx(1, abs=0.05)
