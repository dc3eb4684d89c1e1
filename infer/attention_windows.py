"""Displacements with each token sought in a window alone, which a few queries place: FastVMT's sliding window.

Letters: b clip, f latent frame, n token of a frame, e channel in which queries and keys are compared, t tile of a
frame, m token of a tile, j later frame, l token of a window, p pair of frames, q pair of neighbouring later frames.

Source: FastVMT, arXiv 2602.05551, its equations and not its public code, which clamps each place of a window by itself
and leaves the window's origin out (methods of the project: section 5.3). Displacements are absolute.

Memory: one frame at a time with the frames that follow it, computed again on the way back. At 480 x 832 by the 1.3B the
keys of the windows of a frame are 117 MB (4 frames x 130 tiles x 441 places x 128 channels).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from motionlora.heads.token_grid import TokenGrid
from motionlora.infer.attention_flow import Compared, Displacements, Places, places, recomputed

Weights: TypeAlias = Float[Tensor, "b j t n"]
Seeking: TypeAlias = Callable[[Weights, Places], Float[Tensor, "b j t 2"]]
"""Where the middle of a tile is found in a frame, from its attention."""


def by_mean(attention: Weights, places: Places) -> Float[Tensor, "b j t 2"]:
    """At the mean of the places that it attends to (FastVMT, eq. 2)."""
    return attention @ places


def by_most(attention: Weights, places: Places) -> Float[Tensor, "b j t 2"]:
    """At the place that it attends to most (FastVMT, eq. 4)."""
    return places[attention.argmax(-1)]


@dataclass(frozen=True, eq=False)
class Tiles:
    """A frame cut into tiles of equal size; where they reach over its edge, they hold the edge's tokens once more.

    Attributes:
        members: the tokens of each tile, row by row.
        middles: the representative token of each.
        home: where each token of the frame is found in `members`, flattened.
    """

    members: Int[Tensor, "t m"]
    middles: Int[Tensor, " t"]
    home: Int[Tensor, " n"]


def cut(grid: TokenGrid, rows: int, columns: int, device: torch.device) -> Tiles:
    """Tiles of so many rows and columns of tokens; the middle of 3 x 4 is row 1, column 2 (FastVMT)."""
    down, across = -(-grid.height // rows), -(-grid.width // columns)
    row = torch.arange(down * rows, device=device).clamp(max=grid.height - 1)
    column = torch.arange(across * columns, device=device).clamp(max=grid.width - 1)
    members = rearrange(
        row[:, None] * grid.width + column, "(down r) (across c) -> (down across) (r c)", r=rows, c=columns
    )
    y, x = (side.flatten() for side in torch.meshgrid(row[: grid.height], column[: grid.width], indexing="ij"))
    home = ((y // rows) * across + x // columns) * rows * columns + (y % rows) * columns + x % columns
    return Tiles(members, members[:, rows // 2 * columns + columns // 2], home)


def window(middle: Float[Tensor, "*any 2"], side: int, grid: TokenGrid) -> Int[Tensor, "*any l"]:
    """The tokens of a square around each place, moved as a whole where it would leave the frame.

    Its upper left corner is clamp(round(middle) - side // 2, 0, size - side); it is as long as the frame where that is
    shorter than `side`.
    """
    along = []
    for axis, size in enumerate((grid.width, grid.height)):
        length = min(side, size)
        first = (middle[..., axis].round().long() - side // 2).clamp(0, size - length)
        along.append(first[..., None] + torch.arange(length, device=middle.device))
    return rearrange(along[1][..., :, None] * grid.width + along[0][..., None, :], "... h w -> ... (h w)")


@dataclass(frozen=True, eq=False)
class Sliding:
    """What windows show of a clip.

    Attributes:
        displacements: of every token into the frames that follow its own, frame by frame.
        apart: how many frames lie between the two of each pair, 1 for neighbours.
        drift: by how much the mean key of a tile's window changes from one later frame to the next.
    """

    displacements: Displacements
    apart: Int[Tensor, " p"]
    drift: Float[Tensor, "b q t e"]


def sliding(seen: Compared, span: int, tau: float, tiles: Tiles, side: int, seek: Seeking) -> Sliding:
    """Each frame but the last with those that follow it, `span` frames in all with itself."""
    frames = seen.grid.frames
    later = [range(frame + 1, min(frame + span, frames)) for frame in range(frames - 1)]
    spots = places(seen.grid, seen.q.device)

    def part(q: Tensor, k: Tensor, frame: int) -> tuple[Tensor, Tensor]:
        keys = k[:, frame + 1 : frame + 1 + len(later[frame])]
        found, means = _into_windows(q[:, frame], keys, tau * seen.scale, spots, tiles, side, seek, seen.grid)
        return found, means.diff(dim=1)

    read = [recomputed(part, seen.q, seen.k, frame) for frame in range(frames - 1)]
    apart = [other - frame for frame, others in enumerate(later) for other in others]
    found, drift = (torch.cat(parts, dim=1) for parts in zip(*read, strict=True))
    return Sliding(found, torch.tensor(apart, device=found.device), drift)


def _into_windows(
    q: Float[Tensor, "b n e"],
    k: Float[Tensor, "b j n e"],
    factor: float,
    places: Places,
    tiles: Tiles,
    side: int,
    seek: Seeking,
    grid: TokenGrid,
) -> tuple[Float[Tensor, "b j n 2"], Float[Tensor, "b j t e"]]:
    """Displacements into each later frame, and the mean key of each tile's window there.

    Where a window lies has no gradient: it is rounded.
    """
    with torch.no_grad():
        coarse = (factor * einsum(q[:, tiles.middles], k, "b t e, b j n e -> b j t n")).softmax(-1)
        chosen = window(seek(coarse, places), side, grid)
    clip, frame = (torch.arange(size, device=q.device) for size in k.shape[:2])
    inside = k[clip[:, None, None, None], frame[:, None, None], chosen]
    logits = einsum(q[:, tiles.members], inside, "b t m e, b j t l e -> b j t m l")
    ends = einsum((factor * logits).softmax(-1), places[chosen], "b j t m l, b j t l xy -> b j t m xy")
    return rearrange(ends, "b j t m xy -> b j (t m) xy")[:, :, tiles.home] - places, inside.mean(-2)
