"""Record q, k, v or block outputs of chosen blocks, stop the forward early, leave no trace.

Letters: b clip, s token in (f h w) order, h head, d channel of a head, c channel of the model (c = h d).

Everything is done by hooks on the sub-modules of a block, none by an attention processor: the processor, the
attention backend and the LoRA layers of the model stay what they are, and q, k, v are the very tensors that the
attention receives, not a second projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Generic, Literal, TypeAlias, TypeVar, overload

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from motionlora.data.settings import InputError

What: TypeAlias = Literal["qk", "qkv", "block"]
Heads: TypeAlias = Float[Tensor, "b s h d"]
Seen: TypeAlias = Callable[[Callable[[], Any]], None]  # is given what reads the tensors
Rope: TypeAlias = tuple[Tensor, Tensor]  # cos and sin, each real "1 s 1 d", values doubled for even and odd lanes
BLOCKS = ("blocks", "transformer_blocks")
"""What the list of blocks is called: in Wan, in CogVideoX."""
ROPE = ("rotary_emb", "image_rotary_emb")
"""What the self-attention's rotary tables are called: in Wan, in CogVideoX."""
T = TypeVar("T")
Out = TypeVar("Out")


@overload
def capturing(
    transformer: nn.Module, blocks: Sequence[int], what: Literal["qk"], *, stop: bool = False
) -> AbstractContextManager[Captured[tuple[Tensor, Tensor]]]: ...
@overload
def capturing(
    transformer: nn.Module, blocks: Sequence[int], what: Literal["qkv"], *, stop: bool = False
) -> AbstractContextManager[Captured[tuple[Tensor, Tensor, Tensor]]]: ...
@overload
def capturing(
    transformer: nn.Module, blocks: Sequence[int], what: Literal["block"], *, stop: bool = False
) -> AbstractContextManager[Captured[Tensor]]: ...
@overload
def capturing(
    transformer: nn.Module, blocks: Sequence[int], what: What, *, stop: bool = False
) -> AbstractContextManager[Captured[Any]]: ...
@contextmanager
def capturing(
    transformer: nn.Module, blocks: Sequence[int], what: What, *, stop: bool = False
) -> Iterator[Captured[Any]]:
    """Records tensors of `blocks` in every forward that runs inside the context.

        with capturing(transformer, [15], "qk", stop=True) as seen:
            seen.run(lambda: model.velocity(latent, time, prompt))
            q, k = seen[15]

    Args:
        transformer: a transformer of diffusers' Wan or CogVideoX, or a wrapper that holds one as `.module`.
        blocks: which blocks, counted from zero.
        what: "qk" and "qkv": the self-attention's inputs after norm and rotary positions, each "b s h d";
            "block": the output of the block, "b s c". In the model's dtype; gradients flow. Tokens of the video only:
            where text tokens share the attention (CogVideoX), they are left out.
        stop: end each forward when nothing is left to record: after the last block of `blocks`, for "qk" and "qkv"
            before its attention. Such a forward has no result and must be called through `Captured.run`.

    Raises:
        InputError: no block, a block that the model does not have, an unknown `what`, or fused projections.
    """
    model, layers = unwrapped(transformer), chosen_blocks(transformer, blocks)
    if what not in _WATCH:
        raise InputError(f"Cannot capture {what!r}; allowed are {', '.join(_WATCH)}: choose one of them.")
    seen: Captured[Any] = Captured(last=max(layers) if stop else None)
    with ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(seen._begin))
        hooks.enter_context(model.register_forward_hook(seen._end, always_call=True))
        for block, layer in layers.items():
            hooks.enter_context(_WATCH[what](layer, lambda read, block=block: seen._put(block, read)))
        yield seen


class Captured(Mapping[int, T], Generic[T]):
    """What the latest forward showed: block -> tensors. Readable also after the context is left.

    Indexing applies the rotary positions anew each time, in the gradient mode of the reader (outside of the forward, so
    that gradient checkpointing sees no foreign operation): keep the result rather than index twice.
    """

    def __init__(self, last: int | None) -> None:
        self._last = last
        self._running = False
        self._readers: dict[int, Callable[[], T]] = {}

    def run(self, forward: Callable[[], Out]) -> Out | None:
        """Calls `forward`; returns its result, or None where it ended early because nothing was left to record."""
        try:
            return forward()
        except _Enough as enough:
            if enough.captured is not self:
                raise
            return None

    def __getitem__(self, block: int) -> T:
        if block not in self._readers:
            have = ", ".join(map(str, self._readers)) or "none"
            raise KeyError(f"block {block} was not captured (captured: {have}): name it in capturing(), run a forward")
        return self._readers[block]()

    def __iter__(self) -> Iterator[int]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def _begin(self, *_: object) -> None:
        self._running, self._readers = True, {}

    def _end(self, *_: object) -> None:
        self._running = False

    def _put(self, block: int, read: Callable[[], T]) -> None:
        # Gradient checkpointing runs the blocks once more in the backward pass: that is not a forward of the model.
        if not self._running:
            return
        self._readers[block] = read
        if block == self._last:
            raise _Enough(self)


class _Enough(Exception):
    """Ends a forward whose remaining blocks nobody needs. Never leaves `Captured.run`."""

    def __init__(self, captured: Captured[Any]) -> None:
        super().__init__("this forward was stopped on purpose (stop=True): call it through Captured.run")
        self.captured = captured


@contextmanager
def _watching_attention(layer: nn.Module, seen: Seen, *, value: bool = False) -> Iterator[None]:
    """Calls `seen` just before each attention with a function that returns (q, k) or (q, k, v), each "b s h d".

    The order is that of diffusers' WanAttnProcessor and CogVideoXAttnProcessor2_0 (0.42): to_q, to_k, to_v, norm_q,
    norm_k, rotary, attention. Exceptions of `seen` pass through.
    """
    attention: Any = layer.attn1
    heads, parts = int(attention.heads), dict[str, Any]()

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parts["rope"] = args[3] if len(args) > 3 else next((kwargs[name] for name in ROPE if name in kwargs), None)
        parts["text"] = text_tokens(args, kwargs)

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, _args, out: parts.__setitem__(name, out)

    def ready(_module: nn.Module, _args: object, out: Tensor) -> None:
        seen(_reader(parts["rope"], parts.pop("q"), out, parts.pop("v", None), heads, parts["text"]))

    with ExitStack() as hooks:
        hooks.enter_context(attention.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.enter_context(attention.norm_q.register_forward_hook(keep("q")))
        if value:
            hooks.enter_context(attention.to_v.register_forward_hook(keep("v")))
        hooks.enter_context(attention.norm_k.register_forward_hook(ready))
        yield


def unwrapped(transformer: nn.Module) -> nn.Module:
    """The model inside a wrapper of accelerate, DDP, DeepSpeed (`.module`) or torch.compile (`._orig_mod`)."""
    while not any(hasattr(transformer, name) for name in BLOCKS):
        inner = getattr(transformer, "module", None) or getattr(transformer, "_orig_mod", None)
        if inner is None:
            raise InputError(
                f"A {type(transformer).__name__} has no transformer blocks; a Wan transformer or CogVideoX in "
                "diffusers' classes is supported: load one."
            )
        transformer = inner
    return transformer


def blocks_name(transformer: nn.Module) -> str:
    """What the list of blocks is called in this model, and so what names of their weights begin with."""
    return next(name for name in BLOCKS if hasattr(unwrapped(transformer), name))


def layers_of(transformer: nn.Module) -> list[Any]:
    """The blocks in their order."""
    return list(unwrapped(transformer).get_submodule(blocks_name(transformer)).children())


def text_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """How many tokens of the caption stand before those of the video in a self-attention called with these."""
    text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    return 0 if text is None else text.shape[1]


def by_head(x: Tensor, heads: int) -> Heads:
    """Wan norms queries and keys over all heads together, "b s (h d)", CogVideoX each head's own, "b h s d"."""
    pattern = "b h s d -> b s h d" if x.ndim == 4 else "b s (h d) -> b s h d"
    return rearrange(x, pattern, h=heads)


def rotated(x: Heads, rope: Rope) -> Heads:
    """Rotary positions on neighbouring lanes (arXiv 2104.09864, eq. 34), bit for bit as diffusers has them."""
    even, odd = rearrange(x, "b s h (d two) -> two b s h d", two=2)
    cos, sin = rope[0][..., 0::2], rope[1][..., 1::2]
    pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rearrange(pairs, "b s h d two -> b s h (d two)").type_as(x)


def _reader(rope: Rope | None, q: Tensor, k: Tensor, v: Tensor | None, heads: int, text: int) -> Callable[[], Any]:
    # CogVideoX turns queries and keys in place after this: what is read then is turned already.
    versions = q._version, k._version
    if rope is not None and rope[0].ndim == 2:
        rope = rope[0][None, :, None], rope[1][None, :, None]

    def read() -> tuple[Tensor, ...]:
        heads_ = [by_head(x, heads)[:, text:] for x in (q, k)]
        plain = rope is None or (q._version, k._version) != versions
        turned = heads_ if plain or rope is None else [rotated(x, rope) for x in heads_]
        return (*turned, by_head(v, heads)[:, text:]) if v is not None else tuple(turned)

    return read


def chosen_blocks(transformer: nn.Module, blocks: Sequence[int]) -> dict[int, nn.Module]:
    """The layers of these blocks, counted from zero; InputError for one that is not there, or fused projections."""
    layers = layers_of(transformer)
    wrong = [block for block in blocks if not 0 <= block < len(layers)]
    if wrong or not blocks:
        came = f"Block {wrong[0]} was asked for" if wrong else "No block was named"
        raise InputError(f"{came}; the model has blocks 0 to {len(layers) - 1}: name one or more of these.")
    if any(getattr(layers[block].attn1, "fused_projections", False) for block in blocks):
        raise InputError("The model's projections are fused, which hides q, k and v: call unfuse_qkv_projections().")
    return {block: layers[block] for block in blocks}


def _watching_output(layer: nn.Module, seen: Seen) -> AbstractContextManager[Any]:  # CogVideoX: video and text
    return layer.register_forward_hook(lambda _, __, out: seen(lambda: out[0] if isinstance(out, tuple) else out))


_WATCH: dict[str, Callable[[nn.Module, Seen], AbstractContextManager[Any]]] = {
    "qk": _watching_attention,
    "qkv": partial(_watching_attention, value=True),
    "block": _watching_output,
}
