"""The three ways a run can refuse, and how a mistyped name finds the right one."""

import difflib
from collections.abc import Sequence


class InputError(ValueError):
    """The input or a setting is wrong (exit code 2).

    The message is one sentence: what came, what is allowed, what to do next.
    """


class StorageError(RuntimeError):
    """Storage is full, read-only or damaged (exit code 3)."""


class NumbersError(RuntimeError):
    """The numbers went bad: NaN or infinity where none may be (exit code 4)."""


def nearest(word: str, names: Sequence[str]) -> str:
    """The name that `word` most likely meant: the same last part first, then the closest spelling; "" for no names."""
    lasts = {name: _last(name) for name in names}
    same = [name for name in names if lasts[name] == _last(word)]
    near = difflib.get_close_matches(word, same, 1, cutoff=0.0) or difflib.get_close_matches(word, names, 1, cutoff=0.6)
    if not near:
        near_last = difflib.get_close_matches(_last(word), list(lasts.values()), 1, cutoff=0.6)
        near = [name for name in names if lasts[name] in near_last]
    near = near or difflib.get_close_matches(word, names, 1, cutoff=0.0)
    return near[0] if near else ""


def meant(word: str, names: Sequence[str]) -> str:
    """`did you mean X?` for the nearest of `names`."""
    return f"did you mean {nearest(word, names)}?" if names else "none is known here"


def _last(name: str) -> str:
    """`rank` of `--lora.rank`."""
    return name.lstrip("-").rpartition(".")[2]
