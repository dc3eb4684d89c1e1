"""How every place of a clip moves, in colours: hue is the direction, strength the speed, white stands still.

The wheel is that of hue, saturation and value 1: right is red, down yellow-green, left cyan, up violet.
"""

import numpy as np
from jaxtyping import Float, UInt8

from motionlora.data.clip import Clip
from motionlora.infer.track_points import dense_flow

CELLS = 24
"""Cells along a frame's longer side, of each of which the mean displacement is shown."""
LONGEST = 160
"""Pixels of the longer side at which displacements are looked for; larger clips are made smaller."""


def field_of(clip: Clip) -> Float[np.ndarray, "frame cell cell 2"]:
    """Mean displacement (y, x) of each cell to the next frame, in pixels of the clip; the last is that before it."""
    scale = min(1.0, LONGEST / max(clip.height, clip.width))
    size = tuple(max(1, round(side * scale)) for side in (clip.height, clip.width))
    longer = max(size)
    cells = tuple(max(1, round(CELLS * side / longer)) for side in size)
    if clip.frames < 2:
        return np.zeros((clip.frames, *cells, 2))
    fields = np.stack([_pooled(flow, cells) for flow in dense_flow(clip.pixels, size)]) / scale
    return np.concatenate([fields, fields[-1:]])


def coloured(field: Float[np.ndarray, "... 2"], speed: float) -> UInt8[np.ndarray, "... 3"]:
    """Displacements (y, x) as colours, at full strength from `speed` on."""
    y, x = np.moveaxis(field, -1, 0)
    hue = np.arctan2(y, x) / (2 * np.pi) % 1
    strength = np.minimum(1.0, np.hypot(y, x) / max(speed, 1e-6))
    k = (np.array([5, 3, 1]) + 6 * hue[..., None]) % 6
    return np.rint(255 * (1 - strength[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1))).astype(np.uint8)


def _pooled(flow: Float[np.ndarray, "height width 2"], cells: tuple[int, ...]) -> Float[np.ndarray, "cell cell 2"]:
    """Means over cells, of which some may be a pixel larger."""
    for axis, count in enumerate(cells):
        edges = np.linspace(0, flow.shape[axis], min(count, flow.shape[axis]) + 1).astype(int)
        sizes = np.diff(edges).reshape([-1 if i == axis else 1 for i in range(flow.ndim)])
        flow = np.add.reduceat(flow, edges[:-1], axis=axis) / sizes
    return flow
