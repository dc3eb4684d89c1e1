"""Count the forwards of a model and the passes back through it, by blocks: one that ends early counts in part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from motionlora.heads.capture import layers_of, unwrapped


@dataclass
class Tally:
    """How many blocks ran; a batch is one. A block in which a forward was ended counts whole."""

    blocks: int
    begun: int = 0
    returned: int = 0

    @property
    def forwards(self) -> float:
        """Blocks begun over the blocks of the model."""
        return self.begun / self.blocks

    @property
    def gradients(self) -> float:
        """Blocks that a gradient came back through, over the blocks of the model."""
        return self.returned / self.blocks


@contextmanager
def counting(transformer: nn.Module) -> Iterator[Tally]:
    """Counts inside the context; `transformer` is one of Wan or CogVideoX, or a wrapper of one.

    Blocks that gradient checkpointing runs once more count once more as forwards, and once as gradients.
    """
    model = unwrapped(transformer)
    blocks = layers_of(model)
    tally = Tally(len(blocks))
    running = False

    def enter(_module: nn.Module, _args: object) -> None:
        nonlocal running
        running = True

    def leave(*_: object) -> None:
        nonlocal running
        running = False

    def count(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        tally.begun += 1
        hidden = args[0] if args else kwargs["hidden_states"]
        if running and hidden.requires_grad:
            hidden.register_hook(returned)

    def returned(_gradient: Tensor) -> None:
        tally.returned += 1

    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(enter).remove)
        hooks.callback(model.register_forward_hook(leave, always_call=True).remove)
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(count, with_kwargs=True).remove)
        yield tally
