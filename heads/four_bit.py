"""Frozen linear layers in 4 bits: nf4 of QLoRA (Dettmers et al., arXiv 2305.14314, section 3), by bitsandbytes.

64 numbers that follow each other share one fp32 scale, their largest absolute value; each is the nearest of 16 levels
times it: 4.5 bits a number. The scales are not quantised once more, which would spare another 0.37 bits.

Scales and levels are the bytes of one tensor, the layer's weight: whatever moves, keeps or exchanges weights does so
with these as well, and no change of dtype can round the scales. A forward makes the numbers anew, in the dtype that it
computes in, and so does a backward pass: autograd keeps none of them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SHARING = 64
"""Numbers of one scale: what QLoRA has and what bitsandbytes takes where nothing is said."""


def installed() -> bool:
    """Whether the package is there; it is not asked for where nothing is in 4 bits."""
    return find_spec("bitsandbytes") is not None


class FourBitLinear(nn.Linear):
    """A frozen layer whose weight `pack` has packed; the bias, few numbers, stays as it was."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return Product.apply(x, self.weight.detach(), bias, self.out_features)  # pyright: ignore[reportReturnType]


class Product(torch.autograd.Function):
    """What a linear layer gives; its gradient is that of x alone, by the weights that the forward had.

    Not the package's `matmul_4bit`: on a CPU with AVX-512 it is wrong where rows do not fill whole scales (0.50.2).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size = outputs, x.shape[-1]
        return functional.linear(x, unpacked(weight, ctx.size, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        return gradient @ unpacked(weight, ctx.size, gradient.dtype), None, None, None


def pack(layer: nn.Linear, device: torch.device) -> None:
    """Packs a layer for good: it becomes a `FourBitLinear`, on the device where it is."""
    layer.weight.data = packed(layer.weight.data, device)
    layer.__class__ = FourBitLinear


def packed(weight: Tensor, device: torch.device) -> Tensor:
    """Scales and levels of a weight "o i" as bytes, where the weight is; `device` does the work, a GPU much faster.

    A weight without data gives what its bytes would take, for which the package is not needed.
    """
    if weight.is_meta:
        return weight.new_empty(4 * ceil(weight.numel() / SHARING) + ceil(weight.numel() / 2), dtype=torch.uint8)
    library: Any = import_module("bitsandbytes.functional")
    levels, state = library.quantize_4bit(weight.to(device), blocksize=SHARING, quant_type="nf4")
    return torch.cat([state.absmax.view(torch.uint8), levels.flatten()]).to(weight.device)


def unpacked(weight: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The numbers "o i" of what `packed` made, in a dtype."""
    library: Any = import_module("bitsandbytes.functional")
    numbers = size[0] * size[1]
    scales, levels = weight.split([4 * ceil(numbers / SHARING), ceil(numbers / 2)])
    # As one row: scales go over the ends of rows.
    shape, sharing = torch.Size((1, numbers)), {"blocksize": SHARING, "quant_type": "nf4"}
    state = library.QuantState(scales.view(torch.float32), shape=shape, dtype=dtype, **sharing)
    return library.dequantize_4bit(levels, state).view(size)
