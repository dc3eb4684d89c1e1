"""Where a frozen network's weights wait and what a backward pass runs once more: time, or digits, for memory.

Only linear layers are cast or moved: what autograd keeps of them is a view of the weights as they were used, which
stays right when the layer gets others, while of a norm it keeps the layer's own weights. It keeps them until the
backward pass comes by, so that casting and moving spare memory only where every block is run once more. Layers to be
trained are attached afterwards, and are neither cast nor moved. Nothing here has been tried on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from motionlora.heads.capture import layers_of, unwrapped

FP8 = torch.float8_e4m3fn
Mode: TypeAlias = Literal["fast", "low", "lowest"]


@dataclass(frozen=True)
class Memory:
    """How a network spares memory.

    Attributes:
        recompute_every: 0 keeps all activations, 1 those of no block, 2 those of every second block, and so on.
        fp8: the blocks' linear layers are kept in fp8 (e4m3), one byte a number, and computed in the model's dtype.
        offload: the blocks' linear layers wait in main memory and come to the device one by one.
    """

    recompute_every: int = 0
    fp8: bool = False
    offload: bool = False

    @property
    def waits(self) -> bool:
        """Whether the weights of a block are there as they are used only while it runs."""
        return self.fp8 or self.offload

    def recomputing(self, transformer: nn.Module) -> None:
        """Lets a backward pass run blocks once more; gradients stay the same."""
        model: Any = unwrapped(transformer)
        chosen = {id(block) for block in list(layers_of(transformer))[:: self.recompute_every or 1]}

        def once_more(block: nn.Module, *inputs: Any) -> Any:
            if id(block) not in chosen:
                return block(*inputs)
            # To its end, so that the hooks of its last layers put their weights away.
            return checkpoint(block, *inputs, use_reentrant=False, early_stop=not self.waits)

        if self.recompute_every:
            model.enable_gradient_checkpointing(once_more)

    def casting(self, transformer: nn.Module, dtype: torch.dtype) -> None:
        """Puts the blocks' linear layers into fp8 for good, biases too; `dtype` is what they compute in."""
        from diffusers.hooks import apply_layerwise_casting

        nothing: Any = None  # its annotation forbids what it asks for where the layer itself is meant
        for layer in linear_layers(transformer) if self.fp8 else ():
            apply_layerwise_casting(layer, FP8, dtype, skip_modules_pattern=nothing)

    def offloading(self, transformer: nn.Module, device: torch.device, **more: Any) -> None:
        """Moves the network to the device, without the blocks' linear layers if they wait in main memory.

        `more` goes to diffusers' `apply_group_offloading`; on a CPU, where nothing can be moved, without it nothing is.
        """
        from diffusers.hooks import apply_group_offloading

        if not self.offload or (device.type == "cpu" and not more):
            transformer.to(device)
            return
        linear = linear_layers(transformer)
        waiting = {id(weight) for layer in linear for weight in layer.parameters()}
        for tensor in (*transformer.parameters(), *transformer.buffers()):
            if id(tensor) not in waiting:
                tensor.data = tensor.data.to(device)
        how: dict[str, Any] = {"onload_device": device, "offload_device": torch.device("cpu"), **more}
        for layer in linear:
            apply_group_offloading(layer, offload_type="leaf_level", **how)


NOTHING_SPARED = Memory()


def sampling_memory(mode: Mode, *, gpu: bool) -> Memory:
    """What a mode switches on where nothing is trained, on a GPU or on a CPU: `low` costs time, `lowest` digits too.

    Blocks are run once more only where a guidance asks for a gradient.
    """
    return NOTHING_SPARED if mode == "fast" else Memory(1, fp8=mode == "lowest", offload=gpu)


def linear_layers(transformer: nn.Module) -> list[nn.Linear]:
    """Of the blocks."""
    return [layer for block in layers_of(transformer) for layer in block.modules() if isinstance(layer, nn.Linear)]
