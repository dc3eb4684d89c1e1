"""A plot as an SVG text: values with intervals, as a curve over numbers or one beside another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDE, HIGH, LEFT, TOP, BOTTOM = 640, 300, 56, 34, 96
INK, FAINT, ACCENT = "#333", "#aaa", "#0072b2"


@dataclass(frozen=True)
class Mark:
    """One value with its interval; NaN where there is none. `at` is its place on a numeric axis."""

    label: str
    at: float | None
    value: float
    low: float
    high: float


def plotted(marks: Sequence[Mark], title: str, axis: str, level: tuple[str, float] | None = None) -> str:
    """Marks from left to right, joined where all have a place on the axis, which is then logarithmic; a level across.

    The vertical axis holds 0 and 1 at least.
    """
    ends = [end for mark in marks for end in (mark.value, mark.low, mark.high) if math.isfinite(end)]
    ends += [0.0, 1.0, level[1] if level else 0.0]
    low, high = min(ends), max(ends)
    places = _places(marks)

    def y_of(value: float) -> float:
        return round(TOP + (HIGH - TOP - BOTTOM) * (high - value) / (high - low), 1)

    parts = [_text(LEFT, 20, title, "start")]
    for value in sorted({low, 0.0, 0.5, high}):
        parts += [
            _line(LEFT, y_of(value), WIDE - 16, y_of(value), FAINT, 0.5),
            _text(LEFT - 6, y_of(value) + 4, f"{value:.2g}", "end"),
        ]
    if level:
        parts += [_line(LEFT, y_of(level[1]), WIDE - 16, y_of(level[1]), INK, 1, "5 4")]
        parts += [_text(WIDE - 18, y_of(level[1]) - 4, level[0], "end")]
    drawn = [(x, mark) for x, mark in zip(places, marks, strict=True) if math.isfinite(mark.value)]
    if axis and len(drawn) > 1:
        points = " ".join(f"{x},{y_of(mark.value)}" for x, mark in drawn)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{ACCENT}" stroke-width="1.5"/>')
    for x, mark in drawn:
        if math.isfinite(mark.low):
            parts.append(_line(x, y_of(mark.low), x, y_of(mark.high), ACCENT, 1.5))
        parts.append(f'<circle cx="{x}" cy="{y_of(mark.value)}" r="4" fill="{ACCENT}"/>')
    for x, mark in zip(places, marks, strict=True):
        label = mark.label if not math.isnan(mark.value) else f"{mark.label} (none)"
        parts.append(_text(x, HIGH - BOTTOM + 16, label, "end", f' transform="rotate(-28 {x} {HIGH - BOTTOM + 16})"'))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" font-family="sans-serif" font-size="11">'
        f'<rect width="{WIDE}" height="{HIGH}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _places(marks: Sequence[Mark]) -> list[float]:
    """Horizontal places: by the logarithm of `at` where all have one, else evenly."""
    numbers = [mark.at for mark in marks if mark.at is not None and mark.at > 0]
    room = WIDE - LEFT - 60
    if len(numbers) < len(marks) or min(numbers) == max(numbers):
        return [round(LEFT + 30 + room * (index + 0.5) / len(marks), 1) for index in range(len(marks))]
    low, high = math.log(min(numbers)), math.log(max(numbers))
    return [round(LEFT + 30 + room * (math.log(number) - low) / (high - low), 1) for number in numbers]


def _line(x: float, y: float, x2: float, y2: float, colour: str, width: float, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line x1="{x}" y1="{y}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="{width}"{dashes}/>'


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{INK}"{more}>{escape(text)}</text>'
