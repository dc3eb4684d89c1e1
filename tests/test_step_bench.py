"""The bench of training steps: what it counts, and that a row takes the place of an older one of the same work."""

import json
import sys
from pathlib import Path

import bench_step
import pytest
import torch


def test_a_step_is_counted_with_its_recomputing_and_grows_with_the_clip() -> None:
    (few, short), (more, long) = (bench_step.counted("tiny", frames, 4, torch.float32) for frames in (5, 17))
    assert (few, more) == (2 * 64, 5 * 64)
    assert 2.5 < long / short < 3.5  # 2.5 by what each token takes, more by attention
    with (
        bench_step.step_of("tiny", 5, 4, bench_step.META, torch.float32) as (model, stage, _),
        bench_step.counting() as forward,
        torch.no_grad(),
    ):
        model.velocity(stage.latents, torch.ones(1), stage.prompt)
    assert 3 < short / forward.flops < 4.5  # forward, again, and backward to what is not trained


def test_rows_of_other_work_stay_and_those_of_the_same_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    for frames in (5, 9, 5):
        words = ["--frames", str(frames), "--rank", "4", "--steps", "1", "--results", str(tmp_path / "steps")]
        monkeypatch.setattr(sys, "argv", ["bench_step.py", *words])
        monkeypatch.setattr(bench_step, "matmul_rate", lambda *_, **__: 1e12)
        bench_step.main()
        rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
        rates.append(rows[-1]["share"])
        assert rows[-1]["share"] == pytest.approx(rows[-1]["tflop"] / rows[-1]["seconds"])
    assert [row["frames"] for row in rows] == [9, 5]
    assert (tmp_path / "steps.md").read_text().count("| tiny |") == 2
