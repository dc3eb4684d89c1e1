"""Known answers of the displacement readers: shifts are recovered, chunks and windows equal the dense reading."""

from typing import Any

import pytest
import torch
from largest import Largest
from torch import Tensor

from motionlora.data.errors import InputError
from motionlora.heads.token_grid import TokenGrid
from motionlora.infer.attention_flow import (
    FUSINGS,
    Compared,
    displacements,
    frame_pairs,
    hard,
    logits_of_means,
    mean_of_logits,
    places,
    refuse_injected,
    soft,
)
from motionlora.infer.attention_windows import by_mean, by_most, cut, sliding, window

GRID = TokenGrid(4, 5, 6)
CPU = torch.device("cpu")
SHARP = 1e4
"""An inverse temperature at which the softmax of one-hot features is an argmax."""


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heads_of(seed: int, grid: TokenGrid = GRID, clips: int = 2) -> tuple[Tensor, Tensor]:
    return drawn(seed, clips, grid.tokens, 3, 8), drawn(seed + 1, clips, grid.tokens, 3, 8)


def moving(grid: TokenGrid, dx: int, dy: int) -> tuple[Tensor, Tensor]:
    """Two heads of features that name the place where a token was in the first frame; all move alike, by a torus."""
    first = torch.eye(grid.tokens_per_frame).reshape(grid.height, grid.width, -1)
    frames = [first.roll((f * dy, f * dx), (0, 1)).flatten(0, 1) for f in range(grid.frames)]
    x = torch.cat(frames)[None, :, None].expand(1, -1, 2, -1)
    return x, x


def shift_of(grid: TokenGrid, pairs: Tensor, dx: int, dy: int) -> tuple[Tensor, Tensor]:
    """What each token of each pair should move by, and where it stays inside of the frame."""
    shift = (pairs[:, 1] - pairs[:, 0])[:, None, None] * torch.tensor([dx, dy])
    ends = places(grid, CPU) + shift
    inside = ((ends >= 0) & (ends < torch.tensor([grid.width, grid.height]))).all(-1)
    return shift.expand_as(ends).float(), inside


@pytest.mark.parametrize("fuse", FUSINGS.values(), ids=FUSINGS)
@pytest.mark.parametrize("frames", [3, 6, 7])
@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (1, 0), (-1, 2), (2, -1)])
def test_a_shift_is_recovered(fuse: Any, frames: int, dx: int, dy: int) -> None:
    grid = TokenGrid(frames, 7, 10)
    pairs = frame_pairs(frames)
    expected, inside = shift_of(grid, pairs, dx, dy)
    seen = fuse(*moving(grid, dx, dy), grid)
    assert torch.equal(displacements(seen, pairs, hard)[0][inside], expected[inside])
    assert torch.allclose(displacements(seen, pairs, soft, SHARP)[0][inside], expected[inside], atol=0.01)
    back = Compared(seen.q.flip(1), seen.k.flip(1), seen.scale, grid)
    reversed_, inside = shift_of(grid, pairs, -dx, -dy)
    assert torch.equal(displacements(back, pairs, hard)[0][inside], reversed_[inside])


@pytest.mark.parametrize("seek", [by_mean, by_most])
@pytest.mark.parametrize(("dx", "dy", "tile", "side"), [(8, 0, (3, 4), 3), (-2, 1, (3, 4), 5), (1, -2, (2, 2), 4)])
def test_windows_recover_a_shift_that_is_longer_than_a_tile(
    seek: Any, dx: int, dy: int, tile: tuple[int, int], side: int
) -> None:
    grid = TokenGrid(2, 8, 18)
    found = sliding(logits_of_means(*moving(grid, dx, dy), grid), 5, SHARP, cut(grid, *tile, CPU), side + 4, seek)
    expected, inside = shift_of(grid, torch.tensor([[0, 1]]), dx, dy)
    # Tiles that are torn by the frame's edge have members at both of its sides.
    ends = places(grid, CPU) + expected
    margin = torch.tensor([4, 3])
    kept = inside & ((ends >= margin) & (ends < torch.tensor([18, 8]) - margin)).all(-1)
    assert kept.any()
    assert torch.allclose(found.displacements[0][kept], expected[kept], atol=0.01)


def test_a_mean_of_logits_is_the_mean_of_the_heads_logits() -> None:
    q, k = heads_of(0)
    seen = mean_of_logits(q, k, GRID)
    logits = torch.einsum("bshd,bthd->bhst", q, k).mean(1) / 8**0.5
    whole = seen.scale * torch.einsum("bfne,bgme->bfngm", seen.q, seen.k).reshape(2, GRID.tokens, GRID.tokens)
    assert torch.allclose(whole, logits, atol=1e-6)
    other = logits_of_means(q, k, GRID)
    means = torch.einsum("bsd,btd->bst", q.mean(2), k.mean(2)) / 8**0.5
    whole = other.scale * torch.einsum("bfne,bgme->bfngm", other.q, other.k).reshape(2, GRID.tokens, GRID.tokens)
    assert torch.allclose(whole, means, atol=1e-6)
    assert not torch.allclose(means, logits, atol=0.1)


def by_torch(seen: Compared, pairs: Tensor, tau: float) -> Tensor:
    """torch's own attention with places as values, one pair of frames after another."""
    spots = places(seen.grid, CPU)
    found = [
        torch.nn.functional.scaled_dot_product_attention(
            seen.q[:, i], seen.k[:, j], spots.expand(len(seen.q), -1, -1), scale=tau * seen.scale
        )
        - spots
        for i, j in pairs.tolist()
    ]
    return torch.stack(found, dim=1)


def assert_alike(ours: Any, theirs: Any, fuse: Any, weights: torch.Tensor) -> None:
    """Two readers of the same queries and keys give the same displacements, and the same gradients to both."""
    found = []
    for read in (ours, theirs):
        q, k = (x.requires_grad_() for x in heads_of(0))
        value = read(fuse(q, k, GRID))
        (value * weights).sum().backward()
        found.append((value.detach(), q.grad, k.grad))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("fuse", FUSINGS.values(), ids=FUSINGS)
@pytest.mark.parametrize("at_once", [None, 1, 3, 16])
def test_chunked_is_dense_is_torchs_attention_in_values_and_gradients(fuse: Any, at_once: int | None) -> None:
    pairs, weights = frame_pairs(4), drawn(9, 2, 16, 30, 2)
    assert_alike(
        lambda seen: displacements(seen, pairs, soft, 3.0, at_once=at_once),
        lambda seen: by_torch(seen, pairs, 3.0),
        fuse,
        weights,
    )


def test_no_tensor_grows_with_the_square_of_all_tokens() -> None:
    grid = TokenGrid(12, 5, 6)
    q, k = (x.requires_grad_() for x in heads_of(0, grid, clips=1))
    with Largest() as largest:
        displacements(mean_of_logits(q, k, grid), frame_pairs(12, 1), soft, at_once=1).sum().backward()
    assert largest.numbers <= max(30 * 30, q.numel(), 2 * 34 * 30)
    with Largest() as largest:
        seen = sliding(logits_of_means(q, k, grid), 3, 1.0, cut(grid, 2, 2, CPU), 3, by_mean)
        (seen.displacements.sum() + seen.drift.sum()).backward()
    assert largest.numbers <= max(2 * 9 * 9 * 8, q.numel())


def test_pairs_of_frames_are_all_or_those_within_the_span() -> None:
    assert frame_pairs(2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert frame_pairs(21).shape == (441, 2)
    assert frame_pairs(3, 1).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2], [2, 1], [2, 2]]


def test_tiles_hold_every_token_once_and_repeat_the_edge_where_they_reach_over_it() -> None:
    tiles = cut(TokenGrid(1, 30, 52), 3, 4, CPU)
    assert tiles.members.shape == (130, 12)
    assert tiles.members[14].tolist() == [52 * y + x for y in (3, 4, 5) for x in (4, 5, 6, 7)]
    assert tiles.middles[14] == 52 * 4 + 6
    assert torch.equal(tiles.members.flatten()[tiles.home], torch.arange(30 * 52))
    ragged = cut(TokenGrid(1, 4, 5), 3, 2, CPU)
    assert torch.equal(ragged.members.flatten()[ragged.home], torch.arange(20))
    assert ragged.members[-1].tolist() == [19, 19, 19, 19, 19, 19]
    assert ragged.members[2].tolist() == [4, 4, 9, 9, 14, 14]


def test_windows_are_clamped_as_a_whole_and_never_leave_the_frame() -> None:
    grid = TokenGrid(1, 30, 52)
    for (x, y), (left, top) in {
        (0.0, 0.0): (0, 0),
        (51.0, 29.0): (31, 9),
        (25.6, 14.4): (16, 4),
        (10.4, 10.6): (0, 1),
        (45.0, 3.0): (31, 0),
    }.items():
        expected = [52 * (top + row) + left + column for row in range(21) for column in range(21)]
        assert window(torch.tensor([x, y]), 21, grid).tolist() == expected
    middles = 60 * torch.rand(7, 9, 2, generator=torch.Generator().manual_seed(0)) - 5
    found = window(middles, 5, grid)
    assert found.shape == (7, 9, 25)
    assert ((found >= 0) & (found < 30 * 52)).all()
    assert all(len(set(tokens)) == 25 for tokens in found.flatten(0, 1).tolist())
    assert ((found % 52).amax(-1) - (found % 52).amin(-1) == 4).all()
    assert window(torch.tensor([1.0, 1.0]), 9, TokenGrid(1, 2, 12)).tolist() == [*range(9), *range(12, 21)]


@pytest.mark.parametrize("seek", [by_mean, by_most])
def test_a_window_that_covers_the_frame_is_the_dense_reading(seek: Any) -> None:
    pairs, weights = torch.tensor([[0, 1], [0, 2], [1, 2], [1, 3], [2, 3]]), drawn(9, 2, 5, 30, 2)
    assert_alike(
        lambda seen: sliding(seen, 3, 2.0, cut(GRID, 2, 4, CPU), 6, seek).displacements,
        lambda seen: displacements(seen, pairs, soft, 2.0),
        logits_of_means,
        weights,
    )


def in_loops(seen: Compared, frame: int, other: int, tau: float, tile: tuple[int, int], side: int) -> Any:
    """A window's displacements and mean keys, one tile and one token after another."""
    grid, (rows, columns) = seen.grid, tile
    q, k, factor = seen.q[0, frame], seen.k[0, other], tau * seen.scale
    found, means = torch.zeros(grid.tokens_per_frame, 2), []
    spots = [(x, y) for y in range(grid.height) for x in range(grid.width)]
    for top in range(0, grid.height, rows):
        for left in range(0, grid.width, columns):
            middle = (top + rows // 2) * grid.width + left + columns // 2
            coarse = (factor * q[middle] @ k.T).softmax(-1) @ torch.tensor(spots).float()
            x0, y0 = (
                min(max(round(float(c)) - side // 2, 0), size - side)
                for c, size in zip(coarse, (grid.width, grid.height), strict=True)
            )
            inside = [y * grid.width + x for y in range(y0, y0 + side) for x in range(x0, x0 + side)]
            means.append(k[inside].mean(0))
            for y in range(top, top + rows):
                for x in range(left, left + columns):
                    attention = (factor * q[y * grid.width + x] @ k[inside].T).softmax(-1)
                    end = attention @ torch.tensor([spots[token] for token in inside]).float()
                    found[y * grid.width + x] = end - torch.tensor([x, y])
    return found, torch.stack(means)


def test_windows_are_what_loops_over_tiles_and_tokens_find() -> None:
    grid = TokenGrid(4, 4, 6)
    q, k = heads_of(3, grid, clips=1)
    seen = logits_of_means(4 * q, 4 * k, grid)
    found = sliding(seen, 3, 2.0, cut(grid, 2, 3, CPU), 3, by_mean)
    pairs = [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]
    loops = {pair: in_loops(seen, *pair, 2.0, (2, 3), 3) for pair in pairs}
    assert found.apart.tolist() == [1, 2, 1, 2, 1]
    for index, pair in enumerate(pairs):
        assert torch.allclose(found.displacements[0, index], loops[pair][0], atol=1e-4)
    drift = torch.stack([loops[frame, frame + 2][1] - loops[frame, frame + 1][1] for frame in (0, 1)])
    assert torch.allclose(found.drift[0], drift, atol=1e-5)


def test_the_flow_of_a_block_with_injected_keys_is_refused() -> None:
    refuse_injected((0, 2), (1, 3))
    with pytest.raises(InputError, match=r"Block 2 .* choose another guidance.block"):
        refuse_injected((0, 2), (1, 2))
