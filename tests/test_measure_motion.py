"""Known answers of the motion measures, from arithmetic, brute force and scipy; the tracker on motion that is known."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from bench_measures import moved_otherwise, seen_in_a_mirror, standing
from scipy import ndimage, stats
from scipy.spatial import distance

from motionlora.data.benchmark import Reference, played_backwards, references
from motionlora.data.clip import Clip, backwards, mirrored
from motionlora.data.errors import InputError
from motionlora.data.sprites import SIZE, Scene, Sprite, coverage, render
from motionlora.infer.check_tracker import TrackerCheck, check_tracker, judged, sprite_mask, translations, true_tracks
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
    net_direction,
    track_motion,
    velocity_field,
)
from motionlora.infer.measure_sprites import is_camera, motion_r2, true_motion
from motionlora.infer.track_points import OpticalFlowTracker, Tracks, colours_at, grid_points

FRAMES = 25
TIME = np.arange(float(FRAMES))[:, None]
TRACKER = OpticalFlowTracker(side=20)


def walks(count: int, *, seed: int = 0, frames: int = FRAMES) -> np.ndarray:
    """Random walks whose steps have independent directions, "point frame 2"."""
    return 30 + np.cumsum(np.random.default_rng(seed).normal(size=(count, frames, 2)), axis=1)


def parallel(count: int, *, step: tuple[float, float] = (1.0, 2.0)) -> np.ndarray:
    return np.random.default_rng(1).uniform(10, 50, (count, 1, 2)) + TIME * np.array(step)


def turned(paths: np.ndarray, angle: float) -> np.ndarray:
    return paths @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


# made of 200 parallel tracks: motion, mf_code, mf_sym
CONSTANT = {
    "identical": (lambda p: p, 1.0, 1.0),
    "reversed in time": (lambda p: p[:, ::-1], -1.0, -1.0),
    "perpendicular": (lambda p: turned(p, np.pi / 2), 0.0, 0.0),
    "turned by 40 degrees": (lambda p: turned(p, np.deg2rad(40)), np.cos(np.deg2rad(40)), np.cos(np.deg2rad(40))),
    "elsewhere": (lambda p: p + 20, 1.0, 1.0),
    "twice as fast": (lambda p: p * 2, 1.0, 1.0),
    "standing still": (lambda p: p * 0, 0.0, 0.0),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_motion_fidelity_of_a_translation(name: str) -> None:
    made, code, sym = CONSTANT[name]
    paths = parallel(200)
    assert mf_code(made(paths), paths) == pytest.approx(code, abs=1e-9)
    assert mf_sym(made(paths), paths) == pytest.approx(sym, abs=1e-9)
    assert mf_moving(made(paths), paths) == pytest.approx(sym, abs=1e-9)


def test_the_identity_takes_the_true_match_from_the_published_script() -> None:
    """0.390 was computed for 200 random walks of 25 frames; without the identity it is 1."""
    values = [mf_code(paths, paths) for paths in (walks(200, seed=seed) for seed in range(8))]
    assert np.mean(values) == pytest.approx(0.39, abs=0.01)
    assert mf_sym(walks(200), walks(200)) == pytest.approx(1)


def test_one_track_of_200_decides_by_the_direction_of_the_maximum() -> None:
    there, back = parallel(200), parallel(200)[:, ::-1]
    one_right = np.concatenate([there[:1], back[1:]])
    assert mf_code(one_right, there) == pytest.approx((1 - 199) / 200)  # max over the reference
    assert mf_sym(one_right, there) == pytest.approx(0.5 * (-0.99 + 1))  # the other maximum is 1
    one_reversed = np.concatenate([back[:1], there[1:]])
    # every track finds the reversed one, but for the track of the same number: the identity takes 1 from its match
    assert mf_code(back, one_reversed) == pytest.approx(199 / 200)
    assert mf_sym(back, one_reversed) == pytest.approx(0.5 * (1 - 0.99))


@pytest.mark.parametrize(("steps", "floor"), [(5, 0.74), (8, 0.61), (15, 0.45), (24, 0.355), (48, 0.26), (80, 0.20)])
def test_unrelated_tracks_reach_the_known_chance_level(steps: int, floor: float) -> None:
    pairs = [(walks(100, seed=2 * s, frames=steps + 1), walks(100, seed=2 * s + 1, frames=steps + 1)) for s in range(6)]
    assert np.mean([mf_code(*pair) for pair in pairs]) == pytest.approx(floor, abs=0.012)


def by_hand(generated: np.ndarray, reference: np.ndarray, *, identity: bool, still: float, moving: bool) -> float:
    """Motion fidelity in loops, straight from its definition."""
    table = np.full((len(generated), len(reference)), np.nan)
    for a, ours in enumerate(generated):
        for b, theirs in enumerate(reference):
            agreed, shared = [], 0
            for v, w in zip(np.diff(ours, axis=0), np.diff(theirs, axis=0), strict=True):
                if np.isnan(v).any() or np.isnan(w).any():
                    continue
                shared += 1
                if moving and np.hypot(*w) < still:
                    continue
                slow = int(np.hypot(*v) < still) + int(np.hypot(*w) < still)
                agreed.append({0: lambda v=v, w=w: 1 - distance.cosine(v, w), 1: lambda: 0.0, 2: lambda: 1.0}[slow]())
            if agreed and shared >= (ours.shape[0] - 1) / 2:
                table[a, b] = np.mean(agreed) - (identity and a == b)
    rows, columns = ([np.nanmax(r) for r in t if np.isfinite(r).any()] for t in (table, table.T))
    return float(np.mean(rows)) if identity else float((np.mean(rows) + np.mean(columns)) / 2)


@pytest.mark.parametrize("seed", range(3))
def test_motion_fidelity_against_loops(seed: int) -> None:
    generated, reference = walks(9, seed=seed), walks(7, seed=seed + 50)
    code = by_hand(generated, reference, identity=True, still=1e-8, moving=False)
    assert mf_code(generated, reference) == pytest.approx(code, abs=1e-12)
    lost = np.random.default_rng(seed)
    for paths in (generated, reference):
        paths[lost.random(paths.shape[:2]) < 0.2] = np.nan
    for measure, moving in ((mf_sym, False), (mf_moving, True)):
        expected = by_hand(generated, reference, identity=False, still=0.8, moving=moving)
        assert measure(generated, reference, still=0.8) == pytest.approx(expected, abs=1e-12)


def test_laws_of_the_symmetric_motion_fidelity() -> None:
    generated, reference = walks(30), walks(40, seed=9)
    order = np.random.default_rng(0).permutation(30)
    value = mf_sym(generated, reference)
    assert -1 < value < 1
    assert mf_sym(reference, generated) == pytest.approx(value, abs=1e-12)
    assert mf_sym(generated[order], reference) == pytest.approx(value, abs=1e-12)
    assert mf_sym(generated + 7.5, reference - 3) == pytest.approx(value, abs=1e-12)
    assert mf_sym(turned(generated, 1), turned(reference, 1), still=0) == pytest.approx(
        mf_sym(generated, reference, still=0)
    )
    mixed = np.concatenate([walks(30), parallel(30)])
    shuffled = mixed[np.random.default_rng(0).permutation(60)]
    assert mf_sym(shuffled, mixed) == pytest.approx(1)
    assert abs(mf_code(shuffled, mixed) - mf_code(mixed, mixed)) > 0.05, "its identity depends on the order of tracks"


def test_stillness_agrees_with_stillness_alone() -> None:
    moving, resting = parallel(10), np.repeat(parallel(10)[:, :1], FRAMES, 1)
    jitter = np.random.default_rng(3).normal(scale=0.02, size=resting.shape)
    assert mf_sym(resting + jitter, resting) == 1
    assert mf_sym(resting + jitter, moving) == mf_sym(moving, resting + jitter) == 0
    assert np.isnan(mf_moving(resting, resting))
    assert mf_code(resting, resting) <= 0, "a number, where the scripts have NaN"
    shaking = [np.random.default_rng(seed).normal(scale=0.04, size=resting.shape) for seed in (4, 5)]
    clips = [np.concatenate([moving, resting + shake]) for shake in shaking]
    assert mf_moving(*clips) == pytest.approx(1), "tracks that only shake are not asked"


def test_a_small_object_hides_from_motion_fidelity_and_not_from_its_masked_kind() -> None:
    """One point in ten moves, the others jitter: perfect, none and opposite motion, over all and over the moving."""
    start, generator = np.random.default_rng(0).uniform(0, 60, (200, 1, 2)), np.random.default_rng(5)

    def scene(speed: float) -> np.ndarray:
        jitter = generator.normal(scale=0.02, size=(200, FRAMES, 2))
        return start + jitter + np.where(np.arange(200) < 20, speed, 0)[:, None, None] * TIME * np.array([0.6, 0.8])

    reference, outputs = scene(2.0), [scene(speed) for speed in (2.0, 0.0, -2.0)]
    over_all = [mf_code(output, reference) for output in outputs]
    assert max(over_all) - min(over_all) < 0.25
    assert [mf_sym(output[:20], reference[:20]) for output in outputs] == pytest.approx([1, 0, -1], abs=0.01)


def test_points_are_chosen_by_where_they_start() -> None:
    paths = np.array([[10.4, 20.4], [11.0, 20.0], [70.0, -3.0]])[:, None] + TIME * 3.0
    mask = np.zeros((64, 64), bool)
    mask[10, 20] = mask[63, 0] = True
    chosen = Tracks(paths, np.arange(3)[:, None] + 0 * TIME.T > 0).within(mask)
    assert np.array_equal(chosen.positions, paths[[0, 2]])
    assert chosen.visible.any(1).tolist() == [False, True]


def test_frames_that_differ_are_cut_by_the_script_and_refused_by_ours() -> None:
    paths = parallel(5)
    assert mf_code(paths[:, :9], paths) == mf_code(paths, paths[:, :9]) == pytest.approx(1)
    for measure in (mf_sym, mf_moving, lambda a, b: mf_frechet(a, b, 64, 64), track_motion):
        with pytest.raises(InputError, match="25"):
            measure(paths[:, :9], paths)


def test_tracks_seen_together_in_less_than_half_of_the_steps_do_not_match() -> None:
    early, late = parallel(4), parallel(4)
    early[:, 14:], late[:, :10] = np.nan, np.nan
    assert np.isnan(mf_sym(early, late))
    assert np.isnan(mf_sym(np.full_like(early, np.nan), early))
    assert np.isnan(mf_code(early[:0], early))
    early, late = parallel(4), parallel(4)
    early[:, 19:], late[:, :6] = np.nan, np.nan
    assert mf_sym(early, late) == pytest.approx(1)


def test_chance_is_taken_off() -> None:
    reference, others = walks(100), [walks(100, seed=seed) for seed in range(1, 5)]
    null = mf_null(mf_sym, reference, others)
    assert null == pytest.approx(0.36, abs=0.02)
    assert mf_star(mf_sym(reference, reference), null) == pytest.approx(1)
    assert mf_star(null, null) == 0
    assert mf_star(mf_sym(walks(100, seed=77), reference), null) == pytest.approx(0, abs=0.05)
    assert np.isnan(mf_star(1, 1))
    assert np.isnan(mf_null(mf_sym, reference, []))


# reference (2, 9) pixels a frame: R2 clipped to [-1, 1], gain, cosine of steps, cosine of the net displacement
CROSS = (4 - 81) / 85
MATCHED = {
    "same": (lambda p: p, 1, 1, 1, 1),
    "reversed": (lambda p: p[:, ::-1], -1, -1, -1, -1),
    "static": (lambda p: p * 0, 0, 0, 0, 0),
    "half speed": (lambda p: p / 2, 0.75, 0.5, 1, 1),
    "shifted": (lambda p: p + 11, 1, 1, 1, 1),
    "mirrored": (lambda p: p * np.array([1, -1]), -1, CROSS, CROSS, CROSS),
}


@pytest.mark.parametrize("name", MATCHED)
def test_matched_tracks_tell_size_and_sign(name: str) -> None:
    made, *expected = MATCHED[name]
    truth = parallel(6, step=(2.0, 9.0))
    motion = track_motion(made(truth), truth)
    assert [motion.r2, motion.gain, motion.vcos, motion.net] == pytest.approx(expected, abs=1e-9)


def test_matched_tracks_against_a_regression_of_scipy() -> None:
    """Gain is the slope of observed on true, R2 that of a line of slope 1: one axis, so that scipy has it, too."""
    truth, observed = walks(1), walks(1) * 0.7 + walks(1, seed=4)
    truth[..., 0] = observed[..., 0] = 5
    line: Any = stats.linregress(truth[0, :, 1], observed[0, :, 1])
    assert track_motion(observed, truth).gain == pytest.approx(line.slope)
    assert motion_r2(observed[0], truth[0])[0] == pytest.approx(
        1 - np.var(observed[0, :, 1] - truth[0, :, 1]) / np.var(truth[0, :, 1])
    )


def test_matched_tracks_leave_out_what_is_unseen_or_rests() -> None:
    truth = np.concatenate([parallel(4), np.repeat(parallel(9)[:, :1], FRAMES, 1)])
    observed = truth + 1.0
    observed[4:] += TIME  # where the truth rests nothing is asked
    observed[0, 5:9], truth[1, 20:] = np.nan, np.nan
    truth[2, 1:] = np.nan
    motion = track_motion(observed, truth)
    assert (motion.r2, motion.gain, motion.vcos, motion.net) == pytest.approx((1, 1, 1, 1))
    assert track_motion(observed[1:2], truth[1:2]).r2 == pytest.approx(1), "not NaN"
    resting = track_motion(truth[4:], truth[4:])
    assert (resting.r2, resting.gain, resting.vcos) == (1, 1, 1)
    assert np.isnan(resting.net)
    assert np.isnan(track_motion(truth * np.nan, truth * np.nan).r2)


def test_net_direction() -> None:
    loop = np.stack([np.sin(TIME[:, 0] * 2 * np.pi / 24), np.cos(TIME[:, 0] * 2 * np.pi / 24)], 1) * 9
    line = TIME * np.array([1.0, 0.5])
    assert np.isnan(net_direction(line, loop))
    assert net_direction(loop, line) == 0
    assert net_direction(turned(line, 1.0), line) == pytest.approx(np.cos(1.0))
    assert np.isnan(net_direction(line * np.nan, line))


def test_the_common_path_follows_the_majority() -> None:
    path = np.cumsum(np.random.default_rng(0).normal(size=(FRAMES, 2)), axis=0)
    paths = np.random.default_rng(1).uniform(0, 60, (11, 1, 2)) + path
    paths[:4] += TIME * 5.0
    paths[9, 3:], paths[10, :8] = np.nan, np.nan
    assert common_path(paths) == pytest.approx(path - path[0])
    paths[:, 12] = np.nan
    gap = np.diff(common_path(paths), axis=0)
    assert np.isfinite(gap).all()
    assert gap[[11, 12]] == pytest.approx(0)


def test_the_velocity_field_is_the_mean_step_of_each_cell() -> None:
    paths = np.random.default_rng(2).uniform(-0.5, 31.4, (60, 1, 2)) + walks(60) - walks(60)[:, :1]
    paths[3, 4:9] = np.nan
    field = velocity_field(paths, 32, 48, 4)
    steps = np.diff(paths, axis=1)
    for step, row, column in ((0, 0, 0), (0, 2, 1), (5, 1, 2), (5, 3, 0)):
        cells = np.floor((paths[:, step] + 0.5) / np.array([8, 12])).clip(0, 3)
        inside = (cells == (row, column)).all(1) & np.isfinite(steps[:, step]).all(1)
        expected = steps[inside, step].mean(0) if inside.any() else np.zeros(2)
        assert field[step, row, column] == pytest.approx(expected)
    assert field[:, :, 3].any() == (paths[..., 1] > 35.5).any()


def test_selectivity() -> None:
    plus, minus = walks(5, seed=1), walks(5, seed=2)
    leaked = walks(5, seed=3) * 4
    assert selectivity(plus, minus, plus, minus) == pytest.approx((1, 1))
    assert selectivity(minus, plus, plus, minus) == pytest.approx((-1, -1))
    assert selectivity(leaked + plus / 2, leaked + minus / 2, plus, minus) == pytest.approx((1, 0.5))
    assert selectivity(leaked, leaked, plus, minus) == (0, 0)
    assert np.isnan(selectivity(plus, minus, plus, plus)).all()
    expected = 1 - distance.cosine((leaked - minus).ravel(), (plus - minus).ravel())
    assert selectivity(leaked, minus, plus, minus)[0] == pytest.approx(expected)
    broken = plus.copy()
    broken[0] = np.nan
    assert selectivity(broken, minus, plus, minus) == pytest.approx((1, 1))


def leash(p: np.ndarray, q: np.ndarray) -> float:
    """Discrete Frechet distance by recursion over its definition."""

    @lru_cache(None)
    def to(i: int, j: int) -> float:
        here = distance.euclidean(p[i], q[j])
        ways = [to(a, b) for a, b in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if a >= 0 and b >= 0]
        return max(here, min(ways)) if ways else here

    return to(len(p) - 1, len(q) - 1)


@pytest.mark.parametrize(("frames", "steps"), [(1, 1), (1, 6), (9, 9), (7, 12)])
def test_frechet_against_recursion(frames: int, steps: int) -> None:
    p, q = walks(5, frames=frames), walks(5, seed=1, frames=steps)
    assert frechet(p, q) == pytest.approx([leash(a, b) for a, b in zip(p, q, strict=True)])
    assert frechet(q, p) == pytest.approx(frechet(p, q))
    hausdorff = [
        max(distance.directed_hausdorff(a, b)[0], distance.directed_hausdorff(b, a)[0])
        for a, b in zip(p, q, strict=True)
    ]
    assert (frechet(p, q) >= np.array(hausdorff) - 1e-12).all(), "order can only lengthen the leash"


def test_frechet_of_known_paths() -> None:
    line = TIME * np.array([0.6, 0.8])
    assert frechet(line, line) == 0
    assert frechet(line, line[::-1]) == pytest.approx(24), "the ends lie the whole length apart"
    assert frechet(line, line + np.array([3.0, 4.0])) == pytest.approx(5)
    assert frechet(line, line[:, None].repeat(3, 1).reshape(-1, 2)) == 0, "waiting costs nothing"
    gaps = line.copy()
    gaps[[0, 1, 7, 8, 24]] = np.nan
    assert frechet(gaps, line[::2]) == pytest.approx(leash(gaps[np.isfinite(gaps[:, 0])], line[::2]))
    assert np.isnan(frechet(line * np.nan, line))


def test_the_hybrid_fidelity_sees_the_order_of_frames() -> None:
    paths = parallel(8)
    size = np.hypot(*(paths[0, -1] - paths[0, 0])) / 64
    assert mf_frechet(paths, paths, 64, 64) == pytest.approx(1)
    assert mf_frechet(paths[:, ::-1], paths, 64, 64) == pytest.approx(0.5 * np.exp(-size) - 0.5)
    assert mf_frechet(paths + np.array([6.4, 0]), paths, 64, 64) == pytest.approx(0.5 * np.exp(-0.1) + 0.5)


def noise_pan(path: np.ndarray, *, height: int = 48, width: int = 64) -> np.ndarray:
    """Smooth noise on a torus, moved exactly by the phases of its spectrum, seen through a window of its middle."""
    noise = np.random.default_rng(0).normal(size=(128, 128))
    spectrum = np.fft.fft2(ndimage.gaussian_filter(noise, 1.5, mode="wrap"))
    ky, kx = np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128)
    frames = [np.fft.ifft2(spectrum * np.exp(-2j * np.pi * (ky * y + kx * x))).real for y, x in path]
    field = np.stack(frames)[:, :height, :width]
    luma = np.clip(128 + 40 * field / field.std(), 0, 255).astype(np.uint8)
    return np.repeat(luma[..., None], 3, -1)


@pytest.mark.parametrize("step", [(0.0, 0.0), (1.0, -2.0), (0.3, 0.0), (-0.7, 2.45), (6.5, -9.25)])
def test_phase_correlation_follows_a_camera_below_a_pixel(step: tuple[float, float]) -> None:
    path = TIME[:9] * np.array(step)
    seen = phase_camera(noise_pan(path))
    assert np.abs(np.diff(seen - path, axis=0)).max() < 0.25
    assert motion_r2(seen, path)[0] > 0.99


def test_phase_correlation_with_an_object_hidden_and_without_texture() -> None:
    path = TIME[:9] * np.array([0.5, -1.5])
    pixels, hidden = noise_pan(path), np.zeros((9, 48, 64), bool)
    for frame in range(9):
        hidden[frame, 10:30, 5 * frame : 5 * frame + 20] = True
    pixels[hidden] = 255
    assert motion_r2(phase_camera(pixels, hidden), path)[0] > 0.98
    assert not phase_camera(np.full((4, 32, 32, 3), 90, np.uint8)).any()
    assert phase_camera(pixels[:1]).tolist() == [[0, 0]]


@pytest.fixture(scope="module")
def check() -> TrackerCheck:
    return check_tracker(TRACKER)


def test_the_tracker_is_exact_below_a_pixel(check: TrackerCheck) -> None:
    assert check.passed, str(check)
    assert "good enough" in str(check)
    assert "NOT" not in str(check)
    assert check.error < 0.6
    assert check.seen > 0.8


def test_a_tracker_that_guesses_or_gives_up_does_not_pass() -> None:
    class Still:
        def track(self, clip: Clip) -> Tracks:
            points = grid_points(clip.height, clip.width, 12)
            return Tracks(np.repeat(points[:, None], clip.frames, 1), np.ones((144, clip.frames), bool))

    class Blind(Still):
        def track(self, clip: Clip) -> Tracks:
            return replace(super().track(clip), visible=np.arange(clip.frames) + np.zeros((144, 1)) < 1)

    verdicts = [check_tracker(Still()), check_tracker(Blind())]
    assert not any(verdict.passed for verdict in verdicts)
    assert verdicts[0].error > 5
    assert "NOT good enough" in str(verdicts[1])
    assert not TrackerCheck(0.1, 0.2, 0.05, {}).passed, "exact, because it gives up"


def test_true_tracks_carry_points_with_their_sprite() -> None:
    """A turning, growing square: each point keeps its place in the square, as the renderer's own coverage sees it."""
    frames = 5
    path = 30 + np.arange(frames)[:, None] * np.array([1.0, 2.0])
    sprite = Sprite("square", "red", 10.0, path, np.linspace(0.2, 1.4, frames), np.linspace(1, 1.2, frames))
    scene = Scene((sprite,), "cloudy", np.arange(frames)[:, None] * np.array([-1.0, 0.5]), 3, bar=(60.0, 6.0))
    inside = np.array([[6.0, 1.0], [0.0, -3.0]])
    points = np.concatenate([path[0] + inside, [[5.0, 5.0], [3.0, 60.0], [38.0, 36.0]]])
    tracks = true_tracks(scene, points)
    for offset, positions in zip(inside, tracks.positions, strict=False):
        from_edge = [
            coverage("square", dy, dx, sprite.radius * sprite.scale[f] * share, sprite.angle[f])
            for share in np.linspace(0.2, 1, 9)
            for f, (dy, dx) in enumerate(positions - path)
        ]
        assert np.ptp(np.reshape(from_edge, (9, frames)), axis=1).max() < 0.25
        assert np.linalg.norm(positions - path, axis=1) == pytest.approx(np.hypot(*offset) * sprite.scale)
    assert tracks.positions[2] == pytest.approx(points[2] + scene.pan)
    assert tracks.positions[3] == pytest.approx(np.repeat(points[3:4], frames, 0))
    assert tracks.visible[[0, 1, 3]].all()
    assert tracks.visible[2].tolist() == [True] * 5
    assert tracks.visible[4].tolist() == [True, False, False, False, False], "the square comes over it"


def test_points_behind_a_sprite_or_outside_are_invisible() -> None:
    scene = translations()["walk-square-dark"]
    mask = sprite_mask(scene)
    assert mask.sum() == pytest.approx(2 * 11.0**2, rel=0.05), "the area of a square of circumscribed radius 11"
    assert mask[46, 14]
    pan = replace(scene, sprites=(), pan=np.linspace(0, 70, 49)[:, None] * np.array([1.0, 0.0]))
    assert true_tracks(pan, np.array([[2.0, 9.0]])).visible[0].tolist() == (pan.pan[:, 0] + 2 <= SIZE - 0.5).tolist()


def test_tracks_of_a_mirrored_and_of_a_reversed_clip() -> None:
    scene = next(r.scene for r in references() if r.name == "camera-circle")
    whole = render(scene)
    clip = replace(whole, pixels=whole.pixels[:17])  # later most of what was there at first has left the frame
    scene = replace(scene, pan=scene.pan[:17])
    assert np.array_equal(mirrored(mirrored(clip)).pixels, clip.pixels)
    assert np.array_equal(backwards(backwards(clip)).pixels, clip.pixels)
    open_ = np.logical_not(
        ndimage.binary_dilation(sprite_mask(scene), iterations=6)
    )  # the sprite rests, and what is beside it
    there = common_path(TRACKER.track(clip).within(open_).seen)
    other = common_path(TRACKER.track(mirrored(clip)).within(open_[:, ::-1]).seen)
    assert other == pytest.approx(there * np.array([1, -1]), abs=0.5)
    back = common_path(TRACKER.track(backwards(clip)).within(open_).seen)
    assert back == pytest.approx(there[::-1] - there[-1], abs=0.5)
    assert there == pytest.approx(scene.pan - scene.pan[0], abs=0.5)
    fields = [velocity_field(TRACKER.track(c).seen, SIZE, SIZE, 4) for c in (clip, backwards(clip))]
    score, gain = selectivity(*fields, *(np.diff(p, axis=0)[:, None, None] + 0 * fields[0] for p in (there, back)))
    assert score > 0.75
    assert 0.5 < gain < 1.1, "cells without a point count as still"


@pytest.mark.parametrize("reference", references(), ids=lambda reference: reference.name)
def test_scenes_of_the_controls_move_as_their_names_say(reference: Reference) -> None:
    """Backwards and in a mirror against the pixels of the clip, still and moved otherwise against the true tracks."""
    scene, clip = reference.scene, render(reference.scene)
    assert np.array_equal(render(played_backwards(scene)).pixels, backwards(clip).pixels)
    assert np.ptp(render(standing(scene)).pixels.astype(int), axis=0).max() == 0
    assert np.array_equal(render(standing(scene)).pixels[-1], clip.pixels[0])
    points = grid_points(SIZE, SIZE, 9)
    there, glass = true_tracks(scene, points), true_tracks(seen_in_a_mirror(scene), points * [1, -1] + [0, SIZE - 1])
    assert glass.positions == pytest.approx(there.positions * [1, -1] + [0, SIZE - 1])
    assert (glass.visible == there.visible).mean() > 0.99, "but for points on a rim"
    other = moved_otherwise(scene, np.random.default_rng(0))
    assert is_camera(other) == is_camera(scene)
    assert [sprite.shape for sprite in other.sprites] == [sprite.shape for sprite in scene.sprites]
    assert np.ptp(true_motion(other), axis=1).max() > 5
    assert max(motion_r2(a, b)[0] for a, b in zip(true_motion(other), true_motion(scene), strict=True)) < 0.9
    for sprite in other.sprites:
        assert (np.abs(sprite.path - (SIZE - 1) / 2) < SIZE / 2 - 5).all(), "it stays in the frame"


def test_what_the_tracker_answers() -> None:
    scene = translations()["walk-star-checkered"]
    clip = render(scene)
    tracks = OpticalFlowTracker(side=12).track(clip)
    assert tracks.positions.shape == (144, clip.frames, 2)
    assert np.isfinite(tracks.positions).all()
    assert tracks.visible[:, 0].all()
    assert (np.diff(tracks.visible.astype(int), axis=1) <= 0).all(), "lost is lost"
    assert np.array_equal(np.isnan(tracks.seen[..., 0]), ~tracks.visible)
    flat = OpticalFlowTracker(side=5).track(Clip(np.full((3, 40, 40, 3), 99, np.uint8), 12.0, ""))
    assert not flat.visible[:, 1:].any(), "a flat picture shows no motion"
    assert np.ptp(flat.positions, axis=1).max() == 0
    assert judged(flat, replace(scene, sprites=(), pan=np.zeros((3, 2)))) == (float("inf"), 0.0)


def test_the_tracker_lets_go_of_what_is_gone() -> None:
    texture = noise_pan(np.zeros((1, 2)))[0]
    other = Clip(np.stack([texture, texture[::-1, ::-1]]), 12.0, "")
    loose = OpticalFlowTracker(side=12, change=255, tolerance=1e9)
    assert loose.track(other).visible[:, 1].mean() > 0.5
    assert replace(loose, tolerance=0.5).track(other).visible[:, 1].mean() < 0.2, "there and back is not the same place"
    brighter = np.stack([np.clip(texture * 0.6 + 4.0 * frame, 0, 255) for frame in range(12)]).astype(np.uint8)
    kept = [
        tracker.track(Clip(brighter, 12.0, "")).visible[:, -1].mean()
        for tracker in (replace(loose, tolerance=0.5), TRACKER)
    ]
    assert kept[0] > 0.5
    assert kept[1] < 0.5 * kept[0], "44 levels brighter is another colour"
    away = loose.track(Clip(noise_pan(TIME[:9] * np.array([0, 3.0])), 12.0, "")).seen[..., 1]
    assert np.nanmax(away) <= 63.5
    assert np.isnan(away[:, -1]).mean() > 0.3


def test_the_grid_and_its_colours() -> None:
    points = grid_points(40, 64, 5)
    assert points[0].tolist() == [1, 1]
    assert points[-1].tolist() == [38, 62]
    assert points[1].tolist() == [1, 1 + 61 / 4], "x runs first"
    frame = np.zeros((40, 64, 3), np.uint8)
    frame[..., 0], frame[..., 1] = np.arange(64) * 2, np.arange(40)[:, None] * 3
    assert colours_at(frame, np.array([[10.5, 20.25]]))[0] == pytest.approx([40.5, 31.5, 0], abs=0.3)
