"""Does any broken input end in anything but a result or one sentence? Mutated media, LoRA and settings files.

    python tests/bench_fuzz.py --media 500 --lora 300 --settings 300     writes results/fuzz.*

Every input goes through the functions that the command line calls (reading a clip and describing it; loading,
inspecting and rewriting a LoRA; composing settings), in a process whose memory is bounded, under a clock, with its own
home and temporary folder; a few also go through the real command line. Counted is how each ended, and whether any file
appeared or changed outside the output folder.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from shutil import rmtree

from fuzz_inputs import KINDS, input_of, make_sources

from motionlora.data import reading_process
from motionlora.data.clip import describe, read_clip
from motionlora.data.errors import InputError, NumbersError, StorageError
from motionlora.data.limits import Limits
from motionlora.heads.lora_file import load_lora, save_lora
from motionlora.heads.lora_inspect import inspect_lora
from motionlora.train.command import settings_of

SECONDS = 30.0
"""CPU seconds of one input and, for a clip, wall seconds in the reading process; twenty times as many on the wall."""
MEGABYTES = 1024
"""That one input may add to the harness's own memory (limits of the reading process are its own)."""
COMMAND = [sys.executable, "-P", "-c", "import sys; from motionlora.train.command import main; sys.exit(main())"]
BAD = ("traceback", "hang", "memory", "escape", "died")
INTERESTING: dict[str, tuple[int, ...]] = {
    "media": (
        13, 26, 44, 98, 188, 480,
    ),
    "lora": (
        40, 49, 50, 121, 123, 275, 281,
    ),
    "settings": (
        41, 42, 46, 47, 65, 66, 68, 69, 71, 73, 74, 80, 83, 85, 86, 88, 89, 92, 93, 103, 108, 110, 114, 124,
        131, 137, 142, 144, 155, 183, 192, 198, 229, 237, 238, 240, 242, 256, 259, 262, 271,
    ),
}  # fmt: skip
"""Seeds behind those that CI tries anyway, each of which met a refusal that no other had met (report: first seeds)."""


@dataclass(frozen=True)
class Outcome:
    """How one input ended: `result`, `sentence`, or one of BAD; what was said; the peaks of memory so far, of the
    process that tries and of the one that reads clips."""

    kind: str
    seed: int
    ending: str
    said: str = ""
    megabytes: tuple[int, int] = (0, 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, help="inputs, of the seeds 0, 1, 2 ...")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--interesting", action="store_true", help="the seeds that once showed something, too")
    parser.add_argument("--command", type=int, default=0, help="inputs of each kind for the real command line")
    parser.add_argument("--results", type=Path, default=Path("results/fuzz"))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        make_sources(folder)
        outcomes: list[Outcome] = []
        for kind in KINDS:
            seeds = list(range(chosen.first, chosen.first + getattr(chosen, kind)))
            seeds += [seed for seed in INTERESTING[kind] if chosen.interesting and seed not in seeds]
            outcomes += fuzzed(kind, seeds, folder)
        lines = [by_command(kind, seed, folder) for kind in KINDS for seed in range(chosen.command)]
    report(chosen, outcomes, lines)
    raise SystemExit(any(outcome.ending in BAD for outcome in outcomes + lines))


def fuzzed(kind: str, seeds: list[int], folder: Path) -> list[Outcome]:
    """Every seed's outcome, from child processes: a new one after each that died or was stopped."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(seeds):
        here, there = multiprocessing.Pipe()
        rest = seeds[len(outcomes) :]
        child = multiprocessing.get_context("fork").Process(target=tried_all, args=(kind, rest, folder, there))
        child.start()
        there.close()
        with suppress(EOFError):
            while len(outcomes) < len(seeds):
                outcomes.append(here.recv())
                shown(outcomes[-1], len(outcomes), len(seeds))
        child.join()
        if len(outcomes) < len(seeds):
            ending = "hang" if child.exitcode in (-signal.SIGPROF, -signal.SIGALRM) else "died"
            outcomes.append(Outcome(kind, seeds[len(outcomes)], ending, f"exit code {child.exitcode}"))
            shown(outcomes[-1], len(outcomes), len(seeds))
    return outcomes


def shown(outcome: Outcome, count: int, total: int) -> None:
    if outcome.ending in BAD:
        print(f"{outcome.kind} {outcome.seed}: {outcome.ending}\n{outcome.said}", flush=True)
    if count % 50 == 0 or count == total:
        print(f"{outcome.kind}: {count} of {total}", flush=True)


def tried_all(kind: str, seeds: list[int], folder: Path, answers: Connection) -> None:
    """In a child: each seed's outcome is sent. Its memory and CPU are bounded; home and temporary files are inside."""
    for name in ("home", "temporary", "work"):
        (folder / name).mkdir(exist_ok=True)
    os.environ |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "temporary")}
    tempfile.tempdir = None
    os.chdir(folder / "work")
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + MEGABYTES * 2**20, resource.RLIM_INFINITY))
    for seed in seeds:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends this process, whatever runs
        signal.setitimer(signal.ITIMER_REAL, 20 * SECONDS)
        answers.send(tried(kind, seed, folder))


def tried(kind: str, seed: int, folder: Path) -> Outcome:
    """The outcome of one input; its files are taken away again."""
    for name in ("in", "out"):
        rmtree(folder / name, ignore_errors=True)
    given = input_of(kind, seed, folder)
    before = files_outside(folder)
    try:
        with Limits(seconds=SECONDS).used():
            said = CALLS[kind](given, folder / "out", seed)
        ending = "result"
    except (InputError, StorageError, NumbersError) as refusal:
        said = str(refusal)
        ending = "sentence" if is_sentence(said) else "traceback"
    except MemoryError:
        ending, said = "memory", traceback.format_exc()
    except Exception:
        ending, said = "traceback", traceback.format_exc()
    changed = [name for name, facts in files_outside(folder).items() if before.get(name) != facts]
    if changed or before.keys() - files_outside(folder).keys():
        ending, said = "escape", f"{changed} after {said}"
    return Outcome(kind, seed, ending, said.replace(str(folder), ""), (peak("self"), peak(*reader())))


def is_sentence(text: str) -> bool:
    """One line that ends as a sentence does and is short enough to be read."""
    return len(text) < 1200 and len(text.splitlines()) == 1 and text.rstrip().endswith((".", ")", "`", "?"))


def reader() -> list[str]:
    """The id of the process that reads clips, if there is one."""
    running = reading_process._RUNNING.get(os.getpid())
    return [str(running.pid)] if running is not None and running.poll() is None else []


def peak(*processes: str) -> int:
    """Megabytes of memory that these processes held at most at a time."""
    status = "".join(Path(f"/proc/{process}/status").read_text() for process in processes)
    return max((int(kilobytes) // 1024 for kilobytes in re.findall(r"VmHWM:\s+(\d+) kB", status)), default=0)


def files_outside(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file but those in the output folder."""
    found = (path for path in folder.rglob("*") if path.is_file() and folder / "out" not in path.parents)
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def try_media(path: Path, out: Path, seed: int) -> str:
    del out
    frames, fps = [(None, None), (5, None), (5, 7.5), (None, 16.0)][seed % 4]
    clip = read_clip(path, frames=frames, fps=fps, height=None, width=None, multiple=8, say=lambda line: None)
    found = describe(path)
    assert clip.pixels.shape[0] % 4 == 1
    return f"{clip.pixels.shape} of {found['frames']} {found['kind']}"


def try_lora(path: Path, out: Path, seed: int) -> str:
    shown = inspect_lora(path)
    lora = load_lora(path, "rank" if seed % 3 == 0 else None)
    save_lora(lora, out / "again.safetensors")
    return shown.splitlines()[1]


def try_settings(given: tuple[str, list[str]], out: Path, seed: int) -> str:
    del out, seed
    return type(settings_of(*given)).__name__


CALLS = {"media": try_media, "lora": try_lora, "settings": try_settings}


def by_command(kind: str, seed: int, folder: Path) -> Outcome:
    """The same input through the real command line."""
    for name in ("in", "out"):
        rmtree(folder / name, ignore_errors=True)
    given = input_of(kind, seed, folder)
    words = {
        "media": lambda: ["clip", "inspect", str(given)],
        "lora": lambda: ["lora", "convert", str(given), "--out", str(folder / "out" / "a.safetensors")],
        "settings": lambda: [given[0], *given[1], "--print-config"],
    }[kind]()
    words = [word for word in words if "\0" not in word]
    before = files_outside(folder)
    try:
        ended = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=600, cwd=folder)
    except subprocess.TimeoutExpired:
        return Outcome(kind, seed, "hang", " ".join(words))
    said = ended.stderr.strip()
    right = not said if ended.returncode == 0 else is_sentence(said) and ended.returncode in (2, 3, 4)
    ending = "traceback" if not right else "sentence" if ended.returncode else "result"
    ending = "escape" if files_outside(folder) != before else ending
    print(f"command line, {kind} {seed}: {ended.returncode} {said[-300:]}", flush=True)
    return Outcome(kind, seed, ending, said)


def first_seeds(outcomes: list[Outcome]) -> list[int]:
    """The first seed of every sentence that differs in more than names and numbers: together all refusals met."""
    found: dict[str, int] = {}
    for one in outcomes:
        words = re.sub(r"'[^']*'|`[^`]*`|\([^)]*\)|\S*[\d./_]\S*", "", one.said)
        found.setdefault(words[:60], one.seed)
    return list(found.values())


def report(chosen: argparse.Namespace, outcomes: list[Outcome], lines: list[Outcome]) -> None:
    """results/fuzz.md and .json."""
    tables = {"functions": outcomes, "command line": lines}
    counts = {
        table: {kind: dict(Counter(one.ending for one in rows if one.kind == kind)) for kind in KINDS}
        for table, rows in tables.items()
    }
    caught = {
        "decoder died": sum("its decoder dies on it" in one.said for one in outcomes),
        "reading took too long": sum("took longer to read" in one.said for one in outcomes),
        "memory limit of the reading process": sum("of memory that reading" in one.said for one in outcomes),
    }
    flags = " ".join(f"--{kind} {getattr(chosen, kind)}" for kind in KINDS)
    facts = {
        "what": "mutated files of our own making; how each input ended",
        "machine": f"{platform.machine()}, one of {os.cpu_count()} cores",
        "date": str(date.today()),
        "command": f"python tests/bench_fuzz.py {flags} --first {chosen.first} --command {chosen.command}",
        "bounds": {"cpu_seconds": SECONDS, "megabytes_added": MEGABYTES},
        "counts": counts,
        "caught_by_the_reading_process": caught,
        "most_megabytes": {
            kind: [max((one.megabytes[k] for one in outcomes if one.kind == kind), default=0) for k in range(2)]
            for kind in KINDS
        },
        "first_seed_of_each_sentence": {
            kind: sorted(first_seeds([one for one in outcomes if one.kind == kind])) for kind in KINDS
        },
        "bad": [asdict(one) for one in outcomes + lines if one.ending in BAD],
    }
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    chosen.results.with_suffix(".json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    endings = ("result", "sentence", *BAD)
    most = facts["most_megabytes"]
    rows = [
        f"| {kind}, {table} | {sum(found.values())} | " + " | ".join(str(found.get(name, 0)) for name in endings) + " |"
        for table, kinds in counts.items()
        for kind, found in kinds.items()
    ]
    chosen.results.with_suffix(".md").write_text(
        "# Broken inputs, by how they end\n\n"
        f"Files of our own making, changed at random (`tests/fuzz_inputs.py`). Measured on {facts['date']}, "
        f"{facts['machine']}: `{facts['command']}`.\n\n| input | tried | {' | '.join(endings)} |\n"
        f"|---|{'---|' * (len(endings) + 1)}\n" + "\n".join(rows) + "\n\n"
        f"Most memory held: {', '.join(f'{kind} {a} MB, reading process {b} MB' for kind, (a, b) in most.items())}.\n\n"
        f"Bounds: {SECONDS:g} CPU seconds and {MEGABYTES} MB more than before for an input. *Escape*: a file appeared "
        "or changed outside the output folder. *Died*: the process itself ended. What the process that reads clips "
        f"caught, which are sentences above: {', '.join(f'{name} {count}' for name, count in caught.items())}.\n"
    )


if __name__ == "__main__":
    main()
