"""The three ways a run can refuse, how it stops, and how a mistyped name finds the right one."""

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


class Stopped(RuntimeError):
    """A run ended before its last step and can go on; `code` is the exit code.

    130 or 143: the user or the scheduler stopped it, and it was saved. 1: another process of it died.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def nearest(word: str, names: Sequence[str]) -> str:
    """The name that `word` most likely meant: the same last part first, then the closest spelling; else ""."""
    lasts = {name: _last(name) for name in names}
    same = [name for name in names if lasts[name] == _last(word)]
    near = difflib.get_close_matches(word, same, 1, cutoff=0.0) or difflib.get_close_matches(word, names, 1, cutoff=0.6)
    if not near:
        near_last = difflib.get_close_matches(_last(word), list(lasts.values()), 1, cutoff=0.6)
        near = [name for name in names if lasts[name] in near_last]
    bare = {name.lstrip("-"): name for name in names}  # dashes are alike in all options
    near = near or [bare[name] for name in difflib.get_close_matches(word.lstrip("-"), bare, 1, cutoff=0.45)]
    return near[0] if near else ""


def meant(word: str, names: Sequence[str]) -> str:
    """`did you mean X?` for the nearest of `names`; all whose last part a word without dots is are as near."""
    same = [name for name in names if name != _last(name) == _last(word)] if "." not in word else []
    near = " or ".join(same) or nearest(word, names)
    return f"did you mean {near}?" if near else "no name is like it"


def _last(name: str) -> str:
    """`rank` of `--lora.rank`."""
    return name.lstrip("-").rpartition(".")[2]
