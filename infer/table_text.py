"""Tables as Markdown and CSV: whatever stands in a cell stays there and is no markup."""

import csv
import io
import math
from collections.abc import Mapping, Sequence


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    rule = "|" + " --- |" * len(heads)
    return [_line_of(heads), rule, *map(_line_of, lines)]


def csv_text(lines: Sequence[Mapping[str, object]]) -> str:
    """Lines of the same names as CSV; NaN is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0] if lines else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _number(value) for name, value in line.items()} for line in lines)
    return text.getvalue()


def as_cell(text: str) -> str:
    """Text on one line that is no markup."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def short(value: float) -> str:
    """A figure; - for none."""
    return "-" if math.isnan(value) else f"{value:.2f}" if abs(value) < 100 else f"{value:.4g}"


def span(low: float, high: float) -> str:
    """An interval; - for none."""
    return "-" if math.isnan(low) else f"{low:.2f} .. {high:.2f}"


def _line_of(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(as_cell, cells)) + " |"


def _number(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value
