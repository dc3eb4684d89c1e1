"""Blocks of a network compiled by torch.compile, each for itself, so that equal blocks share what was compiled.

Compiling takes minutes on one CPU core, and seconds where the same was compiled before. Numbers are those of the plain
blocks but for the last digits: kernels that were fused round otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from motionlora.data.errors import InputError
from motionlora.heads.capture import layers_of

VARIANTS = 64
"""Of one block's code: with and without a LoRA, of the first block, of each length of a caption. torch's own limit is
8, above which it goes on uncompiled with a warning."""


@contextmanager
def compiled(transformer: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Inside, the blocks run compiled, for every shape anew; afterwards they are the plain ones again.

    A shape has its kernels whatever came before it, so that a run that is resumed gives the same bits. In the end torch
    forgets all that this process has compiled.

    Raises:
        InputError: they cannot be compiled on this machine.
    """
    if not wanted:
        yield
        return
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        with config.patch(recompile_limit=VARIANTS, fail_on_recompile_limit_hit=True):
            for block in layers_of(transformer):
                block.compile(dynamic=False)
            yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"torch.compile cannot compile the model's blocks here ({reason}): install a C++ compiler (on a GPU "
            "triton), or leave --compile out."
        ) from error
    finally:
        for block in layers_of(transformer):
            block._compiled_call_impl = None
        torch.compiler.reset()


def plain() -> AbstractContextManager[None]:
    """Inside, what is compiled runs as if it were not, and nothing new is compiled: for forwards of another kind."""
    return torch.compiler.set_stance("force_eager")
