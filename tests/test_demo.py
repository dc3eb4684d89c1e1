"""The demo leaves what README promises; what its LoRA is worth is measured elsewhere (results/transfer.md)."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motionlora.data.benchmark import Case
from motionlora.data.clip import Clip
from motionlora.data.errors import Stopped
from motionlora.data.sprites import render
from motionlora.train import demo
from motionlora.train.demo import Demo, command, learn, main


def test_it_leaves_reference_head_map_lora_clips_sheet_and_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One step of training; in place of new clips the reference with the LoRA, its first frame without. Then again."""

    def quick(*words: Any) -> Any:
        return learn(*words, "--temporal.steps", "1", "--temporal.batch", "1")

    monkeypatch.setattr(demo, "learn", quick)

    def shown(model: Any, cases: Sequence[Case], lora: Path | None, title: str) -> list[Clip]:
        clips = [render(case.reference.scene) for case in cases]
        if lora:
            assert lora == tmp_path / "temporal.safetensors"
            return clips
        return [replace(clip, pixels=np.repeat(clip.pixels[:1], clip.frames, 0)) for clip in clips]

    monkeypatch.setattr(demo, "shown", shown)
    main(Demo(tmp_path, seeds=(0,)))
    left = {path.name for path in tmp_path.iterdir()}
    assert {"reference.mp4", "heads.json", "heads.png", "temporal.safetensors", "sheet.png", "summary.json"} <= left
    for name in ("with-lora", "without-lora"):
        assert len([*tmp_path.glob(f"*-seed0-{name}.mp4")]) == 3
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["smf_median"] == pytest.approx(1.0, abs=0.05)
    assert summary["smf_median_without_lora"] == pytest.approx(0.0, abs=0.05)
    assert {"attr_acc_median", "attr_leak_median"} <= summary.keys()
    assert {"heads", "temporal", "generate with LoRA", "measure", "total"} <= summary["seconds"].keys()
    learned = (tmp_path / "temporal.safetensors").read_bytes()
    main(Demo(tmp_path, seeds=(0,)))
    assert (tmp_path / "temporal.safetensors").read_bytes() == learned, "what is done is not done again"
    printed = "".join(capsys.readouterr())
    assert printed.count("with LoRA  ") == 2
    assert f"Done: {tmp_path / 'heads.json'}\n" in printed, "scoring alone names its file"


def test_what_ends_it_early_is_one_sentence_and_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stop while it learns says how the demo goes on, not training alone; a motion that is not there is input."""
    assert command(Demo(tmp_path / "none", motion="moonwalk")) == 2
    refused = capsys.readouterr().err
    assert refused.startswith("motionlora: There is no motion 'moonwalk': choose one of v, zigzag")
    assert refused.count("\n") == 1
    assert not (tmp_path / "none").exists()

    def stopped(settings: Any) -> Any:
        raise Stopped("Stopped after step 7 of 600 and saved X", 130)

    monkeypatch.setattr(demo, "train", stopped)
    assert command(Demo(tmp_path)) == 130
    said = capsys.readouterr().err
    assert said.startswith("motionlora: Stopped after step 7 of 600 and saved X; the demo as a whole goes on")
    assert said.count("\n") == 1
