"""Does a killed run end as if nothing had happened? SIGKILL at random moments, resume, compare the files byte for byte.

    python tests/bench_kill.py --kills 120         some half an hour of one core; writes results/kill_resume.*

Three kinds of runs on the random twin, each with its own cache: training (heads, spatial and temporal stage, a
checkpoint at every step), which gets half of the kills; caching (clip and caption encoded, heads scored); comparing (a
guidance, no transfer and the controls on two clips). A run is killed at a moment drawn evenly over its length, begun
again and killed again up to three times, and then left to end. What it leaves must be that of a run that nobody
disturbed: LoRA files; cache and head map; clips and rows of the table but for their seconds. Runs are forked from a
process that has imported everything, so that the kills fall into the work and not into Python's start.
"""

import argparse
import json
import os
import platform
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import date
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from kill_kinds import Kind, ended, kinds_in, start

MOST = 3
"""Kills of one run."""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: what the run was at, and seconds from its restart to the stage that went on (None: none left)."""

    place: str
    recovery: float | None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--kinds", nargs="+", default=["training", "caching", "comparing"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("results/kill_resume"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    generator = np.random.default_rng(chosen.seed)
    with tempfile.TemporaryDirectory() as name:
        kinds = [kind for kind in kinds_in(Path(name)) if kind.name in chosen.kinds]
        whole = sum(kind.share for kind in kinds)
        tallies = []
        for kind in kinds:
            kills = ceil(chosen.kills * kind.share / whole)
            tallies.append(tallied(kind, kills, Path(name) / kind.name, generator))
    report(chosen, tallies)
    raise SystemExit(0 if all(tally.equal == tally.runs for tally in tallies) else 1)


@dataclass(frozen=True)
class Tally:
    """What came of all runs of a kind; `seconds` is the median length of a run."""

    kind: str
    kills: list[Kill]
    runs: int
    equal: int
    said: Counter[str]
    seconds: float


def tallied(kind: Kind, kills: int, folder: Path, generator: np.random.Generator) -> Tally:
    """Runs of one kind until so many kills have been dealt out."""
    began = time.perf_counter()
    ended(start(kind.work, folder / "whole"))
    lengths = [time.perf_counter() - began]
    expected, dealt, runs, equal, said = kind.left(folder / "whole"), [], 0, 0, Counter()
    while len(dealt) < kills:
        place = folder / f"run{runs}"
        dealt += disturbed(kind, place, min(MOST, kills - len(dealt)), lengths, generator)
        runs, equal = runs + 1, equal + (kind.left(place) == expected)
        said += told(place)
        print(f"{kind.name}: {len(dealt)} kills, {equal} of {runs} runs equal", flush=True)
    return Tally(kind.name, dealt, runs, equal, said, median(lengths))


def disturbed(kind: Kind, place: Path, most: int, lengths: list[float], generator: np.random.Generator) -> list[Kill]:
    """Runs, kills up to `most` times at moments drawn from the median length of a whole run, then lets it end.

    A run that ends before its moment adds its length to `lengths`: machines are not equally fast all the time.
    """
    places: list[str] = []
    recoveries: list[float | None] = []
    for _ in range(most):
        began = time.perf_counter()
        if not killed(start(kind.work, place), generator.uniform(0, median(lengths))):
            lengths += [] if places else [time.perf_counter() - began]
            break
        if places:
            recoveries.append(recovery(kind, place))
        places.append(kind.place(place))
        with (place / "said.txt").open("a") as file:
            file.write("KILLED\n")
    ended(start(kind.work, place))
    recoveries.append(recovery(kind, place))
    return [Kill(where, seconds) for where, seconds in zip(places, recoveries, strict=False)]


def killed(child: int, after: float) -> bool:
    """Kills a child after some seconds; False where it had ended well before."""
    until = time.perf_counter() + after
    while time.perf_counter() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done and status:
            raise RuntimeError(f"A run that nobody killed ended with status {status}: see what it said.")
        if done:
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def recovery(kind: Kind, place: Path) -> float | None:
    """Seconds after which the run that was started last showed that it goes on."""
    lines = (place / "said.txt").read_text().rpartition("KILLED\n")[2].splitlines()
    return next((float(line.split()[0]) for line in lines if kind.sign in line), None)


def told(place: Path) -> Counter[str]:
    """How often a run found a lock that was left over, or something damaged."""
    text = (place / "said.txt").read_text()
    return Counter({"stale locks": text.count("was left over by"), "damaged": text.count("damaged")})


def report(chosen: argparse.Namespace, tallies: list[Tally]) -> None:
    """results/kill_resume.md and .json."""
    kinds = {tally.kind: facts_of(tally) for tally in tallies}
    facts = {
        "what": "SIGKILL at random moments on the random twin, begun again; what is left is compared byte for byte",
        "machine": f"{platform.machine()}, one of {os.cpu_count()} cores, load average {os.getloadavg()[0]:.0f}",
        "date": str(date.today()),
        "command": f"python tests/bench_kill.py --kills {chosen.kills} --kinds {' '.join(kinds)} --seed {chosen.seed}",
        "kills": sum(tally["kills"] for tally in kinds.values()),
        "runs": sum(tally["runs"] for tally in kinds.values()),
        "runs_equal": sum(tally["runs_equal"] for tally in kinds.values()),
        "kinds": kinds,
    }
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    chosen.results.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    chosen.results.with_suffix(".md").write_text(as_markdown(facts))


def facts_of(tally: Tally) -> dict[str, Any]:
    waits = [kill.recovery for kill in tally.kills if kill.recovery is not None]
    return {
        "kills": len(tally.kills),
        "runs": tally.runs,
        "runs_equal": tally.equal,
        "places": dict(Counter(kill.place for kill in tally.kills).most_common()),
        "found": {name: tally.said[name] for name in ("stale locks", "damaged")},
        "seconds_of_a_whole_run": round(tally.seconds, 2),
        "seconds_to_go_on_median": round(median(waits), 2) if waits else None,
        "seconds_to_go_on_most": round(max(waits), 2) if waits else None,
    }


def as_markdown(facts: dict[str, Any]) -> str:
    rows, places = [], []
    for kind, found in facts["kinds"].items():
        rows.append(
            f"| {kind} | {found['kills']} | {found['runs_equal']} of {found['runs']} | {found['found']['stale locks']} "
            f"| {found['found']['damaged']} | {found['seconds_of_a_whole_run']} | {found['seconds_to_go_on_median']} "
            f"| {found['seconds_to_go_on_most']} |"
        )
        places += [f"| {kind}: {place} | {count} |" for place, count in found["places"].items()]
    return (
        f"# Killed and begun again\n\n{facts['what']}.\nMeasured on {facts['date']}, {facts['machine']}: "
        f"`{facts['command']}`.\n\n**{facts['runs_equal']} of {facts['runs']} runs ended with the files of a run that "
        f"nobody disturbed**, after {facts['kills']} kills. Seconds are without Python's imports; to go on is until "
        "the announcement of the stage, of the heads, or of the cells that need no walk.\n\n"
        "| runs | kills | equal | stale locks known | damage found | a whole run, s | to go on, median, s | most, s |"
        "\n|---|---|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\n| killed while | times |\n|---|---|\n"
        + "\n".join(places)
        + "\n"
    )


if __name__ == "__main__":
    main()
