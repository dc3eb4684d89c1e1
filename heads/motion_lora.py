"""A LoRA as values, apart from any model and file, and the arithmetic of its factors.

Letters: r rank, i inputs, o outputs; a "r i" and b "o r" are the two factors of W + alpha / r * b a.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from motionlora.data.settings import InputError
from motionlora.heads.lora_layouts import place

if TYPE_CHECKING:
    from motionlora.heads.head_map import HeadMap

Factors: TypeAlias = tuple[Tensor, Tensor]
"""a and b of one module."""


@dataclass(frozen=True, eq=False)
class MotionLora:
    """A LoRA as values, apart from any model.

    Attributes:
        weights: "blocks.N.attn1.to_q.lora_A.weight" -> a "r i", "... .lora_B.weight" -> b "o r"; zeros carry the mask.
        rank: r of most modules; a module may have another, which its tensors tell.
        alpha: every module's update is alpha / rank * b a.
        head_map: the measured heads that it was trained on; None where nothing was measured.
        stage: "spatial", "temporal", or what a stranger's file is called: "unknown".
        provenance: how it was made (rule, ratio, grid, clip_hash, caption, settings, versions, ...), ready for JSON.
    """

    weights: Mapping[str, Tensor]
    rank: int
    alpha: float
    head_map: HeadMap | None = None
    stage: str = "unknown"
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def modules(self) -> dict[str, Factors]:
        """Module name -> (a, b), in the order of `weights`.

        Raises:
            InputError: no tensor, a key that is no LoRA weight, half a pair, or factors that do not fit each other.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in self.weights.items():
            match = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", key)
            if not match:
                raise InputError(f"{key} is no LoRA weight; keys end in .lora_A.weight or .lora_B.weight.")
            found.setdefault(match[1], {})[match[2]] = value
        if not found:
            raise InputError("The LoRA holds no tensor: give one that was trained.")
        return {module: _pair(module, parts) for module, parts in found.items()}

    def folded(self) -> dict[str, Factors]:
        """As `modules`, with alpha / rank in b, so that a reader who takes alpha for the rank is right."""
        scale = self.alpha / self.rank
        return {module: (a, b if scale == 1.0 else b * scale) for module, (a, b) in self.modules().items()}

    @property
    def heads_per_block(self) -> int | None:
        """Of the model that it was trained on, where that is known."""
        if self.head_map is not None:
            return self.head_map.heads
        heads = self.provenance.get("heads")
        count = heads.get("per_block") if isinstance(heads, Mapping) else None
        return count if isinstance(count, int) and count > 0 else None


def as_weights(modules: Mapping[str, Factors]) -> dict[str, Tensor]:
    """What `MotionLora.weights` is for these modules, in the order of blocks."""
    weights: dict[str, Tensor] = {}
    for module in sorted(modules, key=place):
        weights[f"{module}.lora_A.weight"], weights[f"{module}.lora_B.weight"] = modules[module]
    return weights


def filled(a: Tensor, b: Tensor, rank: int) -> Factors:
    """The same update with zeros up to a rank."""
    missing = rank - len(a)
    return torch.cat([a, a.new_zeros(missing, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), missing)], dim=1)


def inner_product(one: Factors, other: Factors) -> float:
    """Of two updates b a, from r x r matrices alone: tr(b1' b2 a2 a1'); with itself the squared Frobenius norm."""
    (a1, b1), (a2, b2) = one, other
    return float(((b1.double().T @ b2.double()) * (a1.double() @ a2.double().T)).sum())


def _pair(module: str, parts: Mapping[str, Tensor]) -> Factors:
    for missing in {"lora_A", "lora_B"} - parts.keys():
        raise InputError(f"The LoRA has no {module}.{missing}.weight, but its partner: the file is incomplete.")
    a, b = parts["lora_A"], parts["lora_B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise InputError(
            f"The factors of {module} have shapes {tuple(a.shape)} and {tuple(b.shape)}; (rank, inputs) and "
            "(outputs, rank) are allowed: only linear layers can be loaded."
        )
    return a, b
