"""What work takes before it is done: FLOPs and the peak of live bytes, counted on tensors that have shapes and no data.

The counter watches torch's own calls, so what is counted is the very code that will run, LoRA, losses and optimiser
included. Attention counts as a flash kernel: no scores are kept, and its backward computes them once more.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Count(TorchDispatchMode):
    """What the work inside `counting` took.

    Not `FlopCounterMode`, which keeps every activation alive until the garbage collector comes by, and so would hide
    the peak; the formulas are its own.

    Attributes:
        flops: 2 a multiply-add, of matrix products, convolutions and attention.
        attention_flops: those of attention, whose backward counts 5 products (FlashAttention, arXiv 2205.14135), and of
            other batched products: head scores.
        peak_bytes: the most that lived at once of what was made inside; what was there before is not in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.attention_flops = self.peak_bytes = self._live_bytes = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {storage._cdata for storage in _storages((*args, *kwargs.values()))}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage._cdata not in given | self._live:
                self._add(storage)
        operation = func._overloadpacket
        if operation in _ATTENTION:
            flops = _ATTENTION[operation](*(tensor.shape for tensor in args[:4] if isinstance(tensor, Tensor)))
        elif operation in flop_registry:
            flops = flop_registry[operation](*args, **kwargs, out_val=result)
        else:
            return result
        self.flops += flops
        self.attention_flops += flops if operation in _BATCHED else 0
        return result

    def _add(self, storage: UntypedStorage) -> None:
        self._live.add(storage._cdata)
        self._live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key: int, nbytes: int) -> None:
        self._live.discard(key)
        self._live_bytes -= nbytes


@contextmanager
def counting() -> Iterator[Count]:
    """Counts the work inside.

    with counting() as count:
        model.velocity(latent, time, prompt)    # on the meta device
    count.flops, count.peak_bytes
    """
    with _flash_attention(), Count() as count:
        yield count


@contextmanager
def _flash_attention() -> Iterator[None]:
    """Sends attention to a fused kernel: on the meta device torch would spell it out, scores and all.

    The function itself is replaced, because a mode of torch does not reach what checkpointing runs once more.
    """

    def fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return FLASH(query, key, value)[0]

    stock = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = stock


def _storages(values: Any) -> Iterator[UntypedStorage]:
    """Of the tensors among arguments or results, lists of tensors included (a walk over any tree takes far longer)."""
    for value in values if isinstance(values, tuple | list) else (values,):
        if isinstance(value, Tensor):
            yield value.untyped_storage()
        elif isinstance(value, tuple | list):
            yield from _storages(value)


_ATTENTION: dict[Any, Any] = {
    FLASH: lambda query, key, value: sdpa_flop_count(query, key, value),
    FLASH_BACKWARD: lambda grad, query, key, value: sdpa_backward_flop_count(grad, query, key, value),
}
_BATCHED = {*_ATTENTION, torch.ops.aten.bmm, torch.ops.aten.baddbmm}
