"""A comparison as one page that opens from disk: clips in step, tracks, displacements, tables, plots, blind ranking.

Every clip is one picture of all its frames (WebP), which the page draws frame by frame: that plays in every browser,
never falls out of step, and scrubs at once. All that comes from people reaches the page as JSON whose `<`, `>` and `&`
are escaped, and is shown as text only.
"""

import base64
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from motionlora.data.cache import write_text
from motionlora.data.clip import Clip
from motionlora.heads.lora_file import load_lora
from motionlora.infer.compare_table import HEADLINES
from motionlora.infer.gains import COSTS, gains_of
from motionlora.infer.learned import learned_beside
from motionlora.infer.measure_names import MEASURES
from motionlora.infer.pairs import Source
from motionlora.infer.report_field import coloured, field_of
from motionlora.infer.row import Row
from motionlora.infer.settings import lora_choice
from motionlora.infer.studio import Cell

SIDE = 416
"""Pixels of a frame's longer side on the page; larger clips are made smaller there."""
SCRIPTS = ("report_table.js", "report_plot.js", "report_play.js", "report_blind.js")
Paths = list[Any]


def write_report(
    cells: Sequence[Cell],
    rows: Sequence[Row],
    clip_of: Callable[[Cell], Clip],
    paths_of: Callable[[Source], Paths],
    path: Path,
    heading: dict[str, str],
) -> None:
    """The page of a comparison, whole or not at all.

    Args:
        cells, rows: in the same order.
        clip_of: the clip of a cell that did not fail.
        paths_of: what is drawn over a reference.

    Raises:
        StorageError: the file cannot be written.
    """
    payload = {
        "id": comparison_id(rows),
        "heading": heading,
        "fps": cells[0].pair.source.read().fps if cells else 1.0,
        "measures": [asdict(measure) for measure in MEASURES],
        "costs": COSTS,
        "gains": [asdict(gain) for gain in gains_of(rows) if gain.measure in HEADLINES],
        "headlines": HEADLINES,
        "loras": loras_of(cells),
        **_pictured(cells, rows, clip_of, paths_of),
    }
    write_text(path, page_of(payload))


def _pictured(
    cells: Sequence[Cell], rows: Sequence[Row], clip_of: Callable[[Cell], Clip], paths_of: Callable[[Source], Paths]
) -> dict[str, Any]:
    """The rows, and every clip that they and their sources show, as one picture each and one of its displacements."""
    sheets: dict[str, dict[str, Any]] = {}
    fields: dict[str, np.ndarray] = {}

    def sheet(name: str, clip: Callable[[], Clip]) -> int:
        if name not in sheets:
            made = clip()
            sheets[name], fields[name] = sheet_of(made), field_of(made)
        return list(sheets).index(name)

    sources: dict[str, dict[str, Any]] = {}
    shown = []
    for cell, row in zip(cells, rows, strict=True):
        source = cell.pair.source
        if source.name not in sources:
            sources[source.name] = {"sheet": sheet(source.content, source.read), "paths": paths_of(source)}
        name = source.content if row.control == "reference" else row.key
        number = sheet(name, partial(clip_of, cell)) if row.status == "done" else None
        shown.append({**asdict(row), "id": row_id(row), "sheet": number})
        del shown[-1]["key"]
    speed = full_speed(fields.values())
    for name, found in sheets.items():
        pictures = [Image.fromarray(coloured(frame, speed)) for frame in fields[name]]
        found["field"] = webp_of(pictures, found["columns"], 80)
    return {"sources": sources, "sheets": list(sheets.values()), "speed": speed, "rows": shown}


def page_of(payload: dict[str, Any]) -> str:
    """The page around its data."""
    page = _part("report_page.html")
    page = page.replace("/*STYLE*/", _part("report_page.css"))
    page = page.replace("/*SCRIPT*/", "\n".join(_part(name) for name in SCRIPTS))
    return page.replace("<!--DATA-->", embedded(payload))


def embedded(payload: Any) -> str:
    """JSON that cannot end the script it stands in, nor begin markup; NaN becomes null."""
    finite = json.loads(json.dumps(payload), parse_constant=lambda name: None)
    text = json.dumps(finite, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def sheet_of(clip: Clip) -> dict[str, Any]:
    """All frames of a clip in one WebP, row by row, as a data URI; its frames' size there and their number."""
    scale = min(1.0, SIDE / max(clip.height, clip.width))
    height, width = max(1, round(clip.height * scale)), max(1, round(clip.width * scale))
    columns = math.ceil(math.sqrt(clip.frames * height / width))
    pictures = [Image.fromarray(np.ascontiguousarray(frame)) for frame in clip.pixels]
    if scale < 1:
        pictures = [picture.resize((width, height), Image.Resampling.LANCZOS) for picture in pictures]
    source = webp_of(pictures, columns, 92 if scale == 1 else 80)
    size = {"width": width, "height": height, "pixels": clip.width}
    return {"src": source, "frames": clip.frames, "columns": columns, **size}


def webp_of(pictures: Sequence[Image.Image], columns: int, quality: int) -> str:
    """Pictures of one size, row by row, as one WebP in a data URI."""
    width, height = pictures[0].size
    canvas = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height))
    for index, picture in enumerate(pictures):
        canvas.paste(picture, (index % columns * width, index // columns * height))
    content = io.BytesIO()
    canvas.save(content, format="WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


def full_speed(fields: Iterable[np.ndarray]) -> float:
    """Pixels a frame at which a displacement has its full colour: one for the page, that few cells exceed."""
    speeds = [float(np.quantile(np.hypot(*np.moveaxis(field, -1, 0)), 0.98)) for field in fields]
    return round(max(speeds, default=0.0), 3) or 1.0


def loras_of(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Every LoRA of a method, each clip's own: how its loss fell, and the heads that it was measured and trained on."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in cells:
        place = (cell.method.name, cell.pair.source.name)
        if not cell.method.lora or cell.method.control != "none" or place in found:
            continue
        path = lora_choice(cell.donor.lora).path
        if path.is_file():
            learned = learned_beside(path)
            facts = {"curves": learned.curves, "seconds": learned.seconds, **_heads_of(path)}
            found[place] = {"method": place[0], "clip": place[1], **facts}
    return list(found.values())


def _heads_of(path: Path) -> dict[str, Any]:
    """Rank, and scores and choice of heads, None where the file tells none."""
    lora = load_lora(path)
    told, measured = lora.provenance, lora.head_map
    heads = None
    if measured is not None and lora.stage in ("spatial", "temporal"):
        rule: Any = told.get("rule", "code")
        chosen = measured.chosen(lora.stage, rule, float(str(told.get("ratio", 1.3))))
        heads = {"scores": measured.scores.round(4).tolist(), "trained": chosen.astype(int).tolist()}
    return {"rank": lora.rank, "heads": heads}


def row_id(row: Row) -> str:
    """An opaque name of a cell, which tells no one its method."""
    parts = [row.clip, row.caption, row.method, row.seed]
    return sha256(json.dumps(parts).encode()).hexdigest()[:16]


def comparison_id(rows: Sequence[Row]) -> str:
    """Which clips a page shows: rankings of one page are not those of another."""
    return sha256(json.dumps([[row_id(row), row.key] for row in rows]).encode()).hexdigest()[:16]


def _part(name: str) -> str:
    return (resources.files("motionlora.infer") / name).read_text(encoding="utf-8")
