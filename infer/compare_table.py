"""A comparison in files: `results.jsonl` (a cell a line), `table.csv` (a method and measure a line), `table.md`.

Figures and gains are those of `gains.py`.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from math import nan
from pathlib import Path
from statistics import fmean

from motionlora.data.cache import write_text
from motionlora.infer.gains import BASELINES, Figure, Gain, figures_of, gains_of, methods_in
from motionlora.infer.measure_names import LABELS, MEASURES
from motionlora.infer.published import published_of
from motionlora.infer.row import Row
from motionlora.infer.table_text import as_cell, csv_text, markdown_table, short, span

HEADLINES = ("smf", "acc", "selectivity", "mf_moving", "mf_star")
"""Measures of which table.md shows intervals and gains; table.csv has them all."""
COSTS = ("forwards", "dose_rms", "seconds_sample")
NO_GAIN = Gain("", "", "", 0, 0, nan, nan, nan, nan, nan)


def write_tables(rows: Sequence[Row], out: Path, heading: dict[str, str]) -> None:
    """All three files, each whole or not at all."""
    figures, gained = figures_of(rows), gains_of(rows)
    write_text(out / "results.jsonl", "".join(json.dumps(line_of(row), ensure_ascii=False) + "\n" for row in rows))
    write_text(out / "table.csv", as_csv(figures, gained))
    write_text(out / "table.md", as_markdown(rows, figures, gained, heading))


def as_csv(figures: Sequence[Figure], gained: Sequence[Gain]) -> str:
    """A line a method and measure; its gains over each baseline behind it, empty where there is none."""
    units = {measure.name: measure.unit for measure in MEASURES}
    by_place = {(gain.method, gain.measure, gain.baseline): gain for gain in gained}
    lines = []
    for figure in figures:
        line = asdict(figure) | {"unit": units.get(figure.measure, "")}
        for kind in BASELINES:
            gain = by_place.get((figure.method, figure.measure, kind), NO_GAIN)
            line |= {f"over_{kind}_gain": gain.mean, f"over_{kind}_low": gain.low, f"over_{kind}_high": gain.high}
            line |= {f"over_{kind}_p": gain.p, f"over_{kind}_p_holm": gain.p_holm}
        lines.append(line)
    return csv_text(lines)


def as_markdown(rows: Sequence[Row], figures: Sequence[Figure], gained: Sequence[Gain], heading: dict[str, str]) -> str:
    """The table that a person reads."""
    there = {figure.measure for figure in figures if figure.cells}
    shown = [measure.name for measure in MEASURES if measure.name in there]
    costs = [name for name in COSTS if name in there]
    headlines = [name for name in shown if name in HEADLINES]
    by_place = {(figure.method, figure.measure): figure for figure in figures}
    medians = [
        [
            method,
            str(sum(row.method == method and row.status == "done" for row in rows)),
            *(_median(by_place[method, name]) for name in (*shown, *costs)),
        ]
        for method in methods_in(rows)
    ]
    own = [by_place[method, name] for method in methods_in(rows) for name in headlines]
    by_headline = [gain for name in headlines for gain in gained if gain.measure == name]
    measures = [[m.label, m.unit, "-" if m.good is None else f"{m.good:g}", m.source] for m in MEASURES]
    intervals = ["method", "measure", "mean", "95 %", "median", "95 %", "cells", "references"]
    gains = ["method", "over", "measure", "gain", "95 %", "p", "p (Holm)", "pairs", "references"]
    lines = ["# Comparison", "", *(f"- {name}: {as_cell(text)}" for name, text in heading.items()), ""]
    lines += ["## Medians", ""]
    lines += markdown_table(["method", "cells", *(LABELS[name] for name in shown), *costs], medians)
    lines += ["", "A figure in brackets counts the cells that have it, where not all do; - is missing everywhere.", ""]
    lines += ["## Intervals", "", *markdown_table(intervals, [_interval(figure) for figure in own if figure.cells]), ""]
    lines += by_clip(rows, headlines[0]) if headlines else []
    lines += ["## Gains", ""]
    lines += ["Mean difference in the same clip, caption and seed, each reference counting alike.", ""]
    lines += [*markdown_table(gains, [_gain(gain) for gain in by_headline]), "", *verdicts(gained)]
    lines += [*failed_rows(rows), *_missing(rows), *_published(rows)]
    lines += ["## What is measured", "", *markdown_table(["name", "unit", "perfect", "source"], measures), ""]
    return "\n".join(lines)


def by_clip(rows: Sequence[Row], measure: str) -> list[str]:
    """Means of a measure over captions and seeds, a line a clip and a column a method, without the controls."""
    methods = list(dict.fromkeys(row.method for row in rows if row.control == "none"))
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        if measure in row.values:
            found[row.clip, row.method].append(row.values[measure])
    lines = [
        [clip, *(f"{fmean(own):.2f}" if (own := found[clip, name]) else "-" for name in methods)]
        for clip in dict.fromkeys(row.clip for row in rows)
    ]
    return [f"## {LABELS[measure]} by clip", "", *markdown_table(["clip", *methods], lines), ""]


def verdicts(gained: Sequence[Gain]) -> list[str]:
    """Which methods work: better than every baseline, with intervals above 0; by fidelity, and by selectivity.

    Selectivity has the random moves of equal size alone to beat.
    """
    there = {gain.measure for gain in gained} - {"selectivity"}
    fidelity = next((name for name in HEADLINES if name in there), "")
    lines = []
    for measure, needed in ((fidelity, BASELINES[:3]), ("selectivity", ("dose",))):
        own = [gain for gain in gained if gain.measure == measure]
        said = []
        for method in dict.fromkeys(gain.method for gain in own):
            gains = {gain.baseline: gain for gain in own if gain.method == method}
            reasons = [f"not above {name}" for name, gain in gains.items() if not gain.low > 0]
            reasons += [f"not compared with {name}" for name in needed if name not in gains]
            works = f"works, above {', '.join(gains)}"
            said.append(f"- {method}: " + (f"not shown to work ({', '.join(reasons)})" if reasons else works))
        lines += [f"By {LABELS[measure]}, with intervals that exclude 0:", "", *said, ""] if said else []
    return lines


def failed_rows(rows: Sequence[Row], level: str = "##") -> list[str]:
    """Every cell that failed, with its reason, under a heading of its own; nothing where none did."""
    failed = [[r.clip, r.caption, r.method, str(r.seed), r.sentence] for r in rows if r.status == "failed"]
    table = markdown_table(["clip", "caption", "method", "seed", "reason"], failed)
    return [f"{level} Failed", "", *table, ""] if failed else []


def _missing(rows: Sequence[Row]) -> list[str]:
    """Every reason with the measures and the number of cells that it took away."""
    reasons: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for name, reason in row.missing.items():
            reasons[reason][LABELS[name]] += 1
    told = [
        f"- {', '.join(f'{name} ({count})' for name, count in counts.items())}: {reason}"
        for reason, counts in reasons.items()
    ]
    note = "Measures that some cells do not have, with the number of cells."
    return ["## Missing", "", note, "", *told, ""] if told else []


def _published(rows: Sequence[Row]) -> list[str]:
    """Papers' own figures of these methods, apart from ours."""
    found = published_of(methods_in(rows))
    lines = [[p.method, p.called, *map(_printed, (p.text, p.fidelity, p.temporal, p.seconds)), p.paper] for p in found]
    heads = ["method", "in the paper", "text", "motion fidelity", "temporal", "seconds", "paper, model and clips"]
    note = "Not measured here, and not to be merged with the figures above: other models, clips, sizes and trackers."
    return ["## What papers print", "", note, "", *markdown_table(heads, lines), ""] if found else []


def line_of(row: Row) -> dict[str, object]:
    """A row as a line of `results.jsonl`."""
    return {name: value for name, value in asdict(row).items() if name != "paths"}


def _interval(f: Figure) -> list[str]:
    mean, median = span(f.mean_low, f.mean_high), span(f.median_low, f.median_high)
    label = LABELS[f.measure]
    return [f.method, label, short(f.mean), mean, short(f.median), median, str(f.cells), str(f.references)]


def _gain(g: Gain) -> list[str]:
    counts = [f"{g.p:.3g}", f"{g.p_holm:.3g}", str(g.pairs), str(g.references)]
    return [g.method, g.against, LABELS[g.measure], f"{g.mean:+.3f}", span(g.low, g.high), *counts]


def _printed(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _median(figure: Figure) -> str:
    if not figure.cells:
        return "-"
    return short(figure.median) + (f" ({figure.cells})" if figure.cells < figure.asked else "")
