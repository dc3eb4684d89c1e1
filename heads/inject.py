"""Put the keys and values of one forward into others, in chosen blocks; leave no trace.

Letters: b clip, s token in (f h w) order, c channel of the model. By hooks alone, as `motionlora.heads.capture`.

Keys are replaced after their norm and before the rotary positions. Those depend on the token's place alone, so the
attention gets the very keys that the recorded forward had after them, as long as both have the same grid and positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from motionlora.heads.capture import capturing, chosen_blocks


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
            for part in ("attn1.norm_k", "attn1.to_v"):
                hook = injected.hook(f"{block}.{part}")
                hooks.callback(layer.get_submodule(part).register_forward_hook(hook).remove)
        yield injected


class Injected:
    """Keys and values of the latest recorded forward, which take the place of every other forward's."""

    def __init__(self, transformer: nn.Module, last: int) -> None:
        self._transformer, self._last = transformer, last
        self._recording = False
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

    def hook(self, name: str) -> Callable[..., Tensor | None]:
        """What stands behind one module: notes its output, or gives what was noted; one clip serves a whole batch."""

        def noted_or_given(_module: nn.Module, _args: Any, out: Tensor) -> Tensor | None:
            if self._recording:
                self._seen[name] = out.detach()
            elif name in self._seen:
                return self._seen[name].expand_as(out)
            return None

        return noted_or_given
