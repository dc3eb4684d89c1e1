"""A model by the name that the user gives it: which backbone it is, its folder says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from motionlora.heads.cogvideox import CogVideoXBackbone
from motionlora.heads.four_bit import packed
from motionlora.heads.memory import NOTHING_SPARED, Memory, refuse_absent
from motionlora.heads.wan import WanBackbone
from motionlora.heads.wan_folder import found_folder, is_cogvideox


def load_model(
    source: str | Path = "tiny",
    *,
    device: torch.device | str = "cpu",
    memory: Memory = NOTHING_SPARED,
    **how: Any,
) -> WanBackbone:
    """The model of a diffusers folder or hub id, or "tiny"; arguments and refusals are those of `WanBackbone.load`.

    With `memory` it comes by main memory, and only what is not to wait there goes on to the device.
    """
    refuse_absent("4bit" if memory.weights == "nf4" else "")
    folder = found_folder(source, weights=False, cogvideox=True)
    kind = CogVideoXBackbone if is_cogvideox(folder) else WanBackbone
    model = kind.load(source, device="cpu" if memory.waits else device, **how)
    memory.casting(model.transformer, model.dtype, torch.device(device))
    for weights in model.experts.waiting.values():  # else a change of experts would bring uncast weights
        for stored, weight in zip(weights, model.experts.weights, strict=True):
            in_bytes = weight.dtype == torch.uint8
            stored.data = packed(stored.data, torch.device(device)) if in_bytes else stored.data.to(weight.dtype)
    memory.offloading(model.transformer, torch.device(device))
    memory.recomputing(model.transformer)
    return replace(model, parts=replace(model.parts, device=torch.device(device)))
