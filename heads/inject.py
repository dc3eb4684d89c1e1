"""Put the keys and values of one forward into others, in chosen blocks; leave no trace.

Letters: b clip, s token in (f h w) order, c channel of the model. By hooks alone, as `motionlora.heads.capture`. Text
tokens that share the attention (CogVideoX) keep their own keys and values.

Keys are replaced after their norm and before the rotary positions. Those depend on the token's place alone, so the
attention gets the very keys that the recorded forward had after them, as long as both have the same grid and positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from motionlora.heads.capture import capturing, chosen_blocks, text_tokens


@contextmanager
def injecting(transformer: nn.Module, blocks: Sequence[int]) -> Iterator[Injected]:
    """Inside the context the self-attention of `blocks` can be given keys and values; at first it has its own.

        with injecting(transformer, [0]) as injected:
            injected.record(lambda: model.velocity(reference, time, prompt))
            model.velocity(latent, time, prompt)    # attends to the reference's keys and values in block 0

    Raises:
        InputError: no block, a block that the model does not have, or fused projections.
    """
    layers = chosen_blocks(transformer, blocks)
    injected = Injected(transformer, max(layers))
    with ExitStack() as hooks:
        hooks.callback(injected.clear)
        for block, layer in layers.items():
            attention = layer.get_submodule("attn1")
            hooks.callback(attention.register_forward_pre_hook(injected.entered, with_kwargs=True).remove)
            for part in ("attn1.norm_k", "attn1.to_v"):
                hook = injected.hook(f"{block}.{part}")
                hooks.callback(layer.get_submodule(part).register_forward_hook(hook).remove)
        yield injected


class Injected:
    """Keys and values of the latest recorded forward, which take the place of every other forward's."""

    def __init__(self, transformer: nn.Module, last: int) -> None:
        self._transformer, self._last = transformer, last
        self._recording = False
        self._text = 0
        self._seen: dict[str, Float[Tensor, "b s c"]] = {}

    def record(self, forward: Callable[[], object]) -> None:
        """Runs a forward of the model with its own keys and values up to the last of the blocks, and keeps them."""
        self.clear()
        self._recording = True
        try:
            with capturing(self._transformer, [self._last], "qk", stop=True) as seen:
                seen.run(forward)
        finally:
            self._recording = False

    def clear(self) -> None:
        """From here on every forward has its own keys and values."""
        self._seen = {}

    def entered(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What stands before an attention: notes where its video begins."""
        self._text = text_tokens(args, kwargs)

    def hook(self, name: str) -> Callable[..., Tensor | None]:
        """What stands behind one module: notes its output, or gives what was noted; one clip serves a whole batch."""

        def noted_or_given(_module: nn.Module, _args: Any, out: Tensor) -> Tensor | None:
            text, video = out[..., : self._text, :], out[..., self._text :, :]
            if self._recording:
                self._seen[name] = video.detach().clone()  # CogVideoX turns keys in place
            elif name in self._seen:
                return torch.cat([text, self._seen[name].expand_as(video)], dim=-2)
            return None

        return noted_or_given
