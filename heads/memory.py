"""Where a frozen network's weights wait and what a backward pass runs once more: time, or digits, for memory.

Only linear layers are cast, packed or moved: what autograd keeps of them is a view of the weights as they were used,
which stays right when the layer gets others, while of a norm it keeps the layer's own weights. It keeps them until the
backward pass comes by, so that casting and moving spare memory only where every block is run once more. Layers to be
trained are attached afterwards, and are left as they are. Nothing here has been tried on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from motionlora.data.errors import InputError
from motionlora.heads.capture import layers_of, unwrapped
from motionlora.heads.four_bit import installed, pack

FP8 = torch.float8_e4m3fn
CPU = torch.device("cpu")
Mode: TypeAlias = Literal["fast", "low", "4bit", "lowest"]
Weights: TypeAlias = Literal["", "fp8", "nf4"]
AUTO: tuple[Mode, ...] = ("fast", "low", "lowest")
"""What `auto` chooses from, in its order. Not `4bit`, whose error is four times fp8's: that is for a person to want."""
ROUNDED: dict[str, Weights] = {"4bit": "nf4", "lowest": "fp8"}
"""The modes that change numbers, and what they keep the blocks' linear layers in."""


@dataclass(frozen=True)
class Memory:
    """How a network spares memory.

    Attributes:
        recompute_every: 0 keeps all activations, 1 those of no block, 2 those of every second block, and so on.
        weights: what the blocks' linear layers are kept in, while they compute in the model's dtype: as they were
            loaded (""), in fp8 (e4m3), one byte a number, or in nf4, 4.5 bits a number.
        offload: the blocks' linear layers wait in main memory and come to the device one by one.
    """

    recompute_every: int = 0
    weights: Weights = ""
    offload: bool = False

    @property
    def waits(self) -> bool:
        """Whether the weights of a block are there as they are used only while it runs."""
        return bool(self.weights) or self.offload

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

    def casting(self, transformer: nn.Module, dtype: torch.dtype, device: torch.device = CPU) -> None:
        """Puts the blocks' linear layers into fp8 for good, biases too, or into nf4; `dtype` is what they compute in.

        They stay where they are; `device` is where nf4 is worked out, by a package that has to be there.
        """
        from diffusers.hooks import apply_layerwise_casting

        nothing: Any = None  # its annotation forbids what it asks for where the layer itself is meant
        for layer in linear_layers(transformer) if self.weights else ():
            if self.weights == "nf4":
                pack(layer, device)
            else:
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
        how: dict[str, Any] = {"onload_device": device, "offload_device": CPU, **more}
        for layer in linear:
            apply_group_offloading(layer, offload_type="leaf_level", **how)


NOTHING_SPARED = Memory()


def sampling_memory(mode: Mode, *, gpu: bool) -> Memory:
    """What a mode switches on where nothing is trained, on a GPU or on a CPU: `low` costs time, `4bit` digits, `lowest`
    both.

    Blocks are run once more only where a guidance asks for a gradient.
    """
    return NOTHING_SPARED if mode == "fast" else Memory(1, ROUNDED.get(mode, ""), offload=gpu and mode != "4bit")


def refuse_absent(mode: str) -> None:
    """InputError for the mode whose package is not installed."""
    if mode == "4bit" and not installed():
        raise InputError(
            "--memory 4bit needs bitsandbytes, which is not installed: pip install 'motionlora[4bit]', or set --memory "
            "low or lowest."
        )


def linear_layers(transformer: nn.Module) -> list[nn.Linear]:
    """Of the blocks."""
    return [layer for block in layers_of(transformer) for layer in block.modules() if isinstance(layer, nn.Linear)]
