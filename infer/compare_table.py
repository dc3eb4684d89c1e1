"""A comparison in files: `results.jsonl` (a cell a line), `table.csv` (a method and measure a line), `table.md`.

Figures and gains are those of `gains.py`.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from motionlora.data.cache import replacing
from motionlora.infer.gains import Figure, Gain, figures_of, gains_of, methods_in
from motionlora.infer.measure_names import MEASURES
from motionlora.infer.published import published_of
from motionlora.infer.row import Row

HEADLINES = ("smf", "acc", "mf_moving", "mf_star")
"""Measures of which table.md shows intervals and gains; table.csv has them all."""


def write_tables(rows: Sequence[Row], out: Path, heading: dict[str, str]) -> None:
    """All three files, each whole or not at all."""
    figures, gained = figures_of(rows), gains_of(rows)
    texts = {
        "results.jsonl": "".join(json.dumps(line_of(row), ensure_ascii=False) + "\n" for row in rows),
        "table.csv": as_csv(figures, gained),
        "table.md": as_markdown(rows, figures, gained, heading),
    }
    for name, text in texts.items():
        with replacing(out / name) as draft:
            draft.write_text(text, encoding="utf-8", newline="")


def as_csv(figures: Sequence[Figure], gained: Sequence[Gain]) -> str:
    """A line a method and measure; its gains over each baseline behind it, empty where there is none."""
    kinds = ("none", "static", "wrong")
    gain_names = [f"{kind}_{field}" for kind in kinds for field in ("gain", "low", "high", "p", "p_holm")]
    units = {measure.name: measure.unit for measure in MEASURES}
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([*asdict(figures[0]), "unit", *(f"over_{name}" for name in gain_names)] if figures else [])
    by_place = {(gain.method, gain.measure, gain.against.partition(":")[0]): gain for gain in gained}
    for figure in figures:
        cells: list[object] = [number_of(value) for value in asdict(figure).values()] + [units.get(figure.measure, "")]
        for kind in kinds:
            gain = by_place.get((figure.method, figure.measure, kind))
            cells += [number_of(v) for v in (gain.mean, gain.low, gain.high, gain.p, gain.p_holm)] if gain else [""] * 5
        writer.writerow(cells)
    return lines.getvalue()


def as_markdown(rows: Sequence[Row], figures: Sequence[Figure], gained: Sequence[Gain], heading: dict[str, str]) -> str:
    """The table that a person reads."""
    shown = [measure for measure in MEASURES if any(f.cells for f in figures if f.measure == measure.name)]
    costs = [
        name
        for name in ("forwards", "dose_rms", "seconds_sample")
        if any(f.cells for f in figures if f.measure == name)
    ]
    by_place = {(figure.method, figure.measure): figure for figure in figures}
    lines = ["# Comparison", "", *(f"- {name}: {_cell(text)}" for name, text in heading.items()), ""]
    lines += ["## Medians", "", *_header(["method", "cells", *(m.label for m in shown), *costs])]
    for method in methods_in(rows):
        names = [*(measure.name for measure in shown), *costs]
        medians = [_median(by_place[method, name]) for name in names]
        done = sum(row.method == method and row.status == "done" for row in rows)
        lines.append(_line_of([method, str(done), *medians]))
    lines += ["", "A figure in brackets counts the cells that have it, where not all do; - is missing everywhere.", ""]
    headlines = [measure for measure in shown if measure.name in HEADLINES]
    lines += [
        "## Intervals",
        "",
        *_header(["method", "measure", "mean", "95 %", "median", "95 %", "cells", "references"]),
    ]
    for method in methods_in(rows):
        for measure in headlines:
            f = by_place[method, measure.name]
            if f.cells:
                spans = (span(f.mean_low, f.mean_high), span(f.median_low, f.median_high))
                counts = (str(f.cells), str(f.references))
                lines.append(
                    _line_of([method, measure.label, short(f.mean), spans[0], short(f.median), spans[1], *counts])
                )
    lines += [
        "",
        "## Gains",
        "",
        "Mean difference in the same clip, caption and seed, each reference counting alike.",
        "",
    ]
    lines += _header(["method", "over", "measure", "gain", "95 %", "p", "p (Holm)", "pairs", "references"])
    for gain in (gain for measure in headlines for gain in gained if gain.measure == measure.name):
        ps = (f"{gain.p:.3g}", f"{gain.p_holm:.3g}", str(gain.pairs), str(gain.references))
        label = next(measure.label for measure in MEASURES if measure.name == gain.measure)
        lines.append(_line_of([gain.method, gain.against, label, f"{gain.mean:+.3f}", span(gain.low, gain.high), *ps]))
    lines += [
        "",
        *verdicts(gained),
        "",
        *failed_rows(rows),
        *_missing(rows),
        *_published(rows),
        "## What is measured",
        "",
    ]
    lines += _header(["name", "unit", "perfect", "source"])
    lines += [_line_of([m.label, m.unit, "-" if m.good is None else f"{m.good:g}", m.source]) for m in MEASURES]
    return "\n".join([*lines, ""])


def verdicts(gained: Sequence[Gain]) -> list[str]:
    """Which methods work: better than no transfer, a standing clip and a wrong motion, with intervals above 0."""
    measure = next((name for name in HEADLINES if any(gain.measure == name for gain in gained)), "")
    own = [gain for gain in gained if gain.measure == measure]
    said = []
    for method in dict.fromkeys(gain.method for gain in own):
        gains = {gain.against.partition(":")[0]: gain for gain in own if gain.method == method}
        lacking = [name for name in ("none", "static", "wrong") if name not in gains]
        failed = [name for name, gain in gains.items() if not gain.low > 0]
        if lacking or failed:
            reasons = [f"not above {name}" for name in failed] + [f"not compared with {name}" for name in lacking]
            said.append(f"- {method}: not shown to work ({', '.join(reasons)})")
        else:
            said.append(f"- {method}: works, above no transfer, a standing clip and a wrong motion")
    label = next((m.label for m in MEASURES if m.name == measure), "")
    return [f"By {label}, with intervals that exclude 0:", "", *said] if said else []


def failed_rows(rows: Sequence[Row], level: str = "##") -> list[str]:
    """Every cell that failed, with its reason, under a heading of its own; nothing where none did."""
    failed = [row for row in rows if row.status == "failed"]
    if not failed:
        return []
    lines = [f"{level} Failed", "", *_header(["clip", "caption", "method", "seed", "reason"])]
    return [*lines, *(_line_of([r.clip, r.caption, r.method, str(r.seed), r.sentence]) for r in failed), ""]


def _missing(rows: Sequence[Row]) -> list[str]:
    """Every reason with the measures and the number of cells that it took away."""
    reasons: dict[str, dict[str, int]] = {}
    labels = {measure.name: measure.label for measure in MEASURES}
    for row in rows:
        for name, reason in row.missing.items():
            counts = reasons.setdefault(reason, {})
            counts[labels[name]] = counts.get(labels[name], 0) + 1
    if not reasons:
        return []
    told = [
        f"- {', '.join(f'{name} ({count})' for name, count in names.items())}: {reason}"
        for reason, names in reasons.items()
    ]
    return ["## Missing", "", "Measures that some cells do not have, with the number of cells.", "", *told, ""]


def _published(rows: Sequence[Row]) -> list[str]:
    """Papers' own figures of these methods, apart from ours."""
    found = published_of(methods_in(rows))
    if not found:
        return []
    lines = [[p.method, p.called, *map(_printed, (p.text, p.fidelity, p.temporal, p.seconds)), p.paper] for p in found]
    heads = ["method", "in the paper", "text", "motion fidelity", "temporal", "seconds", "paper, model and clips"]
    note = "Not measured here, and not to be merged with the figures above: other models, clips, sizes and trackers."
    return ["## What papers print", "", note, "", *markdown_table(heads, lines), ""]


def line_of(row: Row) -> dict[str, object]:
    """A row as a line of `results.jsonl`."""
    return {name: value for name, value in asdict(row).items() if name != "paths"}


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; whatever stands in a cell stays there and is no markup."""
    return [*_header(heads), *(_line_of(line) for line in lines)]


def _header(names: Sequence[str]) -> list[str]:
    return [_line_of(names), "|" + " --- |" * len(names)]


def _line_of(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    """Text that stays in its cell and is no markup."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _printed(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _median(figure: Figure) -> str:
    if not figure.cells:
        return "-"
    return short(figure.median) + (f" ({figure.cells})" if figure.cells < figure.asked else "")


def short(value: float) -> str:
    """A figure in a table; - for none."""
    return "-" if math.isnan(value) else f"{value:.2f}" if abs(value) < 100 else f"{value:.4g}"


def span(low: float, high: float) -> str:
    """An interval in a table; - for none."""
    return "-" if math.isnan(low) else f"{low:.2f} .. {high:.2f}"


def number_of(value: object) -> object:
    """A value in a CSV file; empty for none."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value
