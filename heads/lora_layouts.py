"""Names of LoRA weights in the layouts that users load, and what each says about alpha; no files here.

native: `diffusion_model.blocks.N.self_attn.q.lora_A.weight`, which diffusers and ComfyUI both load right as long as
alpha equals the rank, so alpha is folded into b. diffusers: `transformer.blocks.N.attn1.to_q.lora_A.weight` with five
fields of metadata. kohya: `lora_unet_blocks_N_self_attn_q.lora_down.weight` with `.alpha`.

Letters: r rank, i inputs, o outputs; a "r i" and b "o r".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from motionlora.data.settings import InputError
from motionlora.heads.lora import MotionLora

Layout: TypeAlias = Literal["native", "diffusers", "kohya"]
METADATA = "lora_adapter_metadata"
"""Header key in which diffusers keeps ranks and alphas."""

IN_BLOCK = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
}
"""Modules of a block, native name -> diffusers name; a text-to-video model has the first ten."""

OUTSIDE = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
ACCEPTED = (
    "diffusion_model.blocks.N.self_attn.q.lora_A.weight (native), transformer.blocks.N.attn1.to_q.lora_A.weight "
    "(diffusers) and lora_unet_blocks_N_self_attn_q.lora_down.weight (kohya)"
)


def layout_of(path: str | Path, tensors: Mapping[str, Tensor]) -> Layout:
    prefixes: dict[Layout, str] = {
        "native": "diffusion_model.",
        "diffusers": "transformer.",
        "kohya": "lora_unet_blocks_",
    }
    for layout, prefix in prefixes.items():
        if all(key.startswith(prefix) for key in tensors):
            return layout
    odd = next((key for key in tensors if not key.startswith(tuple(prefixes.values()))), None)
    came = f"has the key {odd}" if odd else "mixes layouts"
    raise InputError(f"{path} {came}, which is no layout we read: {ACCEPTED} are accepted, one in a file.")


def normalised(
    path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], layout: Layout
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights under our names in the order of blocks, and alpha / rank of every module."""
    weights: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, value in tensors.items():
        match = re.fullmatch(r"(.+?)\.(?:lora_(A|B|down|up)(?:\.default)?\.weight|(alpha))", key)
        module = _module_name(match[1], layout) if match else None
        if not match or module is None:
            raise InputError(f"{path} has the tensor {key}, which is no plain LoRA weight of a Wan module: {ACCEPTED}.")
        if match[3]:
            if value.numel() != 1 or not torch.isfinite(value.float()).all():
                raise InputError(f"{path} has an alpha {key} that is not one finite number: fetch or train it again.")
            alphas[module] = float(value)
        else:
            weights[f"{module}.lora_{'A' if match[2] in ('A', 'down') else 'B'}.weight"] = value
    orphans = [module for module in alphas if f"{module}.lora_A.weight" not in weights]
    if orphans or len(weights) + len(alphas) < len(tensors):
        came = f"an alpha but no weight for {orphans[0]}" if orphans else "the same weight under two names"
        raise InputError(f"{path} has {came}: fetch or train it again.")
    ordered = dict(sorted(weights.items(), key=lambda item: _place(item[0])))
    downs = {key.removesuffix(".lora_A.weight"): value for key, value in ordered.items() if "lora_A" in key}
    return ordered, _scales(path, downs, alphas, header)


def _scales(
    path: str | Path, downs: Mapping[str, Tensor], alphas: Mapping[str, float], header: Mapping[str, str]
) -> dict[str, float]:
    """alpha / rank: from `.alpha` tensors, else from diffusers' metadata, else 1 as every loader has it."""
    ranks = {module: a.shape[0] if a.ndim else 1 for module, a in downs.items()}
    if alphas or METADATA not in header:
        return {module: alphas.get(module, rank) / max(rank, 1) for module, rank in ranks.items()}
    try:
        fields = {key.removeprefix("transformer."): value for key, value in json.loads(header[METADATA]).items()}
        patterned = fields.get("alpha_pattern") or {}
        default = float(fields["lora_alpha"])
        power = 0.5 if fields.get("use_rslora") else 1.0
        scales = {module: _by_pattern(patterned, module, default) / rank**power for module, rank in ranks.items()}
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, re.error) as error:
        raise InputError(
            f"{path} has damaged {METADATA} ({error!r}): its strength is unknown; save it again."
        ) from None
    if not all(map(math.isfinite, scales.values())):
        raise InputError(f"{path} has an infinite alpha in {METADATA}: its strength is unknown; save it again.")
    return scales


def _by_pattern(patterns: Mapping[str, Any], module: str, default: float) -> float:
    """The value of the first pattern that a module ends in, as peft matches them."""
    return float(next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default))


def _module_name(name: str, layout: Layout) -> str | None:
    """Our name of a module from its name in a file; None where there is no such module."""
    if layout == "diffusers":
        return name.removeprefix("transformer.")
    if layout == "native":
        inner = name.removeprefix("diffusion_model.")
        match = re.fullmatch(r"(blocks\.\d+\.)(.+)", inner)
        ours = IN_BLOCK.get(match[2]) if match else OUTSIDE.get(inner)
        return None if ours is None else (match[1] if match else "") + ours
    match = re.fullmatch(r"lora_unet_blocks_(\d+)_(.+)", name)
    flat = {native.replace(".", "_"): ours for native, ours in IN_BLOCK.items()}
    return f"blocks.{match[1]}.{flat[match[2]]}" if match and match[2] in flat else None


def _place(key: str) -> tuple[int, int, str]:
    match = re.match(r"blocks\.(\d+)\.(.+)\.lora_[AB]\.weight$", key)
    names = list(IN_BLOCK.values())
    if not match:
        return 1 << 30, 0, key
    return int(match[1]), names.index(match[2]) if match[2] in names else len(names), key


def _folded(lora: MotionLora) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (a, b) with alpha / rank in b, so that a reader who takes alpha for the rank is right."""
    scale = lora.alpha / lora.rank
    return {module: (a, b if scale == 1.0 else b * scale) for module, (a, b) in lora.modules().items()}


def _as_native(lora: MotionLora) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in _folded(lora).items():
        tensors[f"diffusion_model.{_native_name(module)}.lora_A.weight"] = a
        tensors[f"diffusion_model.{_native_name(module)}.lora_B.weight"] = b
    return tensors, {"ss_network_alpha": str(lora.rank)}


def _as_diffusers(lora: MotionLora) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Only five fields: an unknown field makes an older peft fail."""
    modules = lora.modules()
    other = {module: a.shape[0] for module, (a, _) in modules.items() if a.shape[0] != lora.rank}
    fields = {
        "r": lora.rank,
        "lora_alpha": number(lora.alpha),
        "target_modules": sorted(modules),
        "rank_pattern": other,
        "alpha_pattern": {module: number(rank * lora.alpha / lora.rank) for module, rank in other.items()},
    }
    text = json.dumps({f"transformer.{field}": value for field, value in fields.items()}, sort_keys=True)
    return {f"transformer.{key}": value for key, value in lora.weights.items()}, {METADATA: text}


def _as_kohya(lora: MotionLora) -> tuple[dict[str, Tensor], dict[str, str]]:
    modules = {_native_name(module): pair for module, pair in _folded(lora).items()}
    blocks = 1 + max((int(name.split(".")[1]) for name in modules if name.startswith("blocks.")), default=0)
    needed = [f"blocks.{block}.{name}" for block in range(blocks) for name in list(IN_BLOCK)[:10]]
    wrong = [name for name in needed if name not in modules] + [name for name in modules if name not in needed]
    if wrong:
        raise InputError(
            f"The kohya layout must hold all ten linear modules of every block, or diffusers cannot load it, and "
            f"{wrong[0]} is {'missing' if wrong[0] in needed else 'none of them'} here: save as native."
        )
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in modules.items():
        stem = "lora_unet_" + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = a, b
        tensors[f"{stem}.alpha"] = torch.tensor(float(a.shape[0]))
    return tensors, {"ss_network_alpha": str(lora.rank)}


AS_LAYOUT: dict[str, Callable[[MotionLora], tuple[dict[str, Tensor], dict[str, str]]]] = {
    "native": _as_native,
    "diffusers": _as_diffusers,
    "kohya": _as_kohya,
}


def _native_name(module: str) -> str:
    match = re.fullmatch(r"(blocks\.\d+\.)(.+)", module)
    table = IN_BLOCK if match else OUTSIDE
    inner = match[2] if match else module
    for native, ours in table.items():
        if ours == inner:
            return (match[1] if match else "") + native
    raise InputError(f"The native layout has no name for {module}: save as diffusers.")


def number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)
