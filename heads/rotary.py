"""Rotary tables of their own for the queries and for the keys of self-attention; leave no trace.

Letters: b clip, s token in (f h w) order, h head, d channel of a head, r pair of neighbouring channels (d = 2 r),
c channel of the model. By hooks alone, as `motionlora.heads.capture`.

Stock, one table turns queries and keys of all blocks alike. Where both may differ and every token may have a table of
its own, positions say where a token belongs: DiTFlow (arXiv 2412.07776) optimises them instead of the latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from motionlora.heads.capture import ROPE, by_head, chosen_blocks, layers_of, rotated, text_tokens, unwrapped

Tables: TypeAlias = Float[Tensor, "b 4 s r"]
"""Cosine and sine for queries, cosine and sine for keys; one number a pair of channels, which is all that is read."""
Rope: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The stock cosine and sine, each real "1 s 1 d", for latents "b c f h w"."""
QUERIES, KEYS = 0, 1


@contextmanager
def turning(transformer: nn.Module, rope: Rope | None = None) -> Iterator[Turned]:
    """Inside the context queries and keys can be turned by tables of their own; at first by the stock one.

        with turning(transformer) as turned:
            turned.put(turned.stock(latent))        # bit for bit as if nothing were put
            model.velocity(latent, time, prompt)

    Contexts that watch the attention (`capturing`) are entered after this one, and then see what was turned here. Text
    tokens that share the attention (CogVideoX) stay as they are.

    Args:
        rope: where the stock tables come from; the model's own module `rope` (Wan) where it is not given.
    """
    model = unwrapped(transformer)
    turned = Turned(rope or model.get_submodule("rope"))
    layers = chosen_blocks(model, range(len(layers_of(model))))
    with ExitStack() as hooks:
        hooks.callback(turned.clear)
        for layer in layers.values():
            attention: Any = layer.get_submodule("attn1")
            hooks.callback(attention.register_forward_pre_hook(turned.untabled, with_kwargs=True).remove)
            for part, which in (("norm_q", QUERIES), ("norm_k", KEYS)):
                hook = turned.hook(which, attention.heads)
                hooks.callback(attention.get_submodule(part).register_forward_hook(hook).remove)
        yield turned


class Turned:
    """Which tables turn queries and keys."""

    def __init__(self, rope: Rope) -> None:
        self._rope = rope
        self._text = 0
        self._ropes: tuple[Tensor, Tensor] | None = None

    def stock(self, latent: Float[Tensor, "b c f h w"]) -> Tables:
        """The tables that the model has for a latent of this size, for each clip of the batch, fp32."""
        cos, sin = (rearrange(table.float(), "1 s 1 (r two) -> s r two", two=2) for table in self._rope(latent))
        return repeat(torch.stack((cos[..., 0], sin[..., 1])), "two s r -> b (which two) s r", b=len(latent), which=2)

    def put(self, tables: Tables) -> None:
        """From here on every forward of such a batch is turned by these; gradients reach them."""
        lanes = repeat(tables, "b (which two) s r -> which two b s 1 (r lanes)", which=2, lanes=2)
        self._ropes = (lanes[QUERIES], lanes[KEYS])

    def clear(self) -> None:
        """From here on the stock table counts again."""
        self._ropes = None

    def untabled(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What stands before an attention: takes the stock table away where queries and keys come turned."""
        if self._ropes is None:
            return None
        self._text = text_tokens(args, kwargs)
        if len(args) > 3:
            return (*args[:3], None, *args[4:]), kwargs
        return args, {name: None if name in ROPE else value for name, value in kwargs.items()}

    def hook(self, which: int, heads: int) -> Callable[..., Tensor | None]:
        """What stands behind the norm of queries or keys: turns them."""

        def turn(_module: nn.Module, _args: Any, out: Float[Tensor, "b s c"]) -> Tensor | None:
            if self._ropes is None:
                return None
            x, (cos, sin) = by_head(out, heads), self._ropes[which]
            turned = torch.cat([x[:, : self._text], rotated(x[:, self._text :], (cos, sin))], dim=1)
            return rearrange(turned, "b s h d -> b h s d" if out.ndim == 4 else "b s h d -> b s (h d)")

        return turn
