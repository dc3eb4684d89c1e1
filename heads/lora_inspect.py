"""What a LoRA file holds, for people: layout, strength, modules, heads, size of the update by block, header.

Letters: r rank, i inputs, o outputs; a "r i" and b "o r".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from motionlora.data.settings import InputError
from motionlora.heads.lora import MotionLora
from motionlora.heads.lora_file import LoraFile, as_lora, read_lora
from motionlora.heads.lora_strength import Alpha


def inspect_lora(path: str | Path, alpha: Alpha = None) -> str:
    """What a LoRA file holds: layout and who loads it, modules, rank, alpha, heads and size of the update, header.

    A file of unknown strength is shown, too; its sizes are then those of alpha = rank, which is said.

    Raises:
        InputError: as `load_lora`.
    """
    file = read_lora(path, alpha)
    lora, modules = as_lora(file), file.modules
    ranks = sorted({a.shape[0] for a, _ in modules.values()})
    kinds = Counter(re.sub(r"^blocks\.\d+\.", "", module) for module in modules)
    update = "update of alpha = rank, a guess" if file.strength.doubt else "update"
    lines = [
        f"{path}: {Path(path).stat().st_size:,} bytes",
        f"layout   {file.layout.name}: {file.layout.known}",
        f"stage    {lora.stage}",
        f"modules  {len(modules)}: " + ", ".join(f"{count} x {kind}" for kind, count in kinds.items()),
        f"rank     {', '.join(map(str, ranks))}, {_alpha_words(file, lora)}",
        f"numbers  {sum(a.numel() + b.numel() for a, b in modules.values()):,} as {_dtypes(file)}",
        "",
        f"block  norm of the {update}  heads touched",
        *_block_lines(lora),
        "",
        "header",
        *(f"  {key} = {_short(value)}" for key, value in sorted(file.header.items())),
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


def _block_lines(lora: MotionLora) -> list[str]:
    """One line a block. The Frobenius norm of b a comes from two r x r products: |b a|^2 = tr(b' b a a')."""
    squares: Counter[str] = Counter()
    for module, (a, b) in lora.modules().items():
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


def _alpha_words(file: LoraFile, lora: MotionLora) -> str:
    if file.strength.doubt:
        return f"alpha unknown: {file.strength.doubt}"
    return f"alpha {lora.alpha:g} (update = {lora.alpha / lora.rank:g} * b a) by {file.strength.source}"


def _dtypes(file: LoraFile) -> str:
    found = {str(value.dtype).removeprefix("torch.") for pair in file.modules.values() for value in pair}
    return ", ".join(sorted(found))


def _short(text: str) -> str:
    return text if len(text) <= 160 else text[:157] + "..."


def _heads_per_block(lora: MotionLora) -> int | None:
    if lora.head_map is not None:
        return lora.head_map.heads
    heads = lora.provenance.get("heads")
    count = heads.get("per_block") if isinstance(heads, Mapping) else None
    return count if isinstance(count, int) and count > 0 else None
