"""How functions tell the user of their caller what they do: a sentence at a time, to `print` or to nobody."""

from collections.abc import Callable

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Says nothing."""
    del line
