"""What a clip of the sprite world shows: where sprites are, their colour and shape, the background and its motion.

Needs no weights: sprites are saturated and backgrounds neutral by construction (`data/sprites.py`). Colours are judged
in CIE Lab. Positions are (y, x) in pixels. Ours; `tests/test_measure_sprites.py` states how often it is right.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy import ndimage

from motionlora.data.sprites import COLOURS, GREY_BAR, RADII, SHAPES, TEXTURED, coverage

MIN_CHROMA, MIN_AREA = 26.0, 28
"""Lab chroma above which a pixel belongs to a sprite; a component below so many pixels (0.7 %) is not a sprite."""
PLAIN_SPREAD = 3.0
"""Distance of the 20 % and 80 % quantiles of smoothed lightness (0..100) below which a background has no texture:
plain ones have at most 1 in a noisy clip, clouds at least 5."""
SMOOTHING = 1.5
"""Gaussian sigma in pixels for backgrounds: a fifth of a pixel's noise is left, and 80 % of the checkers' contrast."""
MIN_TRUST = 0.97
"""Share of a smoothed pixel that must come from the background for it to tell the camera's motion."""
CROSS = np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]], bool)
"""Neighbours inside a frame, none in time."""


@dataclass(frozen=True, eq=False)
class Blob:
    """One sprite in one frame: centre (y, x) and visible area in pixels, nearest palette colour, recognised shape.

    `hidden` says that it touches an occluding bar: its shape is then only that of the visible part.
    """

    centre: np.ndarray
    area: int
    colour: str
    shape: str
    hidden: bool = False


@dataclass(frozen=True, eq=False)
class Observation:
    """What was seen: `blobs[frame]` largest first, the most frequent verdict on the background, and `camera_path`."""

    blobs: list[list[Blob]]
    background: str
    camera: np.ndarray


def observe(pixels: np.ndarray) -> Observation:
    """Everything that the measures need of a clip, uint8 "frame height width 3"."""
    lab = lab_of(pixels)
    luma, chroma = lab[..., 0], np.hypot(lab[..., 1], lab[..., 2])
    coloured = ndimage.binary_opening(chroma > MIN_CHROMA * 0.6, CROSS)  # without the specks of a noisy clip
    masks = ndimage.binary_dilation(coloured, np.ones((1, 3, 3)), iterations=2)
    some = slice(0, None, max(1, len(lab) // 6))
    bar = bar_columns(luma[some], masks[some])
    masks = masks | bar
    smooth, trust = filled(luma, masks)
    views = [background_of(field, mask) for field, mask in zip(smooth[some], masks[some], strict=True)]
    background = Counter(views).most_common(1)[0][0]
    camera = camera_path(smooth, trust) if background in TEXTURED else np.zeros((len(lab), 2))
    return Observation(_blobs(lab, chroma, bar), background, camera)


def lab_of(pixels: np.ndarray) -> np.ndarray:
    """sRGB uint8 to CIE Lab (D65), float32, same shape."""
    xyz = _linear_table()[pixels] @ _xyz_matrix()
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def filled(luma: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed backgrounds "frame y x", and the share 0..1 of each pixel's surroundings that was open.

    Masked pixels take what is around them, or the frame's mean far inside a mask. Outside the frame nothing is open.
    """
    open_ = (~masks).astype(np.float32)
    smoothing = {"sigma": (0, SMOOTHING, SMOOTHING), "truncate": 3, "mode": "constant"}
    weight = ndimage.gaussian_filter(open_, **smoothing)
    sums = ndimage.gaussian_filter(luma * open_, **smoothing)
    mean = (luma * open_).sum((1, 2), keepdims=True) / np.maximum(open_.sum((1, 2), keepdims=True), 1)
    return np.where(weight > 0.05, sums / np.maximum(weight, 0.05), mean), weight


def bar_columns(luma: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Which columns an occluding bar covers, bool "x", rims included: its grey from top to bottom in every frame."""
    visible = np.where(masks, np.nan, luma).reshape(-1, luma.shape[-1])
    seen = np.isfinite(visible).mean(0) > 0.2
    visible = np.where(seen, visible, -100.0)
    low, middle, high = np.nanquantile(visible, (0.1, 0.5, 0.9), axis=0) - _bar_luma()
    grey = (low > -6) & (abs(middle) < 2.5) & (high < 6)
    return ndimage.binary_dilation(ndimage.binary_opening(grey, np.ones(5)), iterations=2)


def background_of(smooth: np.ndarray, mask: np.ndarray) -> str:
    """The background's name from one smoothed frame "y x" (`filled`), or "none" where too little of it is visible.

    Plain ones by spread and level, textures by where and along how many directions their spectrum lies.
    """
    visible = smooth[~mask]
    if len(visible) < 200:
        return "none"
    low, middle, high = np.quantile(visible, (0.2, 0.5, 0.8))
    if high - low < PLAIN_SPREAD:
        return "dark" if middle < 50 else "light"
    window = np.hanning(smooth.shape[0])[:, None] * np.hanning(smooth.shape[1])
    field = np.where(mask, 0, smooth - visible.mean()) * window
    power = np.abs(np.fft.fftshift(np.fft.fft2(field))) ** 2
    ky, kx = (grid - size // 2 for grid, size in zip(np.indices(power.shape), power.shape, strict=True))
    reach, angle = np.hypot(ky, kx), np.arctan2(ky, kx)
    fine = (reach >= 2.8) & (reach <= 8)
    if power[fine].sum() < power[reach < 2.8].sum():
        return "cloudy"
    alignment = abs((power[fine] * np.exp(2j * angle[fine])).sum()) / power[fine].sum()
    return "striped" if alignment > 0.55 else "checkered"


def camera_path(smooth: np.ndarray, trust: np.ndarray, *, iterations: int = 6) -> np.ndarray:
    """The background's translation (y, x) in pixels at each frame, "frame 2", from what `filled` gives.

    Least squares between neighbouring frames over trusted pixels, iterated (Lucas and Kanade 1981). Stripes only tell
    the motion across them: the ridge keeps the other component at 0. Good for up to about 4 pixels a frame.
    """
    before, after = smooth[:-1], smooth[1:]
    slopes = np.stack([np.gradient(before, axis=axis) for axis in (1, 2)], 1)
    steps = np.zeros((len(before), 2))
    for _ in range(iterations):
        usable = (trust[:-1] > MIN_TRUST) & (_moved(trust[1:], steps) > MIN_TRUST)
        weighted = slopes * usable[:, None]
        normal = np.einsum("fiyx,fjyx->fij", weighted, slopes)
        ridge = 0.02 * np.trace(normal, axis1=1, axis2=2) + 50.0
        change = _moved(after, steps) - before
        right = np.einsum("fiyx,fyx->fi", weighted, change)
        steps = steps - np.linalg.solve(normal + ridge[:, None, None] * np.eye(2), right[..., None])[..., 0]
    return np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])


def shape_of(cover: np.ndarray) -> str:
    """The shape that a soft mask "y x" in 0..1 overlaps most, in any rotation and of its own area.

    Around the centre, overlap at equal area is decided by how much the areas in sectors differ: a lumpy circle stays a
    circle, where the strongest ripple of its outline would give it as many corners as it has lumps.
    """
    if not (cover > 0.5).any():
        return "none"
    shapes, sectors = _ideals()
    return shapes[int(np.abs(sectors - _sectors(cover)).sum(1).argmin())]


def _sectors(cover: np.ndarray) -> np.ndarray:
    """Shares of a mask's area in each of 48 sectors around its centre, on a grid four times as fine."""
    y, x = np.nonzero(_finer(cover.shape[0]) @ cover @ _finer(cover.shape[1]).T > 0.5)
    turn = (np.arctan2(y - y.mean(), x - x.mean()) + np.pi) / (2 * np.pi)
    return np.bincount((turn * 48).astype(int) % 48, minlength=48) / len(y)


@lru_cache
def _ideals() -> tuple[list[str], np.ndarray]:
    """Every shape, sharp and blurred, in rotations three degrees apart: names, and `_sectors` of each."""
    offsets, names, found = np.arange(-15.0, 16.0), [], []
    for shape, (corners, *_) in SHAPES.items():
        for angle in np.deg2rad(np.arange(0, 360 / corners if corners else 1, 3)):
            sharp = coverage(shape, offsets[:, None], offsets[None], np.array(RADII).mean(keepdims=True), angle)
            found += [_sectors(cover) for cover in (sharp, ndimage.gaussian_filter(sharp, 1.5))]
            names += [shape, shape]
    return names, np.stack(found)


def _blobs(lab: np.ndarray, chroma: np.ndarray, bar: np.ndarray) -> list[list[Blob]]:
    """Connected sprites of each frame of Lab "frame y x 3", largest first; one component per palette colour."""
    hue = lab[..., 1:] @ _hues().T
    nearest = np.where(chroma > MIN_CHROMA, hue.argmax(-1), -1)
    found: list[list[Blob]] = [[] for _ in lab]
    for index, colour in enumerate(COLOURS):
        own = nearest == index
        if own.sum((1, 2)).max() < MIN_AREA:
            continue
        labels = np.zeros(own.shape, np.int32)
        ndimage.label(ndimage.binary_opening(own, CROSS), np.pad(CROSS, ((1, 1), (0, 0), (0, 0))), labels)
        areas = np.bincount(labels.ravel())
        for number, box in enumerate(ndimage.find_objects(labels), 1):
            if areas[number] < MIN_AREA:
                continue
            frame, around = box[0].start, tuple(slice(max(0, side.start - 3), side.stop + 3) for side in box[1:])
            region, classes = labels[frame][around] == number, nearest[frame][around]
            near = ndimage.binary_dilation(region, iterations=2) & ((classes == index) | (classes == -1))
            strength = np.where(near, np.maximum(hue[frame][around][..., index], 0), 0)
            cover = np.minimum(strength / max(float(np.percentile(strength[region], 80)), 1e-6), 1)
            corner = np.array([side.start for side in around])
            centre = corner + np.tensordot(np.indices(cover.shape), cover, 2) / cover.sum()
            hidden = bool(bar[box[2]].any())
            found[frame].append(Blob(centre, int(areas[number]), colour, shape_of(cover), hidden))
    return [sorted(_joined(blobs), key=lambda blob: -blob.area) for blobs in found]


def _joined(blobs: list[Blob]) -> list[Blob]:
    """Pieces of one colour at a bar are one sprite behind it."""
    whole: dict[str, Blob] = {}
    for blob in (blob for blob in blobs if blob.hidden):
        other = whole.get(blob.colour, replace(blob, area=0))
        area = blob.area + other.area
        centre = (blob.centre * blob.area + other.centre * other.area) / area
        whole[blob.colour] = replace(max(blob, other, key=lambda piece: piece.area), centre=centre, area=area)
    return [blob for blob in blobs if not blob.hidden] + list(whole.values())


def _moved(fields: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Each field "f y x" read at its pixels plus a step (y, x) of its own, bilinear, held at the edges."""
    for step in steps.T:  # along y, then turned, along x
        size = fields.shape[1]
        where = np.clip(np.arange(size) + step[:, None], 0, size - 1).astype(np.float32)
        low = np.minimum(where.astype(int), size - 2)
        share, frame = (where - low)[:, :, None], np.arange(len(fields))[:, None]
        fields = (fields[frame, low] * (1 - share) + fields[frame, low + 1] * share).swapaxes(1, 2)
    return fields


@lru_cache
def _linear_table() -> np.ndarray:
    value = np.arange(256, dtype=np.float32) / 255
    return np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92).astype(np.float32)


@lru_cache
def _xyz_matrix() -> np.ndarray:
    """Linear sRGB to XYZ as shares of the white point D65, "rgb xyz"."""
    matrix = np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    return (matrix / np.array([0.9505, 1.0, 1.089])).astype(np.float32)


@lru_cache
def _hues() -> np.ndarray:
    """Directions of the palette in Lab's (a, b) plane, unit length, "colour 2"."""
    plane = lab_of(np.array(list(COLOURS.values()), np.uint8))[:, 1:]
    return plane / np.hypot(*plane.T)[:, None]


@lru_cache
def _bar_luma() -> float:
    return float(lab_of(np.full(3, GREY_BAR, np.uint8))[0])


@lru_cache
def _finer(size: int) -> np.ndarray:
    """Linear interpolation to four times as many samples, "fine coarse"."""
    where = np.arange(0, size - 0.999, 0.25)[:, None]
    return np.maximum(0, 1 - np.abs(where - np.arange(size))).astype(np.float32)
