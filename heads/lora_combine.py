"""Several LoRAs as one by rank concatenation, and one of a smaller rank by singular values.

Letters: r rank, i inputs, o outputs; a "r i" and b "o r" are the two factors of W + alpha / r * b a.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from motionlora.data.settings import InputError
from motionlora.heads.motion_lora import Factors, MotionLora, as_weights, filled, inner_product

SHARED = ("model", "fingerprint", "expert", "until")
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
        InputError: no part, or parts made for models of different sizes, for different experts, or that rest below
            different noise levels.
    """
    if not parts:
        raise InputError("No LoRA was given: name two or more to merge.")
    if len({str(lora.provenance["expert"]) for lora, _ in parts if "expert" in lora.provenance}) > 1:
        raise InputError("The LoRAs are for different experts of a model, each a network: merge those of one expert.")
    ends = [float(lora.provenance.get("until", 0.0)) for lora, _ in parts]
    if len(set(ends)) > 1:
        raise InputError(
            f"The LoRAs were trained down to different noise levels ({', '.join(f'{end:g}' for end in ends)}) and rest "
            "below them, which one file cannot: load them side by side, or train them with equal --temporal.until."
        )
    whole: dict[str, Factors] = {}
    rank = 0
    for lora, strength in parts:
        modules = lora.folded()
        added = max(len(a) for a, _ in modules.values())
        for module in whole | modules:
            a, b = modules.get(module) or _nothing(whole[module])
            a0, b0 = whole.get(module) or _nothing((a, b))
            if (a0.shape[1], len(b0)) != (a.shape[1], len(b)):
                raise InputError(
                    f"The LoRAs were made for different models: {module} has {a0.shape[1]} inputs and {len(b0)} "
                    f"outputs in one, {a.shape[1]} and {len(b)} in another; merge LoRAs of one model."
                )
            (a0, b0), (a, b) = filled(a0, b0, rank), filled(a, strength * b, added)
            whole[module] = torch.cat([a0, a]), torch.cat([b0, b], dim=1)
        rank += added
    return MotionLora(as_weights(whole), rank, float(rank), None, "merged", _story(parts))


def _nothing(like: Factors) -> Factors:
    """An update of rank 0."""
    return like[0][:0], like[1][:, :0]


def _story(parts: Sequence[tuple[MotionLora, float]]) -> dict[str, Any]:
    """What the header of a merged file tells: its parts, and what they have in common."""
    known = ("caption", "clip_hash", "steps", *SHARED)
    told = [
        {"stage": lora.stage, "strength": strength, "rank": lora.rank}
        | {name: lora.provenance[name] for name in known if name in lora.provenance}
        for lora, strength in parts
    ]
    first, counts = told[0], {lora.heads_per_block for lora, _ in parts}
    agreed = {name: first[name] for name in SHARED if name in first and all(p.get(name) == first[name] for p in told)}
    heads = {"heads": {"per_block": counts.pop()}} if len(counts) == 1 and None not in counts else {}
    return {"merged": told, "strength": 1.0} | agreed | heads


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
    modules = lora.folded()
    largest = max(len(a) for a, _ in modules.values())
    if not 1 <= rank < largest:
        raise InputError(f"The LoRA has rank {largest} and cannot be made to have {rank}: choose 1 to {largest - 1}.")
    small, lost, sizes = dict[str, Factors](), dict[str, float](), dict[str, float]()
    for module, (a, b) in modules.items():
        small[module], lost[module] = _cut(a, b, rank)
        sizes[module] = inner_product((a, b), (a, b))
    worst = max(sizes, key=lambda module: _share(lost[module], sizes[module]))
    loss = Loss(_share(sum(lost.values()), sum(sizes.values())), _share(lost[worst], sizes[worst]), worst)
    story = {**lora.provenance, "resized": {"from": largest, "to": rank, "lost": round(loss.whole, 6)}}
    return replace(lora, weights=as_weights(small), rank=rank, alpha=float(rank), provenance=story), loss


def _cut(a: Tensor, b: Tensor, rank: int) -> tuple[Factors, float]:
    """The best factors of a rank, each with the root of the singular values; the square of what is lost."""
    if len(a) <= rank:
        return filled(a, b, rank), 0.0
    left, upper = torch.linalg.qr(b.double())
    right, lower = torch.linalg.qr(a.double().T)
    u, sizes, v = torch.linalg.svd(upper @ lower.T)
    root = sizes[:rank].sqrt()
    small_b = (left @ u[:, :rank]) * root * b.any(dim=1, keepdim=True)
    small_a = ((right @ v[:rank].T) * root).T * a.any(dim=0, keepdim=True)
    return filled(small_a.float(), small_b.float(), rank), float(sizes[rank:].square().sum())


def _share(lost: float, whole: float) -> float:
    return (lost / whole) ** 0.5 if whole else 0.0
