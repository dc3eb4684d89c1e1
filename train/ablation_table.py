"""Ablations in files: `ablation.md` and `.csv` (a line a variant), `.jsonl` (a line a cell), a plot of each.

Every variant is compared with the main method, the first of its table, in the same clip, caption and seed.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from motionlora.data.cache import replacing
from motionlora.infer.compare_table import failed_rows, line_of, markdown_table, number_of, short, span
from motionlora.infer.gains import Figure, figures_of, paired
from motionlora.infer.measure_names import LABELS, MEASURES
from motionlora.infer.plot import Mark, plotted
from motionlora.infer.row import Row
from motionlora.infer.statistics import holm, mean_interval, mean_of, sign_flip_p
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


@dataclass(frozen=True)
class Difference:
    """A variant less the main method: the mean over references, its 95 % interval, p, p after Holm, pairs."""

    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    pairs: int


def write_chapters(chapters: Sequence[Chapter], out: Path, heading: Mapping[str, str]) -> None:
    """All files, each whole or not at all.

    Raises:
        StorageError: one cannot be written.
    """
    lines = [
        json.dumps({"ablation": chapter.ablation.name, **line_of(row)}, ensure_ascii=False)
        for chapter in chapters
        for row in chapter.rows
    ]
    texts = {"ablation.md": as_markdown(chapters, heading), "ablation.csv": as_csv(chapters)}
    texts["ablation.jsonl"] = "".join(f"{line}\n" for line in lines)
    texts |= {f"{chapter.ablation.name}.svg": plot_of(chapter) for chapter in chapters}
    for name, text in texts.items():
        with replacing(out / name) as draft:
            draft.write_text(text, encoding="utf-8", newline="")


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
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [name for name in Figure.__dataclass_fields__]
    writer.writerow(["ablation", *names, *(f"over_main_{name}" for name in Difference.__dataclass_fields__)])
    for chapter in chapters:
        by_measure = {measure.name: differences(chapter, measure.name) for measure in MEASURES}
        for figure in figures_of(chapter.rows):
            found = by_measure.get(figure.measure, {}).get(figure.method)
            values = asdict(found).values() if found else [""] * len(Difference.__dataclass_fields__)
            writer.writerow([chapter.ablation.name, *map(number_of, asdict(figure).values()), *map(number_of, values)])
    return text.getvalue()


def differences(chapter: Chapter, measure: str) -> dict[str, Difference]:
    """Of every variant but the main method that shares a pair with it; Holm's family is the table."""
    main, *others = (variant.name for variant in chapter.ablation.variants)
    groups = {name: paired(chapter.rows, name, main, measure) for name in others}
    groups = {name: found for name, found in groups.items() if found}
    ps = {name: sign_flip_p(found) for name, found in groups.items()}
    corrected = dict(zip(ps, holm(list(ps.values())), strict=True))
    return {
        name: Difference(mean_of(found), *mean_interval(found), ps[name], corrected[name], sum(map(len, found)))
        for name, found in groups.items()
    }


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
