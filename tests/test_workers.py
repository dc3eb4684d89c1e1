"""Laws of a comparison in several processes: the rows of one, nothing lost with a process, each cell made once."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from processes import free_port, together

from motionlora.data.clip import write_clip
from motionlora.data.errors import InputError
from motionlora.data.say import silent
from motionlora.data.sprites import random_scene, render
from motionlora.infer import studio
from motionlora.infer import workers as rooms
from motionlora.infer.compare_settings import CompareSettings
from motionlora.infer.grid import grid
from motionlora.infer.method import parsed_methods
from motionlora.infer.pace import Pace
from motionlora.infer.pairs import read_pairs
from motionlora.infer.workers import Workers, joined, portable, shared, units_of
from motionlora.train.command import main

METHODS = ("flowmotion:share=1.0,iterations=1", "sdedit:start=0.001")
CAPTION = "a red circle on a dark background"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A comparison on a random twin: 24 cells, of which the 4 of sdedit and 4 of its control fail."""
    from motionlora.heads.tiny import random_twin

    folder = tmp_path_factory.mktemp("clips")
    for seed, name in enumerate(("one", "two")):
        write_clip(render(random_scene(np.random.default_rng(seed), frames=5)), folder / f"{name}.mp4", exact=True)
    (folder / "captions.txt").write_text(f"one | {CAPTION}\ntwo | a fox runs over snow\n")
    model = random_twin(tmp_path_factory.mktemp("twin") / "wan", blocks=2, seed=3)
    said = (
        f"compare --model {model} --clips {folder} --points 0 --exact --device cpu --seeds 0 1 --frames 5 --height 64"
    )
    said += " --width 64 --fps 12 --sample.steps 2 --sample.scale 3"
    return [*said.split(), "--methods", *METHODS]


@pytest.fixture(scope="module")
def one(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one process; not to be written to."""
    return ended(words, tmp_path_factory.mktemp("one"), [2])


End = Callable[[int, int], None]
"""Called with a process's number and how many walks it has begun before."""


def ended(words: list[str], folder: Path, codes: list[int], end: End | None = None) -> Path:
    """The folder where a call in as many processes as exit codes left its files."""
    command = [*words, "--out", str(folder / "out"), "--cache", str(folder / "cache")]
    if len(codes) == 1:
        assert main(command) == codes[0]
        return folder / "out"

    def work(rank: int) -> int:
        real, begun = studio.walked, iter(range(999))

        def walked(*args: Any) -> Any:
            number = next(begun)
            (folder / f"walks-{rank}").write_text(str(number + 1))
            if end:
                end(rank, number)
            return real(*args)

        studio.walked = walked
        return main(command)

    together(work, folder, codes)
    return folder / "out"


def rows(out: Path) -> list[dict[str, Any]]:
    """Less what a clock told."""
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for row in found:
        row["cost"] = {name: cost for name, cost in row["cost"].items() if not name.startswith("seconds")}
    return found


def walks(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob("walks-*"))]


def test_two_processes_write_the_rows_of_one(words: list[str], one: Path, tmp_path: Path) -> None:
    out = ended(words, tmp_path, [2, 0])
    assert len(rows(one)) == 28
    assert rows(out) == rows(one)
    assert sum(row["status"] == "failed" for row in rows(out)) == 8
    tables = [
        [line for line in (folder / "table.csv").read_text().splitlines() if "seconds" not in line]
        for folder in (out, one)
    ]
    assert tables[0] == tables[1]
    assert (out / "report.html").is_file()
    assert "in this call of 2 processes at once" in (out / "table.md").read_text()
    assert min(walks(tmp_path)) >= 2, "both had a share"
    assert sum(walks(tmp_path)) == len(list((one / "cells").glob("*.mp4"))) + 8, "no walk was made twice"
    said = [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)]
    assert "8 of 28 cells failed" in said[0]
    assert "failed" not in said[1].replace("failed:", "")
    for row in rows(out):
        if row["status"] == "done" and row["control"] in ("none", "wrong"):
            assert json.loads((out / "cells" / f"{row['key']}.json").read_text())["cost"]["seconds_sample"] > 0


def killed(rank: int, number: int) -> None:
    if (rank, number) == (0, 1):
        os.kill(os.getpid(), signal.SIGKILL)


def told_to_go(rank: int, number: int) -> None:
    if (rank, number) == (1, 1):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("end", "codes"), [(killed, [-9, 1]), (told_to_go, [1, 143])])
def test_a_process_that_dies_ends_the_others_with_a_sentence_and_the_rest_is_made_later(
    words: list[str], one: Path, tmp_path: Path, end: End, codes: list[int]
) -> None:
    out = ended(words, tmp_path, codes, end)
    assert not (out / "results.jsonl").exists()
    for rank in (0, 1):
        said = (tmp_path / f"said-{rank}").read_text()
        told = f"motionlora: Process {rank} of 2 had to end: "
        assert (told in said) == (codes[rank] > 0)
        assert codes[rank] < 0 or f"what is done is kept in {out}, and the same command" in said
        assert "Traceback" not in said
    made = len(list((out / "cells").glob("*.json")))
    assert made >= 1
    for path in tmp_path.glob("walks-*"):
        path.unlink()
    ended(words, tmp_path, [2, 0])
    assert sum(walks(tmp_path)) == len(list((one / "cells").glob("*.json"))) + 8 - made, "what was there stayed"
    assert rows(out) == rows(one)


@pytest.fixture
def cells(words: list[str]) -> list[Any]:
    folder = Path(words[words.index("--clips") + 1])
    settings = CompareSettings(clips=folder, frames=5, height=64, width=64, fps=12.0)
    methods = parsed_methods(("flowmotion", "flowmotion:lr=0.01", "inject", "random"), controls=True)
    return grid(read_pairs(settings, silent), methods)


def test_cells_that_use_each_others_work_stay_together(cells: list[Any]) -> None:
    units = units_of(cells)
    assert sorted(number for unit in units for number in unit) == list(range(len(cells)))
    unit_of = {number: at for at, unit in enumerate(units) for number in unit}
    for unit in units:
        assert unit == sorted(unit), "the first of the grid pays"
    for number, cell in enumerate(cells):
        for other, twin in enumerate(cells):
            motion = [type(c.method.guidance).needs_reference and c.method.guidance_name for c in (cell, twin)]
            same = (cell.pair, cell.seed) == (twin.pair, twin.seed)
            if motion[0] and motion[0] == motion[1]:
                assert (unit_of[number] == unit_of[other]) == (cell.donor.source is twin.donor.source)
            if same and (cell.method.name, twin.method.name) == ("none", "static"):
                assert unit_of[number] == unit_of[other]
    assert len({unit_of[number] for number, cell in enumerate(cells) if cell.method.name == "none"}) == 4


class CountingStore:
    """Of a process that is alone at the moment."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}

    def add(self, name: str, much: int) -> int:
        self.values[name] = self.values.get(name, 0) + much
        return self.values[name]


def test_every_unit_is_taken_once_in_order() -> None:
    store: Any = CountingStore()
    first, second = (Workers(index, 2, store).taken("abcde") for index in (0, 1))
    assert [next(first), next(second), next(second), next(first), next(second)] == list("abcde")
    assert [*first, *second] == []
    assert [*Workers().taken("abcde")] == list("abcde")
    assert next(Workers(1, 2, store).taken("xyz", "another sequence")) == "x"


def test_what_is_shared_comes_back_by_number_and_moves_the_pace() -> None:
    pace = Pace([1.0] * 7, passed=2)
    done: list[tuple[int, int]] = []

    def do(number: int, place: int) -> str:
        done.append((number, place))
        assert pace.passed == 2 + place - 1
        with pace.telling("", silent):
            return "abcde"[number]

    assert shared([[0, 3], [4], [2, 1]], do, Workers(), pace) == list("abcde")
    assert done == [(0, 1), (3, 2), (4, 3), (2, 4), (1, 5)]
    assert pace.passed == 7


def test_an_error_from_another_process_keeps_kind_sentence_and_traceback() -> None:
    class Local(Exception):
        """Not to be found by its name from outside."""

    for error, kind in ((InputError("it is wrong"), InputError), (Local("odd"), RuntimeError)):
        try:
            raise error
        except Exception as caught:
            copy = portable(caught)
        assert type(copy) is kind
        assert str(error) in str(copy)
        assert "test_workers.py" in copy.__notes__[0]


@pytest.mark.parametrize(
    ("device", "rank", "reason"),
    [("auto", 2, "set --num_processes 2"), ("cuda:1", 0, "device is cuda:1 for all"), ("auto", 1, ""), ("cpu", 5, "")],
)
def test_each_process_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, device: str, rank: int, reason: str
) -> None:
    chosen: list[int] = []
    fake = {"is_available": lambda: True, "device_count": lambda: 2, "set_device": chosen.append}
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(**fake))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    if reason:
        with pytest.raises(InputError, match=reason):
            rooms._choose_gpu(device)
        return
    rooms._choose_gpu(device)
    assert chosen == ([] if device == "cpu" else [rank])


def test_a_launcher_that_does_not_say_where_the_others_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(InputError, match=r"RANK expected.*start several processes with accelerate launch"),
        joined("cpu"),
    ):
        pass
    assert main(["bench", "sprites", "ablation", "--dry-run"]) == 2


@pytest.mark.slow
def test_accelerate_launches_it_as_the_readme_says(words: list[str], one: Path, tmp_path: Path) -> None:
    line = f"accelerate launch --multi_gpu --num_processes 2 --main_process_port {free_port()} --no_python motionlora"
    command = [*shlex.split(line), *words, "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    launched = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert launched.returncode != 0
    assert "motionlora: 8 of 28 cells failed" in launched.stderr
    assert rows(tmp_path / "out") == rows(one)
