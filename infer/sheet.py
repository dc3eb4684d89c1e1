"""Contact sheets: clips as rows of frames under their labels, in one PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from motionlora.data.cache import replacing
from motionlora.data.clip import Clip
from motionlora.data.errors import InputError

TILE = 160
"""The longer side of a frame on the sheet, in pixels."""
TEXT, GAP = 18, 4
PAPER, INK = (255, 255, 255), (20, 20, 20)


def contact_sheet(rows: Sequence[tuple[str, Clip]], path: str | Path, frames: int = 8) -> None:
    """Write a PNG with one row a clip: its label, below it evenly spaced frames from the first to the last.

    Frames are scaled so that their longer side is 160 pixels; a clip with fewer frames than asked shows all it has.

    Raises:
        InputError: no rows, or fewer than one frame asked.
        StorageError: the file cannot be written.
    """
    if not rows or frames < 1:
        raise InputError(f"A contact sheet of {len(rows)} rows with {frames} frames was asked: give at least one each.")
    font = ImageFont.load_default(size=TEXT)
    strips = [_strip(clip, frames) for _, clip in rows]
    width = max(max(strip.width for strip in strips), 2 * TILE)
    labels = [_wrapped(label, font, width) for label, _ in rows]
    line = TEXT + 6
    heights = [len(label) * line + strip.height + 3 * GAP for label, strip in zip(labels, strips, strict=True)]
    sheet = Image.new("RGB", (width + 2 * GAP, sum(heights) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for label, strip, height in zip(labels, strips, heights, strict=True):
        for number, words in enumerate(label):
            draw.text((GAP, top + number * line), words, fill=INK, font=font)
        sheet.paste(strip, (GAP, top + len(label) * line))
        top += height
    with replacing(Path(path)) as draft:
        sheet.save(draft, format="PNG")


def _strip(clip: Clip, frames: int) -> Image.Image:
    """Frames side by side."""
    indexes = np.unique(np.linspace(0, clip.frames - 1, frames).round().astype(int))
    scale = TILE / max(clip.height, clip.width)
    size = (max(1, round(clip.width * scale)), max(1, round(clip.height * scale)))
    way = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS
    strip = Image.new("RGB", (len(indexes) * (size[0] + GAP) - GAP, size[1]), PAPER)
    for column, index in enumerate(indexes):
        strip.paste(Image.fromarray(clip.pixels[index]).resize(size, way), (column * (size[0] + GAP), 0))
    return strip


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The words in lines of at most `width` pixels; a longer word stands alone."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
