"""The `motionlora` command: finds the subcommand, composes its settings, runs it; every ending has its exit code."""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from motionlora.data.errors import InputError, meant
from motionlora.data.limits import Limits
from motionlora.data.settings import parse, take_flag
from motionlora.train.endings import exit_code
from motionlora.train.guidance_choice import with_guidance
from motionlora.train.subcommands import SECTIONS, SUBCOMMANDS

OVERVIEW = """usage: motionlora SUBCOMMAND [OPTIONS]

Motion transfer on video Diffusion Transformers: from one clip to a motion LoRA to new videos.

{subcommands}

`motionlora SUBCOMMAND --help` lists its options. Settings come from `--config NAME|FILE` (tiny, wan2.1_1.3b,
wan2.1_14b, wan2.2_5b, wan2.2_a14b, cogvideox_5b or a YAML file; default: tiny), then from the options; `--print-config`
prints them as YAML."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Returns the exit code; whatever goes wrong by input, setting or storage is one sentence."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except SystemExit as ended:  # --help and --print-config
        return ended.code if isinstance(ended.code, int) else 0
    except BaseException as error:
        return exit_code(error)


def _run(words: list[str]) -> int:
    name, rest = _found(words)
    subcommand = SUBCOMMANDS[name]
    settings = settings_of(name, rest)
    with getattr(settings, "limits", Limits()).used():
        subcommand.run(settings)
    sys.stdout.flush()
    return 0


def settings_of(name: str, argv: Sequence[str]) -> Any:
    """The settings of one subcommand; a leading bare word is its file, and `--guidance NAME` chooses a class.

    Raises:
        InputError: an unknown key, a wrong type or an impossible value.
    """
    subcommand, rest = SUBCOMMANDS[name], list(argv)
    helped = bool({"-h", "--help"} & set(rest))
    if subcommand.file and rest and not rest[0].startswith("-"):
        rest = [f"--{subcommand.file}", *rest]
    elif subcommand.file and not helped and take_flag(rest, subcommand.file)[0] is None:
        raise InputError(f"no FILE was named, which comes before the options: motionlora {name} FILE.")
    cls = subcommand.settings
    sections = {**SECTIONS}
    if name == "generate":
        cls, rest = with_guidance(cls, rest, subcommand.config or "")
        sections["generate"] = cls
    if subcommand.config and "height" in cls.model_fields and not helped:
        _refuse_foreign_size(rest, subcommand.config)
    return parse(
        cls,
        rest,
        prog=f"motionlora {name}",
        description=subcommand.summary,
        config=subcommand.config,
        section=subcommand.section,
        sections=sections,
    )


def _refuse_foreign_size(argv: Sequence[str], config: str) -> None:
    """InputError where another model would be used at the size of the default file's model, which nobody asked for."""
    model = take_flag(argv, "model")[0]
    given = {name for name in ("config", "height", "width") if take_flag(argv, name)[0] is not None}
    if model not in (None, config) and "config" not in given and not {"height", "width"} <= given:
        raise InputError(
            f"--model {model} came without --config, and the default file, {config}, is made for another model: add "
            "--config wan2.1_1.3b, wan2.1_14b, wan2.2_5b, wan2.2_a14b, cogvideox_5b or a file of your own, or set both "
            "--height and --width."
        )


def _found(words: list[str]) -> tuple[str, list[str]]:
    """The subcommand that `words` begin with and the words after it; ends the run if help was wanted instead."""
    for length in (3, 2, 1):
        name = " ".join(words[:length])
        if name in SUBCOMMANDS:
            return name, words[length:]
    group = words[0] if words else ""
    members = [name for name in SUBCOMMANDS if name.startswith(f"{group} ")]
    after = words[1:] if members else words
    if not after or after[0] in ("-h", "--help"):
        _show(members or list(SUBCOMMANDS), complete=bool(after))
    if after[0] == "--version":
        from importlib.metadata import version

        print(f"motionlora {version('motionlora')}")
        raise SystemExit(0)
    word = f"{group} {after[0]}" if members else after[0]
    names = members or list(dict.fromkeys(part for name in SUBCOMMANDS for part in (name.split()[0], name)))
    raise InputError(f"there is no subcommand `{word}` ({meant(word, names)}); `motionlora --help` lists all.")


def _show(names: list[str], *, complete: bool) -> NoReturn:
    """Prints the overview of some subcommands; exit code 2 if nothing asked for help."""
    width = max(14, *map(len, names))
    lines = [f"  {name:<{width}} {SUBCOMMANDS[name].summary.splitlines()[0]}" for name in names]
    print(OVERVIEW.format(subcommands="\n".join(lines)), file=sys.stdout if complete else sys.stderr)
    raise SystemExit(0 if complete else 2)
