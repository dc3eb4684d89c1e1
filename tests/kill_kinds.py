"""The runs that `bench_kill.py` kills: what each does, what it leaves, and what it was at.

They work in a child of this process, on a random twin of the tiny Wan and two clips in which a square moves.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from motionlora.heads.head_map import HeadMap
from motionlora.heads.tiny import random_twin
from motionlora.infer.compare import compare
from motionlora.infer.compare_settings import CompareSettings
from motionlora.train.run import train
from motionlora.train.settings import TrainSettings

FILES = ("spatial.safetensors", "temporal.safetensors")
Work: TypeAlias = Callable[[Path, Callable[[str], None]], Any]
"""A run in a folder of its own; what it says goes to the second argument."""


@dataclass(frozen=True)
class Kind:
    """One kind of run in a folder of its own, where it writes into `run` and `cache`.

    Attributes:
        share: of all kills.
        work: the run.
        left: what it leaves, to be compared with `==`.
        place: what it was at when it ended, as its folder shows.
        sign: part of the line by which a run shows that it goes on.
    """

    name: str
    share: float
    work: Work
    left: Callable[[Path], Any]
    place: Callable[[Path], str]
    sign: str


def kinds_in(folder: Path) -> list[Kind]:
    """The three kinds; clips, model and the balanced rule are made in `folder`."""
    settings = balanced(recipe(folder), folder / "scored")

    def training(place: Path, say: Callable[[str], None]) -> None:
        train(settings_in(settings, place), say)

    def caching(place: Path, say: Callable[[str], None]) -> None:
        train(settings_in(settings, place).model_copy(update={"stages": ("heads",)}), say)

    def comparing(place: Path, say: Callable[[str], None]) -> None:
        compare(comparison(folder, place), say)

    return [
        Kind("training", 0.5, training, loras, place_of_training, " stage: "),
        Kind("caching", 0.25, caching, cache_and_map, place_of_caching, "Heads: "),
        Kind("comparing", 0.25, comparing, clips_and_rows, place_of_comparing, " need no walk"),
    ]


def recipe(folder: Path) -> TrainSettings:
    """Both stages, fifteen steps each, on a clip of 17 frames in which a square moves; a second clip for comparing."""
    for name, row in (("one", 8), ("two", 20)):
        (folder / "clips" / name).mkdir(parents=True)
        for index in range(17):
            pixels = np.full((32, 32, 3), 40, np.uint8)
            pixels[row : row + 8, index : index + 8, 0] = 220
            Image.fromarray(pixels).save(folder / "clips" / name / f"{index:04d}.png")
    (folder / "captions.txt").write_text("one | a red square\ntwo | a blue circle\n")
    values = {
        "model": str(random_twin(folder / "twin")), "clip": folder / "clips" / "one", "caption": "a red square",
        "frames": 17, "fps": None, "device": "cpu", "lora": {"rank": 4}, "warmup": 1, "checkpoint_every": 1,
        "spatial": {"steps": 15, "lr": 1e-2}, "temporal": {"steps": 15, "lr": 1e-2, "stride": 2}, "resume": "latest",
    }  # fmt: skip
    return TrainSettings.model_validate(values)


def comparison(folder: Path, place: Path) -> CompareSettings:
    """One guidance, no transfer and the controls, on two clips."""
    values = {
        "model": str(folder / "twin"), "clips": folder / "clips", "captions": folder / "captions.txt", "seeds": (0,),
        "methods": ("inject:share=1.0,blocks=[0]",), "out": place / "run", "cache": place / "cache", "device": "cpu",
        "sample": {"steps": 4, "scale": 3.0}, "frames": 17, "height": 32, "width": 32, "fps": 8.0, "points": 0,
        "exact": True,
    }  # fmt: skip
    return CompareSettings.model_validate(values)


def balanced(settings: TrainSettings, place: Path) -> TrainSettings:
    """With the ratio by which half of the random twin's heads are temporal, so that both stages have some."""
    heads = settings_in(settings, place).model_copy(update={"stages": ("heads",)})
    ended(start(lambda where, say: train(heads, say), place))
    scores = HeadMap.load(place / "run" / "heads.json").scores
    ratio = float(np.median(scores[..., 1] / scores[..., 0]))
    return settings.model_copy(update={"heads": settings.heads.model_copy(update={"ratio": ratio})})


def settings_in(settings: TrainSettings, place: Path) -> TrainSettings:
    return settings.model_copy(update={"out": place / "run", "cache": place / "cache"})


def start(work: Work, place: Path) -> int:
    """A child that does the work, and writes what it says, with times, into `place`; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        began, log = time.perf_counter(), place / "said.txt"
        place.mkdir(parents=True, exist_ok=True)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        with log.open("a", buffering=1) as file:
            work(place, lambda line: print(f"{time.perf_counter() - began:.3f} {line}", file=file))
        code = 0
    finally:
        os._exit(code)


def ended(child: int) -> None:
    """Waits for a child that must end well."""
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"A run that nobody killed ended with status {status}: see what it said.")


def place_of_training(place: Path) -> str:
    out = place / "run"
    if list((out / "checkpoints").glob(".*.unfinished")):
        return "saving a checkpoint"
    if (out / FILES[1]).exists():
        return "after the end"
    begun = [stage for stage in ("spatial", "temporal") if (out / f"log-{stage}.jsonl").exists()]
    if begun == ["spatial"] and (out / FILES[0]).exists():
        return "between the stages"
    return f"steps of the {begun[-1]} stage" if begun else place_of_caching(place)


def place_of_caching(place: Path) -> str:
    if list((place / "cache").rglob(".*.safetensors")):
        return "writing the cache"
    if (place / "run" / "heads.json").exists():
        return "after the head map"
    if not (place / "run" / "reference.mp4").exists():
        return "loading"
    return "scoring heads" if list((place / "cache").rglob("*.safetensors")) else "encoding for the cache"


def place_of_comparing(place: Path) -> str:
    out = place / "run"
    if list(out.rglob(".*")):
        return "writing a clip, a story or a table"
    if (out / "report.html").exists():
        return "after the end"
    made = len(list((out / "cells").glob("*.json")))
    return f"making clip {made + 1}" if made else "loading, encoding"


def loras(place: Path) -> dict[str, str]:
    return {name: sha256_of(place / "run" / name) for name in FILES}


def cache_and_map(place: Path) -> dict[str, str]:
    """Of the finished files; a draft that a kill left behind is hidden and read by nobody."""
    files = [place / "run" / "heads.json", *(path for path in (place / "cache").rglob("*") if path.is_file())]
    return {path.name: sha256_of(path) for path in files if not path.name.startswith(".")}


def clips_and_rows(place: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    rows = [json.loads(line) for line in (place / "run" / "results.jsonl").read_text().splitlines()]
    for row in rows:
        row["cost"] = {name: value for name, value in row["cost"].items() if not name.startswith("seconds")}
    return {path.name: sha256_of(path) for path in (place / "run" / "cells").glob("[!.]*.mp4")}, rows


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
