"""How well a motion was followed, from tracks of points: the papers' motion fidelity, and measures that it cannot fool.

Motion fidelity (MF) compares directions only, best match against best match: it is blind to speed, place and most of
what a small object does, and unrelated tracks reach 0.4 to 0.9 by chance. So it is given with its chance level
(`mf_null`, `mf_star`), on the points of a mask (`Tracks.within`), and beside R2, gain and the rest, which see that.

Paths are "point frame 2", (y, x) in pixels; steps are the differences of neighbouring frames. NaN marks a place that
was not seen (`Tracks.seen`): such steps are left out. Compare clips of one size and rate: the aspect turns directions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float

from motionlora.data.errors import InputError
from motionlora.infer.frechet import frechet
from motionlora.infer.measure_sprites import motion_r2
from motionlora.infer.track_points import Paths

STILL = 0.1
"""Pixels a frame below which a point stands still, by default; about 0.25 suits clips of 480 lines."""
SHARED = 0.5
"""Share of the steps in which both of two tracks must be seen: over fewer, some track agrees by chance."""
Path = Float[np.ndarray, "frame 2"]


def mf_code(generated: Paths, reference: Paths) -> float:
    """Motion fidelity as the published scripts of SMM (arXiv 2311.17009) and DiTFlow (2412.07776) compute it, -1..1.

    Mean over the generated tracks of the best mean cosine of steps with any reference track. The scripts subtract an
    identity matrix first, so a track may not match the one of its own number: identical clips do not get 1 unless
    tracks resemble each other. Visibility is ignored, the longer clip is cut, a step of length 0 counts 0 (the
    scripts get NaN). For comparison with papers only.
    """
    frames = min(generated.shape[1], reference.shape[1])
    ours, theirs = (_directions(np.diff(paths[:, :frames], axis=1), 1e-8) for paths in (generated, reference))
    table = ours @ theirs.T / (frames - 1)
    return _best(table - np.eye(*table.shape), axis=1)


def mf_sym(generated: Paths, reference: Paths, *, still: float = STILL) -> float:
    """Motion fidelity in both directions, -1..1; symmetric in its arguments, 1 on identical clips.

    Half the mean over generated tracks of the best match among the reference's, and half the reverse: the paper's
    score of SMM (arXiv 2311.17009), halved. Steps shorter than `still` pixels: two such agree (1), one alone
    gets 0. Two tracks match only where both are seen in half of the steps; NaN where nothing can be matched.
    """
    table = _similarity(generated, reference, still)
    return 0.5 * (_best(table, axis=0) + _best(table, axis=1))


def mf_moving(generated: Paths, reference: Paths, *, still: float = STILL) -> float:
    """`mf_sym` of what moves: agreeing stillness earns nothing. Ours; -1..1, 1 on identical clips that move.

    Half the mean over reference tracks that move (`still` pixels a frame or more in the mean) of their best match; half
    the mean over generated tracks that move, 0 if none does. Only steps count in which the reference's track moves.
    NaN where no reference track does.
    """
    reference = reference[_moves(reference, still)]
    asked = np.linalg.norm(np.diff(reference, axis=1), axis=-1) >= still
    table = _similarity(generated, reference, still, asked=asked)
    recall, precision = _best(table, axis=0), _best(table[_moves(generated, still)], axis=1)
    return 0.5 * (recall + (0.0 if np.isnan(precision) else precision))


def mf_null(measure: Callable[[Paths, Paths], float], reference: Paths, others: Sequence[Paths]) -> float:
    """Chance level of a measure for one reference: its mean over the tracks of other clips. Ours."""
    return _mean(np.array([measure(other, reference) for other in others]))


def mf_star(mf: float, null: float) -> float:
    """MF* = (MF - null) / (1 - null): 0 is chance, 1 perfect; NaN where chance is already perfect. Ours."""
    return (mf - null) / (1 - null) if 1 - null > 1e-6 else float("nan")


@dataclass(frozen=True)
class TrackMotion:
    """What MF does not see, of matched tracks.

    Attributes:
        r2: 1 - |observed - true|^2 / |true|^2 of centred paths, each clipped to [-1, 1].
        gain: least-squares size of the motion along the true one, 1 is equal, negative is against it.
        vcos: mean cosine of steps in which the truth moves, -1..1.
        net: cosine of the displacements from first to last frame, -1..1; NaN where the truth ends where it began.
    """

    r2: float
    gain: float
    vcos: float
    net: float


def track_motion(observed: Paths, truth: Paths) -> TrackMotion:
    """Means over matched tracks (point i of one is point i of the other) whose truth moves; over all if none does.

    Formulas of `motion_r2`, over the frames in which both are seen. Not affected by where a path begins. Ours.
    """
    _refuse_unequal(observed, truth)
    observed = np.where(np.isfinite(truth), observed, np.nan)
    known = np.isfinite(truth).all(-1).sum(1) >= 2
    moving = known & _moves(truth, STILL)
    chosen = moving if moving.any() else known
    if not chosen.any():
        return TrackMotion(*[float("nan")] * 4)
    pairs = list(zip(observed[chosen], truth[chosen], strict=True))
    r2, gain, vcos = np.transpose([motion_r2(*pair) for pair in pairs])
    net = np.array([net_direction(*pair) for pair in pairs])
    return TrackMotion(_mean(r2.clip(-1, 1)), _mean(gain), _mean(vcos), _mean(net))


def net_direction(observed: Path, truth: Path, *, still: float = 1.0) -> float:
    """Cosine of the net displacements between the first and the last frame that both are seen in, -1..1. Ours.

    NaN where the truth's is shorter than `still` pixels (a closed path has no net direction), 0 where only ours is.
    """
    seen = np.flatnonzero(np.isfinite(observed).all(-1) & np.isfinite(truth).all(-1))
    if len(seen) < 2:
        return float("nan")
    ours, theirs = (path[seen[-1]] - path[seen[0]] for path in (observed, truth))
    if np.hypot(*theirs) < still:
        return float("nan")
    return 0.0 if np.hypot(*ours) < still else float(ours @ theirs / (np.hypot(*ours) * np.hypot(*theirs)))


def common_path(paths: Paths) -> Path:
    """How a group of points moves as one, from (0, 0): the running sum of the median step of those seen.

    A step in which no point is seen adds nothing. Robust against a minority that is lost or dragged along. Ours.
    """
    steps = np.diff(paths, axis=1)
    seen = np.isfinite(steps).all(2).any(0)
    medians = np.zeros(steps.shape[1:])
    medians[seen] = np.nanmedian(steps[:, seen], axis=0)
    return np.concatenate([np.zeros((1, 2)), np.cumsum(medians, axis=0)])


def velocity_field(paths: Paths, height: int, width: int, cells: int) -> Float[np.ndarray, "step cells cells 2"]:
    """Mean step of the points in each cell of a cells x cells grid over the frame; 0 in a cell that shows none.

    A point is in the cell where its step begins. Ours, after the pooled fields of direction selectivity.
    """
    steps = np.diff(paths, axis=1)
    point, step = np.nonzero(np.isfinite(steps).all(-1))
    cell = (paths[point, step] + 0.5) * cells / np.array([height, width])
    row, column = cell.astype(int).clip(0, cells - 1).T
    sums, counts = np.zeros((steps.shape[1], cells, cells, 2)), np.zeros((steps.shape[1], cells, cells, 1))
    np.add.at(sums, (step, row, column), steps[point, step])
    np.add.at(counts, (step, row, column), 1)
    return sums / np.maximum(counts, 1)


def mf_frechet(generated: Paths, reference: Paths, height: int, width: int, *, still: float = STILL) -> float:
    """Half exp(-Frechet distance), half the cosine of steps, mean over matched tracks: 1 on identical clips.

    In the spirit of DeT's hybrid fidelity (arXiv 2503.17350), with places as shares of the frame as there, and with a
    true Frechet distance, where its code takes the mean of all distances and cannot tell a reversed clip. Range
    -0.38..1; ours.
    """
    _refuse_unequal(generated, reference)
    size = np.array([height, width])
    near = np.exp(-frechet(generated / size, reference / size))
    alike = np.array([_similarity(a[None], b[None], still)[0, 0] for a, b in zip(generated, reference, strict=True)])
    return _mean(0.5 * near + 0.5 * alike)


def _similarity(
    generated: Paths, reference: Paths, still: float, asked: Bool[np.ndarray, "point step"] | None = None
) -> Float[np.ndarray, "generated reference"]:
    """Mean agreement over steps that both tracks are seen in and that are `asked` of the reference; NaN for too few."""
    if generated.shape[1] != reference.shape[1]:
        raise InputError(f"tracks over {generated.shape[1]} and {reference.shape[1]} frames: cut both to the same.")
    ours, theirs = np.diff(generated, axis=1), np.diff(reference, axis=1)
    seen = np.asarray(np.isfinite(ours).all(-1))
    wanted = np.asarray(np.isfinite(theirs).all(-1))
    if asked is not None:
        wanted = wanted & asked
    directions = _directions(ours, still), _directions(np.where(wanted[..., None], theirs, np.nan), still)
    resting = [
        (known & (np.linalg.norm(steps, axis=-1) < still)).astype(float)
        for known, steps in ((seen, ours), (wanted, theirs))
    ]
    counts = [seen.astype(float) @ known.astype(float).T for known in (np.isfinite(theirs).all(-1), wanted)]
    agreed = directions[0] @ directions[1].T + resting[0] @ resting[1].T
    enough = (counts[0] >= SHARED * ours.shape[1]) & (counts[1] > 0)
    return np.where(enough, agreed / np.maximum(counts[1], 1), np.nan)


def _directions(steps: Paths, still: float) -> Float[np.ndarray, "point step*2"]:
    """Steps of length 1 in one row a point; 0 where shorter than `still`, or unseen."""
    length = np.linalg.norm(steps, axis=-1, keepdims=True)
    return rearrange(np.where(length >= still, steps / np.maximum(length, still), 0), "p step yx -> p (step yx)")


def _best(table: Float[np.ndarray, "generated reference"], axis: int) -> float:
    """Mean of the largest value along an axis, over the rows or columns that have one."""
    return _mean(np.where(np.isfinite(table), table, -np.inf).max(axis, initial=-np.inf))


def _moves(paths: Paths, still: float) -> Bool[np.ndarray, " point"]:
    """Which tracks have seen steps of at least `still` pixels in the mean."""
    lengths = np.linalg.norm(np.diff(paths, axis=1), axis=-1)
    seen = np.isfinite(lengths)
    return seen.any(1) & (np.where(seen, lengths, 0).sum(1) >= still * seen.sum(1))


def _mean(values: np.ndarray) -> float:
    """Mean of the finite values, NaN where there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _refuse_unequal(observed: Paths, truth: Paths) -> None:
    if observed.shape != truth.shape:
        raise InputError(f"matched tracks need one shape, got {observed.shape} and {truth.shape}: match points first.")
