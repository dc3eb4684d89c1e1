"""A captions file: which clip's motion goes to which caption.

It has one entry a pair. Text: `CLIP | CAPTION`, a third column may name the clip's LoRA, and # begins a comment. YAML
or JSON: a list of mappings with `clip`, `caption`, and where wanted `lora` and `kind`, or one mapping `CLIP: CAPTION`
or `CLIP: [CAPTION, ...]`. JSON lines: such a mapping a line. CSV: a column for each of `clip`, `caption`, `lora`,
`kind`; or LOVEU-TGVE's own file, with a column a class. CLIP is a file's name, with or without its suffix; a
LoRA's path begins at the captions file; `kind` is a word of one's own, shown in the table.
"""

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motionlora.data.errors import InputError, meant
from motionlora.data.json_text import parsed_json
from motionlora.data.manifest import MANIFESTS
from motionlora.data.yaml_file import parsed_yaml
from motionlora.infer.settings import lora_choice

NAMES = ("captions.txt", "captions.csv", "captions.yaml", "captions.yml", "captions.json", "captions.jsonl")
FIELDS = ("clip", "caption", "lora", "kind")
LOVEU_CLIP = "Video name"


@dataclass(frozen=True)
class Asked:
    """One entry of a captions file, and where it stands."""

    clip: str
    caption: str
    lora: str
    kind: str
    place: str = field(compare=False)


def read_captions(path: Path) -> list[Asked]:
    """The entries of a captions file, in its order.

    Raises:
        InputError: unreadable, of another kind, empty, or an entry without clip or caption.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError(f"{path} cannot be read as text ({fault}): give a captions file.") from None
    readers = {".txt": _columns, ".csv": _table, ".jsonl": _json_lines, ".json": _document}
    readers |= {".yaml": _document, ".yml": _document}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: captions come as {', '.join(readers)}, not {path.suffix!r}: rename or convert it.")
    entries = list(readers[path.suffix.lower()](text, path.name))
    if not entries:
        raise InputError(
            f"{path} holds no caption: write a line for each pair, as in `clip.mp4 | a fox runs over snow`."
        )
    return [_checked(values, place) for values, place in entries]


def _columns(text: str, name: str) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        words = [word.strip() for word in line.split("|")]
        if line.strip() and not line.lstrip().startswith("#"):
            if not 2 <= len(words) <= 3:
                raise InputError(
                    f"{name}, line {number}: {line.strip()!r} should be CLIP | CAPTION or CLIP | CAPTION | LORA."
                )
            yield dict(zip(FIELDS, words, strict=False)), f"{name}, line {number}"


def _table(text: str, name: str) -> Iterator[tuple[Any, str]]:
    """CSV. LOVEU-TGVE's has headings of one cell between its rows, and columns like `Style Change Caption`."""
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""), restval="")
    try:
        rows = [(row, f"{name}, line {reader.line_num}") for row in reader]
    except csv.Error as error:
        line = reader.reader.line_num
        raise InputError(f"{name}, line {line}: this is not CSV, {error}; correct the line.") from None
    heads = reader.fieldnames or []
    classes = {kind: head for kind in MANIFESTS["loveu"].classes for head in heads if head.lower().startswith(kind)}
    for row, place in rows:
        if None in row:
            raise InputError(f"{place}: more cells than headings came: put a caption with commas in double quotes.")
        if LOVEU_CLIP not in heads:
            yield row, place
            continue
        for kind, head in classes.items():
            if row[head].strip():
                yield {"clip": row[LOVEU_CLIP], "caption": row[head], "kind": kind}, place


def _json_lines(text: str, name: str) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield parsed_json(line), f"{name}, line {number}"
            except ValueError as error:
                raise InputError(f"{name}, line {number}: this is not JSON, {error}; correct the line.") from None


def _document(text: str, name: str) -> Iterator[tuple[Any, str]]:
    """YAML, of which JSON is a part."""
    values = parsed_yaml(text, name, otherwise="neither YAML nor JSON")
    if isinstance(values, Mapping):
        for clip, captions in values.items():
            for caption in captions if isinstance(captions, list) else [captions]:
                yield {"clip": clip, "caption": caption}, f"{name}, {clip}"
        return
    if values is not None and not isinstance(values, list):
        raise InputError(f"{name} holds a {type(values).__name__}: give a list of entries, or CLIP: CAPTION lines.")
    yield from ((entry, f"{name}, entry {number}") for number, entry in enumerate(values or [], 1))


def _checked(values: Any, place: str) -> Asked:
    if not isinstance(values, Mapping):
        raise InputError(f"{place}: {values!r} should be an entry with clip and caption.")
    for key, value in values.items():
        if key not in FIELDS:
            raise InputError(f"{place}: unknown key `{key}` ({meant(str(key), FIELDS)}).")
        if not isinstance(value, str):
            raise InputError(f"{place}: {key} is {value!r}, which is no text: put it in quotes.")
    texts = {key: " ".join(str(values.get(key, "")).split()) for key in FIELDS}
    for key in ("clip", "caption"):
        if not texts[key]:
            raise InputError(f"{place}: there is no {key}: each entry names a clip and what shall be seen.")
    if texts["lora"]:
        lora_choice(texts["lora"])
    return Asked(**texts, place=place)
