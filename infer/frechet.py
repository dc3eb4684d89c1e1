"""How far two paths are apart when both are walked in order: the discrete Frechet distance."""

import numpy as np
from jaxtyping import Float


def frechet(path: Float[np.ndarray, "*n frame 2"], other: Float[np.ndarray, "*n step 2"]) -> Float[np.ndarray, " *n"]:
    """Discrete Frechet distance in pixels: the shortest leash for two who walk their paths without turning back.

    Eiter and Mannila 1994 (TR CD-TR 94/64): leash[i, j] = max(|p_i - q_j|, min over the three ways to get there). Sees
    the order of the frames, which the mean of all distances does not. Unseen frames are left out; NaN where a path is
    never seen.
    """
    p, q = _held(path), _held(other)
    apart = np.linalg.norm(p[..., :, None, :] - q[..., None, :, :], axis=-1)
    leash = np.empty_like(apart)
    for i in range(apart.shape[-2]):
        for j in range(apart.shape[-1]):
            ways = [leash[..., k, m] for k, m in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if k >= 0 and m >= 0]
            leash[..., i, j] = np.maximum(apart[..., i, j], np.min(ways, axis=0)) if ways else apart[..., i, j]
    return leash[..., -1, -1]


def _held(path: np.ndarray) -> np.ndarray:
    """Unseen frames take the last seen place, the first ones the first seen: a repeated vertex changes no leash."""
    seen = np.isfinite(path).all(-1)
    frame = np.where(seen, np.arange(path.shape[-2]), 0)
    frame = np.maximum(np.maximum.accumulate(frame, axis=-1), seen.argmax(-1)[..., None])
    return np.take_along_axis(path, frame[..., None], axis=-2)
