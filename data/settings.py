"""How any settings class is read from YAML and command line; knows no class itself.

A subcommand takes the shared keys of the file that its class knows, then its own section of the file, then the command
line. Every mistake is one sentence. Nothing heavy is imported here: `--help` has to answer at once.
"""

import contextlib
import functools
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from motionlora.data.complaint import flags_of, sentence
from motionlora.data.errors import InputError as InputError
from motionlora.data.errors import NumbersError as NumbersError
from motionlora.data.errors import StorageError as StorageError
from motionlora.data.errors import meant
from motionlora.data.yaml_file import Located, config_path, merged, read_yaml, section_of


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
    source, prints, args = _own_flags(argv, config, reads_file=config is not None)
    values = Located() if source is None else section_of(read_yaml(config_path(source)), cls, section, sections or {})
    start = _defaults(cls, values, prog)
    settings = _overridden(cls, start, values, args, prog, _help_text(description, source))
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


# --- the class ---


def _defaults(cls: type[AnySettings], values: Located, prog: str) -> AnySettings:
    """The class filled from the file; settings that have no value yet are left to the command line (tyro.MISSING)."""
    import tyro

    complete = _on_defaults(cls, values)
    try:
        return cls.model_validate(complete)
    except ValidationError as error:
        bad = [part for part in error.errors() if not (part["type"] == "missing" and len(part["loc"]) == 1)]
        if bad:
            raise InputError(sentence(bad[0], cls, values, {}, prog)) from None
    filled: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        if name in complete:
            kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            filled[name] = TypeAdapter(kind).validate_python(complete[name])
        elif field.is_required():
            filled[name] = tyro.MISSING
    return cls.model_construct(**filled)


def _on_defaults(cls: type[BaseModel], values: Mapping[str, Any]) -> Located:
    """`values` with nested settings completed by the defaults of their field, which may differ from their class's."""
    complete = Located(values, getattr(values, "places", {}))
    for name, field in cls.model_fields.items():
        default = field.get_default(call_default_factory=True) if not field.is_required() else None
        if isinstance(default, BaseModel) and isinstance(values.get(name), Mapping):
            complete[name] = merged(default.model_dump(), values[name])
    return complete


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


# --- the command line ---


def _own_flags(argv: Sequence[str], config: str | None, *, reads_file: bool) -> tuple[str | None, bool, list[str]]:
    """What `--config` and `--print-config` say, and the arguments without them."""
    source, rest = take_flag(argv, "config") if reads_file else (None, list(argv))
    prints = any(_field_name(word) == "print_config" for word in rest)
    return source or config, prints, [word for word in rest if _field_name(word) != "print_config"]


def _help_text(description: str, source: str | None) -> str:
    if source is None:
        return description
    return (
        f"{description}\n\n--config NAME|FILE: settings to start from, now `{source}`; the defaults below come from it."
        "\n--print-config: print the resolved settings as YAML and stop."
    )


def _overridden(
    cls: type[AnySettings], start: AnySettings, values: Located, args: list[str], prog: str, description: str
) -> AnySettings:
    """tyro's result, or the reason of its refusal in one sentence instead of its boxes."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                cls,
                prog=prog,
                description=description,
                args=args,
                default=start,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stopped:
        if stopped.code in (0, None):
            raise
    raise InputError(_reason(cls, start, values, args, prog, said.getvalue()))


def _reason(cls: type[BaseModel], start: BaseModel, values: Located, args: Sequence[str], prog: str, said: str) -> str:
    """Why tyro refused `args`: found by reading them again ourselves, else its own words in one line."""
    flags, given = flags_of(cls), _given(args)
    if stray := given.pop("", []):
        return f"unexpected word {stray[0]!r:.80}: options begin with --, and words with spaces need quotes."
    for name, words in given.items():
        if misspelt := _misspelt(name, words, flags):
            return misspelt
    known = {name: start.__dict__[name] for name in cls.model_fields if _has_value(start, name)}
    known = {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in known.items()}
    for name, words in given.items():
        if name in flags:
            _put(known, name.split("."), _read(words, flags[name]))
    try:
        cls.model_validate(known)
    except ValidationError as error:
        return sentence(error.errors()[0], cls, values, given, prog)
    words = " ".join(re.sub(r"[\u2500-\u257f]", " ", said).split())[:800]
    return f"{words or 'these arguments cannot be read'} (see `{prog} --help`)."


def _misspelt(name: str, words: Sequence[str], flags: Mapping[str, Any]) -> str:
    """What is wrong with an option itself: unknown, or a switch that was given a value; "" if nothing."""
    head, dot, tail = name.rpartition(".")
    switched_on = f"{head}{dot}{tail.removeprefix('no_')}"
    switch = next((flag for flag in (name, switched_on) if flags.get(flag) is bool), None)
    if name not in flags and switch is None:
        return f"unknown option {_option(name)} ({meant(_option(name), [_option(flag) for flag in flags])})."
    if switch is not None and words:
        head, dot, tail = switch.rpartition(".")
        off = _option(f"{head}{dot}no_{tail}")
        return f"{_option(switch)} takes no value, got {words[0]!r:.80}; write {_option(switch)} or {off}."
    return "" if words or switch or _takes_many(flags[name]) else f"{_option(name)} needs a value after it."


def _given(args: Sequence[str]) -> dict[str, list[str]]:
    """The options in `args` with the words after each; words before the first option are under ""."""
    given: dict[str, list[str]] = {}
    name = ""
    for word in args:
        if word.startswith("--") and len(word) > 2:
            flag, equals, value = word.partition("=")
            name = _field_name(flag) or ""
            given[name] = [value] if equals else []
        else:
            given.setdefault(name, []).append(word)
    return given


def _has_value(start: BaseModel, name: str) -> bool:
    import tyro

    return name in start.__dict__ and start.__dict__[name] is not tyro.MISSING


def _read(words: list[str], kind: Any) -> Any:
    """Command-line words as pydantic may take them: a list for a sequence, None for "None" where that is allowed."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if type(None) in parts and words == ["None"]:
        return None
    return words if _takes_many(kind) or len(words) != 1 else words[0]


def _takes_many(kind: Any) -> bool:
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return any(get_origin(part) in (tuple, list, Sequence) for part in parts)


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _field_name(flag: str) -> str | None:
    """`--lora.no-bias` as `lora.no_bias`; None for a word that is no option."""
    return flag[2:].replace("-", "_") if flag.startswith("--") else None


def _option(name: str) -> str:
    """`lora.no_bias` as `--lora.no-bias`."""
    return "--" + name.replace("_", "-")
