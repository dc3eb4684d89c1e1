"""Names of LoRA weights in every layout that is in circulation for Wan, and how each is told; no files here.

A layout is a prefix and a family of module names: native (`blocks.N.self_attn.q`, as the published code of Wan has
them), those of diffusers (`blocks.N.attn1.to_q`), or native ones with every "." as "_". Which prefix goes with which
names was read in the files that other trainers write and in what diffusers and ComfyUI accept.

Letters: r rank, i inputs, o outputs; a "r i" and b "o r".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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

IN_COGVIDEOX = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear",
    "norm2.linear",
)  # fmt: skip
"""Modules of a block of CogVideoX (`transformer_blocks.N.`), which has names in diffusers' layout alone."""

OUTSIDE = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}

NATIVE = {f"blocks.#.{native}": f"blocks.#.{ours}" for native, ours in IN_BLOCK.items()} | OUTSIDE
"""Every module, native name -> our name, which is that of diffusers; "#" stands for the number of the block."""
FLAT = {native.replace(".", "_"): ours for native, ours in NATIVE.items()}
DIFFUSERS = {ours: ours for ours in (*NATIVE.values(), *(f"transformer_blocks.#.{name}" for name in IN_COGVIDEOX))}
TO_NATIVE = {ours: native for native, ours in NATIVE.items()}
BLOCK = re.compile(r"(?:transformer_)?blocks\.([0-9]{1,4})\.(.+)")
"""A module of a block: its number, and our name of the module in it."""
OUTSIDE_BLOCKS = 1 << 30
"""The number of the block, in an order of modules, of those that stand in none."""


def renamed(name: str, names: Mapping[str, str]) -> str | None:
    """What a name becomes by a table as those above; None where there is no such module."""
    block = re.match(r"((?:transformer_)?blocks[._])([0-9]{1,4})(?=[._])", name)
    found = names.get(f"{block[1]}#{name[block.end() :]}" if block else name)
    if found is None or "#" in name:
        return None
    return found.replace("#", block[2]) if block else found


def native_name(module: str) -> str:
    """`blocks.N.self_attn.q` from our `blocks.N.attn1.to_q`; InputError where the layout has no name for a module."""
    found = renamed(module, TO_NATIVE)
    if found is None:
        raise InputError(f"The native layout has no name for {module}: save as diffusers.")
    return found


@dataclass(frozen=True, eq=False)
class Layout:
    """One way in which LoRA weights are named.

    Attributes:
        name: what we call it; several spellings may share one.
        prefix: what every key begins with.
        names: what stands behind the prefix -> our name, as in `renamed`.
        known: who writes it, and what the two common loaders make of it.
    """

    name: str
    prefix: str
    names: Mapping[str, str]
    known: str


BY_PEFT = "as peft writes; neither diffusers nor ComfyUI load it"
BY_DIFFSYNTH = "as DiffSynth writes; neither diffusers nor ComfyUI load it"
LAYOUTS = (
    Layout(
        "native",
        "diffusion_model.",
        NATIVE,
        "as motionlora, diffusion-pipe and ai-toolkit write; diffusers and ComfyUI load it",
    ),
    Layout("diffusers", "transformer.", DIFFUSERS, "as diffusers writes; ComfyUI does not load it"),
    Layout(
        "kohya",
        "lora_unet_",
        FLAT,
        "as musubi-tuner writes; ComfyUI loads it, diffusers only with all ten modules of every block",
    ),
    Layout("peft", "base_model.model.", DIFFUSERS, BY_PEFT),
    Layout("peft", "base_model.model.", NATIVE, BY_PEFT),
    Layout("peft", "", DIFFUSERS, "peft's keys without a prefix; neither diffusers nor ComfyUI load it"),
    Layout("diffsynth", "", NATIVE, BY_DIFFSYNTH),
    Layout("diffsynth", "pipe.dit.", NATIVE, BY_DIFFSYNTH),
    Layout(
        "videox-fun",
        "lora_unet__",
        FLAT,
        "as VideoX-Fun writes; diffusers does not load it, ComfyUI only with block 0's cross_attn.k",
    ),
    Layout(
        "simpletuner",
        "diffusion_model.",
        DIFFUSERS,
        "diffusers' names behind ComfyUI's prefix, as SimpleTuner's ComfyUI mode writes; neither of the two loads it",
    ),
)
ACCEPTED = (
    "native (diffusion_model.blocks.N.self_attn.q.lora_A.weight), diffusers (transformer.blocks.N.attn1.to_q...), "
    "kohya (lora_unet_blocks_N_self_attn_q.lora_down.weight), peft, diffsynth, videox-fun and simpletuner"
)
KEY = re.compile(r"(.+?)\.(?:lora_(A|B|down|up)(?:\.default)?(?:\.weight)?|lora\.(down|up)\.weight|(alpha))")
KINDS = {"A": "A", "down": "A", "B": "B", "up": "B", "alpha": "alpha"}


def parsed(key: str, layout: Layout) -> tuple[str, str] | None:
    """Our name of the module and "A", "B" or "alpha"; None where it is no such tensor of a module of Wan."""
    match = KEY.fullmatch(key.removeprefix(layout.prefix)) if key.startswith(layout.prefix) else None
    module = renamed(match[1], layout.names) if match else None
    return (module, KINDS[match[2] or match[3] or match[4]]) if match and module else None


def normalised(path: str | Path, tensors: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor], dict[str, float]]:
    """The layout of a file, its weights under our names, and what its `.alpha` tensors say by module.

    Raises:
        InputError: no layout in which every key is a LoRA weight of Wan, a weight under two names, an alpha without a
            weight, or one that is not one finite number.
    """
    readings = {
        layout: {key: found for key in tensors if (found := parsed(key, layout)) is not None} for layout in LAYOUTS
    }
    layout = next((layout for layout, names in readings.items() if len(names) == len(tensors)), None)
    if layout is None:
        raise InputError(f"{path} {_why_none(tensors, readings)}")
    weights: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, (module, kind) in readings[layout].items():
        value = tensors[key]
        if kind != "alpha":
            weights[f"{module}.lora_{kind}.weight"] = value
        elif value.numel() != 1 or not torch.isfinite(value.float()).all():
            raise InputError(f"{path} has an alpha {key} that is not one finite number: fetch or train it again.")
        else:
            alphas[module] = float(value)
    orphans = [module for module in alphas if f"{module}.lora_A.weight" not in weights]
    if orphans or len(weights) + len(alphas) < len(tensors):
        came = f"an alpha but no weight for {orphans[0]}" if orphans else "the same weight under two names"
        raise InputError(f"{path} has {came}: fetch or train it again.")
    return layout, weights, alphas


def _why_none(tensors: Mapping[str, Tensor], readings: Mapping[Layout, Mapping[str, tuple[str, str]]]) -> str:
    """What is wrong with keys of which no layout has all."""
    firsts = [next((layout.name for layout in LAYOUTS if key in readings[layout]), None) for key in tensors]
    if None not in firsts:
        one, *others = sorted(name for name in set(firsts) if name)
        return (
            f"mixes layouts ({one} and {', '.join(others) or 'its other spelling'}), of which loaders find a part "
            "only: save it anew in one layout."
        )
    odd = list(tensors)[firsts.index(None)]
    if any(odd.startswith(layout.prefix) for layout in LAYOUTS if layout.prefix):
        return f"has the tensor {odd:.100}, which is no plain LoRA weight of a Wan module: {ACCEPTED}."
    return f"has the key {odd:.100}, which is no layout we read: {ACCEPTED} are accepted, one a file."


def place(module: str) -> tuple[int, int, str]:
    """Where a module stands in the order of blocks."""
    match, names = BLOCK.fullmatch(module), list(IN_BLOCK.values())
    if not match:
        return OUTSIDE_BLOCKS, 0, module
    return int(match[1]), names.index(match[2]) if match[2] in names else len(names), module
