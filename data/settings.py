"""How any settings class is read from YAML and command line; knows no class itself.

A subcommand takes the shared keys of the file that its class knows, then its own section of the file, then the command
line. Every mistake is one sentence. Nothing heavy is imported here: `--help` has to answer at once.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from motionlora.data.complaint import flags_of, sentence
from motionlora.data.errors import InputError as InputError
from motionlora.data.errors import NumbersError as NumbersError
from motionlora.data.errors import StorageError as StorageError
from motionlora.data.errors import meant
from motionlora.data.yaml_file import Located, config_path, merged, overlaid, read_yaml, section_of


class Settings(BaseModel):
    """What every settings class of the project is: frozen, and no key that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


AnySettings = TypeVar("AnySettings", bound=BaseModel)


def parse(
    cls: type[AnySettings],
    argv: Sequence[str],
    *,
    prog: str,
    description: str = "",
    config: str | None = None,
    section: str | None = None,
    sections: Mapping[str, type[BaseModel]] | None = None,
) -> AnySettings:
    """Settings of `cls` from the file named by `--config` (or `config`), overridden by the rest of `argv`.

    `config` None means that the subcommand reads no file. `section` is the part of the file that belongs to this
    subcommand; `sections` names the class behind every section, so that a shared key counts as known where any class
    knows it. `--print-config` prints the result as YAML that can be fed back; `--help` is tyro's. Both end with
    SystemExit(0).

    Raises:
        InputError: unknown key, wrong type, impossible value or no such file; names the nearest valid name.
    """
    source, rest = take_flag(argv, "config") if config is not None else (None, list(argv))
    source = source or config
    prints = any(_field_name(word) == "print_config" for word in rest)
    args = [word for word in rest if _field_name(word) != "print_config"]
    values = Located() if source is None else section_of(read_yaml(config_path(source)), cls, section, sections or {})
    start = _from_file(cls, values, prog)
    if {"-h", "--help"} & set(args):
        _show_help(cls, start, prog, description, source)
    settings = _overridden(cls, start, values, args, prog)
    _refuse_impossible(settings)
    if prints:
        print(as_yaml(settings, section), end="")
        raise SystemExit(0)
    return settings


def as_yaml(settings: BaseModel, section: str | None = None) -> str:
    """The settings as YAML; under the name of their section, so that the file can be given back to `--config`.

    Also groups that change no result, which other records leave out (`exclude` in their field); not a single value that
    is so marked, which only the command line gives.
    """
    values = settings.model_dump(mode="json")
    silent = {name: getattr(settings, name) for name, field in type(settings).model_fields.items() if field.exclude}
    values |= {name: group.model_dump(mode="json") for name, group in silent.items() if isinstance(group, BaseModel)}
    return yaml.safe_dump(
        values if section is None else {section: values}, sort_keys=False, allow_unicode=True, width=100
    )


def take_flag(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The last value of `--name VALUE` or `--name=VALUE` in `argv` (None if absent), and `argv` without it."""
    rest: list[str] = []
    found: str | None = None
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if _field_name(flag) != name.replace("-", "_"):
            rest.append(word)
            continue
        found = value if equals else next(words, None)
        if found is None or (not equals and found.startswith("--")):
            raise InputError(f"--{name} needs a value after it.")
    return found, rest


def _from_file(cls: type[AnySettings], values: Located, prog: str) -> AnySettings | None:
    """The class filled from the file; None where the command line has to give what is missing."""
    try:
        return cls.model_validate(_on_defaults(cls, values))
    except ValidationError as error:
        bad = [part for part in error.errors() if not (part["type"] == "missing" and len(part["loc"]) == 1)]
        if bad:
            raise InputError(sentence(bad[0], cls, values, {}, prog)) from None
    return None


def _overridden(
    cls: type[AnySettings], start: AnySettings | None, values: Located, args: Sequence[str], prog: str
) -> AnySettings:
    """What the file gives, with the options of the command line on top."""
    chosen = _chosen(args, flags_of(cls))
    tree = overlaid(values if start is None else _as_tree(start), chosen)
    try:
        return cls.model_validate(_on_defaults(cls, tree))
    except ValidationError as error:
        raise InputError(sentence(error.errors()[0], cls, values, chosen, prog)) from None


def _on_defaults(cls: type[BaseModel], values: Mapping[str, Any]) -> Located:
    """`values` with nested settings completed by the defaults of their field, which may differ from their class's."""
    complete = Located(values, getattr(values, "places", {}))
    for name, field in cls.model_fields.items():
        default = field.get_default(call_default_factory=True) if not field.is_required() else None
        if isinstance(default, BaseModel) and isinstance(values.get(name), Mapping):
            complete[name] = merged(_as_tree(default), values[name])
    return complete


def _as_tree(settings: BaseModel) -> dict[str, Any]:
    """All values, those as well that records leave out."""
    return {name: _as_tree(value) if isinstance(value, BaseModel) else value for name, value in settings}


def _refuse_impossible(settings: BaseModel) -> None:
    """InputError for what no setting of the project can use, though its type allows it.

    `gt=0` alone would let infinity through, torch takes no longer integers, and neither files nor tokenizers take NUL
    or half a character.
    """
    for name in flags_of(type(settings)):
        value = functools.reduce(getattr, name.split("."), settings)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, float) and not math.isfinite(part):
                raise InputError(f"{_option(name)} is {part}: it should be a finite number.")
            if isinstance(part, int) and not -(2**63) <= part < 2**63:
                raise InputError(f"{_option(name)} is a number of {len(f'{part:x}')} hex digits: use one below 2^63.")
            if isinstance(part, str | Path) and re.search("[\0\ud800-\udfff]", str(part)):
                raise InputError(f"{_option(name)} is {str(part)!a:.80}: it should hold no NUL and UTF-8 text only.")


def _show_help(
    cls: type[AnySettings], start: AnySettings | None, prog: str, about: str, source: str | None
) -> NoReturn:
    """Prints tyro's page and ends the run."""
    import tyro

    if source is not None:
        about += (
            f"\n\n--config NAME|FILE: settings to start from, now `{source}`; the defaults below come from it."
            "\n--print-config: print the resolved settings as YAML and stop."
        )
    defaults: dict[str, Any] = {} if start is None else {"default": start}
    tyro.cli(cls, prog=prog, description=about, args=["--help"], config=(tyro.conf.AvoidSubcommands,), **defaults)
    raise SystemExit(0)


def _chosen(args: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The options in `args` by their dotted names, with values as pydantic may take them.

    Raises:
        InputError: a word that belongs to no option, an unknown option, one without its value, a switch with one.
    """
    chosen: dict[str, Any] = {}
    for name, words in _given(args):
        head, dot, tail = name.rpartition(".")
        switched = name if name in flags else f"{head}{dot}{tail.removeprefix('no_')}"
        if flags.get(switched) is bool:
            if words:
                on, off = _option(switched), _option(f"{head}{dot}no_{tail.removeprefix('no_')}")
                raise InputError(f"{on} takes no value, got {words[0]!r:.80}; write {on} or {off}.")
            chosen[switched] = name == switched
        elif name not in flags:
            hint = meant(_option(name), [_option(flag) for flag in flags])
            raise InputError(f"unknown option {_option(name)} ({hint}); --help lists all.")
        elif not words and not _takes_many(flags[name]):
            raise InputError(f"{_option(name)} needs a value after it.")
        else:
            chosen[name] = _read(words, flags[name])
    return chosen


def _given(args: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The options in `args` with the words after each."""
    given: list[tuple[str, list[str]]] = []
    for word in args:
        flag, equals, value = word.partition("=")
        if (name := _field_name(flag)) is not None:
            given.append((name, [value] if equals else []))
        elif given:
            given[-1][1].append(word)
        else:
            raise InputError(f"unexpected word {word!r:.80}: options begin with --, and words with spaces need quotes.")
    return given


def _read(words: list[str], kind: Any) -> Any:
    """Command-line words as pydantic may take them: a list for a sequence, None for "None" where that is allowed."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if type(None) in parts and words == ["None"]:
        return None
    return words if _takes_many(kind) or len(words) != 1 else words[0]


def _takes_many(kind: Any) -> bool:
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return any(get_origin(part) in (tuple, list, Sequence) for part in parts)


def _field_name(flag: str) -> str | None:
    """`--lora.no-bias` as `lora.no_bias`; None for a word that is no option."""
    return flag[2:].replace("-", "_") if flag.startswith("--") else None


def _option(name: str) -> str:
    """`lora.no_bias` as `--lora.no-bias`."""
    return "--" + name.replace("_", "-")
