"""How well a clip of the sprite world followed a reference's motion and its own caption.

Measures of `SpriteScores` (ours, see each field): SMF is R2 clipped to [-1, 1]; a reconstruction of the reference gets
SMF 1, accuracy 0, leak 1; a perfect transfer 1, 1, 0; no transfer about 0 or less, 1, 0. The seeing itself is in
`recognise_sprites.py`.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from motionlora.data.sprites import Scene, Sprite
from motionlora.infer.recognise_sprites import Blob, Observation, camera_path, observe

__all__ = [
    "Blob",
    "Observation",
    "SpriteScores",
    "camera_path",
    "is_camera",
    "motion_r2",
    "observe",
    "scores",
    "seen_scene",
    "true_motion",
]

MIN_COVERAGE = 0.5
"""Share of frames with every sprite seen below which a clip's motion counts as none."""
WHOLE = 0.6
"""Share of its median area below which a sprite is too hidden for its visible centre to be its centre."""
STEADY = 2.0
"""Pixels within which a path that was only seen counts as standing still."""
Track = list[Blob | None]


@dataclass(frozen=True)
class SpriteScores:
    """One clip against its reference.

    Attributes:
        smf: sprite motion fidelity, R2 of centred paths clipped to [-1, 1]; 0 where coverage is below one half.
        gain: least-squares size of the motion along the reference's, 1 is equal.
        vcos: mean cosine of frame-to-frame velocity over frames in which the reference moves.
        acc: share of frames and attributes (colour, shape, background) that are the caption's; undetected counts 0,
            the shape of a sprite that touches a bar is not asked for.
        leak: share of frames and differing attributes that are the reference's instead.
        coverage: share of frames in which every sprite was seen, also those in which a bar hides a part of it.
        extra: mean number of sprites seen beyond those asked for.
    """

    smf: float
    gain: float
    vcos: float
    acc: float
    leak: float
    coverage: float
    extra: float


def scores(seen: Observation, target: Scene, reference: Scene, *, motion_of: np.ndarray | None = None) -> SpriteScores:
    """A generated clip's observation against the scene it should show and the scene whose motion it should have.

    Args:
        motion_of: the true motion, "object frame 2" in pixels; by default `true_motion(reference)`.
    """
    truth = true_motion(reference) if motion_of is None else motion_of
    tracks = _tracks(seen, len(target.sprites))
    coverage = float(np.mean([None not in blobs for blobs in zip(*tracks, strict=True)]))
    camera = is_camera(reference)
    observed = seen.camera[None] if camera else np.stack([_path(track) for track in tracks])
    smf, gain, vcos = _matched_motion(observed, truth) if camera or coverage >= MIN_COVERAGE else (0.0, 0.0, 0.0)
    acc, leak = _attributes(tracks, seen.background, target, reference)
    extra = float(np.mean([max(0, len(frame) - len(target.sprites)) for frame in seen.blobs]))
    return SpriteScores(smf, gain, vcos, acc, leak, coverage, extra)


def true_motion(scene: Scene) -> np.ndarray:
    """What moves in a scene, "object frame 2": the background's pan for a camera's scene, else the sprites' centres."""
    return scene.pan[None] if is_camera(scene) else np.stack([sprite.path for sprite in scene.sprites])


def seen_scene(seen: Observation) -> Scene | None:
    """What a clip shows as a scene, for clips whose true one nobody knows; None where it shows no motion to follow.

    Sprites by their most frequent looks, paths as seen and straight where unseen; what moves less than `STEADY` stands.
    """
    count = Counter(len(blobs) for blobs in seen.blobs).most_common(1)[0][0]
    sprites, still = [], np.zeros(len(seen.blobs))
    for track in _tracks(seen, count) if count else []:
        shown = [blob for blob in track if blob]
        path = _steadied(_path(track))
        radius = float(np.sqrt(np.median([blob.area for blob in shown]) / np.pi))
        colour, shape = (Counter(looks).most_common(1)[0][0] for looks in zip(*map(_named, shown), strict=True))
        sprites.append(Sprite(shape, colour, radius, path, still, still + 1))
    scene = Scene(tuple(sprites), seen.background, _steadied(seen.camera), 0)
    return scene if sprites or is_camera(scene) else None


def is_camera(scene: Scene) -> bool:
    """Whether the scene's motion is the camera's: the background pans and every sprite stays where it is."""
    return _moves(scene.pan) and not any(_moves(sprite.path) for sprite in scene.sprites)


def motion_r2(observed: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """R2, gain and velocity cosine of one path "frame 2" against the true one; frames with NaN are left out.

    Where the truth does not move there is nothing to divide by: staying within half a pixel is 1, 1, 1, moving 0, 0, 0.
    """
    valid = np.isfinite(observed).all(1)
    if valid.sum() < 2:
        return 0.0, 0.0, 0.0
    c, o = truth[valid] - truth[valid].mean(0), observed[valid] - observed[valid].mean(0)
    power = float((c**2).sum())
    if power < 1e-6:
        still = float((o**2).sum(1).mean() < 0.25)
        return still, still, still
    return 1 - float(((o - c) ** 2).sum()) / power, float((o * c).sum()) / power, _velocity_cosine(observed, truth)


def _velocity_cosine(observed: np.ndarray, truth: np.ndarray) -> float:
    """Mean over seen steps in which the truth moves (0.1 px); an observed step below 0.05 px counts 0."""
    v, w = np.diff(truth, axis=0), np.diff(observed, axis=0)
    steps = np.isfinite(w).all(1) & (np.hypot(*v.T) > 0.1)
    if not steps.any():
        return 0.0
    v, w = v[steps], w[steps]
    length = np.hypot(*w.T)
    cosine = (v * w).sum(1) / (np.hypot(*v.T) * np.maximum(length, 0.05))
    return float(np.where(length < 0.05, 0, cosine).mean())


def _steadied(path: np.ndarray) -> np.ndarray:
    """A seen path "frame 2" without gaps, and at its mean where it only trembles."""
    known = np.isfinite(path).all(1)
    frames = np.arange(len(path))
    whole = np.stack([np.interp(frames, frames[known], line[known]) for line in path.T], 1)
    return whole if np.ptp(whole, axis=0).max() >= STEADY else np.repeat(whole.mean(0)[None], len(whole), 0)


def _named(blob: Blob) -> tuple[str, str]:
    return blob.colour, blob.shape


def _moves(path: np.ndarray) -> bool:
    return float(np.ptp(path, axis=0).max()) > 1e-6


def _tracks(seen: Observation, count: int) -> list[Track]:
    """The `count` largest sprites of each frame linked by distance to where each was last seen: "sprite frame"."""
    tracks: list[Track] = [[None] * len(seen.blobs) for _ in range(count)]
    last: np.ndarray | None = None
    for frame, blobs in enumerate(seen.blobs):
        if not blobs:
            continue
        centres = np.array([blob.centre for blob in blobs[:count]])
        if last is None:
            last = np.resize(centres[np.argsort(centres[:, 1])], (count, 2))
        cost = np.linalg.norm(last[:, None] - centres[None], axis=-1)
        for row, column in zip(*linear_sum_assignment(cost), strict=True):
            last[row] = centres[column]
            tracks[row][frame] = blobs[column]
    return tracks


def _path(track: Track) -> np.ndarray:
    """Centres "frame 2"; NaN where the sprite is unseen, or so small that most of it must be hidden."""
    areas = [blob.area for blob in track if blob]
    least = WHOLE * float(np.median(areas)) if areas else 0.0
    return np.array([blob.centre if blob and blob.area >= least else (np.nan, np.nan) for blob in track])


def _matched_motion(observed: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Mean over true objects of the measures of the observed path that fits each best, one to one."""
    table = np.array([[motion_r2(path, wanted) for path in observed] for wanted in truth])
    table[..., 0] = table[..., 0].clip(-1, 1)
    rows, columns = linear_sum_assignment(-table[..., 0])
    smf, gain, vcos = table[rows, columns].sum(0) / len(truth)
    return float(smf), float(gain), float(vcos)


def _attributes(tracks: list[Track], background: str, target: Scene, reference: Scene) -> tuple[float, float]:
    """Accuracy and leak. Sprites are matched to the caption's by what they look like, frame by frame.

    A sprite leaks what it has in common with any of the reference's sprites, where its caption asks for none of theirs.
    """
    wanted = [(sprite.colour, sprite.shape) for sprite in target.sprites]
    known = [{sprite.colour for sprite in reference.sprites}, {sprite.shape for sprite in reference.sprites}]
    right, leaked = [], []
    for blobs in zip(*tracks, strict=True):
        hits = np.array([[sum(_equal(blob, look)) for look in wanted] for blob in blobs])
        for row, column in zip(*linear_sum_assignment(-hits), strict=True):
            right += _equal(blobs[row], wanted[column])
            pairs = zip(_looks(blobs[row]), wanted[column], known, strict=False)
            leaked += [seen in theirs for seen, asked, theirs in pairs if asked not in theirs]
    right += [background == target.background] * len(tracks[0])
    if target.background != reference.background:
        leaked += [background == reference.background] * len(tracks[0])
    return float(np.mean(right)), float(np.mean(leaked)) if leaked else 0.0


def _looks(blob: Blob | None) -> tuple[str, ...]:
    """Colour and shape; behind a bar the colour alone, because nobody can tell the shape."""
    if blob is None:
        return "none", "none"
    return (blob.colour,) if blob.hidden else (blob.colour, blob.shape)


def _equal(blob: Blob | None, look: tuple[str, str]) -> list[bool]:
    return [seen == asked for seen, asked in zip(_looks(blob), look, strict=False)]
