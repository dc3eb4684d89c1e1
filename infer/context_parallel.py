"""`generate --context-parallel ulysses`: what can be asked of processes that make every clip together.

    accelerate launch --multi_gpu --num_processes 2 --no_python motionlora generate --context-parallel ulysses ...

All walk the same walk from the same noise and hold all weights, but a part of the tokens; the first one decodes and
writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from motionlora.data.errors import InputError
from motionlora.heads.context_parallel import refuse_unshareable
from motionlora.infer.guide_flowmotion import FlowMotion
from motionlora.infer.guide_none import NoGuidance
from motionlora.infer.guide_random import RandomGradient
from motionlora.infer.guide_sdedit import SDEdit

if TYPE_CHECKING:
    from motionlora.heads.wan import WanBackbone
    from motionlora.infer.settings import GenerateSettings

FROM_OUTSIDE = (NoGuidance, RandomGradient, SDEdit, FlowMotion)
"""Guidances that ask for velocities alone: all others read or change the network's inside, where tokens are missing."""


def refuse_alone_or_crowded(settings: GenerateSettings, processes: int) -> None:
    """Refuses settings that do not go with the number of processes, before anything is loaded.

    Raises:
        InputError: several processes that share nothing, one that shall share, or what cannot be shared.
    """
    if settings.context_parallel == "none":
        if processes > 1:
            raise InputError(
                f"{processes} processes were launched, and each would make every clip: add --context-parallel ulysses "
                "to let them make each together, or start one."
            )
        return
    if processes == 1:
        raise InputError(
            "context_parallel is ulysses, and there is one process: start several with `accelerate launch --multi_gpu "
            "--num_processes 2 --no_python motionlora generate ...`, or set --context-parallel none."
        )
    if settings.positions or not isinstance(settings.guidance, FROM_OUTSIDE):
        name = "--positions" if settings.positions else f"--guidance {_name(settings.guidance)}"
        raise InputError(
            f"{name} works inside of the network, where each of {processes} processes has a part of the tokens: set "
            "--context-parallel none, in one process, or guide by none, random, sdedit or flowmotion."
        )
    if settings.memory == "auto":
        raise InputError(
            "memory is auto, and plans are made for one process alone: set --memory fast, low, 4bit or lowest."
        )


def refuse_indivisible(encoders: WanBackbone, settings: GenerateSettings, processes: int) -> None:
    """InputError where a model (it needs no weights) and its clips cannot be shared by so many processes."""
    if processes > 1:
        frames = (settings.frames - 1) // encoders.frame_multiple + 1
        sides = (side // encoders.spatial_factor for side in (settings.height, settings.width))
        tokens = encoders.grid(torch.empty(1, 1, frames, *sides, device="meta")).tokens
        refuse_unshareable(encoders, tokens, settings.attention, processes)


def _name(guidance: object) -> str:
    return str(getattr(guidance, "name", type(guidance).__name__))
