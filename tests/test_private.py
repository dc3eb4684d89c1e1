"""What a run may tell: captions and paths unless they are private, keys never; and the same run twice, bit for bit."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from motionlora.data.clip import Clip
from motionlora.data.errors import InputError
from motionlora.heads.head_map import HeadMap
from motionlora.heads.lora_file import load_lora
from motionlora.infer.compare import compared
from motionlora.infer.compare_settings import CompareSettings
from motionlora.infer.pairs import Pair, Source
from motionlora.infer.private import secrets, without_secrets
from motionlora.infer.studio import Size
from motionlora.train import command, loop
from motionlora.train.endings import exit_code
from motionlora.train.journal import start_trackers
from motionlora.train.private import needed_again, told_caption
from motionlora.train.run import train
from motionlora.train.settings import TrainSettings

CAPTION, VALIDATED = "a red zanzibar over a dark background", "a blue quokka"
KEYS = {"HF_TOKEN": "hf_thisisnotatoken", "WANDB_API_KEY": "0123456789abcdef", "my_secret": "hf_thisisnot"}


@pytest.fixture(scope="module")
def settings(
    twin_folder: Path, tmp_path_factory: pytest.TempPathFactory, moving_square: Callable[[Path, int], Path]
) -> TrainSettings:
    """One step of the temporal stage on 5 frames, every head temporal, one validation."""
    folder = moving_square(tmp_path_factory.mktemp("meerkat"), 5)
    values = {
        "model": str(twin_folder), "clip": folder, "caption": CAPTION, "frames": 5, "fps": None, "device": "cpu",
        "cache": folder.with_name("numbat"), "lora": {"rank": 2}, "heads": {"ratio": 1e-9},
        "stages": ("heads", "temporal"), "temporal": {"steps": 1, "lr": 1e-2, "stride": 1},
        "validation": {"every": 1, "captions": (VALIDATED,), "sample": {"steps": 1}},
    }  # fmt: skip
    return TrainSettings.model_validate(values)


def copied(settings: TrainSettings, **changes: Any) -> TrainSettings:
    return TrainSettings.model_validate({**settings.model_dump(), **changes})


def found(folder: Path, words: list[str]) -> set[str]:
    """Which of the words stand in the bytes or the name of any file of a folder."""
    texts = [path.name.encode() + path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return {word for word in words if any(word.encode() in text for text in texts)}


@pytest.mark.parametrize("private", [True, False])
def test_a_private_run_tells_no_caption_and_no_path_and_none_tells_a_key(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    run, said = copied(settings, private=private, out=tmp_path / "dugong"), []
    train(run, said.append)
    assert {"temporal.safetensors", "settings.yaml", "heads.json", "validation"} <= set(os.listdir(run.out))
    words = ["zanzibar", "quokka", "meerkat", "numbat", "dugong", str(settings.model)]
    assert found(run.out, words) == (set() if private else set(words))
    told: dict[str, Any] = {}
    start_trackers(SimpleNamespace(init_trackers=lambda name, **more: told.update(more)), run)  # pyright: ignore
    shown = str(told["config"]) + str({**told["init_kwargs"]["wandb"], "dir": ""})
    assert [word for word in words if word in shown] == ([] if private else words)
    assert told["config"]["temporal.steps"] == 1
    assert ("x_disable_meta" in shown) is private
    lora, heads = load_lora(run.out / "temporal.safetensors"), HeadMap.load(run.out / "heads.json")
    assert (lora.provenance["caption"] == CAPTION) is not private
    assert heads.caption == lora.provenance["identity"]["caption"] == lora.provenance["caption"]
    for key in KEYS.values():
        assert found(tmp_path, [key]) == set()
        assert key not in "\n".join(said) + shown


def test_a_private_run_goes_on_with_what_its_settings_leave_out(settings: TrainSettings, tmp_path: Path) -> None:
    run = copied(settings, private=True, out=tmp_path / "run")
    train(run, print)
    words = ["--config", str(run.out / "settings.yaml"), *needed_again(run), "--resume", "latest"]
    again, said = command.settings_of("train", words), []
    assert again == copied(run, resume="latest")
    train(again, said.append)
    assert any("done already" in line for line in said), "the caption's mark is not the same twice"
    with pytest.raises(InputError, match="made with caption = private ") as refusal:
        train(copied(again, caption="a green wombat"), print)
    assert "wombat" not in str(refusal.value)
    assert needed_again(settings) == []


def test_the_mark_of_a_private_caption_cannot_be_guessed() -> None:
    black, grey, other = (
        told_caption(Clip(np.full((1, 16, 16, 3), level, np.uint8), 12.0, caption), True)
        for level, caption in ((0, CAPTION), (9, CAPTION), (0, VALIDATED))
    )
    assert len({black, grey, other}) == 3, "without the clip the words can be tried"


@pytest.mark.parametrize("private", [True, False])
def test_tables_and_pages_of_a_comparison_tell_no_key_and_where_private_no_path(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    """The model's folder and the command, whose words may hold a key that no setting has."""
    monkeypatch.setenv("HF_TOKEN", KEYS["HF_TOKEN"])
    monkeypatch.setattr("sys.argv", ["motionlora", "compare", "--clips", "okapi", KEYS["HF_TOKEN"]])
    asked = CompareSettings.model_validate(
        {"model": settings.model, "methods": ("none",), "controls": False, "out": tmp_path / "out", "cache": None,
         "sample": {"steps": 1}, "device": "cpu", "points": 0, "private": private, "seeds": (0,)}
    )  # fmt: skip
    clip = Clip(np.zeros((5, 16, 16, 3), np.uint8), 12.0, "")
    pairs = [Pair(Source("gnu.mp4", lambda: clip, clip.content_hash()), "a red circle", (0,))]
    said: list[str] = []
    compared(pairs, asked, Size(5, 16, 16, 12.0), {}, said.append)
    shared = [tmp_path / "out" / name for name in ("results.jsonl", "table.csv", "table.md", "report.html")]
    text = "\n".join([*said, *(path.read_text() for path in shared)])
    assert KEYS["HF_TOKEN"] not in text
    assert ("okapi" in text, "<HF_TOKEN>" in text.replace("&lt;", "<")) == (not private, not private)
    assert (Path(settings.model).name in text) is not private
    assert "a red circle" in text, "what is compared is told"
    with pytest.raises(InputError, match="--negative holds the value of HF_TOKEN"):
        compared(pairs, asked.model_copy(update={"negative": KEYS["HF_TOKEN"]}), Size(5, 16, 16, 12.0), {})


def test_a_key_in_a_setting_is_refused_and_one_in_an_error_is_not_shown(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "run"
    with pytest.raises(InputError, match=r"--validation\.negative holds the value of HF_TOKEN.*take it out") as refusal:
        train(copied(settings, out=out, validation={"negative": f"not {KEYS['HF_TOKEN']}"}), print)
    assert KEYS["HF_TOKEN"] not in str(refusal.value)
    assert not out.exists()
    for error, code in ((RuntimeError(f"401 for {KEYS['HF_TOKEN']}"), 1), (InputError(KEYS["WANDB_API_KEY"]), 2)):
        assert exit_code(error) == code
        printed = "".join(capsys.readouterr())
        assert not [key for key in KEYS.values() if key in printed]
        assert "<HF_TOKEN>" in printed or "<WANDB_API_KEY>" in printed
    assert without_secrets(KEYS["HF_TOKEN"], KEYS) == "<HF_TOKEN>", "the longer of two comes first"
    plain = {"PATH": "/usr/bin:/bin", "TOKENIZERS_PARALLELISM": "false-or-true", "HF_TOKEN": "1"}
    assert secrets(plain) == {}


def test_a_deterministic_run_ends_in_the_same_bytes_twice(settings: TrainSettings, tmp_path: Path) -> None:
    files = []
    for index in range(2):
        run = copied(settings, deterministic=True, out=tmp_path / str(index), validation={})
        torch.manual_seed(index)  # what a process has drawn before must not matter
        files.append(train(run, print).paths["temporal"])
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "CPU with" in load_lora(files[0]).provenance["identity"]["machine"]


def test_deterministic_allows_only_operations_that_are_and_leaves_no_trace(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, seen = loop.training_step, []

    def with_put(*words: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        torch.zeros(2).put_(torch.zeros(2, dtype=torch.long), torch.ones(2))  # which of the two is written is open
        return step(*words)

    monkeypatch.setattr(loop, "training_step", with_put)
    train(copied(settings, out=tmp_path / "free", validation={}), print)
    with pytest.raises(InputError, match=r"put_ has no deterministic form .* leave --deterministic out"):
        train(copied(settings, out=tmp_path / "strict", deterministic=True, validation={}), print)
    assert seen == [False, True]
    assert not torch.are_deterministic_algorithms_enabled()
