"""Does a motion move? The sprite protocol's eight object motions with the demo's recipe, beside every control.

    python tests/bench_transfer.py                 about an hour on two cores; resumes; writes results/transfer.*

`--share 0/2` and `--share 1/2` in two processes of one thread each learn the LoRAs sooner; the call without makes the
table of them.

Rows: the temporal LoRA; no LoRA, same seeds; the LoRA of another reference; the static clip (SMF 0 by definition, its
looks are those of the first frame without LoRA); the reference itself fed in as an output. Selectivity: LoRAs of a
reference and of its time reversal (`measure_direction.turning`).
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from datetime import date
from functools import cache
from pathlib import Path
from statistics import mean, median

import numpy as np

from motionlora.data.benchmark import Case, Reference, cases, protocol_hash
from motionlora.data.clip import Clip
from motionlora.data.sprites import render
from motionlora.heads.wan import WanBackbone
from motionlora.infer.learned import learned_beside
from motionlora.infer.measure_direction import turning
from motionlora.infer.measure_sprites import observe
from motionlora.train.demo import judged, learn, shown

FIGURES = ("smf", "gain", "vcos", "acc", "leak", "coverage", "extra")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--results", type=Path, default=Path("results/transfer"))
    parser.add_argument("--references", type=int, default=8)
    parser.add_argument("--reversed", nargs="*", default=["v", "zigzag", "s", "circle"], help="also learned backwards")
    parser.add_argument("--share", help="I/N: only learn the LoRAs of the I-th of N shares of the references")
    parser.add_argument("overrides", nargs="*", help="training settings, as of motionlora train, after --")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    book = Book(chosen.work / "cells.jsonl")
    todo = cases("objects")
    names = list(dict.fromkeys(case.reference.name for case in todo))[: chosen.references]
    learners = {case.reference.name: case.reference for case in todo if case.reference.name in names}
    backwards = [name for name in names if name in chosen.reversed]
    if chosen.share:
        share, shares = map(int, chosen.share.split("/"))
        for name in names[share::shares]:
            learned(learners[name], chosen, book)
        for name in backwards[share::shares]:
            learned(learners[name].reversed(), chosen, book)
        return
    lora = {name: learned(learners[name], chosen, book) for name in names}
    for name in names:
        part = [case for case in todo if case.reference.name == name]
        wrong = lora[names[(names.index(name) + 1) % len(names)]]
        for row, made in rows_of(part, lora[name], wrong).items():
            book.once(f"{row}/{name}", lambda made=made: {"scores": made()})
    for name in backwards:
        turned = learned(learners[name].reversed(), chosen, book)
        book.once(f"selectivity/{name}", lambda n=name, b=turned: selectivity(todo, n, lora[n], b))
    seconds = [book.cells[f"learn/{name}"]["seconds"] for name in names]
    write(chosen, book, names, seconds)


class Book:
    """Cells that are done, one JSON line each, so that a stopped run goes on."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.cells: dict[str, dict] = {entry.pop("cell"): entry for entry in map(json.loads, lines)}

    def once(self, cell: str, make: Callable[[], dict]) -> None:
        if cell not in self.cells:
            self.cells[cell] = make()
            with self.path.open("a") as file:
                file.write(json.dumps({"cell": cell, **self.cells[cell]}) + "\n")
            print(cell, json.dumps(self.cells[cell])[:150], flush=True)


def learned(reference: Reference, chosen: argparse.Namespace, book: Book) -> Path:
    out = chosen.work / reference.name
    if f"learn/{reference.name}" not in book.cells:
        learn(reference, out, *chosen.overrides)
        book.once(f"learn/{reference.name}", lambda: {"seconds": learned_beside(out / "temporal.safetensors").seconds})
    return out / "temporal.safetensors"


def rows_of(part: list[Case], lora: Path, wrong: Path) -> dict[str, Callable[[], list[dict]]]:
    model = WanBackbone.load("tiny")

    @cache
    def made(file: Path | None) -> list[Clip]:
        return shown(model, part, file, "walk")

    def judged_all(clips: Iterable[Clip]) -> list[dict]:
        return [asdict(judged(clip, case)) for clip, case in zip(clips, part, strict=True)]

    return {
        "temporal LoRA": lambda: judged_all(made(lora)),
        "no LoRA": lambda: judged_all(made(None)),
        "wrong LoRA": lambda: judged_all(made(wrong)),
        "static clip": lambda: judged_all(map(frozen, made(None))),
        "reference itself": lambda: judged_all(render(case.reference.scene) for case in part),
    }


def frozen(clip: Clip) -> Clip:
    return replace(clip, pixels=np.repeat(clip.pixels[:1], clip.frames, 0))


def selectivity(todo: list[Case], name: str, forwards: Path, backwards: Path) -> dict[str, list[float]]:
    """Of each seed, between the LoRA and that of the reversed reference; over latent frames and over frames."""
    model = WanBackbone.load("tiny")
    part = [case for case in todo if case.reference.name == name]
    seen = [[observe(clip.pixels) for clip in shown(model, part, file, "walk")] for file in (forwards, backwards)]
    pairs = [(there, back, c.reference.scene.sprites[0].path) for c, there, back in zip(part, *seen, strict=True)]
    return {key: [turning(*pair, pooled=n)[0] for pair in pairs] for key, n in (("values", 4), ("by_frame", 1))}


def interval(values: list[list[float]], *, draws: int = 4000) -> tuple[float, float]:
    """95 % bootstrap interval of the median, drawn over references, "reference seed"."""
    generator, table = np.random.default_rng(0), np.array(values)
    picks = generator.integers(len(table), size=(draws, len(table)))
    medians = np.median(table[picks].reshape(draws, -1), axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(low), float(high)


def write(chosen: argparse.Namespace, book: Book, names: list[str], seconds: list[float]) -> None:
    rows = ("temporal LoRA", "no LoRA", "wrong LoRA", "static clip", "reference itself")
    made = {row: [book.cells[f"{row}/{name}"]["scores"] for name in names] for row in rows}
    lines = [
        "# Motion transfer on the embedded tiny Wan",
        "",
        f"Sprite protocol {protocol_hash()}, {len(names)} object motions x 1 caption x 2 seeds; medians; the",
        "interval is a 95 % bootstrap over references. Recipe: `configs/tiny.yaml`"
        + (f" with `{' '.join(chosen.overrides)}`." if chosen.overrides else "."),
        "",
        "| row | SMF | interval | " + " | ".join(FIGURES[1:]) + " |",
        "| --- | --- | --- |" + " --- |" * (len(FIGURES) - 1),
    ]
    summary: dict[str, dict] = {}
    for row in rows:
        flat = [score for reference in made[row] for score in reference]
        low, high = interval([[score["smf"] for score in reference] for reference in made[row]])
        summary[row] = {key: round(median(score[key] for score in flat), 4) for key in FIGURES}
        figures = " | ".join(f"{summary[row][key]:.2f}" for key in FIGURES[1:])
        lines.append(f"| {row} | {summary[row]['smf']:.2f} | {low:.2f} .. {high:.2f} | {figures} |")
    gains = [
        [a["smf"] - b["smf"] for a, b in zip(*pair, strict=True)]
        for pair in zip(made["temporal LoRA"], made["no LoRA"], strict=True)
    ]
    wrong = [
        [a["smf"] - b["smf"] for a, b in zip(*pair, strict=True)]
        for pair in zip(made["temporal LoRA"], made["wrong LoRA"], strict=True)
    ]
    for what, table in (("no LoRA", gains), ("the wrong LoRA", wrong)):
        low, high = interval(table)
        lines += ["", f"Paired gain over {what}: median {np.median(table):.2f} ({low:.2f} .. {high:.2f})."]
    turned = {key.partition("/")[2]: cell for key, cell in book.cells.items() if key.startswith("selectivity/")}
    chosen_values = [value for cell in turned.values() for value in cell["values"]]
    if turned:
        by_frame = median(value for cell in turned.values() for value in cell["by_frame"])
        each = ", ".join(f"{name} {mean(cell['values']):.2f}" for name, cell in turned.items())
        lines += ["", f"Selectivity against the time-reversed reference: median {median(chosen_values):.2f} of "]
        lines[-1] += f"{len(chosen_values)} pairs ({each}); of velocities frame by frame {by_frame:.2f}."
    lines += ["", "| reference | SMF with LoRA | without | accuracy with | without | leak with | without |"]
    lines.append("| --- |" + " --- |" * 6)
    for index, name in enumerate(names):
        with_, without = made["temporal LoRA"][index], made["no LoRA"][index]
        cells = [f"{mean(s[key] for s in part):.2f}" for key in ("smf", "acc", "leak") for part in (with_, without)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    command = " ".join(["python tests/bench_transfer.py", *sys.argv[1:]])
    lines += ["", f"Training took {median(seconds):.0f} s a reference (both stages; median)."]
    lines += [f"{machine}, {date.today()}, `{command}`.", ""]
    text = "\n".join(lines)
    chosen.results.parent.mkdir(exist_ok=True)
    chosen.results.with_suffix(".md").write_text(text)
    values = {"protocol": protocol_hash(), "medians": summary, "selectivity": chosen_values, "seconds": seconds}
    values |= {"machine": machine, "date": str(date.today()), "command": command}
    chosen.results.with_suffix(".json").write_text(json.dumps(values, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
