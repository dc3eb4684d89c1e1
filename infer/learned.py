"""What a training run left beside a LoRA file: how its loss fell, how long it took, which heads it was measured on.

A run's folder holds `temporal.safetensors`, `spatial.safetensors` and the logs of their steps. A LoRA file of another
name is no run's, and nothing is known of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STAGES = ("spatial", "temporal")
POINTS = 80
"""Of a curve: steps in between are averaged."""
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Learned:
    """What is known of a training run.

    Attributes:
        curves: the loss of each stage, (step, mean loss since the point before).
        seconds: of all steps together; None where there is no log.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    seconds: float | None = None


def learned_beside(lora: Path) -> Learned:
    """What the logs beside a LoRA file tell; nothing where it is not a run's own."""
    logs = {stage: lora.parent / f"log-{stage}.jsonl" for stage in STAGES if lora.name.startswith(STAGES)}
    rows = {stage: list(_rows(path)) for stage, path in logs.items() if path.is_file()}
    rows = {stage: found for stage, found in rows.items() if found}
    if not rows:
        return Learned()
    seconds = sum(row["seconds"] for found in rows.values() for row in found)
    return Learned({stage: curve_of(found) for stage, found in rows.items()}, round(seconds, 2))


def curve_of(rows: list[dict[str, Any]]) -> Curve:
    """The loss over the steps in at most `POINTS` points, each the mean of the finite losses up to it."""
    every = math.ceil(len(rows) / POINTS)
    curve = []
    for start in range(0, len(rows), every):
        part = rows[start : start + every]
        losses = [row["loss"] for row in part if row["loss"] is not None]
        if losses:
            curve.append((part[-1]["step"], round(sum(losses) / len(losses), 5)))
    return curve


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The steps of a log; a line that a crash cut off is left out."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"step", "loss", "seconds"} <= row.keys():
            yield row
