"""A comparison as one page that opens from disk: clips in step, tracks, tables, filters, and a blind ranking.

Every clip is one picture of all its frames (WebP), which the page draws frame by frame: that plays in every browser,
never falls out of step, and scrubs at once. All that comes from people reaches the page as JSON whose `<`, `>` and `&`
are escaped, and is shown as text only.
"""

import base64
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from motionlora.data.cache import replacing
from motionlora.data.clip import Clip
from motionlora.infer.compare_table import HEADLINES
from motionlora.infer.gains import COSTS, gains_of
from motionlora.infer.measure_pair import MEASURES
from motionlora.infer.pairs import Source
from motionlora.infer.row import Row
from motionlora.infer.studio import Cell

SIDE = 416
"""Pixels of a frame's longer side on the page; larger clips are made smaller there."""
SCRIPTS = ("report_table.js", "report_play.js", "report_blind.js")
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
    sheets: dict[str, dict[str, Any]] = {}

    def sheet(name: str, clip: Callable[[], Clip]) -> int:
        if name not in sheets:
            sheets[name] = sheet_of(clip())
        return list(sheets).index(name)

    sources: dict[str, dict[str, Any]] = {}
    shown = []
    for cell, row in zip(cells, rows, strict=True):
        source = cell.pair.source
        if source.name not in sources:
            number = sheet(source.content, source.read)
            sources[source.name] = {"sheet": number, "paths": paths_of(source)}
        made = row.status == "done"
        name = source.content if row.control == "reference" else row.key
        number = sheet(name, lambda cell=cell: clip_of(cell)) if made else None
        shown.append({**asdict(row), "id": row_id(row), "sheet": number})
        del shown[-1]["key"]
    payload = {
        "id": comparison_id(rows),
        "heading": heading,
        "fps": cells[0].pair.source.read().fps if cells else 1.0,
        "measures": [asdict(measure) for measure in MEASURES],
        "costs": COSTS,
        "gains": [asdict(gain) for gain in gains_of(rows) if gain.measure in HEADLINES],
        "sources": sources,
        "sheets": list(sheets.values()),
        "rows": shown,
    }
    with replacing(path) as draft:
        draft.write_text(page_of(payload), encoding="utf-8")


def page_of(payload: dict[str, Any]) -> str:
    """The page around its data."""
    page = _part("report_page.html")
    page = page.replace("/*STYLE*/", _part("report_page.css"))
    page = page.replace("/*SCRIPT*/", "\n".join(_part(name) for name in SCRIPTS))
    return page.replace("<!--DATA-->", embedded(payload))


def embedded(payload: Any) -> str:
    """JSON that cannot end the script it stands in, nor begin markup; NaN becomes null."""
    text = json.dumps(_without_nan(payload), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def sheet_of(clip: Clip) -> dict[str, Any]:
    """All frames of a clip in one WebP, row by row, as a data URI; its frames' size there and their number."""
    scale = min(1.0, SIDE / max(clip.height, clip.width))
    height, width = max(1, round(clip.height * scale)), max(1, round(clip.width * scale))
    columns = math.ceil(math.sqrt(clip.frames * height / width))
    lines = math.ceil(clip.frames / columns)
    canvas = Image.new("RGB", (columns * width, lines * height))
    for index, frame in enumerate(clip.pixels):
        picture = Image.fromarray(np.ascontiguousarray(frame))
        if scale < 1:
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        canvas.paste(picture, (index % columns * width, index // columns * height))
    content = io.BytesIO()
    canvas.save(content, format="WEBP", quality=92 if scale == 1 else 80, method=4)
    source = "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
    facts = {"width": width, "height": height, "frames": clip.frames, "columns": columns, "pixels": clip.width}
    return {"src": source, **facts}


def row_id(row: Row) -> str:
    """An opaque name of a cell, which tells no one its method."""
    parts = [row.clip, row.caption, row.method, row.seed]
    return sha256(json.dumps(parts).encode()).hexdigest()[:16]


def comparison_id(rows: Sequence[Row]) -> str:
    """Which clips a page shows: rankings of one page are not those of another."""
    return sha256(json.dumps([[row_id(row), row.key] for row in rows]).encode()).hexdigest()[:16]


def _part(name: str) -> str:
    return (resources.files("motionlora.infer") / name).read_text(encoding="utf-8")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
