"""Read LoRA files in every layout that is in circulation, and write them in those that users load.

Letters: r rank, i inputs, o outputs; a "r i" and b "o r".
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from motionlora.data.cache import replacing
from motionlora.data.errors import InputError, NumbersError, meant
from motionlora.data.json_text import parsed_json
from motionlora.data.limits import LIBRARY_HEADER, MB, limits
from motionlora.heads.head_map import HeadMap
from motionlora.heads.lora_layouts import Layout, normalised
from motionlora.heads.lora_strength import FORMAT, Alpha, Strength, strength_of
from motionlora.heads.lora_write import AS_LAYOUT, Written, number
from motionlora.heads.motion_lora import Factors, MotionLora, as_weights

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA file as it is: layout, factors (a, b) by our names of the modules, strength, header."""

    path: Path
    layout: Layout
    modules: Mapping[str, Factors]
    strength: Strength
    header: Mapping[str, str]


def save_lora(lora: MotionLora, path: str | Path, layout: Written | None = None, precision: Precision = "fp32") -> None:
    """Writes a LoRA as safetensors; equal LoRAs give equal bytes, and either the whole file appears or nothing changes.

    Args:
        lora: its provenance, head map and stage go into the header as flat strings `motion.*`.
        path: the file; its folder is made.
        layout: None takes "native" for Wan and "diffusers" for CogVideoX, which has no other;
            "native" for diffusers and ComfyUI alike; "diffusers" keeps alpha; "kohya" only for a LoRA that has all
            ten modules of every block (`motionlora.heads.lora_write.padded`), since diffusers fails on others.
        precision: of the numbers; training works in fp32, and bf16 or fp16 halve the file and round.

    Raises:
        InputError: an unknown layout, or one that cannot hold this LoRA.
        NumbersError: a weight that is NaN or infinite, also by the range of fp16: nothing is written.
        StorageError: the file cannot be written.
    """
    layout = layout or ("diffusers" if _is_cogvideox(lora) else "native")
    if layout not in AS_LAYOUT:
        known = list(AS_LAYOUT)
        raise InputError(f"There is no layout {layout!r}: name one of {', '.join(known)} ({meant(layout, known)}).")
    if _is_cogvideox(lora) and layout != "diffusers":
        raise InputError(f"CogVideoX has no names in the layout {layout}: save its LoRA as diffusers.")
    lora, tensors, own = AS_LAYOUT[layout](lora)
    # In the precision of the file; an alpha is exact.
    rounded = {key: value.to(DTYPES[precision]) if value.ndim else value for key, value in tensors.items()}
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise NumbersError(f"{key} of the LoRA has NaN or infinite numbers: not saved; lower the learning rate.")
        if not rounded[key].isfinite().all():
            raise NumbersError(f"{key} of the LoRA is beyond the range of {precision}: not saved; choose fp32 or bf16.")
    content = _serialised(rounded, _header(lora, Path(path).stem) | own)
    with replacing(Path(path)) as draft, draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # a finished stage shall be found whole after a power cut, too


def load_lora(path: str | Path, alpha: Alpha = None) -> MotionLora:
    """Reads a LoRA of any layout in `motionlora.heads.lora_layouts`, whoever wrote it, as fp32.

    One scale for all modules stays as `alpha`; differing scales are folded into b, so that alpha equals the rank.

    Args:
        alpha: what it was trained with ("rank": equal to the rank), for a file that does not say it; it is believed
            against a file that says otherwise.

    Raises:
        InputError: no such file, a damaged one, another layout, a tensor that is no plain LoRA weight, a NaN, or a
            strength that the file leaves open.
    """
    file = read_lora(path, alpha)
    file.strength.refuse_doubt()
    return as_lora(file)


def read_lora(path: str | Path, alpha: Alpha = None) -> LoraFile:
    """What is in a LoRA file, of known strength or not; otherwise as `load_lora`."""
    tensors, header = _read(Path(path))
    layout, weights, alphas = normalised(path, tensors)
    for key, value in weights.items():
        if not value.is_floating_point() or not torch.isfinite(value.float()).all():
            raise InputError(f"{path} has a NaN, infinite or non-float number in {key}: fetch or train it again.")
    try:
        modules = MotionLora(weights, rank=1, alpha=1.0).modules()
    except InputError as error:
        raise InputError(f"{path} cannot be used: {error}") from None
    ranks = {module: len(a) for module, (a, _) in modules.items()}
    return LoraFile(Path(path), layout, modules, strength_of(Path(path), ranks, alphas, header, alpha), header)


def as_lora(file: LoraFile) -> MotionLora:
    """The LoRA of a file in fp32; one of unknown strength as if alpha were the rank, which only `inspect` may show."""
    scales = file.strength.scales or dict.fromkeys(file.modules, 1.0)
    # One scale of all stays alpha, those that differ go into b.
    common = next(iter(scales.values())) if len(set(scales.values())) == 1 else None
    folds = scales if common is None else dict.fromkeys(scales, 1.0)
    rank = Counter(len(a) for a, _ in file.modules.values()).most_common(1)[0][0]
    weights = as_weights({module: (a.float(), b.float() * folds[module]) for module, (a, b) in file.modules.items()})
    told = {key.removeprefix("motion."): _unflat(text) for key, text in file.header.items() if key[:7] == "motion."}
    stage, content, _ = (told.pop(name, None) for name in ("stage", "head_map", "format"))
    head_map = None if content is None else HeadMap.from_json(content, f"the head map in {file.path}")
    return MotionLora(
        weights, rank, rank * (1.0 if common is None else common), head_map, str(stage or "unknown"), told
    )


def _header(lora: MotionLora, title: str) -> dict[str, str]:
    """Flat strings. No date: two runs that end in the same weights shall give the same file."""
    facts: dict[str, Any] = {"versions": {name: version(name) for name in ("motionlora", "torch", "diffusers", "peft")}}
    own: dict[str, Any] = {"stage": lora.stage, "format": FORMAT}
    if lora.head_map is not None:
        rule = {name: lora.provenance[name] for name in ("rule", "ratio") if name in lora.provenance}
        own["head_map"] = content = lora.head_map.as_json(**rule)
        facts |= {name: content[name] for name in ("clip_hash", "caption", "grid")}
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "cogvideox/lora" if _is_cogvideox(lora) else "wan2.1/lora",
        "modelspec.title": title,
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": str(number(lora.alpha)),
        **{f"motion.{name}": _flat(value) for name, value in (facts | dict(lora.provenance) | own).items()},
    }


def _is_cogvideox(lora: MotionLora) -> bool:
    return any(key.startswith("transformer_blocks.") for key in lora.weights)


def _flat(value: Any) -> str:
    """JSON, but plain text stays plain text where it cannot be taken for JSON."""
    plain = isinstance(value, str) and _unflat(value) == value
    return value if plain else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _unflat(text: str) -> Any:
    try:
        return parsed_json(text)
    except ValueError:
        return text


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header. Copies: a mapped tensor is not aligned, and the CPU then rounds differently."""
    from safetensors import SafetensorError, safe_open

    try:
        _refuse_large(path)
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"Cannot read {path} ({error.strerror or error}): give a LoRA file.") from None
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} is damaged or no safetensors file ({error!s:.200}): fetch it again.") from None
    if not tensors:
        raise InputError(f"{path} holds no tensor: give a LoRA file.")
    return tensors, header


def _refuse_large(path: Path) -> None:
    """The first eight bytes claim how long the header is; a false claim must not cost the memory that it names."""
    facts = path.stat()
    if not S_ISREG(facts.st_mode):
        raise InputError(f"{path} is a folder, a device or a pipe, not a file: give a LoRA file.")
    limits().refuse_over("file_mb", facts.st_size / MB, f"{path} has {{}} MB", "see whether it is a LoRA")
    with path.open("rb") as file:
        claimed = int.from_bytes(file.read(8), "little")
    if claimed > LIBRARY_HEADER:
        raise InputError(
            f"{path} claims a header of {claimed / MB:,.0f} MB, and the format allows {LIBRARY_HEADER // MB}: it is "
            "damaged or no safetensors file; fetch or train it again."
        )
    limits().refuse_over("header_mb", claimed / MB, f"{path} has a header of {{}} MB", "see whether it is a LoRA")


def _serialised(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    """A safetensors file with its header in order: the library's own order changes from process to process."""
    from safetensors.torch import save

    plain = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    raw = save(plain, metadata=dict(header))
    start = 8 + int.from_bytes(raw[:8], "little")
    content = json.loads(raw[8:start])
    content["__metadata__"] = dict(sorted(content["__metadata__"].items()))
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text + raw[start:]
