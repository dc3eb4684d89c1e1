"""`--memory`: how much time, or how many digits, a training run gives for memory, and which of the modes fits.

fast    nothing is spared.
low     blocks are run once more for the backward pass (every `recompute_every`-th): the same numbers, a third slower.
4bit    every block is run once more, and the blocks' linear layers are in nf4 (4.5 bits a number, by bitsandbytes:
        `pip install 'motionlora[4bit]'`): other numbers, further from those in bf16 than fp8's, and nothing on the way
        over PCIe.
lowest  every block is run once more, and the blocks' linear layers wait in main memory in fp8 (e4m3), coming to the GPU
        one by one: other numbers than with the base in bf16, and slower by what the way over PCIe takes. On a CPU they
        stay where they are.
auto    the first of these but 4bit that `motionlora plan` predicts to fit, which is said; with --compile of fast and
        low alone.

All but `fast` are tried on a CPU alone, with layers that wait on a disk; the time that they take on a GPU is not known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from motionlora.data.errors import InputError
from motionlora.heads.memory import AUTO, ROUNDED, Memory, Mode
from motionlora.heads.schedule import preserves_variance
from motionlora.heads.wan_outline import outline_of
from motionlora.train.fsdp import is_sharded
from motionlora.train.plan import Plan, chosen_card, outlined, plan_of, size, unmeasured

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from accelerate import Accelerator

    from motionlora.data.clip import Clip
    from motionlora.heads.wan import WanBackbone
    from motionlora.heads.wan_outline import WanOutline
    from motionlora.train.cards import Card, PlanSettings
    from motionlora.train.settings import TrainSettings


def memory_of(mode: Mode, recompute_every: int = 1, *, gpu: bool = True) -> Memory:
    """What a mode switches on, on a GPU or on a CPU."""
    if mode in ROUNDED:
        return Memory(1, ROUNDED[mode], offload=gpu and mode == "lowest")
    return Memory(recompute_every if mode == "low" else 0)


def plans_of(settings: TrainSettings, outline: WanOutline, dtype: torch.dtype, card: Card) -> dict[Mode, Plan]:
    """The plan of the mode that is set; for `auto` of each up to the first that the card holds.

    Text encoder and VAE are left out: they are gone before the network comes.
    """
    auto: tuple[Mode, ...] = ("fast", "low") if settings.compile else AUTO
    wanted = auto if settings.memory == "auto" else (settings.memory,)
    plans: dict[Mode, Plan] = {}
    for mode in wanted:
        memory = memory_of(mode, settings.recompute_every, gpu=card.gpu)
        plans[mode] = plan_of(settings, outline, dtype, memory, prepares=False)
        if card.holds(plans[mode].peak_bytes):
            break
    return plans


def fitting(
    settings: TrainSettings, outline: WanOutline, dtype: torch.dtype, card: Card, say: Callable[[str], None]
) -> Mode:
    """The mode that a run with `memory: auto` takes, which is said.

    Raises:
        InputError: none is predicted to fit.
    """
    plans = plans_of(settings, outline, dtype, card)
    mode = list(plans)[-1]
    if not card.holds(plans[mode].peak_bytes):
        last = "leave --compile out" if settings.compile else "try it with --memory lowest all the same"
        raise InputError(
            f"The run fits on {card.name} in no mode of memory (predicted: {needed(plans, card)}): take fewer frames, "
            f"a smaller size or batch, or {last}."
        )
    say(f"Memory: auto takes {mode} (predicted: {needed(plans, card)}).")
    return mode


def memory_for(
    settings: TrainSettings, model: WanBackbone, clip: Clip, accelerator: Accelerator, say: Callable[[str], None]
) -> Memory:
    """What a run switches on: what is set, or what fits this device; `model` needs no weights.

    Raises:
        InputError: nothing fits, or DeepSpeed, FSDP2 or a backbone without plans cannot do what is set.
    """
    gpu, mode = accelerator.device.type == "cuda", settings.memory
    split = accelerator.state.deepspeed_plugin is not None or is_sharded(accelerator)
    if mode == "auto" and split:
        mode = "low"
        say("Memory: auto takes low, since what is split over processes is not planned.")
    elif mode == "auto" and preserves_variance(model.scheduler_config):
        raise InputError(
            "Plans are made for Wan alone, so that auto cannot choose: set --memory fast, low, 4bit or lowest."
        )
    elif mode == "auto":
        sized = settings.model_copy(update={"height": clip.height, "width": clip.width})
        mode = fitting(sized, outlined(model), model.dtype, unmeasured(accelerator.device), say)
    if mode in ROUNDED and split:
        raise InputError(
            f"DeepSpeed and FSDP2 keep the weights in their own places, and so would {mode}: set --memory low."
        )
    return memory_of(mode, settings.recompute_every, gpu=gpu)


def planned(settings: PlanSettings, say: Callable[[str], None] = print) -> tuple[Plan, Card]:
    """The plan that the settings ask for, and its card; what `auto` takes, or lowest where nothing fits, is said.

    Raises:
        InputError: as `plan_of`, or there is no such model.
    """
    gpu = settings.card != "here" or (settings.device != "cpu" and torch.cuda.is_available())
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": torch.bfloat16 if gpu else torch.float32}
    dtype, outline = kinds[settings.dtype], outline_of(settings.model)
    card = chosen_card(settings, dtype)
    plans = plans_of(settings, outline, dtype, card)
    mode = list(plans)[-1]
    say(f"Memory: {mode} (predicted without text encoder and VAE: {needed(plans, card)}).")
    return plan_of(settings, outline, dtype, memory_of(mode, settings.recompute_every, gpu=card.gpu)), card


def needed(plans: Mapping[Mode, Plan], card: Card) -> str:
    """`fast 20.1 GiB, low 4.5 GiB of 24.0 GiB`."""
    return f"{', '.join(f'{mode} {size(plan.peak_bytes)}' for mode, plan in plans.items())} of {size(card.nbytes)}"
