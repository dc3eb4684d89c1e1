"""A complaint of pydantic as one sentence: where, what came, what is allowed, and the nearest valid name."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from motionlora.data.errors import meant
from motionlora.data.yaml_file import Located


def sentence(
    error: Any, cls: type[BaseModel], values: Mapping[str, Any], given: Mapping[str, Sequence[str]], prog: str
) -> str:
    """One pydantic complaint as one sentence that says where, what came and what is allowed."""
    path = _known_part(cls, error["loc"])
    name = ".".join(path)
    option = "--" + name.replace("_", "-")
    if error["type"] == "missing":
        return f"{option} is missing; give it on the command line or in the configuration file (see `{prog} --help`)."
    place = _place(values, path)
    if error["type"] == "extra_forbidden":
        names = sorted(_names_beside(cls, path))
        return f"{place or prog}: unknown key `{name}` ({meant(name, names)})."
    reason = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").rstrip(".")
    if not name:
        return f"{reason}."
    start = f"{option} is" if name in given or not place else f"{place}: {name} is"
    reason = re.sub(r"^Input should", "it should", reason.split(", unable to parse")[0])
    hint = ""
    if error["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))
        hint = f" ({meant(str(error['input']), choices)})" if choices else ""
    return f"{start} {error['input']!r:.80}: {reason}{hint}."


def _known_part(cls: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    """The part of a pydantic location that names keys: without list positions and the names of union members."""
    path: list[str] = []
    inside: Any = cls
    for part in loc:
        if not (isinstance(inside, type) and issubclass(inside, BaseModel)):
            break
        path.append(str(part))
        inside = inside.model_fields[part].annotation if part in inside.model_fields else None
    return path


def _names_beside(cls: type[BaseModel], path: Sequence[str]) -> set[str]:
    """All settings that could have been meant by an unknown one: dotted names, and the groups at the same place."""
    inside: Any = cls
    for part in path[:-1]:
        inside = inside.model_fields[part].annotation
    prefix = "".join(f"{part}." for part in path[:-1])
    return {prefix + name for name in inside.model_fields} | set(flags_of(cls))


def _place(values: Mapping[str, Any], path: Sequence[str]) -> str:
    """Where in a file the key stands; "" if it came from elsewhere."""
    place = ""
    for part in path:
        if not isinstance(values, Located) or part not in values:
            return place
        place, values = values.places.get(part, place), values[part]
    return place


def flags_of(cls: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """The type of every setting of a class by its dotted name, nested classes included."""
    found: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= flags_of(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.annotation
    return found
