"""What the ablations of a run have to learn and to make, and how long that takes: known before anything is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from motionlora.infer.bench_sprites import SPRITES
from motionlora.infer.method import PLAIN, Method, parsed_method
from motionlora.infer.pace import spoken
from motionlora.infer.pairs import Pair
from motionlora.infer.settings import lora_choice
from motionlora.infer.studio import Cell, Studio
from motionlora.infer.workers import units_of
from motionlora.train.ablations import Ablation, Variant, latent_frames
from motionlora.train.lesson import Lesson, lesson_of
from motionlora.train.settings import TrainSettings

SECONDS = 0.009
"""Of one latent frame through the embedded tiny Wan on one CPU core: 300 s for a LoRA of 400 steps of 4 x 7 frames."""


@dataclass(frozen=True, eq=False)
class Part:
    """One ablation of a plan: lessons by variant and clip, and cells of them and of every control."""

    ablation: Ablation
    lessons: list[tuple[Variant, Lesson]]
    cells: list[Cell]

    @property
    def neighbours(self) -> list[list[int]]:
        """The numbers of lessons of which one goes on from the other, those of fewer steps first."""
        units: dict[Path, list[int]] = {}
        for number, (_, lesson) in enumerate(self.lessons):
            units.setdefault(lesson.folder.parent, []).append(number)
        return [sorted(unit, key=lambda n: self.lessons[n][1].settings.temporal.steps) for unit in units.values()]


def planned(ablation: Ablation, pairs: Sequence[Pair], recipe: TrainSettings, fingerprint: str, out: Path) -> Part:
    """What an ablation has to learn and to make. A wrong motion is the LoRA of the next reference."""
    root = out / "lessons"
    lessons = {
        (variant.name, pair.source.name): (variant, lesson_of(variant, pair.source, recipe, fingerprint, root))
        for variant in ablation.variants
        for pair in pairs
    }
    cells = []
    for at, pair in enumerate(pairs):
        for control in ("none", "static", "reference"):
            cells += [Cell(pair, parsed_method(control), seed, pair) for seed in pair.seeds]
        others = [other for other in (*pairs[at + 1 :], *pairs[:at]) if other.source is not pair.source]
        for variant in ablation.variants:
            donors = {variant.name: pair} | ({f"wrong:{variant.name}": others[0]} if others else {})
            for name, donor in donors.items():
                lora = lessons[variant.name, donor.source.name][1].lora(variant)
                method = Method(name, lora=True, control="none" if donor is pair else "wrong")
                cells += [Cell(pair, method, seed, replace(donor, lora=lora)) for seed in pair.seeds]
    return Part(ablation, list(lessons.values()), cells)


def costs_of(plan: Sequence[Part], studio: Studio) -> list[tuple[list[float], list[float]]]:
    """Latent frames through the model for lessons and cells of each part, in the order of their units.

    0 for what is there, or came up before.
    """
    sample, seen = studio.how.sample, set()
    walk = float(sample.steps * sample.passes * latent_frames(SPRITES.frames, 1))

    def cost(name: str, is_done: bool, whole: float) -> float:
        new = name not in seen and not is_done
        seen.add(name)
        return whole if new else 0.0

    def is_made(cell: Cell) -> bool:
        learned = not cell.method.lora or lora_choice(cell.donor.lora).path.is_file()
        return learned and studio.is_done(cell)

    def cell_name(cell: Cell) -> str:
        which = cell.donor.lora if cell.method.lora else PLAIN
        return f"{cell.pair.source.name} {cell.pair.caption} {cell.seed} {which}"

    costs = []
    for part in plan:
        first = [part.lessons[at][1] for unit in part.neighbours for at in unit]
        lessons = [cost(str(lesson.folder), lesson.is_done, lesson.work) for lesson in first]
        then = [part.cells[at] for unit in units_of(part.cells) for at in unit]
        walks = [0.0 if cell.method.control == "reference" else walk for cell in then]
        cells = [cost(cell_name(cell), is_made(cell), each) for cell, each in zip(then, walks, strict=True)]
        costs.append((lessons, cells))
    return costs


def prediction(plan: Sequence[Part], costs: Sequence[tuple[list[float], list[float]]], recipe: TrainSettings) -> str:
    """The grid, what is missing of it, and how long that takes."""
    names = ("LoRAs", "to learn", "clips", "to make")
    lines = [f"{'ablation':<10}" + "".join(f"{name:>10}" for name in (*names, "time")) + "   variants"]
    for part, (lessons, cells) in zip(plan, costs, strict=True):
        counts = (len(lessons), sum(map(bool, lessons)), len(cells), sum(map(bool, cells)))
        told = "".join(f"{count:>10}" for count in counts) + f"{spoken(SECONDS * sum((*lessons, *cells))):>10}"
        lines.append(
            f"{part.ablation.name:<10}{told}   {', '.join(variant.name for variant in part.ablation.variants)}"
        )
    total = spoken(SECONDS * sum(cost for part in costs for half in part for cost in half))
    lines.append(
        f"{total} in all on one CPU core by the embedded tiny Wan, {recipe.temporal.steps} temporal steps; what two "
        "ablations share counts where it comes first"
    )
    return "\n".join(lines)
