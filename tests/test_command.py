"""Laws of the `motionlora` command: it answers at once, every ending has its exit code, every shipped file is valid."""

import errno
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from motionlora.data.complaint import flags_of
from motionlora.data.errors import InputError, NumbersError, StorageError
from motionlora.data.yaml_file import read_yaml
from motionlora.train.command import main, settings_of
from motionlora.train.guidance_choice import GUIDANCES
from motionlora.train.settings import TrainSettings
from motionlora.train.subcommands import SECTIONS, SUBCOMMANDS, HeadsSettings

CONFIGS = Path(str(resources.files("motionlora.configs")))
OURS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("accelerate"))
ACCELERATE = sorted(path.name for path in CONFIGS.glob("accelerate*.yaml"))
WITH_CONFIG = [name for name, subcommand in SUBCOMMANDS.items() if subcommand.config]
HEAVY = ("torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "av")


@pytest.mark.parametrize("words", [[], ["clip"], ["lora"], *(name.split() for name in SUBCOMMANDS)], ids=" ".join)
def test_help_answers_at_once_and_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from motionlora.train.command import main; code = main(sys.argv[1:]);"
        f"heavy = [name for name in {HEAVY} if name in sys.modules];"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    spent = []
    for _ in range(3):  # the least of three: other work on the machine makes caches cold and clocks slow
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = subprocess.run([sys.executable, "-c", code, *words, "--help"], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert ended.returncode == 0, ended.stderr
        assert "usage: motionlora" in ended.stdout
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if spent[-1] < 1:
            break
    seconds = min(spent)
    assert seconds < 1, f"{seconds:.2f} s of processor time, where people expect an answer at once."


def test_the_overview_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert [name for name in SUBCOMMANDS if name not in said] == []
    assert main(["lora", "--help"]) == 0
    assert "train" not in capsys.readouterr().out.partition("Settings come from")[0].partition("SUBCOMMAND")[2]
    assert main([]) == main(["clip"]) == 2
    assert main(["--version"]) == 0


@pytest.mark.parametrize("name", WITH_CONFIG)
@pytest.mark.parametrize("config", OURS)
def test_a_shipped_file_serves_every_subcommand_and_prints_as_a_file(
    name: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*name.split(), "--config", config, "--print-config"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    assert main([*name.split(), "--config", str(tmp_path / "again.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("config", OURS)
def test_a_shipped_file_names_every_setting_with_a_comment(config: str) -> None:
    path = CONFIGS / f"{config}.yaml"
    values = read_yaml(path)
    for section, cls in SECTIONS.items():
        of_one_run = {"clip", "caption", "resume", "reference", "clips", "captions", "loras", "rankings", "dry_run"}
        of_one_run |= {"latents", "positions", "together"}
        if "a14b" not in config:  # the others have no two experts
            of_one_run |= {"expert", "sample.scale_low", "validation.sample.scale_low"}
        missing = set(flags_of(cls)) - of_one_run - _names(values) - _names(values[section]) - {"guidance"}
        assert not missing, f"{config}.yaml lacks {sorted(missing)} for {section}."
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    bare = [line for line in lines if "  # " not in line and not re.fullmatch(r"#.*| *[a-z]+:", line)]
    assert bare == [], f"{config}.yaml: these keys have no comment."


def _names(values: Mapping[str, Any], prefix: str = "") -> set[str]:
    """All keys of a file, dotted."""
    found = set()
    for key, value in values.items():
        found |= _names(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key}
    return found


@pytest.mark.parametrize("file", ACCELERATE)
def test_accelerate_reads_its_files(file: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / file))
    kind = {"one_gpu": "NO", "multi_gpu": "MULTI_GPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}
    name = file.removeprefix("accelerate_").removesuffix(".yaml")
    assert str(getattr(config.distributed_type, "value", config.distributed_type)) == kind[name]
    assert (getattr(config, "deepspeed_config", None) or {}).get("zero_stage") == {"zero2": 2, "zero3": 3}.get(name)
    assert (getattr(config, "fsdp_config", None) or {}).get("fsdp_version") == {"fsdp2": 2}.get(name)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trian"], ["`trian`", "did you mean train?"]),
        (["clip", "inspct", "x"], ["`clip inspct`", "did you mean clip inspect?"]),
        (["inspect"], ["did you mean"]),
        (["train", "--rank", "3"], ["--rank", "did you mean --lora.rank?"]),
        (["train", "--lora.rank", "many"], ["--lora.rank is 'many'"]),
        (["train", "--config", "tinny"], ["did you mean tiny?"]),
        (["train", "--temporal.positions", "alined"], ["did you mean aligned?"]),
        (["train", "--heads.times", "2"], ["--heads.times"]),
        (["train", "--steps", "2"], ["did you mean --spatial.steps or --temporal.steps"]),
        (["train", "--boxes", "2"], ["no name is like it", "--help"]),
        (["train"], ["clip"]),
        (["generate", "--guidance.lr", "2"], ["--guidance.lr", "add --guidance NAME", "flowmotion"]),
        (["generate", "--guidance", "nne"], ["'nne'", "did you mean none?"]),
        (["generate", "--guidance", "smm", "--guidance.name", "inject"], ["choose with --guidance NAME"]),
        (["lora", "inspect"], ["no FILE was named", "motionlora lora inspect FILE"]),
        (["lora", "convert", "x", "--out", "y", "--layout", "natve"], ["did you mean native?"]),
        (["lora", "merge", "--out", "x"], ["no FILE was named"]),
        (["lora", "resize", "x", "--out", "y"], ["--rank is missing"]),
        (["lora", "convert", "x", "--out", "y", "--precision", "fp8"], ["--precision is 'fp8'"]),
        (["lora", "inspect", "x", "--alpha", "0"], ["above 0, or `rank`"]),
        (["lora", "verify", "nowhere.safetensors"], ["Cannot read nowhere.safetensors"]),
        (["clip", "sprite", "--out", "x.mp4", "--shape", "sqare"], ["did you mean square?"]),
        (["clip", "sprite", "--out", "x.mp4", "--frames", "48"], ["4k + 1", "45 or 49"]),
        (["clip", "sprite", "--out", "x.mp4", "--motion", "zigzagg"], ["did you mean zigzag?"]),
        (["clip", "sprite", "--out", "x.mp4", "--motion", "v", "--frames", "45"], ["49 frames", "leave --frames out"]),
        (["train", "--clip", "x.mp4", "--model", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"], ["--config wan2.1_1.3b"]),
        (["heads", "--clip", "x.mp4", "--model=some/folder", "--height", "480"], ["both --height and --width"]),
        (["generate", "--caption", "x", "--model", "Wan-AI/Wan2.1-T2V-14B-Diffusers"], ["wan2.1_14b"]),
        (["heads", "--scores", "nowhere.json"], ["nowhere.json"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    words: list[str],
    parts: list[str],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("motionlora: ")
    assert err.count("\n") == 1, err
    assert [part for part in parts if part not in err] == [], err
    assert list(tmp_path.iterdir()) == []


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (InputError("this is wrong."), 2, 1),
        (StorageError("this is full."), 3, 1),
        (NumbersError("this is NaN."), 4, 1),
        (OSError(errno.ENOSPC, "No space left on device", "x.mp4"), 3, 1),
        (PermissionError(errno.EACCES, "Permission denied", "x.mp4"), 3, 1),
        (KeyboardInterrupt(), 130, 1),
        (OutOfMemoryError("CUDA out of memory"), 2, 1),
        (RuntimeError("boom"), 1, None),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1, None),
        (SystemExit(0), 0, 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_ending_has_its_exit_code(
    error: BaseException,
    code: int,
    lines: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(settings: BaseModel) -> None:
        raise error

    monkeypatch.setitem(SUBCOMMANDS, "train", replace(SUBCOMMANDS["train"], run=failing))
    assert main(["train"]) == code
    said = capsys.readouterr().err
    if lines is None:
        assert "Traceback" in said
        assert "failing" in said
        assert said.splitlines()[-1].startswith("motionlora: this is a bug")
    else:
        assert len(said.splitlines()) == lines


@pytest.mark.parametrize("code", [130, 143])
def test_a_stop_after_saving_has_the_code_of_its_signal(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from motionlora.train.loop import Stopped

    def stopping(settings: BaseModel) -> None:
        raise Stopped("saved; continue with: motionlora train --resume latest", code)

    monkeypatch.setitem(SUBCOMMANDS, "train", replace(SUBCOMMANDS["train"], run=stopping))
    assert main(["train"]) == code
    assert "--resume latest" in capsys.readouterr().err


def test_the_accelerate_door_is_the_train_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "wan2.1_1.3b", "--clip", "a.mp4", "--lora.rank", "16", "--print-config"]
    assert main(["train", *words]) == 0
    door = subprocess.run(
        [sys.executable, "-m", "motionlora.train", *words], capture_output=True, text=True, check=True
    )
    assert door.stdout == capsys.readouterr().out


def test_heads_and_train_mean_the_same_by_a_name() -> None:
    ours, theirs = flags_of(HeadsSettings), flags_of(TrainSettings)
    assert {name: kind for name, kind in ours.items() if name != "scores"}.items() <= theirs.items()
    one, other = HeadsSettings().model_dump(), TrainSettings().model_dump()
    differing = {name for name in one.keys() & other.keys() if one[name] != other[name]}
    assert differing == {"out"}


def test_a_guidance_is_named_and_its_class_seen(capsys: pytest.CaptureFixture[str]) -> None:
    for name in GUIDANCES:
        assert main(["generate", "--guidance", name, "--print-config"]) == 0
        assert f"name: {name}" in capsys.readouterr().out


def test_a_sprite_clip_can_be_made_and_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "clip.mp4"
    named = ["--shape", "star", "--colour", "cyan", "--background", "light", "--motion", "ease", "--seed", "3"]
    assert main(["clip", "sprite", "--out", str(path), *named]) == 0
    assert path.with_suffix(".txt").read_text().startswith("a cyan star")
    capsys.readouterr()
    assert main(["clip", "inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert "49" in said
    assert "64" in said
    assert "a cyan star" in said


def test_every_reference_of_the_protocol_can_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    from motionlora.data.benchmark import references
    from motionlora.data.sprites import render
    from motionlora.train.sprite_clip import sprite_clip

    for reference in references():
        clip = sprite_clip(motion=reference.name)
        assert np.array_equal(clip.pixels, render(reference.scene).pixels)
        assert clip.caption == reference.scene.caption
    assert main(["clip", "sprite", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert [reference.name for reference in references() if reference.name not in said] == []
    other = sprite_clip(motion="v", shape="star", colour="cyan", background="light")
    assert other.caption == "a cyan star on a light background"


def test_another_model_needs_its_own_size(capsys: pytest.CaptureFixture[str]) -> None:
    other = ["--model", "some/folder"]
    for words in (["--config", "tiny"], ["--config", "wan2.1_1.3b"], ["--height", "64", "--width", "64"]):
        assert main(["train", *other, *words, "--print-config"]) == 0
        assert "model: some/folder" in capsys.readouterr().out
    assert settings_of("train", ["--model", "tiny"]).model == "tiny"


def test_a_rule_is_applied_to_saved_scores_without_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from motionlora.heads.backbone import TokenGrid
    from motionlora.heads.head_map import HeadMap

    scores = np.stack([np.full((2, 3), 0.3), np.array([[0.1, 0.32, 0.5], [0.25, 0.31, 0.4]])], axis=-1)
    HeadMap("made up", TokenGrid(2, 3, 4), (1.0,), scores, 1, "hash", "words").save(tmp_path / "old.json")
    monkeypatch.setattr("motionlora.heads.wan.WanBackbone.load", lambda *_, **__: pytest.fail("a model was loaded"))
    words = ["heads", "--scores", str(tmp_path / "old.json"), "--out", str(tmp_path / "new"), "--heads.rule"]
    temporal = {}
    for rule in ("code", "paper"):
        assert main([*words, rule]) == 0
        temporal[rule] = re.search(r"(\d+) temporal", capsys.readouterr().out)[1]  # pyright: ignore
        assert (tmp_path / "new" / "heads.png").stat().st_size > 1000
    assert temporal == {"code": "2", "paper": "5"}
    assert np.array_equal(HeadMap.load(tmp_path / "new" / "heads.json").scores, scores)
