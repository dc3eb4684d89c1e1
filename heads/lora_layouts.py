"""Names of LoRA weights in every layout that is in circulation for Wan, and how each is told; no files here.

A layout is a prefix and a family of module names: native (`blocks.N.self_attn.q`, as the published code of Wan has
them), those of diffusers (`blocks.N.attn1.to_q`), or native ones with every "." as "_". Which prefix goes with which
names was read in the files that other trainers write and in what diffusers and ComfyUI accept.

Letters: r rank, i inputs, o outputs; a "r i" and b "o r".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from motionlora.data.settings import InputError

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


def from_native(name: str) -> str | None:
    """Our name of `blocks.N.self_attn.q` and the like; None where there is no such module."""
    match = re.fullmatch(r"(blocks\.[0-9]{1,4}\.)(.+)", name)
    ours = IN_BLOCK.get(match[2]) if match else OUTSIDE.get(name)
    return None if ours is None else (match[1] if match else "") + ours


def from_flat(name: str) -> str | None:
    """Our name of `blocks_N_self_attn_q` and the like."""
    match = re.fullmatch(r"blocks_([0-9]{1,4})_(.+)", name)
    flat = {native.replace(".", "_"): ours for native, ours in (IN_BLOCK if match else OUTSIDE).items()}
    ours = flat.get(match[2] if match else name)
    return None if ours is None else (f"blocks.{match[1]}." if match else "") + ours


def from_diffusers(name: str) -> str | None:
    """Our names are those of diffusers."""
    match = re.fullmatch(r"blocks\.[0-9]{1,4}\.(.+)", name)
    return name if (match[1] in IN_BLOCK.values() if match else name in OUTSIDE.values()) else None


def native_name(module: str) -> str:
    """`blocks.N.self_attn.q` from our `blocks.N.attn1.to_q`; InputError where the layout has no name for a module."""
    match = re.fullmatch(r"(blocks\.[0-9]{1,4}\.)(.+)", module)
    inner = match[2] if match else module
    for native, ours in (IN_BLOCK if match else OUTSIDE).items():
        if ours == inner:
            return (match[1] if match else "") + native
    raise InputError(f"The native layout has no name for {module}: save as diffusers.")


@dataclass(frozen=True)
class Layout:
    """One way in which LoRA weights are named.

    Attributes:
        name: what we call it; several spellings may share one.
        prefix: what every key begins with.
        module: our name of a module from what stands behind the prefix; None where there is no such module.
        known: who writes it, and what the two common loaders make of it.
    """

    name: str
    prefix: str
    module: Callable[[str], str | None]
    known: str


LAYOUTS = (
    Layout(
        "native",
        "diffusion_model.",
        from_native,
        "as motionlora, diffusion-pipe and ai-toolkit write; diffusers and ComfyUI load it",
    ),
    Layout("diffusers", "transformer.", from_diffusers, "as diffusers writes; ComfyUI does not load it"),
    Layout(
        "kohya",
        "lora_unet_",
        from_flat,
        "as musubi-tuner writes; ComfyUI loads it, diffusers only with all ten modules of every block",
    ),
    Layout("peft", "base_model.model.", from_diffusers, "as peft writes; neither diffusers nor ComfyUI load it"),
    Layout("peft", "base_model.model.", from_native, "as peft writes; neither diffusers nor ComfyUI load it"),
    Layout("peft", "", from_diffusers, "peft's keys without a prefix; neither diffusers nor ComfyUI load it"),
    Layout("diffsynth", "", from_native, "as DiffSynth writes; neither diffusers nor ComfyUI load it"),
    Layout("diffsynth", "pipe.dit.", from_native, "as DiffSynth writes; neither diffusers nor ComfyUI load it"),
    Layout(
        "videox-fun",
        "lora_unet__",
        from_flat,
        "as VideoX-Fun writes; diffusers does not load it, ComfyUI only with block 0's cross_attn.k",
    ),
    Layout(
        "simpletuner",
        "diffusion_model.",
        from_diffusers,
        "diffusers' names behind ComfyUI's prefix, as SimpleTuner's ComfyUI mode writes; neither of the two loads it",
    ),
)
ACCEPTED = (
    "native (diffusion_model.blocks.N.self_attn.q.lora_A.weight), diffusers (transformer.blocks.N.attn1.to_q...), "
    "kohya (lora_unet_blocks_N_self_attn_q.lora_down.weight), peft, diffsynth, videox-fun and simpletuner"
)
KEY = re.compile(r"(.+?)\.(?:lora_(A|B|down|up)(?:\.default)?(?:\.weight)?|lora\.(down|up)\.weight|(alpha))")


@dataclass(frozen=True)
class Key:
    """A key of a file: the module under our name; "A", "B" or "alpha"."""

    module: str
    kind: str


def parsed(key: str, layout: Layout) -> Key | None:
    """What a key names in a layout; None where it is no a, b or alpha of a module of Wan."""
    match = KEY.fullmatch(key.removeprefix(layout.prefix)) if key.startswith(layout.prefix) else None
    module = layout.module(match[1]) if match else None
    if match is None or module is None:
        return None
    kind = "alpha" if match[4] else {"A": "A", "down": "A", "B": "B", "up": "B"}[match[2] or match[3]]
    return Key(module, kind)


def layout_of(path: str | Path, tensors: Mapping[str, Tensor]) -> Layout:
    """The one layout in which every key of a file is a LoRA weight of Wan; InputError naming the first that is not."""
    known = {key: [layout for layout in LAYOUTS if parsed(key, layout)] for key in tensors}
    for layout in LAYOUTS:
        if all(layout in layouts for layouts in known.values()):
            return layout
    odd = next((key for key, layouts in known.items() if not layouts), None)
    if odd is None:
        one, *others = sorted({layouts[0].name for layouts in known.values()})
        raise InputError(
            f"{path} mixes layouts ({one} and {', '.join(others) or 'its other spelling'}), of which loaders find a "
            "part only: save it anew in one layout."
        )
    if any(odd.startswith(layout.prefix) and layout.prefix for layout in LAYOUTS):
        raise InputError(
            f"{path} has the tensor {odd:.100}, which is no plain LoRA weight of a Wan module: {ACCEPTED}."
        )
    raise InputError(f"{path} has the key {odd:.100}, which is no layout we read: {ACCEPTED} are accepted, one a file.")


def normalised(
    path: str | Path, tensors: Mapping[str, Tensor], layout: Layout
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights under our names in the order of blocks, and what the `.alpha` tensors say by module.

    Raises:
        InputError: a weight under two names, an alpha without a weight, an alpha that is not one finite number.
    """
    weights: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, value in tensors.items():
        key = parsed(name, layout)
        if key is None:
            raise RuntimeError(f"{name} is not of the layout {layout.name}: call layout_of first.")
        if key.kind == "alpha":
            if value.numel() != 1 or not torch.isfinite(value.float()).all():
                raise InputError(f"{path} has an alpha {name} that is not one finite number: fetch or train it again.")
            alphas[key.module] = float(value)
        else:
            weights[f"{key.module}.lora_{key.kind}.weight"] = value
    orphans = [module for module in alphas if f"{module}.lora_A.weight" not in weights]
    if orphans or len(weights) + len(alphas) < len(tensors):
        came = f"an alpha but no weight for {orphans[0]}" if orphans else "the same weight under two names"
        raise InputError(f"{path} has {came}: fetch or train it again.")
    return dict(sorted(weights.items(), key=lambda item: place(item[0]))), alphas


def place(key: str) -> tuple[int, int, str]:
    """Where a weight of ours stands in the order of blocks."""
    match = re.match(r"blocks\.([0-9]{1,4})\.(.+)\.lora_[AB]\.weight$", key)
    names = list(IN_BLOCK.values())
    if not match:
        return 1 << 30, 0, key
    return int(match[1]), names.index(match[2]) if match[2] in names else len(names), key
