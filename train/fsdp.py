"""FSDP2 (arXiv 2304.11277, torch's `fully_shard`): frozen base, LoRA and moments split over the processes of a launch.

`accelerate launch --use_fsdp --fsdp_version 2` starts the processes, and torch splits: accelerate itself does so on
GPUs alone, and makes plain DDP of it on a CPU. What a file holds is gathered by name, as one process would have it. All
processes have to call these functions together.
"""

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from motionlora.data.errors import InputError
from motionlora.heads.capture import layers_of
from motionlora.train.zero import MOMENTS

if TYPE_CHECKING:
    from accelerate import Accelerator

ASKED = "ACCELERATE_USE_FSDP"
"""What the launcher sets. Libraries that load models look at it, too, and would wait for each other: it is renamed."""
OURS = "MOTIONLORA_FSDP"
UNKNOWN = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing",
}
"""Switches of accelerate's file that are not heard here."""


def flag(name: str) -> bool:
    """Whether the launcher set one of accelerate's variables."""
    return os.environ.get(name, "false").lower() in ("1", "true")


def take_over() -> bool:
    """Whether the launcher asks for FSDP2; from here on only this module knows.

    Raises:
        InputError: it asks for FSDP1, or for what is not heard here.
    """
    if flag(ASKED):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise InputError(
                "The launcher asks for FSDP1, which cannot split frozen and trained weights together: set fsdp_version "
                "to 2."
            )
        for variable, name in UNKNOWN.items():
            if flag(variable):
                raise InputError(f"The launcher sets {name}, which is not heard here: set it to false (--memory low).")
        os.environ[OURS] = os.environ.pop(ASKED)
    return flag(OURS)


def is_sharded(accelerator: "Accelerator") -> bool:
    """Whether each process has a part of every weight."""
    return flag(OURS) and accelerator.num_processes > 1


def shard(network: nn.Module, accelerator: "Accelerator") -> None:
    """Splits every block, and what is left of the network, for good; a part is gathered while its block runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # torch warns of changes in place, of which a block of diffusers makes none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for part in (*layers_of(network), network):
        fully_shard(part, mesh=mesh)


def gathered(value: Any) -> Any:
    """A split tensor whole, anything else as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def whole_weights(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """By name, on the CPU."""
    return {name: gathered(weight.detach()).cpu().clone() for name, weight in parameters.items()}


def whole_moments(parameters: Mapping[str, nn.Parameter], stepper: Any) -> dict[str, Tensor]:
    """As `checkpoint.moments_of`. `stepper` is AdamW as accelerate wraps it."""
    return {
        f"{name}|{moment}": gathered(value).cpu().clone()
        for name, weight in parameters.items()
        for moment, value in stepper.optimizer.state[weight].items()
    }


def put_back(parameters: Mapping[str, nn.Parameter], stepper: Any, moments: Mapping[str, Tensor]) -> None:
    """Gives each process its part of what `whole_moments` gathered, before the first step; nothing for no moments."""
    from torch.distributed.tensor import distribute_tensor

    for name, weight in parameters.items() if moments else ():
        split: Any = weight
        state = {
            moment: distribute_tensor(
                moments[f"{name}|{moment}"].to(weight.device), split.device_mesh, split.placements
            )
            for moment in MOMENTS
        }
        stepper.optimizer.state[weight] = {"step": moments[f"{name}|step"].clone(), **state}
