"""Several LoRAs as one by rank concatenation, and one of a smaller rank by singular values.

Letters: r rank, i inputs, o outputs; a "r i" and b "o r" are the two factors of W + alpha / r * b a.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from motionlora.data.settings import InputError
from motionlora.heads.lora import MotionLora
from motionlora.heads.lora_layouts import place
from motionlora.heads.lora_write import filled, folded

SHARED = ("model", "fingerprint")
"""What a merged LoRA tells of its model, where its parts agree."""


@dataclass(frozen=True)
class Loss:
    """What a smaller rank left out, as shares of the update's Frobenius norm: 0 nothing, 1 everything.

    Attributes:
        whole: of all modules together.
        worst: of the module that lost most, and its name.
    """

    whole: float
    worst: float
    module: str


def merged(parts: Sequence[tuple[MotionLora, float]]) -> MotionLora:
    """One LoRA that acts at strength 1 as all parts act together, each at its own strength.

    b a + d c = [b d] [a; c]: ranks add up, nothing is lost. A module that a part lacks gets zeros, so that every module
    has the same rank and alpha = rank: a loader that guesses alpha from the rank of one module is right, too. Heads
    that no part touches stay zero.

    Args:
        parts: LoRAs and strengths, in the order in which they are concatenated.

    Raises:
        InputError: no part, or parts made for models of different sizes.
    """
    if not parts:
        raise InputError("No LoRA was given: name two or more to merge.")
    factors = [{module: (a, strength * b) for module, (a, b) in folded(lora).items()} for lora, strength in parts]
    shapes: dict[str, tuple[int, int]] = {}
    for modules in factors:
        for module, (a, b) in modules.items():
            _refuse_other_shape(module, shapes.setdefault(module, (b.shape[0], a.shape[1])), a, b)
    ranks = [max(a.shape[0] for a, _ in modules.values()) for modules in factors]
    weights: dict[str, Tensor] = {}
    for module, (outputs, inputs) in shapes.items():
        absent = (torch.zeros(0, inputs), torch.zeros(outputs, 0))
        pairs = [filled(*modules.get(module, absent), r) for modules, r in zip(factors, ranks, strict=True)]
        weights[f"{module}.lora_A.weight"] = torch.cat([a for a, _ in pairs])
        weights[f"{module}.lora_B.weight"] = torch.cat([b for _, b in pairs], dim=1)
    ordered = dict(sorted(weights.items(), key=lambda item: place(item[0])))
    return MotionLora(ordered, sum(ranks), float(sum(ranks)), None, "merged", _story(parts))


def resized(lora: MotionLora, rank: int) -> tuple[MotionLora, Loss]:
    """The nearest LoRA of a smaller rank, and what it lost.

    The best approximation of b a in the Frobenius norm keeps its largest singular values (Eckart and Young 1936). They
    come from QR of the two thin factors and an SVD of an r x r matrix; the full matrix is never made. Rows of b and
    columns of a that are zero stay exactly zero, so that the choice of heads is kept.

    Args:
        rank: of every module, 1 or more; a module that has no more is left as it is, filled with zeros.

    Raises:
        InputError: a rank below 1, or not below the largest one of the LoRA.
    """
    largest = max(a.shape[0] for a, _ in lora.modules().values())
    if not 1 <= rank < largest:
        raise InputError(f"The LoRA has rank {largest} and cannot be made to have {rank}: choose 1 to {largest - 1}.")
    weights: dict[str, Tensor] = {}
    lost: dict[str, tuple[float, float]] = {}
    for module, (a, b) in folded(lora).items():
        small_a, small_b, lost[module] = _cut(a, b, rank)
        weights[f"{module}.lora_A.weight"], weights[f"{module}.lora_B.weight"] = small_a, small_b
    shares = {module: (gone / whole) ** 0.5 if whole else 0.0 for module, (gone, whole) in lost.items()}
    gone, whole = (sum(pair[side] for pair in lost.values()) for side in (0, 1))
    worst = max(shares, key=lambda module: shares[module])
    loss = Loss((gone / whole) ** 0.5 if whole else 0.0, shares[worst], worst)
    story = {**lora.provenance, "resized": {"from": largest, "to": rank, "lost": round(loss.whole, 6)}}
    return replace(lora, weights=weights, rank=rank, alpha=float(rank), provenance=story), loss


def _cut(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """The best factors of a rank, each with the root of the singular values; squares of what is lost and of all."""
    if len(a) <= rank:
        squares = (b.double().T @ b.double()) * (a.double() @ a.double().T)
        return *filled(a, b, rank), (0.0, float(squares.sum()))
    left, upper = torch.linalg.qr(b.double())
    right, lower = torch.linalg.qr(a.double().T)
    u, sizes, v = torch.linalg.svd(upper @ lower.T)
    root = sizes[:rank].sqrt()
    small_b = (left @ u[:, :rank]) * root * b.any(dim=1, keepdim=True)
    small_a = ((right @ v[:rank].T) * root).T * a.any(dim=0, keepdim=True)
    lost = float(sizes[rank:].square().sum()), float(sizes.square().sum())
    return *filled(small_a.float(), small_b.float(), rank), lost


def _refuse_other_shape(module: str, shape: tuple[int, int], a: Tensor, b: Tensor) -> None:
    if shape != (b.shape[0], a.shape[1]):
        raise InputError(
            f"The LoRAs were made for different models: {module} has {shape[1]} inputs and {shape[0]} outputs in one, "
            f"{a.shape[1]} and {b.shape[0]} in another; merge LoRAs of one model."
        )


def _story(parts: Sequence[tuple[MotionLora, float]]) -> dict[str, Any]:
    """What the header of a merged file tells: its parts, and what they have in common."""
    known = ("caption", "clip_hash", "model", "fingerprint", "steps")
    told = [
        {"stage": lora.stage, "strength": strength, "rank": lora.rank}
        | {name: lora.provenance[name] for name in known if name in lora.provenance}
        for lora, strength in parts
    ]
    story: dict[str, Any] = {"merged": told, "strength": 1.0}
    for name in SHARED:
        values = {part.get(name) for part in told}
        if len(values) == 1 and None not in values:
            story[name] = values.pop()
    counts = {_per_block(lora) for lora, _ in parts}
    return story | ({"heads": {"per_block": counts.pop()}} if len(counts) == 1 and None not in counts else {})


def _per_block(lora: MotionLora) -> int | None:
    heads = lora.provenance.get("heads")
    return heads.get("per_block") if isinstance(heads, Mapping) else None
