"""A head map as a picture: one cell for each head, its class by colour, how clear the case is by strength."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from motionlora.data.cache import replacing

if TYPE_CHECKING:
    from motionlora.heads.head_map import HeadMap
    from motionlora.heads.settings import Rule

INK, FAINT, WHITE = (35, 35, 35), (110, 110, 110), (255, 255, 255)
# Blue and vermillion of Okabe and Ito's palette: told apart with every common colour blindness.
COLOURS = {"spatial": np.array([0, 114, 178]), "temporal": np.array([213, 94, 0])}
FULL_COLOUR = 4.0
"""Factor beyond the boundary of the rule from which on a cell has its full colour: one scale for all pictures."""


def draw_head_map(head_map: HeadMap, path: str | Path, rule: Rule = "code", ratio: float = 1.3) -> None:
    """Draws the map as a PNG: blocks downward, heads to the right, counts of each block at the side.

    Raises:
        StorageError: the file cannot be written.
    """
    with replacing(Path(path)) as draft:
        _picture(head_map, rule, ratio).save(draft, format="PNG")


def _picture(head_map: HeadMap, rule: Rule, ratio: float) -> Image.Image:
    """Title, one cell for each head, counts of each block at the right, scale of colours below."""
    spatial, temporal = head_map.counts(rule, ratio).sum(axis=0)
    grid = f"{head_map.grid.frames} x {head_map.grid.height} x {head_map.grid.width}"
    times = ", ".join(f"{time:g}" for time in head_map.times)
    sign = f">= {ratio:g} x" if rule == "code" else f"> 1/{ratio:g} x"
    text, title = ImageFont.load_default(size=15), ImageFont.load_default(size=23)
    lines = (
        f"temporal where temporal mass {sign} spatial mass (rule {rule})",
        f"{spatial} spatial, {temporal} temporal heads; grid {grid}, noise level {times}",
    )
    cell = int(np.clip(880 // max(head_map.blocks, head_map.heads), 20, 48))
    left, top, high, bars = 74, 150, head_map.blocks * cell, 160
    right = left + head_map.heads * cell + 24
    heading = f"Attention heads of {head_map.backbone}"
    wide = max(right + bars + 28, 480, 28 + round(max(title.getlength(heading), *map(text.getlength, lines)) + 28))
    image = Image.new("RGB", (wide, top + high + 92), WHITE)
    pen = ImageDraw.Draw(image)
    pen.text((28, 20), heading, INK, title)
    for row, line in enumerate(lines):
        pen.text((28, 56 + 22 * row), line, FAINT, text)
    _draw_cells(pen, head_map, (left, top), cell, _margins(head_map, rule, ratio))
    _draw_counts(pen, head_map.counts(rule, ratio), (right, top), (bars, cell))
    _draw_scale(pen, (left, top + high + 34))
    return image


def _margins(head_map: HeadMap, rule: Rule, ratio: float) -> np.ndarray:
    """How far each head is beyond the boundary of the rule, in [-1, 1] on a log scale; temporal above 0."""
    spatial, temporal = np.moveaxis(np.maximum(head_map.scores, 1e-12), -1, 0)
    boundary = ratio if rule == "code" else 1 / ratio
    margin = np.clip(np.log(temporal / spatial / boundary) / np.log(FULL_COLOUR), -1, 1)
    return np.where(head_map.temporal(rule, ratio), np.maximum(margin, 0.0), np.minimum(margin, -0.0))


def _tint(kind: str, strength: float) -> tuple[int, ...]:
    weight = 0.16 + 0.84 * strength  # never white: a head at the boundary still shows its class
    return tuple(int(value) for value in np.rint(255 + weight * (COLOURS[kind] - 255)))


def _draw_cells(
    pen: ImageDraw.ImageDraw, head_map: HeadMap, corner: tuple[int, int], cell: int, margin: np.ndarray
) -> None:
    left, top = corner
    font = ImageFont.load_default(size=min(15, cell * 2 // 3))
    every = 1 if cell >= 26 else 5
    pen.text((left, top - 26), "head", FAINT, ImageFont.load_default(size=15), "ls")
    pen.text((left - 12, top - 26), "block", FAINT, ImageFont.load_default(size=15), "rs")
    for head in range(0, head_map.heads, every):
        pen.text((left + (head + 0.5) * cell, top - 8), str(head), INK, font, "ms")
    for block, row in enumerate(margin):
        if block % every == 0:
            pen.text((left - 12, top + (block + 0.5) * cell), str(block), INK, font, "rm")
        for head, value in enumerate(row):
            x, y = left + head * cell, top + block * cell
            kind = "temporal" if np.signbit(value) == 0 else "spatial"
            pen.rectangle((x, y, x + cell - 2, y + cell - 2), _tint(kind, abs(value)))


def _draw_counts(pen: ImageDraw.ImageDraw, counts: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> None:
    left, top = corner
    wide, cell = size
    font = ImageFont.load_default(size=min(15, cell * 2 // 3))
    for kind, x, anchor in (("spatial", left, "ls"), ("temporal", left + wide, "rs")):
        pen.text((x, top - 8), kind, tuple(COLOURS[kind]), ImageFont.load_default(size=15), anchor)
    for block, (spatial, temporal) in enumerate(counts):
        y, middle = top + block * cell, left + round(wide * spatial / (spatial + temporal))
        for kind, count, start, end in (
            ("spatial", spatial, left, middle),
            ("temporal", temporal, middle, left + wide),
        ):
            if count:
                pen.rectangle((start, y, end - 2, y + cell - 2), tuple(COLOURS[kind]))
                at, anchor = (start + 6, "lm") if kind == "spatial" else (end - 8, "rm")
                pen.text((at, y + cell / 2 - 1), str(count), WHITE, font, anchor)


def _draw_scale(pen: ImageDraw.ImageDraw, corner: tuple[int, int]) -> None:
    left, top = corner
    half, font = 150, ImageFont.load_default(size=13)
    for step in range(half):
        for kind, x in (("spatial", left + half - 1 - step), ("temporal", left + half + 1 + step)):
            pen.line((x, top, x, top + 12), _tint(kind, step / (half - 1)))
    pen.text((left, top + 30), f"{FULL_COLOUR:g} x spatial", FAINT, font, "ls")
    pen.text((left + half, top + 30), "boundary", FAINT, font, "ms")
    pen.text((left + 2 * half, top + 30), f"{FULL_COLOUR:g} x temporal", FAINT, font, "rs")
