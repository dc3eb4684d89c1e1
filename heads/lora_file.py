"""Read and write LoRA files in the layouts that users load; inspect.

Letters: r rank, i inputs, o outputs; a "r i" and b "o r".
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionlora.data.settings import InputError, NumbersError, StorageError
from motionlora.heads.head_map import HeadMap
from motionlora.heads.lora import MotionLora
from motionlora.heads.lora_layouts import AS_LAYOUT, Layout, layout_of, normalised, number

FORMAT = "motionlora.lora/1"


def save_lora(lora: MotionLora, path: str | Path, layout: Layout = "native") -> None:
    """Writes a LoRA as safetensors; equal LoRAs give equal bytes, and either the whole file appears or nothing changes.

    Args:
        lora: its provenance, head map and stage go into the header as flat strings `motion.*`.
        path: the file; its folder is made.
        layout: "native" for diffusers and ComfyUI alike; "diffusers" keeps alpha; "kohya" only for a LoRA that has all
            ten modules of every block, since diffusers fails on others.

    Raises:
        InputError: an unknown layout, or one that cannot hold this LoRA.
        NumbersError: a NaN or infinite weight: nothing is written.
        StorageError: the file cannot be written.
    """
    if layout not in AS_LAYOUT:
        close = difflib.get_close_matches(str(layout), AS_LAYOUT, n=1)
        hint = f", did you mean {close[0]!r}?" if close else "."
        raise InputError(f"There is no layout {layout!r}; allowed are {', '.join(AS_LAYOUT)}{hint}")
    for key, value in lora.weights.items():
        if not torch.isfinite(value).all():
            raise NumbersError(f"{key} of the LoRA has NaN or infinite numbers: not saved; lower the learning rate.")
    tensors, extra = AS_LAYOUT[layout](lora)
    header = {**_header(lora, Path(path).stem), **extra}
    _replace(Path(path), _serialised(tensors, header))


def load_lora(path: str | Path) -> MotionLora:
    """Reads a LoRA of any of the three layouts, whoever wrote it, as fp32.

    One scale for all modules stays as `alpha`; differing scales are folded into b, so that alpha equals the rank.

    Raises:
        InputError: no such file, a damaged one, another layout, a tensor that is no plain LoRA weight, a NaN.
    """
    tensors, header = _read(Path(path))
    layout = layout_of(path, tensors)
    weights, scales = normalised(path, tensors, header, layout)
    for key, value in weights.items():
        if not value.is_floating_point() or not torch.isfinite(value.float()).all():
            raise InputError(f"{path} has a NaN, infinite or non-float number in {key}: fetch or train it again.")
    try:
        modules = MotionLora(weights, rank=1, alpha=1.0).modules()
    except InputError as error:
        raise InputError(f"{path} cannot be used: {error}") from None
    rank = Counter(a.shape[0] for a, _ in modules.values()).most_common(1)[0][0]
    common = next(iter(scales.values())) if len(set(scales.values())) == 1 else 1.0
    ready: dict[str, Tensor] = {}
    for module, (a, b) in modules.items():
        fold = scales[module] / common if len(set(scales.values())) > 1 else 1.0
        ready[f"{module}.lora_A.weight"] = a.float()
        ready[f"{module}.lora_B.weight"] = b.float() if fold == 1.0 else b.float() * fold
    stage, head_map, provenance = _story(path, header)
    return MotionLora(ready, rank, rank * common, head_map, stage, provenance)


def inspect_lora(path: str | Path) -> str:
    """What a LoRA file holds, for people: layout, modules, rank, alpha, heads and size of the update by block, header.

    Raises:
        InputError: as `load_lora`.
    """
    tensors, header = _read(Path(path))
    lora = load_lora(path)
    modules = lora.modules()
    ranks = sorted({a.shape[0] for a, _ in modules.values()})
    kinds = Counter(re.sub(r"^blocks\.\d+\.", "", module) for module in modules)
    lines = [
        f"{path}: {Path(path).stat().st_size:,} bytes",
        f"layout   {layout_of(path, tensors)}",
        f"stage    {lora.stage}",
        f"modules  {len(modules)}: " + ", ".join(f"{count} x {kind}" for kind, count in kinds.items()),
        f"rank     {', '.join(map(str, ranks))}, alpha {lora.alpha:g} (update = {lora.alpha / lora.rank:g} * b a)",
        f"numbers  {sum(value.numel() for value in tensors.values()):,}",
        "",
        "block  norm of the update  heads touched",
        *_block_lines(lora, modules),
        "",
        "header",
        *(f"  {key} = {value if len(value) <= 160 else value[:157] + '...'}" for key, value in sorted(header.items())),
    ]
    return "\n".join(lines)


def touched_heads(lora: MotionLora, heads: int) -> dict[int, list[int]]:
    """Block -> heads whose rows of q, k, v or columns of o are not all zero; the mask as the file itself shows it.

    Args:
        heads: heads of a block.
    """
    found: dict[int, set[int]] = {}
    for module, (a, b) in lora.modules().items():
        match = re.fullmatch(r"blocks\.(\d+)\.attn1\.(to_q|to_k|to_v|to_out\.0)", module)
        if match:
            side = a.any(dim=0) if match[2] == "to_out.0" else b.any(dim=1)
            if len(side) % heads:
                raise InputError(
                    f"{module} has {len(side)} channels, which {heads} heads cannot share: give its heads."
                )
            by_head = side.reshape(heads, -1).any(dim=1)
            found.setdefault(int(match[1]), set()).update(by_head.nonzero()[:, 0].tolist())
    return {block: sorted(chosen) for block, chosen in sorted(found.items())}


def _block_lines(lora: MotionLora, modules: Mapping[str, tuple[Tensor, Tensor]]) -> list[str]:
    """One line a block. The Frobenius norm of b a comes from two r x r products: |b a|^2 = tr(b' b a a')."""
    squares: Counter[str] = Counter()
    for module, (a, b) in modules.items():
        match = re.match(r"blocks\.(\d+)\.", module)
        product = ((b.double().T @ b.double()) * (a.double() @ a.double().T)).sum().item()
        squares[match[1] if match else "other"] += (lora.alpha / lora.rank) ** 2 * max(product, 0.0)  # pyright: ignore
    per_block = _heads_per_block(lora)
    touched = touched_heads(lora, per_block) if per_block else {}
    order = sorted(squares, key=lambda block: (not block.isdigit(), int(block) if block.isdigit() else 0))
    unknown = "?" if not per_block else "-"
    return [
        f"{block:>5}  {squares[block] ** 0.5:18.4g}  "
        + (" ".join(map(str, touched.get(int(block), []) if block.isdigit() else [])) or unknown)
        for block in order
    ]


def _heads_per_block(lora: MotionLora) -> int | None:
    if lora.head_map is not None:
        return lora.head_map.heads
    heads = lora.provenance.get("heads")
    count = heads.get("per_block") if isinstance(heads, Mapping) else None
    return count if isinstance(count, int) and count > 0 else None


def _header(lora: MotionLora, title: str) -> dict[str, str]:
    """Flat strings. No date: two runs that end in the same weights shall give the same file."""
    facts: dict[str, Any] = {"versions": _versions()}
    if lora.head_map is not None:
        grid = lora.head_map.grid
        facts |= {
            "clip_hash": lora.head_map.clip_hash,
            "caption": lora.head_map.caption,
            "grid": {"frames": grid.frames, "height": grid.height, "width": grid.width},
        }
    facts |= lora.provenance
    if lora.head_map is not None:
        facts["head_map"] = lora.head_map.as_json(**_rule(lora.provenance))
    facts |= {"stage": lora.stage, "format": FORMAT}
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "wan2.1/lora",
        "modelspec.title": title,
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": str(number(lora.alpha)),
        **{f"motion.{name}": _flat(value) for name, value in facts.items()},
    }


def _rule(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {name: provenance[name] for name in ("rule", "ratio") if name in provenance}


def _versions() -> dict[str, str]:
    found = {}
    for package in ("motionlora", "torch", "diffusers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _flat(value: Any) -> str:
    """JSON, but plain text stays plain text where it cannot be taken for JSON."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _unflat(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _story(path: str | Path, header: Mapping[str, str]) -> tuple[str, HeadMap | None, dict[str, Any]]:
    facts = {key.removeprefix("motion."): _unflat(text) for key, text in header.items() if key.startswith("motion.")}
    facts.pop("format", None)
    stage, content = str(facts.pop("stage", "unknown")), facts.pop("head_map", None)
    return stage, None if content is None else HeadMap.from_json(content, f"the head map in {path}"), facts


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header. Copies: a mapped tensor is not aligned, and the CPU then rounds differently."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise InputError(f"Cannot read {path} ({error.strerror or error}): give a LoRA file.") from None
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} is damaged or no safetensors file ({error}): fetch or train it again.") from None
    if not tensors:
        raise InputError(f"{path} holds no tensor: give a LoRA file.")
    return tensors, header


def _serialised(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    """A safetensors file with its header in order: the library's own order changes from process to process."""
    from safetensors.torch import save

    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    raw = save(plain, metadata=dict(header))
    start = 8 + int.from_bytes(raw[:8], "little")
    content = json.loads(raw[8:start])
    content["__metadata__"] = dict(sorted(content["__metadata__"].items()))
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text + raw[start:]


def _replace(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise StorageError(
            f"Cannot write {path}: {error.strerror}; free some space or choose another place."
        ) from error
