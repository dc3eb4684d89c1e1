"""A LoRA as tensors and header entries in the three layouts that we write.

native: `diffusion_model.blocks.N.self_attn.q.lora_A.weight`, which diffusers and ComfyUI both load right as long as
alpha equals the rank and all modules have the same one, so alpha is folded into b and zeros fill up. diffusers:
`transformer.blocks.N.attn1.to_q.lora_A.weight` with five fields of metadata. kohya:
`lora_unet_blocks_N_self_attn_q.lora_down.weight` with `.alpha`, filled up likewise.

Letters: r rank, i inputs, o outputs; a "r i" and b "o r".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from motionlora.data.settings import InputError
from motionlora.heads.lora_layers import check_width
from motionlora.heads.lora_layouts import IN_BLOCK, native_name
from motionlora.heads.lora_strength import METADATA
from motionlora.heads.motion_lora import MotionLora, as_weights, filled

Written: TypeAlias = Literal["native", "diffusers", "kohya"]
Parts: TypeAlias = tuple[MotionLora, dict[str, Tensor], dict[str, str]]
"""The same LoRA as a layout holds it, its tensors there, and header entries of that layout alone."""
WHOLE_BLOCK = list(IN_BLOCK.values())[:10]
"""The ten linear modules of a text-to-video block."""


def padded(lora: MotionLora, config: Mapping[str, Any]) -> MotionLora:
    """The same LoRA with all ten modules of every block of its model; those that it has not got are zeros of its rank.

    diffusers reads the kohya layout only so. The zeros do nothing but take room: rank 32 on Wan 2.1 14B is 0.6 GB.

    Args:
        config: of the model's transformer, as diffusers saves it.

    Raises:
        InputError: the LoRA was made at another width, or has a module outside the ten.
    """
    modules, shapes = lora.modules(), whole_shapes(config)
    check_width(config["num_attention_heads"] * config["attention_head_dim"], modules)
    for module, (a, b) in modules.items():
        if shapes.get(module) != (b.shape[0], a.shape[1]):
            raise InputError(
                f"The LoRA has {module} with {a.shape[1]} inputs and {b.shape[0]} outputs, and the model has "
                f"{shapes.get(module, 'none of that name')}: name the model that it was made for, or save as native."
            )
    for module, (outputs, inputs) in shapes.items():
        modules.setdefault(module, (torch.zeros(lora.rank, inputs), torch.zeros(outputs, lora.rank)))
    return replace(lora, weights=as_weights(modules))


def whole_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Module -> (outputs, inputs) of the ten linear modules of every block of a text-to-video Wan."""
    width, inner = config["num_attention_heads"] * config["attention_head_dim"], config["ffn_dim"]
    own = {"ffn.net.0.proj": (inner, width), "ffn.net.2": (width, inner)}
    return {
        f"blocks.{block}.{name}": own.get(name, (width, width))
        for block in range(config["num_layers"])
        for name in WHOLE_BLOCK
    }


def evened(lora: MotionLora) -> MotionLora:
    """The same LoRA with alpha = rank, and every module with the largest rank.

    diffusers 0.35 takes the commonest rank for the alpha of all modules of a file without alpha: of a module of half
    that rank it would double the update.
    """
    modules = lora.folded()
    rank = max(len(a) for a, _ in modules.values())
    weights = as_weights({module: filled(a, b, rank) for module, (a, b) in modules.items()})
    return replace(lora, weights=weights, rank=rank, alpha=float(rank))


def _as_native(lora: MotionLora) -> Parts:
    lora = evened(lora)
    modules = {f"diffusion_model.{native_name(module)}": pair for module, pair in lora.modules().items()}
    return lora, as_weights(modules), {}


def _as_diffusers(lora: MotionLora) -> Parts:
    """Only five fields: an unknown field makes an older peft fail."""
    modules = lora.modules()
    other = {module: len(a) for module, (a, _) in modules.items() if len(a) != lora.rank}
    fields = {
        "r": lora.rank,
        "lora_alpha": number(lora.alpha),
        "target_modules": sorted(modules),
        "rank_pattern": other,
        "alpha_pattern": {module: number(rank * lora.alpha / lora.rank) for module, rank in other.items()},
    }
    text = json.dumps({f"transformer.{field}": value for field, value in fields.items()}, sort_keys=True)
    return lora, {f"transformer.{key}": value for key, value in lora.weights.items()}, {METADATA: text}


def _as_kohya(lora: MotionLora) -> Parts:
    lora = evened(lora)
    modules = lora.modules()
    blocks = 1 + max((int(name.split(".")[1]) for name in modules if name.startswith("blocks.")), default=0)
    needed = [f"blocks.{block}.{name}" for block in range(blocks) for name in WHOLE_BLOCK]
    wrong = [name for name in needed if name not in modules] + [name for name in modules if name not in needed]
    if wrong:
        cure = "name its model with --model to fill up with zeros, or " if wrong[0] in needed else ""
        raise InputError(
            "The kohya layout must hold all ten linear modules of every block and no other, or diffusers cannot load "
            f"it, and {native_name(wrong[0])} is {'missing' if wrong[0] in needed else 'none of them'} here: "
            f"{cure}save as native."
        )
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in modules.items():
        stem = "lora_unet_" + native_name(module).replace(".", "_")
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = a, b
        tensors[f"{stem}.alpha"] = torch.tensor(lora.alpha)
    return lora, tensors, {}


AS_LAYOUT: dict[str, Callable[[MotionLora], Parts]] = {
    "native": _as_native,
    "diffusers": _as_diffusers,
    "kohya": _as_kohya,
}


def number(value: float) -> int | float:
    """A whole number as such, for headers."""
    return int(value) if float(value).is_integer() else float(value)
