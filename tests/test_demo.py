"""The demo leaves what README promises; what its LoRA is worth is measured elsewhere (results/transfer.md)."""

import json
from pathlib import Path
from typing import Any

import pytest

from motionlora.data.benchmark import references
from motionlora.data.sprites import render
from motionlora.train import demo
from motionlora.train.demo import Demo, learn, main


def test_it_leaves_reference_head_map_lora_clips_sheet_and_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One step of training, and the reference in place of new clips."""
    (zigzag,) = (reference for reference in references() if reference.name == "zigzag")

    def quick(*words: Any) -> Any:
        return learn(*words, "--temporal.steps", "1", "--temporal.batch", "1")

    monkeypatch.setattr(demo, "learn", quick)
    monkeypatch.setattr(demo, "shown", lambda model, cases, *rest: [render(zigzag.scene)] * len(cases))
    main(Demo(tmp_path, seeds=(0,)))
    left = {path.name for path in tmp_path.iterdir()}
    assert {"reference.mp4", "heads.json", "heads.png", "temporal.safetensors", "sheet.png", "summary.json"} <= left
    for name in ("with-lora", "without-lora"):
        assert len([*tmp_path.glob(f"*-seed0-{name}.mp4")]) == 3
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["smf_median"] == summary["smf_median_without_lora"] == pytest.approx(1.0, abs=0.05)
    assert {"attr_acc_median", "attr_leak_median"} <= summary.keys()
    assert {"heads", "temporal", "generate with LoRA", "measure", "total"} <= summary["seconds"].keys()
    assert "with LoRA" in capsys.readouterr().out
