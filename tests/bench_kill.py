"""Does a killed run end as if nothing had happened? SIGKILL at random moments, resume, compare the files byte for byte.

    python tests/bench_kill.py --kills 100         some twenty minutes of one core; writes results/kill_resume.*

A run on the random twin (heads, spatial and temporal stage, a checkpoint at every step, its own cache) is killed at a
moment drawn evenly over its length, resumed and killed again up to three times, and then left to end. Its LoRA files
must be those of a run that nobody disturbed. Runs are forked from a process that has imported everything, so that the
kills fall into the work and not into Python's start.
"""

import argparse
import hashlib
import json
import os
import platform
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from motionlora.heads.head_map import HeadMap
from motionlora.heads.tiny import random_twin
from motionlora.train.run import train
from motionlora.train.settings import TrainSettings

FILES = ("spatial.safetensors", "temporal.safetensors")
MOST = 3
"""Kills of one run."""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: what the run was at, and seconds from its restart to the stage that went on (None: none left)."""

    place: str
    recovery: float | None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("results/kill_resume"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    generator = np.random.default_rng(chosen.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = balanced(recipe(folder), folder / "scored")
        began = time.perf_counter()
        ended(start(settings_in(settings, folder / "whole")))
        lengths = [time.perf_counter() - began]
        expected, kills, runs, equal, said = hashes(folder / "whole" / "run"), [], 0, 0, Counter()
        while len(kills) < chosen.kills:
            place = folder / f"run{runs}"
            run = settings_in(settings, place)
            kills += disturbed(run, min(MOST, chosen.kills - len(kills)), lengths, generator)
            runs, equal = runs + 1, equal + (hashes(place / "run") == expected)
            said += told(place)
            print(f"{len(kills)} kills, {equal} of {runs} runs equal", flush=True)
    report(chosen, kills, runs, equal, said, median(lengths))
    raise SystemExit(0 if equal == runs else 1)


def recipe(folder: Path) -> TrainSettings:
    """Both stages, fifteen steps each, on a clip of 17 frames in which a square moves."""
    (folder / "clip").mkdir()
    for index in range(17):
        pixels = np.full((32, 32, 3), 40, np.uint8)
        pixels[8:16, index : index + 8, 0] = 220
        Image.fromarray(pixels).save(folder / "clip" / f"{index:04d}.png")
    values = {
        "model": str(random_twin(folder / "twin")), "clip": folder / "clip", "caption": "a red square",
        "frames": 17, "fps": None, "device": "cpu", "lora": {"rank": 4}, "warmup": 1, "checkpoint_every": 1,
        "spatial": {"steps": 15, "lr": 1e-2}, "temporal": {"steps": 15, "lr": 1e-2, "stride": 2}, "resume": "latest",
    }  # fmt: skip
    return TrainSettings.model_validate(values)


def balanced(settings: TrainSettings, place: Path) -> TrainSettings:
    """With the ratio by which half of the random twin's heads are temporal, so that both stages have some."""
    ended(start(settings_in(settings, place).model_copy(update={"stages": ("heads",)})))
    scores = HeadMap.load(place / "run" / "heads.json").scores
    ratio = float(np.median(scores[..., 1] / scores[..., 0]))
    return settings.model_copy(update={"heads": settings.heads.model_copy(update={"ratio": ratio})})


def settings_in(settings: TrainSettings, place: Path) -> TrainSettings:
    return settings.model_copy(update={"out": place / "run", "cache": place / "cache"})


def start(settings: TrainSettings) -> int:
    """A child that trains, and writes what it says, with times, beside its folder; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        began, log = time.perf_counter(), settings.out.with_name("said.txt")
        log.parent.mkdir(parents=True, exist_ok=True)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        with log.open("a", buffering=1) as file:
            train(settings, say=lambda line: print(f"{time.perf_counter() - began:.3f} {line}", file=file))
        code = 0
    finally:
        os._exit(code)


def ended(child: int) -> None:
    """Waits for a child that must end well."""
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"A run that nobody killed ended with status {status}: see what it said.")


def disturbed(settings: TrainSettings, most: int, lengths: list[float], generator: np.random.Generator) -> list[Kill]:
    """Runs, kills up to `most` times at moments drawn from the median length of a whole run, then lets it end.

    A run that ends before its moment adds its length to `lengths`: machines are not equally fast all the time.
    """
    places: list[str] = []
    recoveries: list[float | None] = []
    for _ in range(most):
        began = time.perf_counter()
        if not killed(start(settings), generator.uniform(0, median(lengths))):
            lengths += [] if places else [time.perf_counter() - began]
            break
        if places:
            recoveries.append(recovery(settings.out))
        places.append(place_of(settings.out))
        with settings.out.with_name("said.txt").open("a") as file:
            file.write("KILLED\n")
    ended(start(settings))
    recoveries.append(recovery(settings.out))
    return [Kill(place, seconds) for place, seconds in zip(places, recoveries, strict=False)]


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


def recovery(out: Path) -> float | None:
    """Seconds after which the run that was started last announced the stage that it went on with."""
    lines = out.with_name("said.txt").read_text().rpartition("KILLED\n")[2].splitlines()
    return next((float(line.split()[0]) for line in lines if " stage: " in line), None)


def place_of(out: Path) -> str:
    """What a run was at when it ended, as its folder shows."""
    if list((out / "checkpoints").glob(".*.unfinished")):
        return "saving a checkpoint"
    if (out / FILES[1]).exists():
        return "after the end"
    begun = [stage for stage in ("spatial", "temporal") if (out / f"log-{stage}.jsonl").exists()]
    if begun == ["spatial"] and (out / FILES[0]).exists():
        return "between the stages"
    if begun:
        return f"steps of the {begun[-1]} stage"
    return "scoring heads" if (out / "reference.mp4").exists() else "loading, encoding"


def told(place: Path) -> Counter[str]:
    """How often a run found a lock that was left over, or a damaged checkpoint."""
    text = (place / "said.txt").read_text()
    return Counter({"stale locks": text.count("was left over by"), "damaged checkpoints": text.count("is damaged")})


def hashes(out: Path) -> dict[str, str]:
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in FILES}


def report(chosen, kills: list[Kill], runs: int, equal: int, said: Counter[str], seconds: float) -> None:
    """results/kill_resume.md and .json."""
    places = Counter(kill.place for kill in kills)
    waits = [kill.recovery for kill in kills if kill.recovery is not None]
    facts = {
        "what": "SIGKILL at random moments of training on the random twin, resumed; LoRA files compared byte for byte",
        "machine": f"{platform.machine()}, one of {os.cpu_count()} cores, load average {os.getloadavg()[0]:.0f}",
        "date": str(date.today()),
        "command": f"python tests/bench_kill.py --kills {chosen.kills} --seed {chosen.seed}",
        "kills": len(kills),
        "runs": runs,
        "runs_equal": equal,
        "places": dict(places.most_common()),
        "found": {name: said[name] for name in ("stale locks", "damaged checkpoints")},
        "seconds_of_a_whole_run": round(seconds, 2),
        "seconds_to_go_on_median": round(median(waits), 2) if waits else None,
        "seconds_to_go_on_most": round(max(waits), 2) if waits else None,
    }
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    chosen.results.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    rows = "\n".join(f"| {place} | {count} |" for place, count in places.most_common())
    chosen.results.with_suffix(".md").write_text(
        f"# Killed and resumed\n\n{facts['what']}.\nMeasured on {facts['date']}, {facts['machine']}: "
        f"`{facts['command']}`.\n\n**{equal} of {runs} runs ended with the files of a run that nobody disturbed**, "
        f"after {len(kills)} kills. Locks left over and recognised: {said['stale locks']}; damaged checkpoints: "
        f"{said['damaged checkpoints']}.\n\n| killed while | times |\n|---|---|\n{rows}\n\nA whole run takes "
        f"{facts['seconds_of_a_whole_run']} s. From the restart to the announcement of the stage that went on: median "
        f"{facts['seconds_to_go_on_median']} s, at most {facts['seconds_to_go_on_most']} s, without Python's imports.\n"
    )


if __name__ == "__main__":
    main()
