"""The list of bugs for `bench_guards.py` still fits the code; the bench itself takes a quarter of an hour."""

from functools import cache
from pathlib import Path

import pytest
from guard_bugs import BUGS, Bug

ROOT = Path(__file__).resolve().parent.parent
EVERY = [bug for bugs in BUGS.values() for bug in bugs]


@cache
def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("bug", EVERY, ids=lambda bug: f"{bug.guard}, {bug.bug}")
def test_a_guard_stands_once_in_its_file_and_the_bug_changes_it(bug: Bug) -> None:
    assert read(bug.file).count(bug.text) == 1, f"{bug.file} has another text now: bring it into guard_bugs.py."
    assert bug.instead.strip() != bug.text.strip()


@pytest.mark.parametrize("test", sorted({test for bug in EVERY for test in bug.tests}))
def test_the_tests_that_should_notice_are_there(test: str) -> None:
    file, _, name = test.partition("::")
    assert f"def {name.partition('[')[0]}(" in read(f"tests/{file}")


def test_no_bug_is_there_twice() -> None:
    assert len({bug[2:5] for bug in EVERY}) == len(EVERY)
