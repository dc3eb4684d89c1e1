"""Which rate each guidance needs on the tiny Wan: a ladder for each, on two motions outside of the sprite protocol.

    python tests/bench_rates.py --dry-run          what would be made, and how long that takes
    python tests/bench_rates.py                    resumes; writes results/guidance_rates.md and .json
    python tests/bench_rates.py --rungs smm:lr=0.02,block=2 smm:lr=0.02,block=4 --results results/NAME
                                                   rungs of one's own, such as blocks

Every rung is walked with the reference and with its time reversal from the same seed. Selectivity is
`measure_direction.turning`; that of `random` is between two draws, which is chance. Rungs are factors of the published
rate; methods without a rate have rungs of their own. A rung may be chosen where it keeps four fifths of plain
sampling's AttrAcc and leaks at most 0.1 more than it.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isfinite, nan
from pathlib import Path
from statistics import fmean

import numpy as np

from motionlora.data.benchmark import CENTRE, RADIUS, REACH, Reference, references, target_of
from motionlora.data.cache import replacing
from motionlora.data.sprites import FRAMES, Change, Scene, Sprite, render
from motionlora.infer.bench_sprites import SPRITES
from motionlora.infer.compare import Bench, opened, row_of
from motionlora.infer.compare_settings import SpriteStudioSettings
from motionlora.infer.guidance_list import guidance_class, guidance_names
from motionlora.infer.measure_direction import turning
from motionlora.infer.measure_sprites import observe
from motionlora.infer.method import PLAIN, parsed_method
from motionlora.infer.pairs import Pair, Source
from motionlora.infer.row import Row
from motionlora.infer.studio import Cell

FACTORS = (1, 3, 10, 30, 100)
OWN: dict[str, tuple[str, ...]] = {
    "inject": ("share=0.2", "share=0.6", "share=1.0", "blocks=[0,1,2],share=0.2", "blocks=[0,1,2],share=0.6"),
    "sdedit": ("start=0.955", "start=0.9", "start=0.8", "start=0.7", "start=0.5"),
    "random": tuple(f"dose={0.01 * factor:g}" for factor in FACTORS),  # about what Adam does in a step
}
"""Rungs of the methods that have no learning rate."""
CORNERS = {"hook": ((-1, -1), (1, -1), (1, 1)), "triangle": ((0.8, -0.9), (-0.9, 0), (0.8, 0.9), (0.8, -0.9))}
"""(y, x) in units of the reach, passed at even times: an open and a closed motion."""
LOOKS: dict[str, tuple[str, str, str, Change]] = {
    "hook": ("blue", "star", "light", "subject"),
    "triangle": ("yellow", "circle", "dark", "scene"),
}
FIGURES = ("smf", "acc", "leak", "coverage", "dose_rms", "seconds_sample")
SECONDS_A_FORWARD, GRADIENT = 0.12, 2.0
"""Of the tiny on one quiet core; a gradient counts as so many forwards."""


@dataclass(frozen=True)
class Rung:
    """One method at one rate: means over references, NaN where nothing could be measured."""

    method: str
    text: str
    figures: dict[str, float]
    selectivity: float
    selectivity_gain: float


def main() -> None:
    chosen = arguments()
    ladders = {name: ladder(name, chosen.factors) for name in chosen.methods}
    if chosen.rungs:
        names = dict.fromkeys(text.partition(":")[0] for text in chosen.rungs)
        ladders = {name: [text for text in chosen.rungs if text.partition(":")[0] == name] for name in names}
    if chosen.dry_run:
        print(prediction(ladders))
        return
    told = motions()
    pairs = [pair for motion in told for pair in motion[:2]]
    bench = opened(pairs, SpriteStudioSettings(out=chosen.work, points=0, model=chosen.model), SPRITES)
    rungs = [climbed(bench, told, PLAIN, PLAIN)]
    for name, texts in ladders.items():
        for text in texts:
            rungs.append(climbed(bench, told, name, text))
            print(line_of(rungs[-1]), flush=True)
            write(rungs, bench.heading, chosen.results)


def arguments() -> argparse.Namespace:
    known = [name for name in guidance_names() if name != PLAIN]
    parser = argparse.ArgumentParser(description="Rates of guidances on motions outside of the sprite protocol.")
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument("--factors", nargs="+", type=float, default=FACTORS)
    parser.add_argument("--rungs", nargs="+", default=[], help="methods with settings, in place of the ladders")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--work", type=Path, default=Path("runs/rates"))
    parser.add_argument("--results", type=Path, default=Path("results/guidance_rates"))
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args()


def ladder(name: str, factors: Sequence[float]) -> list[str]:
    """Methods as a comparison has them, from weak to strong."""
    fields = guidance_class(name).model_fields
    if name in OWN:
        return [f"{name}:{rung}" for rung in OWN[name][: len(factors)]]
    return [f"{name}:lr={fields['lr'].default * factor:g}" for factor in factors]


def motions() -> list[tuple[Pair, Pair, Reference]]:
    """Each motion as it is and played backwards, to the same caption and looks."""
    made = []
    for name, corners in CORNERS.items():
        colour, shape, background, change = LOOKS[name]
        times = np.linspace(0, 1, len(corners))
        path = np.stack([np.interp(np.linspace(0, 1, FRAMES), times, side) for side in np.array(corners).T], -1)
        still = np.zeros(FRAMES)
        sprite = Sprite(shape, colour, RADIUS, path * REACH + CENTRE, still, still + 1)
        scene = Scene((sprite,), background, np.zeros((FRAMES, 2)), 77)
        reference = Reference(name, "open" if name == "hook" else "closed", scene)
        assert name not in {known.name for known in references()}
        target = target_of(reference, change)
        forwards = Pair(source_of(reference), target.caption, (0,), "", change, target)
        made.append((forwards, replace(forwards, source=source_of(reference.reversed())), reference))
    return made


def source_of(reference: Reference) -> Source:
    clip = render(reference.scene)
    return Source(reference.name, partial(render, reference.scene), clip.content_hash(), reference.scene)


def climbed(bench: Bench, told: Sequence[tuple[Pair, Pair, Reference]], name: str, text: str) -> Rung:
    """A rung on both motions, each also the other way round."""
    rows, scores = [], []
    for there, back, reference in told:
        texts = (f"{text},draw=0", f"{text},draw=1") if name == "random" else (text, text)
        donors = (there, back)
        cells = [Cell(there, parsed_method(words), 0, donor) for words, donor in zip(texts, donors, strict=True)]
        made = [row_of(cell, bench.studio, bench.judge, cell.method.name, print)[0] for cell in cells]
        for row in made:
            if row.status == "failed":
                print(f"{row.clip}, {row.method}: {row.sentence}", flush=True)
        rows.append(made[0])
        if all(row.status == "done" for row in made):
            clips = (bench.studio.clip(cell, cell.method.name, print)[0] for cell in cells)
            there, back = (observe(clip.pixels) for clip in clips)
            scores.append(turning(there, back, reference.scene.sprites[0].path))
    figures = {figure: mean_of(rows, figure) for figure in FIGURES}
    turned, gain = (float(np.mean(column)) for column in zip(*scores, strict=True)) if scores else (nan, nan)
    return Rung(name, text, figures, turned, gain)


def mean_of(rows: Sequence[Row], figure: str) -> float:
    found = [value for row in rows if (value := row.values.get(figure, row.cost.get(figure))) is not None]
    return fmean(found) if found else nan


def chosen_rungs(rungs: Sequence[Rung]) -> dict[str, str]:
    """Of each method the rung that turns furthest among those that keep looks; the first where none does.

    Not the highest cosine: a difference of hundredths of a pixel has one, too.
    """
    plain, by_method = rungs[0].figures, defaultdict[str, list[Rung]](list)
    for rung in rungs[1:]:
        by_method[rung.method].append(rung)
    best = {}
    for name, own in by_method.items():
        able = [
            rung
            for rung in own
            if isfinite(rung.selectivity)
            and rung.figures["acc"] >= 0.8 * plain["acc"]
            and rung.figures["leak"] <= plain["leak"] + 0.1
        ]
        if name != "random":
            best[name] = max(able, key=lambda rung: rung.selectivity_gain, default=own[0]).text
    return best


def prediction(ladders: dict[str, list[str]], steps: int = 20, blocks: int = 6) -> str:
    """Cells, forwards and minutes, at the pace of one quiet core."""
    lines, total = [], 0.0
    for name, texts in {PLAIN: [PLAIN], **ladders}.items():
        walks = [parsed_method(text) for text in texts]
        cells = len(CORNERS) * (1 if name == PLAIN else 2)
        work = cells * sum(m.forwards(steps, 2, blocks) + GRADIENT * m.guidance.gradients(steps, blocks) for m in walks)
        lines.append(f"{name:<12}{cells * len(walks):>4} cells {work * SECONDS_A_FORWARD / 60:6.1f} min")
        total += work
    return "\n".join([*lines, f"in all {total * SECONDS_A_FORWARD / 60:.0f} min, less what is there already"])


def line_of(rung: Rung) -> str:
    values = [rung.selectivity, rung.selectivity_gain, *rung.figures.values()]
    return f"| {rung.text} | " + " | ".join(f"{value:.3f}" if isfinite(value) else "-" for value in values) + " |"


def write(rungs: Sequence[Rung], heading: dict[str, str], results: Path) -> None:
    """The table so far, whole or not at all."""
    heading = heading | {"command": " ".join(["python", "tests/bench_rates.py", *sys.argv[1:]])}
    best = chosen_rungs(rungs)
    names = ("method", "selectivity", "its gain", *FIGURES)
    lines = ["# Settings of guidances, outside of the sprite protocol", "", *_told(heading), ""]
    lines += [f"Means over the motions {', '.join(CORNERS)}, one caption and one seed each. Selectivity of `none` is 0"]
    lines += ["by definition; that of `random` is between two draws, which is chance.", ""]
    lines += ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names), *map(line_of, rungs)]
    lines += ["", "Chosen by how far it turns among rungs that keep looks: " + ", ".join(best.values()) + ".", ""]
    record = {"heading": heading, "rungs": [asdict(rung) for rung in rungs], "chosen": best}
    results.parent.mkdir(exist_ok=True)
    for suffix, text in ((".md", "\n".join(lines)), (".json", json.dumps(_without_nan(record), indent=1) + "\n")):
        with replacing(results.with_suffix(suffix)) as draft:
            draft.write_text(text, encoding="utf-8")


def _told(heading: dict[str, str]) -> Iterator[str]:
    yield from (f"- {key}: {value}" for key, value in heading.items())


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value


if __name__ == "__main__":
    main()
