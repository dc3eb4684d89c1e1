"""Gradients through a forward of which only the inputs of blocks are kept: each block is computed again for them.

Memory is that of one block and of the blocks' inputs, not that of all blocks; a gradient costs one forward more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import checkpoint

from motionlora.heads.capture import unwrapped

if TYPE_CHECKING:
    from torch import nn

SWITCHES = ("gradient_checkpointing", "_gradient_checkpointing_func")
"""Attributes of diffusers' models; the second is not there before it was set for the first time."""


@contextmanager
def recomputing(transformer: nn.Module) -> Iterator[None]:
    """Inside the context blocks are computed again where a gradient is asked for; other forwards stay as they are.

    Both the forward and the way back have to lie inside. Leaves the model as it was, also one that recomputed before.
    """
    model: Any = unwrapped(transformer)
    before = {name: vars(model)[name] for name in SWITCHES if name in vars(model)}
    model.gradient_checkpointing, model._gradient_checkpointing_func = True, _once_more
    try:
        yield
    finally:
        for name in SWITCHES:
            vars(model).pop(name, None)
        vars(model).update(before)


def _once_more(block: nn.Module, *inputs: Any) -> Any:
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
