"""How much of each head's attention stays in its own frame, and how much stays on its own place: exact, streamed.

Letters: b clip, s token in (f h w) order, h head, d channel of a head, r a chunk of query rows, m mask.

Never an s x s matrix: logits exist for one chunk of rows at a time, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from motionlora.data.settings import InputError
from motionlora.heads.backbone import Latent, Prompt, TokenGrid
from motionlora.heads.capture import Heads, layers_of, watching_attention

if TYPE_CHECKING:
    from motionlora.heads.wan import WanBackbone

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**29}
"""Room for the logits of one chunk of rows and for its masks; small chunks were twice as fast on CPUs (ours)."""


@torch.no_grad()
def head_scores(
    backbone: WanBackbone, latent: Latent, prompt: Prompt, times: Sequence[float], generator: torch.Generator
) -> np.ndarray:
    """Spatial and temporal attention shares of every head on a noised clip, averaged over noise levels.

    The clip should be the full-length reference: on short clips both masks overlap and the split means little.
    One noise serves all levels, so that the scores of a level do not depend on the list it stands in.

    Args:
        backbone: the model.
        latent: the clean latent x0 of one clip or of several (averaged), "b c f h w".
        prompt: the embedded caption, for the same number of clips.
        times: noise levels in (0, 1]; the Follow-Your-Motion release uses (0.9998,), almost pure noise.
        generator: source of the noise.

    Returns:
        float64 "block head 2": spatial, temporal share of the attention mass, each in [0, 1].

    Raises:
        InputError: no time, or one outside (0, 1].

    Source: Follow-Your-Motion (arXiv 2506.05207) stage 1, with the masks of its release.
    """
    if not times or not all(0 < time <= 1 for time in times):
        raise InputError(
            f"Heads are scored at noise levels above 0 and at most 1 (pure noise), got {list(times)}: name one or more."
        )
    noise = torch.randn(latent.shape, generator=generator, device=generator.device).to(latent)
    with scoring(backbone.transformer, backbone.grid(latent)) as shares:
        for time in times:
            levels = torch.full((latent.shape[0],), time, device=latent.device)
            backbone.velocity((1 - time) * latent + time * noise, levels, prompt)
    return (shares / len(times)).numpy()


@contextmanager
def scoring(transformer: nn.Module, grid: TokenGrid) -> Iterator[Float[Tensor, "block head 2"]]:
    """Scores the self-attention of every block during each forward inside the context; the forward itself is unchanged.

    Yields:
        float64 on the CPU, "block head 2", zero at first: every forward adds its shares (`attention_shares`). Divide by
        the number of forwards. Where text tokens share the attention (CogVideoX), only what stays in the video counts.

    Raises:
        InputError: in the forward, where the tokens do not fit `grid`.
    """
    layers = layers_of(transformer)
    total = torch.zeros(len(layers), int(layers[0].attn1.heads), 2, dtype=torch.float64)
    with ExitStack() as hooks:
        for block, layer in enumerate(layers):

            def add(read: Callable[[], tuple[Tensor, ...]], block: int = block) -> None:
                with torch.no_grad():
                    q, k = read()
                    total[block] += attention_shares(q, k, grid)

            hooks.enter_context(watching_attention(layer.get_submodule("attn1"), add, value=False))
        yield total


@torch.no_grad()
def attention_shares(q: Heads, k: Heads, grid: TokenGrid, *, rows: int | None = None) -> Float[Tensor, "h 2"]:
    """Share of each head's attention that falls into the spatial and into the temporal mask, averaged over clips.

    For a = softmax(q k^T / sqrt(d)): sum(a * mask) / s, which is the area of the mask for a head that attends evenly.

    Args:
        q, k: queries and keys after norm and rotary positions, tokens in (f h w) order.
        grid: the token grid.
        rows: query rows at a time; by default as many as CHUNK_BYTES holds. Changes memory and speed only.

    Returns:
        float64 on the CPU: spatial, temporal share in [0, 1].

    Raises:
        InputError: the number of tokens is not that of the grid.
    """
    clips, tokens, heads, width = q.shape
    if tokens != grid.tokens:
        raise InputError(
            f"The attention runs over {tokens} tokens, the grid {grid.frames} x {grid.height} x {grid.width} has "
            f"{grid.tokens}: pass the grid of the latent that is being scored."
        )
    rows = rows or max(1, CHUNK_BYTES.get(q.device.type, 2**29) // (4 * tokens * (heads + 2)))
    total = torch.zeros(heads, 2, dtype=torch.float64, device=q.device)
    # Autocast would turn the two products below into bf16: rows would no longer sum to 1.
    with torch.autocast(q.device.type, enabled=False):
        for query, key in zip(_by_head(q), _by_head(k), strict=True):
            query = query * width**-0.5
            for chunk in torch.split(torch.arange(tokens, device=q.device), rows):
                total += _row_shares(query[:, chunk], key, mask_rows(grid, chunk)).sum(dim=1, dtype=torch.float64)
    return (total / (clips * tokens)).cpu()


def mask_block(tokens_per_frame: int) -> int:
    """Tokens that the masks treat as one: 128 as in Sparse VideoGen (arXiv 2502.01776), less on small frames.

    A twelfth of a frame keeps the half-width of the band at about one frame where a frame has under 1536 tokens; with
    128 it shrinks to nothing there (ours: the release gives two empty masks below 128 tokens a frame).
    """
    return max(1, min(128, tokens_per_frame // 12))


def mask_rows(grid: TokenGrid, rows: Int[Tensor, " r"]) -> Float[Tensor, "r 2 s"]:
    """Rows of the spatial and of the temporal mask, 0 or 1.

    Spatial: a band of about one frame to either side in (f h w) order. Temporal: the same band in position-major order
    (h w f), which is the same place in every frame. Source: the release of Follow-Your-Motion (arXiv 2506.05207).
    """
    block = mask_block(grid.tokens_per_frame)
    half_width = max(1, grid.tokens_per_frame // block)
    rows, columns = rows.int(), torch.arange(grid.tokens, device=rows.device, dtype=torch.int32)

    def band(row: Tensor, column: Tensor) -> Tensor:
        return (row[:, None] // block - column // block).abs_() < half_width

    def by_place(index: Tensor) -> Tensor:
        return (index % grid.tokens_per_frame) * grid.frames + index // grid.tokens_per_frame

    return torch.stack((band(rows, columns), band(by_place(rows), by_place(columns))), dim=1).float()


def _by_head(x: Heads) -> Float[Tensor, "b h s d"]:
    return rearrange(x.float(), "b s h d -> b h s d")


def _row_shares(
    query: Float[Tensor, "h r d"], key: Float[Tensor, "h s d"], masks: Float[Tensor, "r 2 s"]
) -> Float[Tensor, "h r 2"]:
    logits = query @ key.mT
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()  # in place: this is the one large tensor
    inside = torch.einsum("hrs,rms->hrm", weights, masks)
    return inside / weights.sum(dim=-1, keepdim=True)
