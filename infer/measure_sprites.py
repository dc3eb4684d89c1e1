"""What a clip of the sprite world shows: where sprites are, their colour and shape, the background, and how well a motion
was followed. Needs no weights: colours are saturated and backgrounds are neutral by construction.

Measures of `SpriteScores` (ours, see each field): SMF is R2 clipped to [-1, 1]; a reconstruction of the reference gets
SMF 1, accuracy 0, leak 1; a perfect transfer 1, 1, 0; no transfer about 0 or less, 1, 0.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from motionlora.data.sprites import COLOURS, SHAPES, Scene

MIN_CHROMA, MIN_AREA = 26.0, 28
"""Lab chroma above which a pixel belongs to a sprite; a component below so many pixels (0.7 %) is not a sprite."""
CIRCLE_RIPPLE = 0.028
MIN_COVERAGE = 0.5


@dataclass(frozen=True, eq=False)
class Blob:
    """One connected sprite in one frame: centre (y, x) and area in pixels, nearest palette colour, recognised shape."""

    centre: np.ndarray
    area: int
    colour: str
    shape: str


@dataclass(frozen=True, eq=False)
class Observation:
    """What was seen. `blobs[frame]` is largest first; `background` is the most frequent verdict; `camera` "frame 2" px."""

    blobs: list[list[Blob]]
    background: str
    camera: np.ndarray


@dataclass(frozen=True)
class SpriteScores:
    """One clip against its reference.

    Attributes:
        smf: sprite motion fidelity, R2 of centred paths clipped to [-1, 1]; 0 where coverage is below one half.
        gain: least-squares size of the motion along the reference's, 1 is equal.
        vcos: mean cosine of frame-to-frame velocity over frames in which the reference moves.
        acc: share of frames and attributes (colour, shape, background) that are the caption's; undetected counts 0.
        leak: share of frames and differing attributes that are the reference's instead.
        coverage: share of frames in which every sprite was seen.
        extra: mean number of sprites seen beyond those asked for.
    """

    smf: float
    gain: float
    vcos: float
    acc: float
    leak: float
    coverage: float
    extra: float


def observe(pixels: np.ndarray) -> Observation:
    """Everything that the measures need of a clip, uint8 "frame height width 3"."""
    lab = lab_of(pixels)
    blobs = [_blobs(frame) for frame in lab]
    chroma = np.hypot(lab[..., 1], lab[..., 2])
    masks = ndimage.binary_dilation(chroma > MIN_CHROMA * 0.6, np.ones((1, 3, 3)), iterations=2)
    views = [_background(lab[index, ..., 0], masks[index]) for index in range(0, len(lab), max(1, len(lab) // 6))]
    return Observation(blobs, Counter(views).most_common(1)[0][0], camera_path(lab[..., 0], masks))


def scores(seen: Observation, target: Scene, reference: Scene, *, motion_of: np.ndarray | None = None) -> SpriteScores:
    """A generated clip's observation against the scene it should show and the scene whose motion it should have.

    Args:
        motion_of: the true motion, "object frame 2" in pixels; by default `true_motion(reference)`.
    """
    truth = true_motion(reference) if motion_of is None else motion_of
    paths, chosen = _tracks(seen, len(target.sprites))
    coverage = float(np.isfinite(paths).all(axis=(0, 2)).mean())
    observed = seen.camera[None] if is_camera(reference) else paths
    smf, gain, vcos = _matched_motion(observed, truth) if coverage >= MIN_COVERAGE or is_camera(reference) else (0, 0, 0)
    acc, leak = _attributes(chosen, seen.background, target, reference)
    extra = float(np.mean([max(0, len(frame) - len(target.sprites)) for frame in seen.blobs]))
    return SpriteScores(smf, gain, vcos, acc, leak, coverage, extra)


def true_motion(scene: Scene) -> np.ndarray:
    """What moves in a scene, "object frame 2": the background's pan where the sprites stay, else the sprites' centres."""
    return scene.pan[None] if is_camera(scene) else np.stack([sprite.path for sprite in scene.sprites])


def is_camera(scene: Scene) -> bool:
    """Whether the scene's motion is the camera's: the background moves and its sprites move no other way."""
    moves = max(float(np.ptp(sprite.path - scene.pan, axis=0).max()) for sprite in scene.sprites)
    return float(np.ptp(scene.pan, axis=0).max()) > 0 and (moves == 0 or _still(scene))


def motion_r2(observed: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """R2, gain and velocity cosine of one path "frame 2" against the true one; frames with NaN are left out."""
    valid = np.isfinite(observed).all(1)
    if valid.sum() < 2:
        return 0.0, 0.0, 0.0
    c, o = truth[valid] - truth[valid].mean(0), observed[valid] - observed[valid].mean(0)
    power = float((c**2).sum())
    if power < 1e-6:
        return float((o**2).sum() < len(o) * 0.25), 1.0, 1.0
    v, w = np.diff(truth, axis=0), np.diff(observed, axis=0)
    moving = np.isfinite(w).all(1) & (np.hypot(*v.T) > 0.1)
    cosine = (v * w).sum(1) / np.maximum(np.hypot(*v.T) * np.hypot(*w.T), 1e-6)
    vcos = float(np.where(np.hypot(*w.T) < 0.05, 0, cosine)[moving].mean()) if moving.any() else 0.0
    return 1 - float(((o - c) ** 2).sum()) / power, float((o * c).sum()) / power, vcos


def camera_path(luma: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The background's translation (y, x) in pixels at each frame, by iterated least squares on unmasked pixels.

    Stripes only tell the motion across them: there the other component is taken as 0 (the ridge).
    """
    steps = [np.zeros(2)]
    for before, after, mask in zip(luma[:-1], luma[1:], masks[:-1] | masks[1:], strict=True):
        weight = (~mask).astype(np.float32)
        weight[:2] = weight[-2:] = weight[:, :2] = weight[:, -2:] = 0
        gy, gx = np.gradient(before)
        normal = np.array([[(weight * gy * gy).sum(), (weight * gy * gx).sum()], [0, (weight * gx * gx).sum()]])
        normal[1, 0] = normal[0, 1]
        step = np.zeros(2)
        for _ in range(3):
            change = ndimage.shift(after, -step, order=1, mode="nearest") - before
            right = -np.array([(weight * gy * change).sum(), (weight * gx * change).sum()])
            step = step + np.linalg.solve(normal + np.eye(2) * (0.02 * np.trace(normal) + 50.0), right)
        steps.append(step)
    return np.cumsum(steps, axis=0)


def lab_of(pixels: np.ndarray) -> np.ndarray:
    """sRGB uint8 to CIE Lab (D65), float32, same shape."""
    linear = _linear_table()[pixels]
    xyz = linear @ np.array(
        [[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]], np.float32
    ) / np.array([0.9505, 1.0, 1.089], np.float32)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def shape_of(cover: np.ndarray) -> str:
    """The shape of a soft mask "y x" in 0..1, from the Fourier magnitudes of its radius at 3, 4 and 5 cycles a turn.

    The radius in a sector comes from the sector's area, on a grid four times as fine; rotation does not matter.
    """
    fine = ndimage.zoom(cover, 4, order=1) > 0.5
    y, x = np.nonzero(fine)
    if not len(y):
        return "none"
    dy, dx = y - y.mean(), x - x.mean()
    bins = ((np.arctan2(dy, dx) + np.pi) / (2 * np.pi) * 48).astype(int) % 48
    radius = np.sqrt(np.bincount(bins, minlength=48))
    spectrum = np.abs(np.fft.rfft(radius / radius.mean()))[3:6] / 24
    if spectrum.max() < CIRCLE_RIPPLE:
        return "circle"
    return {0: "triangle", 1: "square", 2: "star"}[int(spectrum.argmax())]


@lru_cache
def _linear_table() -> np.ndarray:
    value = np.arange(256, dtype=np.float32) / 255
    return np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92).astype(np.float32)


@lru_cache
def _palette() -> np.ndarray:
    return lab_of(np.array(list(COLOURS.values()), np.uint8))


def _blobs(lab: np.ndarray) -> list[Blob]:
    """Connected sprites of one frame in Lab "y x 3", largest first; one component per palette colour."""
    chroma = np.hypot(lab[..., 1], lab[..., 2])
    hue = lab[..., None, 1:] @ (_palette()[:, 1:] / np.hypot(*_palette()[:, 1:].T)[:, None]).T
    nearest = np.where(chroma > MIN_CHROMA, hue[..., 0, :].argmax(-1), -1)
    found = []
    for index, colour in enumerate(COLOURS):
        labels, count = ndimage.label(ndimage.binary_opening(nearest == index))  # pyright: ignore[reportGeneralTypeIssues]
        for number in range(1, count + 1):
            region = labels == number
            if region.sum() < MIN_AREA:
                continue
            near = ndimage.binary_dilation(region, iterations=2) & ((nearest == index) | (nearest == -1))
            strength = np.where(near, np.clip(hue[..., 0, index], 0, None), 0)
            soft = strength / max(float(np.percentile(strength[region], 80)), 1e-6)
            cover = np.clip(soft, 0, 1)
            y, x = (cover * grid for grid in np.indices(cover.shape))
            centre = np.array([y.sum(), x.sum()]) / cover.sum()
            found.append(Blob(centre, int(region.sum()), colour, shape_of(cover)))
    return sorted(found, key=lambda blob: -blob.area)


def _background(luma: np.ndarray, mask: np.ndarray) -> str:
    """Plain ones by their spread and level, textures by where and along how many directions their spectrum lies."""
    visible = luma[~mask]
    if len(visible) < 200:
        return "none"
    if visible.std() < 2.6:
        return "dark" if visible.mean() < 50 else "light"
    window = np.hanning(luma.shape[0])[:, None] * np.hanning(luma.shape[1])
    field = np.where(mask, 0, luma - visible.mean()) * window
    power = np.abs(np.fft.fftshift(np.fft.fft2(field))) ** 2
    ky, kx = (grid - size // 2 for grid, size in zip(np.indices(power.shape), power.shape, strict=True))
    reach, angle = np.hypot(ky, kx), np.arctan2(ky, kx)
    fine = (reach >= 2.8) & (reach <= 8)
    if power[fine].sum() < power[reach < 2.8].sum():
        return "cloudy"
    alignment = abs((power[fine] * np.exp(2j * angle[fine])).sum()) / power[fine].sum()
    return "striped" if alignment > 0.55 else "checkered"


def _tracks(seen: Observation, count: int) -> tuple[np.ndarray, list[list[Blob | None]]]:
    """The `count` largest blobs of each frame linked by distance: centres "sprite frame 2" (NaN unseen), and blobs."""
    paths = np.full((count, len(seen.blobs), 2), np.nan)
    chosen: list[list[Blob | None]] = []
    last: np.ndarray | None = None
    for frame, blobs in enumerate(seen.blobs):
        picked: list[Blob | None] = [None] * count
        large = blobs[:count]
        if large:
            centres = np.array([blob.centre for blob in large])
            if last is None:
                last = np.resize(centres[np.argsort(centres[:, 1])], (count, 2)).copy()
            cost = np.linalg.norm(last[:, None] - centres[None], axis=-1)
            for row, column in zip(*linear_sum_assignment(cost), strict=True):
                paths[row, frame] = last[row] = centres[column]
                picked[row] = large[column]
        chosen.append(picked)
    return paths, chosen


def _matched_motion(observed: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Mean over true objects of the measures of the observed path that fits each best, one to one."""
    table = np.array([[motion_r2(path, wanted) for path in observed] for wanted in truth])
    rows, columns = linear_sum_assignment(-table[..., 0])
    best = table[rows, columns]
    missing = len(truth) - len(rows)
    smf = np.concatenate([np.clip(best[:, 0], -1, 1), np.zeros(missing)])
    return float(smf.mean()), float(best[:, 1].mean()), float(best[:, 2].mean())


def _attributes(chosen: list[list[Blob | None]], background: str, target: Scene, reference: Scene) -> tuple[float, float]:
    """Accuracy and leak. Objects are matched to the caption's by what they look like, frame by frame."""
    right, leaked = [], []
    wanted = [(sprite.colour, sprite.shape) for sprite in target.sprites]
    known = [(sprite.colour, sprite.shape) for sprite in reference.sprites]
    for blobs in chosen:
        looks = [(blob.colour, blob.shape) if blob else ("none", "none") for blob in blobs]
        hits = np.array([[np.equal(look, want) for want in wanted] for look in looks])
        rows, columns = linear_sum_assignment(-hits.sum(-1))
        for row, column in zip(rows, columns, strict=True):
            right += list(hits[row, column])
            source = known[min(column, len(known) - 1)]
            leaked += [looks[row][i] == source[i] for i in (0, 1) if wanted[column][i] != source[i]]
    right += [background == target.background] * len(chosen)
    if target.background != reference.background:
        leaked += [background == reference.background] * len(chosen)
    return float(np.mean(right)), float(np.mean(leaked)) if leaked else 0.0


def _still(scene: Scene) -> bool:
    return all(float(np.ptp(sprite.path, axis=0).max()) < 1e-6 for sprite in scene.sprites)


SHAPE_NAMES = tuple(SHAPES)
