"""The list of licences is of this project, and each kind of metadata is understood."""

import tomllib
from email.message import Message
from pathlib import Path

import pytest
from bench_licences import installed_needs, licence_of, normal
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def test_the_list_has_every_dependency_and_what_they_need() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = [Requirement(text) for text in declared]
    names = {normal(each.name) for each in wanted if each.marker is None or each.marker.evaluate()}
    rows = (ROOT / "results/licences.md").read_text().splitlines()
    listed = {row.split(" | ")[0].removeprefix("| ") for row in rows if row.startswith("| ")}
    assert names <= listed, f"results/licences.md lacks {names - listed}: run `make licences`."
    assert names | {"huggingface-hub", "tokenizers"} <= set(installed_needs("motionlora"))


@pytest.mark.parametrize(
    ("lines", "licence"),
    [
        ({"License-Expression": "MIT", "License": "BSD"}, "MIT"),
        ({"License": "Apache 2.0", "Classifier": "License :: OSI Approved :: MIT License"}, "Apache 2.0"),
        ({"License": "All rights " * 9, "Classifier": "License :: OSI Approved :: MIT License"}, "MIT License"),
        ({"Classifier": "Topic :: Games"}, "not in its metadata: see its own files"),
    ],
)
def test_a_licence_is_read_from_wherever_it_stands(lines: dict[str, str], licence: str) -> None:
    metadata = Message()
    for name, value in lines.items():
        metadata[name] = value
    assert licence_of(metadata) == licence
