"""How much of each head's attention stays in its own frame, and how much stays on its own place: exact, and cheap.

Letters: b clip, s token in (f h w) order, h head, d channel of a head, f frame, p place in a frame, n window.

A share is a ratio of two sums of exp(q k / sqrt(d)): over the keys that a mask allows, and over all keys. Both are what
a fused attention kernel (FlashAttention, arXiv 2307.08691) keeps of the softmax anyway, its logarithm. The sum over all
keys comes with the very call that the model makes; that over a mask from the same kernel, called for each mask block of
queries with the keys that it may see. So no logit reaches memory and none outside of the masks is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from motionlora.data.settings import InputError
from motionlora.heads.backbone import Latent, Prompt, TokenGrid
from motionlora.heads.capture import layers_of, text_tokens

if TYPE_CHECKING:
    from motionlora.heads.wan import WanBackbone

EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default
KERNELS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    EFFICIENT,
}
"""PyTorch's kernels that return the logarithm of the softmax's sum, natural, as their second result "b h s"."""
ALLOWED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""What PyTorch may choose from while heads are scored. The last of them is refused afterwards, in our words."""
LEAST_LEFT = 0.01
"""Of a query's attention, what the text must leave to the video for a difference of two sums to be exact to 1e-4. Heads
with a query that has less are summed over the video's keys anew, for the price of their attention (ours)."""


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
    return (shares / len(times)).cpu().numpy()


@contextmanager
def scoring(transformer: nn.Module, grid: TokenGrid) -> Iterator[Float[Tensor, "block head 2"]]:
    """Scores the self-attention of every block during each forward inside the context; the forward itself is unchanged.

    Inside, attention runs on PyTorch's own kernels, the fused ones of flash and memory-efficient attention, whatever
    backend was chosen; afterwards on the chosen one again.

    Yields:
        float64 where the model is, "block head 2", zero at first: every forward adds its shares (`attention_shares`).
        Divide by the number of forwards. Where text tokens share the attention (CogVideoX), only what stays in the
        video counts.

    Raises:
        InputError: in the forward, where the tokens do not fit `grid`, or no fused kernel takes this dtype and device.
    """
    layers, kernels = layers_of(transformer), FusedKernels()
    device = next(transformer.parameters()).device
    total = torch.zeros(len(layers), int(layers[0].attn1.heads), 2, dtype=torch.float64, device=device)

    def add(block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        total[block] += attention_shares(kernels.watched(), grid, text_tokens(args, kwargs)).to(device)

    with ExitStack() as stack:
        for block, layer in enumerate(layers):
            attention, backend = layer.get_submodule("attn1"), "_attention_backend"
            before, after = attention.register_forward_pre_hook, attention.register_forward_hook
            stack.enter_context(before(lambda *_: kernels.watch()))
            stack.enter_context(after(lambda _, args, kw, __, block=block: add(block, args, kw), with_kwargs=True))
            processor: Any = attention.processor
            if hasattr(processor, backend):  # CogVideoX has PyTorch's own always
                stack.callback(setattr, processor, backend, getattr(processor, backend))
                setattr(processor, backend, "native")
        stack.enter_context(sdpa_kernel(ALLOWED))
        stack.enter_context(kernels)
        yield total


@dataclass(frozen=True, eq=False)
class FusedCall:
    """A call of one of `KERNELS`: its arguments, the first of which are q, k and v "b h s d", and log sums "b h s"."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    log_sums: Float[Tensor, "b h s"]

    def again(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b h k d"]) -> Float[Tensor, "b h q"]:
        """Log of the sum of exp(q k / sqrt(d)) over other keys."""
        return self.kernel(q, k, k, *self.args[3:], **self.kwargs)[1][..., : q.shape[2]]


class FusedKernels(TorchDispatchMode):
    """Inside, notes the call of a fused kernel that comes between `watch` and `watched`."""

    def __init__(self) -> None:
        super().__init__()
        self._watching = False
        self._call: FusedCall | None = None

    def watch(self) -> None:
        """From here on calls are noted."""
        self._watching, self._call = True, None

    def watched(self) -> FusedCall:
        """The latest call; none is noted from here on.

        Raises:
            InputError: there was none.
        """
        call, self._watching, self._call = self._call, False, None
        if call is None:
            raise InputError(
                "Heads are scored by PyTorch's fused attention, which has no kernel for this model here: load it in "
                "bf16 or fp32 on a CPU or a CUDA GPU, with diffusers' own attention processors."
            )
        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is EFFICIENT:  # leaves the sums out where no gradient is wanted
            args = (*args[:4], True, *args[5:])
        result = func(*args, **kwargs)
        if self._watching and func in KERNELS:
            self._call = FusedCall(func, args, kwargs, result[1])
        return result


@torch.no_grad()
def attention_shares(call: FusedCall, grid: TokenGrid, text: int = 0) -> Float[Tensor, "h 2"]:
    """Share of each head's attention that falls into the spatial and into the temporal mask, averaged over clips.

    For a = softmax(q k^T / sqrt(d)): sum(a * mask) / s, which is the area of the mask for a head that attends evenly.
    Spatial: a band of about one frame to either side in (f h w) order. Temporal: the same band in position-major order
    (h w f), which is the same place in every frame. With `mask_block` tokens m and p tokens a frame, queries of block i
    see keys of block j if |i - j| < max(1, p // m). Source: the release of Follow-Your-Motion (arXiv 2506.05207).

    Args:
        call: the attention, queries and keys after norm and rotary positions, tokens in (f h w) order after the text.
        grid: the token grid.
        text: tokens of a caption before them, which are left out of a.

    Returns:
        float64: spatial, temporal share in [0, 1]. Errors are about 1e-7 times the largest logit.

    Raises:
        InputError: the number of tokens is not that of the grid.
    """
    q, k = (x[:, :, text:] for x in call.args[:2])
    if q.shape[2] != grid.tokens:
        raise InputError(
            f"The attention runs over {q.shape[2]} tokens, the grid {grid.frames} x {grid.height} x {grid.width} has "
            f"{grid.tokens}: pass the grid of the latent that is being scored."
        )
    whole = call.log_sums[..., text : text + grid.tokens]
    if text:
        whole = _without_text(call, q, k, whole, call.args[1][:, :, :text])
    shares = []
    for order in ("b h (f p) ... -> b h (f p) ...", "b h (f p) ... -> b h (p f) ..."):
        query, key, sums = (rearrange(x, order, f=grid.frames) for x in (q, k, whole))
        inside = torch.cat([_band(call, *clip, grid) for clip in zip(query.split(1), key.split(1), strict=True)])
        shares.append((inside - sums).clamp(max=0).exp().mean(dim=(0, 2), dtype=torch.float64))
    return torch.stack(shares, dim=1)


def mask_block(tokens_per_frame: int) -> int:
    """Tokens that the masks treat as one: 128 as in Sparse VideoGen (arXiv 2502.01776), less on small frames.

    A twelfth of a frame keeps the half-width of the band at about one frame where a frame has under 1536 tokens; with
    128 it shrinks to nothing there (ours: the release gives two empty masks below 128 tokens a frame).
    """
    return max(1, min(128, tokens_per_frame // 12))


def _without_text(call: FusedCall, q: Tensor, k: Tensor, whole: Tensor, words: Tensor) -> Float[Tensor, "b h s"]:
    """Log of the sum over the video's keys alone: what is over all keys, less what is over the words."""
    left = -torch.expm1(call.again(q, words) - whole)
    whole = whole + left.log()
    heads = left.amin(dim=(0, 2)) < LEAST_LEFT
    if heads.any():
        whole[:, heads] = call.again(q[:, heads], k[:, heads])
    return whole


def _band(
    call: FusedCall, q: Float[Tensor, "1 h s d"], k: Float[Tensor, "1 h s d"], grid: TokenGrid
) -> Float[Tensor, "1 h s"]:
    """Log of the sum over the keys of the band, for every query.

    Mask blocks whose window of keys lies within the clip are one call, a batch of windows that overlap in memory; those
    at either end, whose windows are cut off, are a call each.
    """
    block, tokens = mask_block(grid.tokens_per_frame), grid.tokens
    reach = block * (max(1, grid.tokens_per_frame // block) - 1)
    window = 2 * reach + block
    count = max(0, (tokens - window) // block + 1)
    last = reach + count * block

    def at_an_end(start: int) -> Tensor:
        return call.again(q[:, :, start : start + block], k[:, :, max(0, start - reach) : start + block + reach])

    pieces = [at_an_end(start) for start in range(0, min(reach, tokens), block)]
    if count:
        queries = rearrange(q[:, :, reach:last], "1 h (n s) d -> n h s d", n=count)
        keys = rearrange(k.unfold(2, window, block), "1 h n d s -> n h s d")
        pieces.append(rearrange(call.again(queries, keys), "n h s -> 1 h (n s)"))
    return torch.cat([*pieces, *(at_an_end(start) for start in range(last, tokens, block))], dim=2)
