"""What a LoRA file holds, for people: layout, strength, modules, heads, size of the update by block, header.

Letters: r rank, i inputs, o outputs; a "r i" and b "o r".
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

from motionlora.data.settings import InputError
from motionlora.heads.lora_file import as_lora, read_lora
from motionlora.heads.lora_layers import PROJECTIONS, is_output
from motionlora.heads.lora_layouts import BLOCK, OUTSIDE_BLOCKS, place
from motionlora.heads.lora_strength import Alpha
from motionlora.heads.motion_lora import MotionLora, inner_product


def inspect_lora(path: str | Path, alpha: Alpha = None) -> str:
    """What a LoRA file holds: layout and who loads it, modules, rank, alpha, heads and size of the update, header.

    A file of unknown strength is shown, too; its sizes are then those of alpha = rank, which is said.

    Raises:
        InputError: as `load_lora`.
    """
    file = read_lora(path, alpha)
    lora, tensors = as_lora(file), [tensor for pair in file.modules.values() for tensor in pair]
    kinds = Counter(match[2] if (match := BLOCK.fullmatch(module)) else module for module in file.modules)
    ranks = sorted({len(a) for a, _ in file.modules.values()})
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    strength = f"alpha {lora.alpha:g} (update = {lora.alpha / lora.rank:g} * b a) by {file.strength.source}"
    update = "update"
    if file.strength.doubt:
        strength, update = f"alpha unknown: {file.strength.doubt}", "update of alpha = rank, a guess"
    identity = lora.provenance.get("identity")
    base = identity.get("weights") if isinstance(identity, dict) else None
    lines = [
        f"{path}: {Path(path).stat().st_size:,} bytes",
        f"layout   {file.layout.name}: {file.layout.known}",
        f"stage    {lora.stage}",
        *([f"expert   {lora.provenance['expert']}-noise, of a model of two"] if "expert" in lora.provenance else []),
        *([f"until    noise {lora.provenance['until']}; it rests below"] if "until" in lora.provenance else []),
        *([f"base     rounded to {base} while it was trained"] if base else []),
        f"modules  {len(file.modules)}: " + ", ".join(f"{count} x {kind}" for kind, count in kinds.items()),
        f"rank     {', '.join(map(str, ranks))}, {strength}",
        f"numbers  {sum(tensor.numel() for tensor in tensors):,} as {', '.join(dtypes)}",
        "",
        f"block  norm of the {update}  heads touched",
        *_block_lines(lora),
        "",
        "header",
        *(f"  {key} = {text if len(text) <= 160 else text[:157] + '...'}" for key, text in sorted(file.header.items())),
    ]
    return "\n".join(lines)


def touched_heads(lora: MotionLora, heads: int) -> dict[int, list[int]]:
    """Block -> heads whose rows of q, k, v or columns of o are not all zero; the mask as the file itself shows it.

    Args:
        heads: heads of a block.
    """
    found: dict[int, set[int]] = {}
    for module, (a, b) in lora.modules().items():
        match = BLOCK.fullmatch(module)
        if match and match[2] in (f"attn1.{projection}" for projection in PROJECTIONS.values()):
            side = a.any(dim=0) if is_output(module) else b.any(dim=1)
            if len(side) % heads:
                raise InputError(
                    f"{module} has {len(side)} channels, which {heads} heads cannot share: give its heads."
                )
            by_head = side.reshape(heads, -1).any(dim=1)
            found.setdefault(int(match[1]), set()).update(by_head.nonzero()[:, 0].tolist())
    return {block: sorted(chosen) for block, chosen in sorted(found.items())}


def _block_lines(lora: MotionLora) -> list[str]:
    """One line a block with the Frobenius norm of its updates; last what stands outside of blocks."""
    squares: defaultdict[int, float] = defaultdict(float)
    for module, pair in lora.folded().items():
        squares[place(module)[0]] += inner_product(pair, pair)
    heads = lora.heads_per_block
    touched = touched_heads(lora, heads) if heads else {}
    return [
        f"{'other' if block == OUTSIDE_BLOCKS else block:>5}  {max(squares[block], 0.0) ** 0.5:18.4g}  "
        + (" ".join(map(str, touched.get(block, []))) or ("-" if heads else "?"))
        for block in sorted(squares)
    ]
