"""Ablations in files: `ablation.md` and `.csv` (a line a variant), `.jsonl` (a line a cell), a plot of each.

Every variant is compared with the main method, the first of its table, in the same clip, caption and seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from motionlora.data.cache import write_text
from motionlora.infer.compare_table import NO_GAIN, failed_rows, line_of
from motionlora.infer.gains import Figure, Gain, family, figures_of, paired
from motionlora.infer.measure_names import LABELS, MEASURES
from motionlora.infer.plot import Mark, plotted
from motionlora.infer.row import Row
from motionlora.infer.statistics import mean_interval, mean_of
from motionlora.infer.table_text import csv_text, markdown_table, short, span
from motionlora.train.ablations import Ablation, Claim, Variant

MEASURED = "smf"
"""The measure by which variants are compared; all others are in ablation.csv."""
SHOWN = ("gain", "acc", "leak", "coverage", "mf_moving", "mf_star")
COSTS = {"seconds_tuning": "tuning s", "seconds_sample": "sampling s"}


@dataclass(frozen=True)
class Chapter:
    """An ablation and all its rows, controls as well."""

    ablation: Ablation
    rows: list[Row]


def write_chapters(chapters: Sequence[Chapter], out: Path, heading: Mapping[str, str]) -> None:
    """All files, each whole or not at all.

    Raises:
        StorageError: one cannot be written.
    """
    lines = [{"ablation": chapter.ablation.name, **line_of(row)} for chapter in chapters for row in chapter.rows]
    write_text(out / "ablation.md", as_markdown(chapters, heading))
    write_text(out / "ablation.csv", as_csv(chapters))
    write_text(out / "ablation.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    for chapter in chapters:
        write_text(out / f"{chapter.ablation.name}.svg", plot_of(chapter))


def as_markdown(chapters: Sequence[Chapter], heading: Mapping[str, str]) -> str:
    """The tables that a person reads."""
    lines = ["# Ablations of the main method", "", *(f"- {name}: {text}" for name, text in heading.items()), ""]
    lines += [
        "Medians, with 95 % intervals drawn over references; `over main` is the mean difference of "
        f"{LABELS[MEASURED]} to the first line in the same clip, caption and seed, p after Holm within a table; "
        "`over wrong` is the mean gain over the same variant's LoRA of another reference.",
        "",
    ]
    for chapter in chapters:
        ablation = chapter.ablation
        lines += [f"## {ablation.name}", "", ablation.question, "", *_table(chapter), ""]
        lines += [f"![{LABELS[MEASURED]} by variant]({ablation.name}.svg)", ""]
        lines += [*(f"- {verdict(claim, chapter)}" for claim in ablation.claims), *([""] if ablation.claims else [])]
        lines += failed_rows(chapter.rows, "###")
    return "\n".join(lines)


def as_csv(chapters: Sequence[Chapter]) -> str:
    """A line for each ablation, variant or control, and measure."""
    lines = []
    for chapter in chapters:
        over = {measure.name: differences(chapter, measure.name) for measure in MEASURES}
        for figure in figures_of(chapter.rows):
            gain = over.get(figure.measure, {}).get(figure.method, NO_GAIN)
            line = {"ablation": chapter.ablation.name, **asdict(figure)}
            line |= {f"over_main_{name}": getattr(gain, name) for name in ("mean", "low", "high", "p", "p_holm")}
            lines.append(line | {"over_main_pairs": gain.pairs or ""})
    return csv_text(lines)


def differences(chapter: Chapter, measure: str) -> dict[str, Gain]:
    """Of every variant but the main method that shares a pair with it; Holm's family is the table."""
    main, *others = (variant.name for variant in chapter.ablation.variants)
    return {gain.method: gain for gain in family(chapter.rows, dict.fromkeys(others, main), measure)}


def verdict(claim: Claim, chapter: Chapter) -> str:
    """What the paper found beside what is found here, as one sentence."""
    names = {variant.name for variant in chapter.ablation.variants}
    pair = [_own_name(name, chapter.ablation, names) for name in (claim.better, claim.worse)]
    told = f"The paper (Follow-Your-Motion, its motion fidelity): {claim.better} over {claim.worse}, {claim.found}."
    found = paired(chapter.rows, pair[0], pair[1], MEASURED)
    if not found:
        return f"{told} Here: not both were measured."
    low, high = mean_interval(found)
    ours = f"Here: {mean_of(found):+.2f} ({span(low, high)}) in {LABELS[MEASURED]}"
    if math.isnan(low):
        return f"{told} {ours}, of one reference: no interval, so nothing is decided."
    if claim.equal:
        said = {True: "agrees, no difference is seen", False: "does not agree"}[low <= 0 <= high]
    else:
        said = "agrees in direction" if low > 0 else "does not agree" if high < 0 else "undecided, the interval holds 0"
    return f"{told} {ours}: {said}."


def plot_of(chapter: Chapter) -> str:
    """The measure by variant with its interval, no transfer as a line; a curve where something is swept."""
    rows, ablation = chapter.rows, chapter.ablation
    figures = {figure.method: figure for figure in figures_of(rows) if figure.measure == MEASURED}
    swept = [variant for variant in ablation.variants if variant.at is not None] if ablation.axis else []
    chosen = sorted(swept, key=lambda variant: variant.at or 0.0) or ablation.variants
    marks = [_mark(variant, figures.get(variant.name)) for variant in chosen]
    plain = figures.get("none")
    level = ("no transfer", plain.mean) if plain and plain.cells else None
    return plotted(marks, f"{ablation.name}: mean {LABELS[MEASURED]}, 95 %", ablation.axis, level)


def _table(chapter: Chapter) -> list[str]:
    figures = {(figure.method, figure.measure): figure for figure in figures_of(chapter.rows)}
    over = differences(chapter, MEASURED)
    heads = ["variant", "clips", LABELS[MEASURED], "95 %", "over main", "95 %", "p (Holm)", "over wrong"]
    heads += [*(LABELS[name] for name in SHOWN), *COSTS.values()]
    variants = [variant.name for variant in chapter.ablation.variants]
    lines = []
    for name in [*variants, "none", "static", "reference"]:
        f = figures[name, MEASURED]
        cells = [name, f"{f.cells} of {f.asked}", short(f.median), span(f.median_low, f.median_high)]
        if difference := over.get(name):
            cells += [f"{difference.mean:+.2f}", span(difference.low, difference.high), f"{difference.p_holm:.3g}"]
        else:
            cells += ["-"] * 3
        wrong = paired(chapter.rows, name, f"wrong:{name}", MEASURED)
        cells.append(f"{mean_of(wrong):+.2f}" if wrong else "-")
        lines.append([*cells, *(short(figures[name, other].median) for other in (*SHOWN, *COSTS))])
    return markdown_table(heads, lines)


def _own_name(name: str, ablation: Ablation, names: set[str]) -> str:
    """The main method stands for a variant that is it under another name."""
    return name if name in names else ablation.variants[0].name


def _mark(variant: Variant, figure: Figure | None) -> Mark:
    blank = Mark(variant.name, variant.at, math.nan, math.nan, math.nan)
    return replace(blank, value=figure.mean, low=figure.mean_low, high=figure.mean_high) if figure else blank
