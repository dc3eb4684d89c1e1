"""How the camera moves, from pixels alone, by phase correlation.

For natural pictures. The sprite world's backgrounds are a few plane waves, whose spectrum is nearly empty and which
repeat themselves: there `recognise_sprites.camera_path` (least squares) is the right one.
"""

from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, UInt8

LUMA = np.array([0.299, 0.587, 0.114])
BLUR = 1.0
"""Gaussian sigma of the correlation's peak in pixels: its logarithm is a parabola, so three samples find its top."""


def phase_camera(
    pixels: UInt8[np.ndarray, "frame height width 3"], hidden: Bool[np.ndarray, "frame height width"] | None = None
) -> Float[np.ndarray, "frame 2"]:
    """The background's translation (y, x) in pixels since the first frame, "frame 2", from (0, 0).

    Phase correlation of neighbouring frames (Kuglin and Hines 1975), summed; below a pixel by a parabola through the
    logarithm of the peak. Steps up to about a third of the frame. A pair that shows no texture adds 0.

    Args:
        hidden: pixels that are not background, such as moving objects; they are filled with the frame's mean.
    """
    luma = pixels @ LUMA
    shown = np.ones(luma.shape, bool) if hidden is None else ~hidden
    mean = (luma * shown).sum((1, 2), keepdims=True) / np.maximum(shown.sum((1, 2), keepdims=True), 1)
    window = np.hanning(luma.shape[1])[:, None] * np.hanning(luma.shape[2])
    spectra = np.fft.fft2(np.where(shown, luma - mean, 0) * window)
    steps = [_step(before, after) for before, after in pairwise(spectra)]
    return np.concatenate([np.zeros((1, 2)), np.cumsum(np.reshape(steps, (-1, 2)), axis=0)])


def _step(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The translation (y, x) between two frames, from their spectra."""
    cross = after * before.conj()
    size = np.abs(cross)
    if size.max() < 1e-6 * before.size:
        return np.zeros(2)
    waves = [np.fft.fftfreq(count) for count in cross.shape]
    soft = np.exp(-2 * (np.pi * BLUR) ** 2 * (waves[0][:, None] ** 2 + waves[1] ** 2))
    peak = np.fft.ifft2(soft * cross / np.maximum(size, 1e-9 * size.max())).real
    top = np.unravel_index(peak.argmax(), peak.shape)
    return np.array([_top_of(np.take(peak, top[1 - axis], axis=1 - axis), int(top[axis])) for axis in (0, 1)])


def _top_of(line: np.ndarray, index: int) -> float:
    """Where the peak of a periodic line is, with sign and below a pixel: top of the parabola through its logarithm."""
    size = len(line)
    below, middle, above = np.log(np.maximum(line[[index - 1, index, (index + 1) % size]], 1e-12))
    bend = below - 2 * middle + above
    offset = 0.5 * (below - above) / bend if bend < 0 else 0.0
    return float((index + offset + size / 2) % size - size / 2)
