"""AdamW of a stage (arXiv 1711.05101): torch's, its fused form, or bitsandbytes' with moments in 8 bits (2110.02861).

A LoRA has few weights, so that no form makes a step much faster, and 8 bits spare 6 bytes of 16 a weight.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from motionlora.data.errors import InputError
from motionlora.heads.four_bit import installed
from motionlora.train.settings import OptimizerName

MOMENT_BYTES: dict[OptimizerName, int] = {"adamw": 8, "adamw_fused": 8, "adamw_8bit": 2}
"""Of one weight."""


def new_optimizer(name: OptimizerName, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float) -> Any:
    """A torch optimiser before its first step. Weights whose gradient is zero stay zero in all forms."""
    if name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

        return AdamW8bit(parameters, lr=lr, weight_decay=weight_decay)
    return AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True if name == "adamw_fused" else None)


def refuse_absent_optimizer(name: OptimizerName) -> None:
    """InputError for the optimiser whose package is not installed."""
    if name == "adamw_8bit" and not installed():
        raise InputError(
            "--optimizer adamw_8bit needs bitsandbytes, which is not installed: pip install 'motionlora[4bit]', or set "
            "--optimizer adamw."
        )


def counted_by_int(optimizer: Optimizer) -> None:
    """Makes the numbers of steps that a checkpoint gave back what bitsandbytes wants: int in place of a tensor."""
    if not isinstance(optimizer, AdamW):
        for state in optimizer.state.values():
            state["step"] = int(state["step"])
