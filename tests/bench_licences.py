"""Under which licences is what motionlora stands on? Read from the metadata of the packages that are installed here.

    make licences        writes results/licences.md

Beginning with the dependencies in pyproject.toml, everything that they require in turn on this machine. Those of the
optional groups are listed where they are installed.
"""

import argparse
import re
from collections.abc import Iterator
from email.message import Message
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

LONGEST = 60
"""Characters of a licence's name; a longer text is the licence itself."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, default=Path("results/licences.md"))
    chosen = parser.parse_args()
    chosen.results.write_text(as_markdown(installed_needs("motionlora")))


def installed_needs(root: str) -> dict[str, tuple[Any, str]]:
    """Name -> (its distribution, who asked for it first) of all that `root` needs and that is installed, by name."""
    found: dict[str, tuple[Any, str]] = {}
    queue = [(requirement, root) for requirement in requirements(root, every_extra=True)]
    while queue:
        requirement, asker = queue.pop(0)
        name = normal(requirement.name)
        if name in found or name == normal(root):
            continue
        try:
            found[name] = distribution(name), asker
        except PackageNotFoundError:  # of a group that is not installed
            continue
        queue += [(each, name) for each in requirements(name, extras=requirement.extras)]
    return dict(sorted(found.items()))


def requirements(name: str, *, extras: set[str] | None = None, every_extra: bool = False) -> Iterator[Requirement]:
    """What a package asks for on this machine, in the given optional groups or in all of them."""
    package = distribution(name)
    groups = (package.metadata.get_all("Provides-Extra") or []) if every_extra else [*(extras or ())]
    for text in package.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": group}) for group in ("", *groups)):
            yield requirement


def licence_of(metadata: Message) -> str:
    """The expression, else the short name, else the classifiers; what nothing says is said to be unknown."""
    if expression := metadata.get("License-Expression"):
        return expression
    short = " ".join((metadata.get("License") or "").split())
    if short and len(short) <= LONGEST and short != "UNKNOWN":
        return short
    kinds = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier") or () if line.startswith("License")]
    return ", ".join(kinds) or "not in its metadata: see its own files"


def normal(name: str) -> str:
    """A package's name as it is compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def as_markdown(found: dict[str, tuple[Any, str]]) -> str:
    rows = "\n".join(
        f"| {name} | {package.version.partition('+')[0]} | {licence_of(package.metadata)} | {asker} |"
        for name, (package, asker) in found.items()
    )
    return (
        "# Licences of what motionlora stands on\n\nRead from the metadata of the packages installed with "
        "`constraints.txt`: `make licences`. motionlora itself is under Apache-2.0. None of them is part of this "
        "repository; wheels may carry libraries under licences of their own (FFmpeg in av and decord, OpenCV, "
        "OpenBLAS, CUDA in the default torch): see the licence files inside.\n\n"
        f"| package | version | licence | asked for by |\n|---|---|---|---|\n{rows}\n"
    )


if __name__ == "__main__":
    main()
