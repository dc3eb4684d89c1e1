"""Is every guard guarded? Puts a bug into each guard, one at a time, and looks which test fails.

python tests/bench_guards.py                 a quarter of an hour of one core; writes results/guards.*
python tests/bench_guards.py --only lock     bugs with the word, or one of several, in guard, bug or file; others stay

The bugs stand in `guard_bugs.py`. They go into a copy of the working tree, never into the tree itself: the copy's
`.pyright` holds the links by which the package is found there. Exit code 1 where no test notices a bug.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import NoReturn, TypeAlias

import pytest
from guard_bugs import BUGS, Bug

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 90
"""Of the tests of one bug, which take a third of it at most; a bug that makes them hang is noticed, too."""
PYTEST = ["-x", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
LIBRARIES = (
    "accelerate", "diffusers.pipelines.cogvideo.pipeline_cogvideox", "diffusers.pipelines.wan.pipeline_wan", "peft",
    "scipy.stats", "transformers.models.t5.modeling_t5", "transformers.models.umt5.modeling_umt5", "tyro",
)  # fmt: skip
"""Imported once: the processes of the tests are forks of this one, since most of their time would go into imports."""
Rows: TypeAlias = dict[tuple[str, str, str], dict[str, str]]
"""By guard, bug and file."""
FIRST = re.compile(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - .*)?$", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, default=Path("results/guards"))
    parser.add_argument("--only", nargs="+", default=[])
    asked = parser.parse_args()
    every = [bug for group in BUGS.values() for bug in group]
    bugs = [bug for bug in every if not asked.only or any(words in " ".join(bug[:3]) for words in asked.only)]
    results = asked.results.resolve()
    rows = rows_before(results) if asked.only else {}
    with tempfile.TemporaryDirectory() as name:
        tree = copied(Path(name) / "tree")
        for bug in bugs:
            with_bug(tree, bug)
        for library in LIBRARIES:
            importlib.import_module(library)
        refuse_red(tree, bugs)
        for bug in bugs:
            rows[bug[:3]] = tried(tree, bug)
            report(results, rows)
    survivors = [bug.guard for bug in bugs if not rows[bug[:3]]["noticed by"]]
    print(f"{len(bugs)} bugs, {len(survivors)} survive{': ' * bool(survivors)}{'; '.join(survivors)}")
    raise SystemExit(1 if survivors else 0)


def copied(tree: Path) -> Path:
    """The files of the working tree that git knows or would take; from now on the package is that of the copy."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if os.path.lexists(ROOT / name):  # else it was deleted and git was not told
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    path = os.pathsep.join(filter(None, [str(tree / ".pyright"), os.environ.get("PYTHONPATH")]))
    os.environ |= {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "999"}
    sys.path.insert(0, str(tree / ".pyright"))
    found = importlib.util.find_spec("motionlora.data.errors")
    if not (found and found.origin and Path(found.origin).resolve().is_relative_to(tree.resolve())):
        raise SystemExit(f"The tests would not run on the copy but on {found}: has it lost .pyright/motionlora?")
    return tree


def with_bug(tree: Path, bug: Bug) -> str:
    """The text of a bug's file with the bug in it; ends the bench where the guard does not stand there just once."""
    content = (tree / bug.file).read_text(encoding="utf-8")
    if content.count(bug.text) != 1 or bug.text == bug.instead:
        raise SystemExit(f"The guard '{bug.guard}' stands {content.count(bug.text)} times in {bug.file}, not once.")
    return content.replace(bug.text, bug.instead)


def refuse_red(tree: Path, bugs: Iterable[Bug]) -> None:
    """Ends the bench where a test fails without any bug."""
    tests = sorted({test for bug in bugs for test in bug.tests})
    code, said = ran(tree, tests, 20 * SECONDS)
    # What is compiled by now is of sound files; that of a bug is never kept, which may have their size and time.
    os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True
    if code != 0:
        raise SystemExit(f"Without any bug the tests do not pass: {first_of(said) or said[-2000:]}")
    print(f"without a bug: {said.strip().splitlines()[-1]}", flush=True)


def tried(tree: Path, bug: Bug) -> dict[str, str]:
    """One bug put in, tested and taken out again; by what it was noticed, "" where by nothing."""
    path = tree / bug.file
    sound, spoiled = path.read_bytes(), with_bug(tree, bug)
    try:
        path.write_text(spoiled, encoding="utf-8")
        code, said = ran(tree, bug.tests, SECONDS)
    finally:
        path.write_bytes(sound)
    if code is None:
        noticed = f"{named(bug.tests)} hangs, stopped after {SECONDS} s"
    elif code < 0:
        noticed = f"{named(bug.tests)} dies by {signal.Signals(-code).name}"
    elif code > 1:
        raise SystemExit(f"The tests of '{bug.guard}' cannot be run with the bug in {bug.file}: {said[-2000:]}")
    else:
        noticed = first_of(said) if code else ""
    print(f"{'survives' if not noticed else 'noticed '} {bug.guard}: {bug.bug}\n         {noticed}", flush=True)
    return {"guard": bug.guard, "bug": bug.bug, "file": bug.file, "noticed by": noticed}


def ran(tree: Path, tests: Iterable[str], seconds: float) -> tuple[int | None, str]:
    """Exit code of pytest, None where its time was over, and what it printed; nothing of it runs on."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if not child:
            _run_tests(tree, [f"tests/{test}" for test in tests], said.fileno())
        ended, code, until = 0, None, time.monotonic() + seconds
        try:
            while not ended and time.monotonic() < until:
                ended, status = os.waitpid(child, os.WNOHANG)
                code = os.waitstatus_to_exitcode(status) if ended else None
                time.sleep(0.02)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            if not ended:
                os.waitpid(child, 0)
        said.seek(0)
        return code, said.read().decode(errors="replace")


def _run_tests(tree: Path, tests: list[str], said: int) -> NoReturn:
    """In a fork: pytest in the copy, in a group of processes of its own."""
    code = 3
    try:
        os.setsid()
        os.chdir(tree)
        for stream, target in enumerate((os.open(os.devnull, os.O_RDONLY), said, said)):
            os.dup2(target, stream)
        code = int(pytest.main([*PYTEST, *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def first_of(said: str) -> str:
    """The first test that pytest says to have failed, of which the bench's folder tells nothing."""
    found = FIRST.search(said)
    return found[1] if found else ""


def named(tests: Iterable[str]) -> str:
    return " or ".join(tests)


def rows_before(results: Path) -> Rows:
    """What an earlier run wrote."""
    if not results.with_suffix(".json").is_file():
        return {}
    found = json.loads(results.with_suffix(".json").read_text(encoding="utf-8"))["found"]
    return {(row["guard"], row["bug"], row["file"]): row for group in found.values() for row in group}


def report(results: Path, known: Rows) -> None:
    """results/guards.md and .json, of those bugs in the order of the list that were tried so far."""
    found = {group: [known[bug[:3]] for bug in bugs if bug[:3] in known] for group, bugs in BUGS.items()}
    rows = [row for group in found.values() for row in group]
    facts = {
        "what": "bugs put into the guards one at a time, and the first test that failed",
        "machine": platform.machine(),
        "date": str(date.today()),
        "command": "python tests/bench_guards.py",
        "guards": len({row["guard"] for row in rows}),
        "bugs": len(rows),
        "survive": sum(not row["noticed by"] for row in rows),
        "not tried": sum(map(len, BUGS.values())) - len(rows),
        "found": found,
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.with_suffix(".json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    parts = [
        "# Guards\n\nA bug was put into each guard, one at a time, and the tests that should notice were run: "
        f"{facts['bugs']} bugs in {facts['guards']} guards, {facts['survive']} not noticed, {facts['not tried']} not "
        "tried. The first test that failed is named.\nFrom runs, whole or in parts, up to "
        f"{facts['date']} ({facts['machine']}): `{facts['command']}`.\n"
    ]
    for group, lines in found.items():
        parts.append(f"\n## {group}\n\n| guard | bug | noticed by |\n|---|---|---|\n")
        parts += [
            f"| {escaped(row['guard'])} (`{row['file']}`) | {escaped(row['bug'])} | "
            + (f"`{escaped(row['noticed by'])}` |\n" if row["noticed by"] else "**nothing** |\n")
            for row in lines
        ]
    results.with_suffix(".md").write_text("".join(parts), encoding="utf-8")


def escaped(text: str) -> str:
    """For a cell of a table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
