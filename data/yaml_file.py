"""A YAML file of settings: found by name, read with its line numbers, and cut to the part a subcommand needs.

A file has shared keys at the top (`model`, `frames`, ...) and one section for each subcommand that wants its own
(`train:`, `generate:`). Shared keys that a subcommand's class does not know are left out; its section lies on top.
"""

import math
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from motionlora.data.errors import InputError, meant

LARGEST = 100_000
"""Characters of a file of settings that are read, and values that its aliases may make of it."""


class Located(dict[str, Any]):
    """A mapping of a YAML file that remembers where each of its keys stands ("tiny.yaml, line 3")."""

    def __init__(self, values: Mapping[str, Any] | None = None, places: Mapping[str, str] | None = None):
        super().__init__(values or {})
        self.places = dict(places or {})


def config_path(name: str) -> Path:
    """The file behind `--config`: a path, or the bare name of a configuration that ships with the package."""
    path = Path(name)
    if path.is_file():
        return path
    folder = Path(str(resources.files("motionlora.configs")))
    packaged = folder / f"{path.name.removesuffix('.yaml')}.yaml"
    if packaged.is_file() and path.parent.name in ("", "configs"):
        return packaged
    names = sorted(file.stem for file in folder.glob("*.yaml") if not file.stem.startswith("accelerate"))
    what = "is a folder" if path.is_dir() else "does not exist"
    raise InputError(f"--config {name} {what}; give a YAML file or one of {', '.join(names)} ({meant(name, names)}).")


def read_yaml(path: Path) -> Located:
    """The mapping in a YAML file; its keys remember their lines.

    Raises:
        InputError: unreadable, not YAML, a key twice, or not a mapping.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as text ({error}); give a YAML file.") from None
    if len(text) > LARGEST:
        raise InputError(f"{path} has more than {LARGEST:,} characters, which no settings have; give a YAML file.")
    values = parsed_yaml(text, path.name)
    if values is None:
        return Located()
    if not isinstance(values, Located):
        raise InputError(f"{path.name} holds a {type(values).__name__}, not `key: value` lines; give a mapping.")
    return values


def parsed_yaml(text: str, source: str, *, otherwise: str = "not YAML") -> Any:
    """The values of a YAML text (JSON is a part of it); mappings are `Located`.

    Args:
        source: how refusals call the text.
        otherwise: what they call one that cannot be read.

    Raises:
        InputError: not YAML, a key twice, nested too deeply, or more values than anyone wrote.
    """
    try:
        return _parsed(text, source)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        reason = " ".join(str(error.problem or error.context).split())
        raise InputError(f"{source}, line {line}: this is {otherwise}, {reason}; correct the line.") from None
    except yaml.YAMLError as error:
        raise InputError(f"{source}: this is {otherwise}, {' '.join(str(error).split())}.") from None
    except RecursionError:
        raise InputError(f"{source} is nested too deeply to be read; write plain `key: value` lines.") from None


def _parsed(text: str, source: str) -> Any:
    """The values of a document, which aliases must not blow up: eleven lines can stand for billions of values."""
    loader, most = _loader(source)(text), max(LARGEST, len(text))  # without aliases no more than there are characters
    node = loader.get_single_node()
    if node is not None and _values_in(node, {}) > most:
        raise InputError(f"{source} holds more than {most:,} values by its aliases (&, *); write them out.")
    return None if node is None else loader.construct_document(node)


def _values_in(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values stand below a node, those behind aliases each time; infinite for one that holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is counted: met again below, it holds itself
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        parts = [] if isinstance(node, yaml.ScalarNode) else parts
        known[id(node)] = 1 + sum(_values_in(part, known) for part in parts)
    return known[id(node)]


def _loader(source: str) -> type[yaml.SafeLoader]:
    """A safe loader that reads 2e-4 as a number (YAML 1.1 wants 2.0e-4), refuses doubled keys, and remembers lines."""

    class Loader(yaml.SafeLoader):
        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                if isinstance(error, InputError):
                    raise
                place, value = f"{source}, line {node.start_mark.line + 1}", str(node.value)[:80]
                raise InputError(f"{place}: {value!r} cannot be read as its tag says ({error}); correct it.") from None

        def construct_yaml_map(self, node: yaml.MappingNode) -> Iterator[Located]:
            values = Located()
            yield values
            for key, _ in node.value:
                name, place = str(self.construct_object(key)), f"{source}, line {key.start_mark.line + 1}"
                if name in values.places and name != "<<":
                    raise InputError(
                        f"{place}: `{name}` stands twice (first: {values.places[name]}); keep one of them."
                    )
                values.places[name] = place
            values.update({str(key): value for key, value in self.construct_mapping(node).items()})

    exponent = re.compile(r"^[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789."))
    Loader.add_constructor("tag:yaml.org,2002:map", Loader.construct_yaml_map)
    return Loader


def section_of(
    values: Located, cls: type[BaseModel], section: str | None, sections: Mapping[str, type[BaseModel]]
) -> Located:
    """The keys of a file that belong to `cls`: shared ones that it knows, then its own section on top."""
    shared = set(cls.model_fields).union(*(other.model_fields for other in sections.values()))
    _refuse_unknown(values, shared | set(sections))
    for key in sections.keys() & values.keys():
        if not isinstance(values[key], Mapping | None):
            raise InputError(f"{values.places[key]}: `{key}` is a section; put its settings below it, indented.")
        _refuse_unknown(values[key] or Located(), set(sections[key].model_fields), f"{key}.")
    own = (values.get(section) if section is not None and section in sections else None) or {}
    known = {key: value for key, value in values.items() if key in cls.model_fields and key not in sections}
    return merged(Located(known, values.places), own)


def _refuse_unknown(values: Located, known: set[str], prefix: str = "") -> None:
    for key in values:
        if key not in known:
            raise InputError(f"{values.places[key]}: unknown key `{prefix}{key}` ({meant(key, sorted(known))}).")


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Located:
    """Two mappings as one; where both hold a mapping under a key, those are merged too, else `above` wins."""
    result = Located(below, {**getattr(below, "places", {}), **getattr(above, "places", {})})
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def overlaid(tree: Mapping[str, Any], values: Mapping[str, Any]) -> Located:
    """Nested settings with others on top, which are given by their dotted names (`lora.rank`)."""
    result = Located(tree, getattr(tree, "places", {}))
    for name, value in values.items():
        above = value
        for part in reversed(name.split(".")):
            above = {part: above}
        result = merged(result, above)
    return result
