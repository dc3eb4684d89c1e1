"""Where the attention of a block says that tokens move: displacements between frames, read from queries and keys.

Letters: b clip, s token in (f h w) order, h head, d channel of a head, f latent frame, n token of a frame, e channel in
which queries and keys are compared, p pair of frames.

A displacement is (x, y) in tokens, right and down, from a token of one frame to where it is found in another: the
attention motion flow of DiTFlow, arXiv 2412.07776. Each token is sought in one frame at a time: softmax and argmax run
over the tokens of that frame alone.

Memory: never s x s. Pairs of frames are read in chunks of `CHUNK_BYTES` of logits, and computed again on the way back:
a reading holds about four times that, whatever the length of the clip (at 480 x 832 27 pairs at once, 1 GB), beside q
and k of the block (100 MB each in bf16 at 81 frames by the 1.3B) and the displacements (6 MB).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from motionlora.data.errors import InputError
from motionlora.heads.token_grid import TokenGrid

if TYPE_CHECKING:
    from motionlora.heads.backbone import Backbone, Latent, Prompt
    from motionlora.heads.capture import Heads
    from motionlora.infer.guidance import Time

CHUNK_BYTES = 2**28
"""Room for the logits of one chunk of pairs."""

Read = TypeVar("Read")
Rows: TypeAlias = Float[Tensor, "b p n e"]
Places: TypeAlias = Float[Tensor, "n 2"]
Displacements: TypeAlias = Float[Tensor, "b p n 2"]
Reading: TypeAlias = Callable[[Rows, Rows, float, Places], Displacements]
"""Of queries in one frame of each pair and keys in the other, the factor of their logits, and where tokens stand."""


@dataclass(frozen=True, eq=False)
class Compared:
    """Queries and keys of one block, by frame, as they are compared: a logit is `scale * q . k`."""

    q: Float[Tensor, "b f n e"]
    k: Float[Tensor, "b f n e"]
    scale: float
    grid: TokenGrid


Fusing: TypeAlias = "Callable[[Heads, Heads, TokenGrid], Compared]"


def queries_keys(
    model: Backbone, latent: Latent, time: Time, prompt: Prompt, blocks: Sequence[int], fuse: Fusing
) -> dict[int, Compared]:
    """Of each block, by a forward that ends before the attention of the last; gradients flow where grad is enabled.

    Raises:
        InputError: a block that the model does not have.
    """
    grid = model.grid(latent)
    with model.capturing(blocks, "qk", stop=True) as seen:
        seen.run(lambda: model.velocity(latent, time.expand(latent.shape[0]), prompt))
    heads: dict[int, tuple[Heads, Heads]] = {block: seen[block] for block in blocks}
    return {block: fuse(q, k, grid) for block, (q, k) in heads.items()}


def mean_of_logits(q: Heads, k: Heads, grid: TokenGrid) -> Compared:
    """The logits' mean over heads (DiTFlow's code): mean_h(q_h . k_h) = q . k / h with the heads side by side."""
    heads, width = q.shape[-2:]
    q, k = (rearrange(x, "b (f n) h d -> b f n (h d)", f=grid.frames) for x in (q, k))
    return Compared(q, k, width**-0.5 / heads, grid)


def logits_of_means(q: Heads, k: Heads, grid: TokenGrid) -> Compared:
    """The logits of the means over heads of queries and of keys (DiTFlow's text; FastVMT): not the same quantity."""
    width = q.shape[-1]
    q, k = (reduce(x.float(), "b (f n) h d -> b f n d", "mean", f=grid.frames) for x in (q, k))
    return Compared(q, k, width**-0.5, grid)


FUSINGS: dict[str, Fusing] = {"mean_of_logits": mean_of_logits, "logits_of_means": logits_of_means}


def places(grid: TokenGrid, device: torch.device) -> Places:
    """Where the tokens of a frame stand: column and row, counted from zero."""
    rows, columns = torch.arange(grid.height, device=device), torch.arange(grid.width, device=device)
    return rearrange(torch.stack(torch.meshgrid(columns, rows, indexing="xy")), "xy h w -> (h w) xy").float()


def frame_pairs(frames: int, span: int | None = None) -> Int[Tensor, "p 2"]:
    """All ordered pairs of frames, a frame with itself too; with `span` only those at most so far apart."""
    pairs = torch.cartesian_prod(torch.arange(frames), torch.arange(frames))
    apart = (pairs[:, 1] - pairs[:, 0]).abs()
    return pairs[apart <= (frames if span is None else span)]


def soft(q: Rows, k: Rows, factor: float, places: Places) -> Displacements:
    """From each token to the mean of the places that it attends to: sum_m a_m place_m - place, as sum_m a_m = 1."""
    attention = (factor * (q.float() @ k.float().mT)).softmax(-1)
    return attention @ places - places


def hard(q: Rows, k: Rows, factor: float, places: Places) -> Displacements:
    """From each token to the place that it attends to most; whole numbers, no gradient."""
    del factor
    return places[(q.float() @ k.float().mT).argmax(-1)] - places


def displacements(
    seen: Compared, pairs: Int[Tensor, "p 2"], read: Reading, tau: float = 1.0, *, at_once: int | None = None
) -> Displacements:
    """Of every token of the first frame of each pair into the second.

    Args:
        read: `soft` or `hard`.
        tau: what logits are multiplied by before the softmax, an inverse temperature.
        at_once: pairs in a chunk; by default as many as CHUNK_BYTES holds. Changes memory and speed only.
    """
    spots, pairs = places(seen.grid, seen.q.device), pairs.to(seen.q.device)
    at_once = at_once or max(1, CHUNK_BYTES // (4 * len(seen.q) * seen.grid.tokens_per_frame**2))

    def part(q: Tensor, k: Tensor, chunk: Int[Tensor, "p 2"]) -> Displacements:
        return read(q[:, chunk[:, 0]], k[:, chunk[:, 1]], tau * seen.scale, spots)

    return torch.cat([recomputed(part, seen.q, seen.k, chunk) for chunk in pairs.split(at_once)], dim=1)


def recomputed(part: Callable[..., Read], *arguments: Any) -> Read:
    """What `part` returns; nothing inside it is kept for the way back, where it is computed once more."""
    return cast(Read, checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False))


def refuse_injected(injected: Iterable[int], read: Iterable[int]) -> None:
    """InputError where the flow would be read from injected keys, which no change of the latent can move."""
    if both := sorted(set(injected) & set(read)):
        raise InputError(
            f"Block {both[0]} gets the reference's keys by guidance.inject.blocks and its own flow is to be read: "
            "inject into other blocks, or choose another guidance.block."
        )
