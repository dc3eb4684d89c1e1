"""What DeepSpeed splits over processes, whole: a LoRA's weights and AdamW's moments, gathered for a file and put back.

ZeRO keeps parameters and moments of all tensors as a few flat ones, of which each process has a part. DeepSpeed's own
checkpoints are pickles in as many parts; these functions give the tensors by name, as one process would have them, so
that a checkpoint is the same under every launcher. All processes have to call them together.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

MOMENTS = ("exp_avg", "exp_avg_sq")


def is_split(accelerator: "Accelerator") -> bool:
    """Whether DeepSpeed trains, so that no process has all weights and moments."""
    return accelerator.state.deepspeed_plugin is not None


def whole_weights(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The fp32 weights that the optimiser moves, by name, on the CPU."""
    get = _deepspeed().safe_get_full_fp32_param
    return {name: _whole(get(weight)) for name, weight in parameters.items()}


def whole_moments(parameters: Mapping[str, nn.Parameter], stepper: Any) -> dict[str, Tensor]:
    """As `checkpoint.moments_of`, after one step at least. `stepper` is the optimiser as accelerate wraps it."""
    get, zero = _deepspeed().safe_get_full_optimizer_state, stepper.optimizer
    step = torch.as_tensor(zero.optimizer.state[_flat(zero)[0]]["step"]).cpu()
    found = {}
    for name, weight in parameters.items():
        found |= {f"{name}|{moment}": _whole(get(weight, moment)) for moment in MOMENTS}
        found[f"{name}|step"] = step.clone()
    return found


def put_back(parameters: Mapping[str, nn.Parameter], stepper: Any, moments: Mapping[str, Tensor]) -> None:
    """Gives each process its part of what `whole_moments` gathered, before the first step; nothing for no moments."""
    if not moments:
        return
    put, zero = _deepspeed().safe_set_full_optimizer_state, stepper.optimizer
    step = next(value for key, value in moments.items() if key.endswith("|step"))
    for part in _flat(zero):
        zero.optimizer.state[part] = {"step": step.clone()} | {name: torch.zeros_like(part) for name in MOMENTS}
    if link := getattr(zero, "_lazy_init_hp_params_optimizer_state", None):
        link()  # ZeRO-1 and 2 look for a tensor's moments only after their first step
    for name, weight in parameters.items():
        for moment in MOMENTS:
            put(weight, moments[f"{name}|{moment}"].to(weight.device), moment)


def _deepspeed() -> Any:
    """Its public functions for single tensors; an extra, there because `launch.new_accelerator` has seen it."""
    return import_module("deepspeed.utils")


def _flat(zero: Any) -> list[Tensor]:
    """This process's part of all trained weights, as the optimiser inside knows it: of ZeRO-3, else of ZeRO-1 and 2."""
    third = "fp32_partitioned_groups_flat"
    return getattr(zero, third) if hasattr(zero, third) else zero.single_partition_of_fp32_groups


def _whole(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise RuntimeError("DeepSpeed did not tell a weight's numbers: it does not train it.")
    return tensor.detach().cpu().clone()
