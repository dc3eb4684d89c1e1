"""HeadMap: the measured roles of all attention heads; classify, save, load, draw.

Needs neither torch nor a model: a rule is applied anew to saved scores in milliseconds.
"""

from __future__ import annotations

import difflib
import io
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from motionlora.data.settings import InputError, StorageError

if TYPE_CHECKING:
    from motionlora.heads.backbone import TokenGrid
    from motionlora.heads.settings import Rule

Kind: TypeAlias = Literal["spatial", "temporal", "all"]
FORMAT = "motionlora.head_map/1"

# Follow-Your-Motion (arXiv 2506.05207): the release wants the temporal mass to win by the ratio, the paper lets it
# lose by the ratio. The first leans to spatial heads, the second to temporal ones.
RULES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "code": lambda spatial, temporal, ratio: temporal >= ratio * spatial,
    "paper": lambda spatial, temporal, ratio: temporal > spatial / ratio,
}


@dataclass(frozen=True, eq=False)
class HeadMap:
    """What was measured on one clip with one model.

    Attributes:
        backbone: name of the model.
        grid: token grid of the clip.
        times: noise levels in [0, 1] over which the scores are averaged.
        scores: float64 "block head 2": spatial and temporal share of the attention mass, each in [0, 1].
        mask_block: tokens that the masks treat as one.
        clip_hash: content hash of the clip.
        caption: caption of the clip.

    Raises:
        InputError: scores of another shape, not finite, or outside [0, 1].
    """

    backbone: str
    grid: TokenGrid
    times: tuple[float, ...]
    scores: np.ndarray
    mask_block: int
    clip_hash: str
    caption: str

    def __post_init__(self) -> None:
        shape = self.scores.shape
        if len(shape) != 3 or shape[2] != 2 or 0 in shape:
            raise InputError(
                f"A head map needs scores of shape (blocks, heads, 2), got {shape}: score the heads again."
            )
        # A share may exceed 1 by the rounding of its sum.
        if not (np.isfinite(self.scores).all() and self.scores.min() >= 0 and self.scores.max() <= 1 + 1e-4):
            raise InputError("A head map needs scores from 0 to 1, got others: score the heads again.")

    @property
    def blocks(self) -> int:
        return self.scores.shape[0]

    @property
    def heads(self) -> int:
        return self.scores.shape[1]

    def temporal(self, rule: Rule = "code", ratio: float = 1.3) -> np.ndarray:
        """True for temporal heads, False for spatial ones; bool "block head".

        Args:
            rule: "code": temporal where its mass >= ratio * spatial mass (the release, our default);
                "paper": temporal where its mass > spatial mass / ratio (arXiv 2506.05207).
            ratio: above 0; 1.3 in paper and release, where it is called alpha. At 1 the rules agree but for ties.

        Raises:
            InputError: an unknown rule, or a ratio that is not above 0.
        """
        if rule not in RULES:
            raise InputError(f"There is no head rule {rule!r}{_nearest(rule, RULES)}; allowed are {', '.join(RULES)}.")
        if not 0 < ratio < float("inf"):
            raise InputError(f"The ratio of a head rule must be above 0, got {ratio}: 1.3 is the published one.")
        return RULES[rule](self.scores[..., 0], self.scores[..., 1], ratio)

    def chosen(self, kind: Kind, rule: Rule = "code", ratio: float = 1.3) -> np.ndarray:
        """The heads of one kind, bool "block head". Some blocks may have none.

        Raises:
            InputError: an unknown kind, or as `temporal`.
        """
        temporal = self.temporal(rule, ratio)
        kinds = {"spatial": ~temporal, "temporal": temporal, "all": np.ones_like(temporal)}
        if kind not in kinds:
            raise InputError(
                f"There is no kind of heads {kind!r}{_nearest(kind, kinds)}; allowed are {', '.join(kinds)}."
            )
        return kinds[kind]

    def counts(self, rule: Rule = "code", ratio: float = 1.3) -> np.ndarray:
        """Spatial and temporal heads of each block, int "block 2"."""
        temporal = self.temporal(rule, ratio).sum(axis=1)
        return np.stack((self.heads - temporal, temporal), axis=1)

    def as_json(self, rule: Rule = "code", ratio: float = 1.3) -> dict[str, Any]:
        """Everything, ready for JSON, with the verdict of one rule for readers who do not have this module."""
        return {
            "format": FORMAT,
            "backbone": self.backbone,
            "grid": {"frames": self.grid.frames, "height": self.grid.height, "width": self.grid.width},
            "times": list(self.times),
            "mask_block": self.mask_block,
            "clip_hash": self.clip_hash,
            "caption": self.caption,
            "rule": rule,
            "ratio": ratio,
            "temporal": self.temporal(rule, ratio).astype(int).tolist(),
            "scores": self.scores.tolist(),
        }

    @classmethod
    def from_json(cls, content: Any, source: str = "This text") -> HeadMap:
        """The inverse of `as_json`. The verdict is not read: it follows from the scores.

        Args:
            content: what JSON gave.
            source: where it came from, the subject of the sentence when it is wrong.

        Raises:
            InputError: another format, a missing field, or a wrong type.
        """
        from motionlora.heads.backbone import TokenGrid

        came = content.get("format") if isinstance(content, dict) else type(content).__name__
        if came != FORMAT:
            raise InputError(f"{source} is no head map: its format is {came!r}, not {FORMAT!r}; score the heads again.")
        try:
            return cls(
                backbone=_text(content["backbone"]),
                grid=TokenGrid(*(int(content["grid"][side]) for side in ("frames", "height", "width"))),
                times=tuple(float(time) for time in content["times"]),
                scores=np.array(content["scores"], dtype=np.float64),
                mask_block=int(content["mask_block"]),
                clip_hash=_text(content["clip_hash"]),
                caption=_text(content["caption"]),
            )
        except InputError as error:
            raise InputError(f"{source} is damaged: {error}") from None
        except KeyError as missing:
            raise InputError(f"{source} is a head map without {missing}; score the heads again.") from None
        except (TypeError, ValueError) as error:
            raise InputError(f"{source} is a damaged head map ({error}); score the heads again.") from None

    def save(self, path: str | Path, rule: Rule = "code", ratio: float = 1.3) -> None:
        """Writes `as_json` to a file; either the whole file appears or nothing changes.

        Raises:
            StorageError: the file cannot be written.
        """
        text = json.dumps(self.as_json(rule, ratio), indent=1, ensure_ascii=False)
        _write(Path(path), text.encode())

    @classmethod
    def load(cls, path: str | Path) -> HeadMap:
        """Reads what `save` wrote.

        Raises:
            InputError: no such file, no JSON, or as `from_json`.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"Cannot read the head map {path}: {error.strerror}; give a file made by `heads`."
            ) from None
        except ValueError:
            raise InputError(f"{path} is no head map: it is not JSON; give a file made by `heads`.") from None
        return cls.from_json(content, str(path))

    def draw(self, path: str | Path, rule: Rule = "code", ratio: float = 1.3) -> None:
        """Draws the map as a PNG: blocks downward, heads to the right, counts of each block at the side.

        Raises:
            StorageError: the file cannot be written.
        """
        buffer = io.BytesIO()
        _picture(self, rule, ratio).save(buffer, format="PNG")
        _write(Path(path), buffer.getvalue())


def _nearest(name: object, allowed: dict[str, Any]) -> str:
    close = difflib.get_close_matches(str(name), allowed, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise StorageError(
            f"Cannot write {path}: {error.strerror}; free some space or choose another place."
        ) from error


INK, FAINT, WHITE = (35, 35, 35), (110, 110, 110), (255, 255, 255)
# Blue and vermillion of Okabe and Ito's palette: told apart with every common colour blindness.
COLOURS = {"spatial": np.array([0, 114, 178]), "temporal": np.array([213, 94, 0])}
FULL_COLOUR = 4.0
"""Factor beyond the boundary of the rule from which on a cell has its full colour: one scale for all pictures."""


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
