"""Laws of selectivity in a comparison: what is played backwards, what moves at random by the same dose, who has it."""

import json
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from motionlora.data.benchmark import cases
from motionlora.data.clip import backwards
from motionlora.data.errors import InputError
from motionlora.data.say import silent
from motionlora.data.sprites import render
from motionlora.heads.tiny import random_twin
from motionlora.infer import measure_pair
from motionlora.infer.bench_sprites import SPRITES, protocol_pairs
from motionlora.infer.compare import compared
from motionlora.infer.compare_settings import BenchSpritesSettings
from motionlora.infer.grid import grid
from motionlora.infer.measure_direction import turning_of_points
from motionlora.infer.measure_pair import UNTURNED, Judge, Measured
from motionlora.infer.measure_sprites import observe
from motionlora.infer.method import parsed_method, parsed_methods
from motionlora.infer.row import Row
from motionlora.infer.track_points import OpticalFlowTracker
from motionlora.infer.turned import with_selectivity

METHOD = "flowmotion:share=1.0,iterations=1,lr=0.1"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Row], Path]:
    """Rows by method of one pair and seed on a random twin, and the folder of its clips."""
    out = tmp_path_factory.mktemp("turned")
    twin = random_twin(out / "wan", blocks=1, seed=3)
    values: dict[str, Any] = {"model": str(twin), "methods": (METHOD,), "out": out, "cache": None, "points": 0}
    values |= {"sample": {"steps": 2, "scale": 1.0}, "device": "cpu", "controls": False, "selective": True}
    pairs = protocol_pairs("short")[:1]
    rows = compared(pairs, BenchSpritesSettings.model_validate(values), SPRITES, {}, silent)
    return {row.method: row for row in rows}, out


def test_a_guidance_has_its_selectivity_and_so_has_chance(made: tuple[dict[str, Row], Path]) -> None:
    rows, out = made
    assert list(rows) == ["none", METHOD, *(f"{control}:{METHOD}" for control in ("reversed", "dose", "redose"))]
    assert {row.status for row in rows.values()} == {"done"}
    assert {name for name, row in rows.items() if "selectivity" in row.values} == {METHOD, f"dose:{METHOD}"}
    assert "By selectivity, with intervals that exclude 0:" in (out / "table.md").read_text()


def test_a_method_stands_beside_its_clip_backwards_and_chance_beside_another_chance() -> None:
    pairs = protocol_pairs("short")[:1]
    cells = grid(pairs, parsed_methods([METHOD], controls=False, selective=True))
    rows = [
        Row(cell.pair.source.name, "", cell.pair.caption, cell.method.name, cell.seed, cell.method.control)
        for cell in cells
    ]
    asked: list[tuple[str, str]] = []
    half = Measured({"selectivity": 0.5, "turned": 0.25})
    judge: Any = SimpleNamespace(turning=lambda there, back, source: asked.append((there, back)) or half)
    name_of: Any = attrgetter("method.name")
    found = {row.method: row.values for row in with_selectivity(cells, rows, judge, name_of)}
    assert asked == [(METHOD, f"reversed:{METHOD}"), (f"dose:{METHOD}", f"redose:{METHOD}")]
    assert found[METHOD] == {"selectivity": 0.5, "turned": 0.25}
    judge.turning = lambda *_: Measured(missing={"turned": "nobody looked"})
    (row,) = [row for row in with_selectivity(cells, rows, judge, name_of) if row.method == METHOD]
    assert (row.values, row.missing["turned"]) == ({}, "nobody looked")
    failed = [replace(row, status="failed") if row.control == "reversed" else row for row in rows]
    assert "selectivity" not in {r.method: r.values for r in with_selectivity(cells, failed, judge, name_of)}[METHOD]


def test_random_moves_go_as_far_as_the_guidance_in_each_step_and_each_its_own_way(
    made: tuple[dict[str, Row], Path],
) -> None:
    rows, _ = made
    own, dose, redose = (rows[name].cost for name in (METHOD, f"dose:{METHOD}", f"redose:{METHOD}"))
    assert own["dose_rms"] > 0
    assert dose["doses"] == pytest.approx(own["doses"], rel=1e-4)
    assert (dose["dose_rms"], redose["dose_rms"]) == pytest.approx((own["dose_rms"],) * 2, rel=0.05)
    assert (dose["forwards"], dose["gradients"]) == (rows["none"].cost["forwards"], 0)
    assert len({row.key for row in rows.values()}) == len(rows)


def test_the_clip_backwards_is_that_clip_and_no_other_control_has_it() -> None:
    pairs = protocol_pairs("short")
    for cell in grid(pairs, parsed_methods([METHOD], controls=True, selective=True)):
        own, given = cell.pair.source, cell.donor.source
        if cell.method.control == "reversed":
            assert np.array_equal(given.read().pixels, own.read().pixels[::-1])
            assert given.content == given.read().content_hash() != own.content
        else:
            assert (given is own) == (cell.method.control != "wrong")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("reversed:none", "has no reversed"),
        ("dose:lora+flowmotion", "without a LoRA"),
        ("redose:static", "has no redose"),
    ],
)
def test_a_control_of_nothing_is_one_sentence(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        parsed_method(text)


@pytest.mark.parametrize("points", [0, 20])
def test_an_output_that_turns_round_is_selective_and_one_that_does_not_is_not(points: int, tmp_path: Path) -> None:
    """By the sprite, and by points alone for a clip that nobody knows the scene of."""
    case = cases("short")[0]
    pair = protocol_pairs("short")[0]
    there = render(case.reference.scene)
    judge = Judge([pair.source], OpticalFlowTracker(points) if points else None, tmp_path)
    source = pair.source if not points else type(pair.source)("film", pair.source.read, pair.source.content)
    turned, still = judge.turning(there, backwards(there), source), judge.turning(there, there, source)
    assert turned.values["selectivity"] > 0.8
    assert still.values == {"selectivity": 0, "turned": 0}
    swapped = judge.turning(backwards(there), there, source)
    assert swapped.values["selectivity"] < -0.8
    if points:
        for why in ("no tracker", "another reason"):
            unseen = Judge([source], None, tmp_path, why).turning(there, there, source)
            assert unseen.missing == {"selectivity": why, "turned": why}


def test_what_turned_is_measured_once_and_never_a_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, pair = cases("short")[0], protocol_pairs("short")[0]
    there = render(case.reference.scene)
    back, looked = backwards(there), []
    monkeypatch.setattr(measure_pair, "observe", lambda pixels: looked.append(pixels) or observe(pixels))
    first, again = (Judge([pair.source], None, tmp_path).turning(there, back, pair.source) for _ in range(2))
    assert first == again
    assert first.values["selectivity"] > 0.8
    assert len(looked) == 2
    for others in ((back, there), (there, there), (back, back)):
        assert Judge([pair.source], None, tmp_path).turning(*others, pair.source) != first
    monkeypatch.setattr(measure_pair, "turning", lambda *_: (float("nan"), float("nan")))
    undefined = Judge([pair.source], None, tmp_path / "nan").turning(there, back, pair.source)
    assert undefined == Measured(missing=dict.fromkeys(("selectivity", "turned"), UNTURNED))


def test_points_that_all_move_alike_turn_as_one() -> None:
    way = np.cumsum(np.random.default_rng(1).normal(0, 1, (17, 2)), 0)
    grid_ = np.stack(np.meshgrid(np.arange(8.0), np.arange(8.0), indexing="ij"), -1).reshape(-1, 1, 2) * 8 + 4
    paths = np.clip(grid_ + 0 * way, 0, 63) + way * 0.01
    back = grid_ + way[::-1] * 0.01
    assert turning_of_points(paths, back, paths, 64, 64) == pytest.approx((1, 1), abs=0.02)


def story_of(out: Path, row: Row) -> dict[str, Any]:
    return json.loads((out / "cells" / f"{row.key}.json").read_text())


def test_a_random_control_says_what_it_was(made: tuple[dict[str, Row], Path]) -> None:
    rows, out = made
    told = [story_of(out, rows[f"{control}:{METHOD}"])["guidance"] for control in ("dose", "redose")]
    assert [each["draw"] for each in told] == [0, 1]
