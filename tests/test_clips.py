"""Laws of a folder of clips: a LoRA each is that of each clip alone; together they are one, of one clip that clip's."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import in_processes

from motionlora.data.clip import read_clip
from motionlora.data.errors import InputError, Stopped
from motionlora.data.settings import as_yaml
from motionlora.heads.backbone import Prompt
from motionlora.heads.head_map import HeadMap
from motionlora.heads.lora_file import load_lora
from motionlora.train import loop
from motionlora.train.clips import train_clips
from motionlora.train.command import main
from motionlora.train.experts import train_experts
from motionlora.train.launch import resume_command
from motionlora.train.noise import keyed_generator
from motionlora.train.settings import TrainSettings
from motionlora.train.stages import Stage, of_all

CAPTIONS = {"down": "a red square", "right": "a green square"}
SETTINGS = {
    "frames": 9, "fps": None, "device": "cpu", "lora": {"rank": 2}, "heads": {"heads": "all", "ratio": 1.0},
    "spatial": {"steps": 2, "lr": 1e-2}, "temporal": {"steps": 3, "lr": 1e-2, "stride": 2},
}  # fmt: skip


def quiet(line: str) -> None:
    del line


def write_moving(folder: Path, name: str, side: int = 16) -> None:
    """9 numbered pictures of a square that goes down, or right, and their caption beside them."""
    (folder / name).mkdir(parents=True)
    for index in range(9):
        pixels = np.full((side, side, 3), 40, np.uint8)
        if name.startswith("down"):
            pixels[index : index + 4, 4:8, 0] = 220
        else:
            pixels[4:8, index : index + 4, 1] = 220
        Image.fromarray(pixels).save(folder / name / f"{index:04d}.png")
    (folder / f"{name}.txt").write_text(CAPTIONS[name.partition("-")[0]])


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips; not to be written to."""
    folder = tmp_path_factory.mktemp("clips")
    for name in CAPTIONS:
        write_moving(folder, name)
    return folder


@pytest.fixture(scope="module")
def recipe(twin_folder: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    places = {"model": str(twin_folder), "clips": clips, "cache": tmp_path_factory.mktemp("cache")}
    return TrainSettings.model_validate({**SETTINGS, **places})


@pytest.fixture(scope="module")
def single(recipe: TrainSettings, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The file of each clip, trained by --clip."""
    out, files = tmp_path_factory.mktemp("single"), {}
    for name in CAPTIONS:
        (result,) = train_experts(changed(recipe, clips=None, clip=clips / name, out=out / name), quiet)
        files[name] = result.paths["temporal"].read_bytes()
    assert files["down"] != files["right"]
    return files


def changed(settings: TrainSettings, **changes: Any) -> TrainSettings:
    """The settings with some replaced; `heads="split"` has the spatial stage, too."""
    values = settings.model_dump()
    if "heads" in changes:
        changes["heads"] = {**values["heads"], "heads": changes["heads"]}
    return TrainSettings.model_validate({**values, **changes})


def files_in(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(out.glob("*/temporal.safetensors"))}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(load_lora(out / "temporal.safetensors").weights)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are done from now on."""
    done: list[int] = []
    step = loop.training_step

    def counting(stage: Any, model: Any, optimizer: Any, now: int, *rest: Any) -> Any:
        done.append(now)
        return step(stage, model, optimizer, now, *rest)

    monkeypatch.setattr(loop, "training_step", counting)
    return done


def interrupting(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Ctrl-C comes in the step `at` from now, counted from 0, of all that is trained."""
    step, done = loop.training_step, []

    def ending(*words: Any) -> Any:
        done.append(0)
        if len(done) == at + 1:
            signal.raise_signal(signal.SIGINT)
        return step(*words)

    monkeypatch.setattr(loop, "training_step", ending)


def test_each_clip_gets_the_lora_that_it_gets_alone_and_a_line_in_the_table(
    recipe: TrainSettings, single: dict[str, bytes], tmp_path: Path
) -> None:
    said: list[str] = []
    rows = train_clips(changed(recipe, out=tmp_path / "out"), said.append)
    assert files_in(tmp_path / "out") == single
    assert [(row["clip"], row["file"]) for row in rows] == [
        ("down", "down/temporal.safetensors"),
        ("right", "right/temporal.safetensors"),
    ]
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == rows
    table = (tmp_path / "out" / "table.md").read_text()
    assert said[-1] == table.strip()
    lines = table.splitlines()
    assert lines[0] == "| clip | seconds | last loss | file |"
    for row, line in zip(rows, lines[2:], strict=True):
        log = [json.loads(text) for text in (tmp_path / "out" / row["clip"] / "log-temporal.jsonl").open()]
        assert row["loss"] == pytest.approx(log[-1]["loss"], abs=1e-5)
        assert row["seconds"] == pytest.approx(sum(step["seconds"] for step in log), abs=0.01)
        assert f"| {row['loss']:.4f} | {row['file']} |" in line


def test_finished_clips_are_not_trained_again_and_an_interrupted_one_goes_on_bit_identical(
    recipe: TrainSettings, single: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    run = changed(recipe, out=tmp_path / "out")
    interrupting(monkeypatch, at=4)
    with pytest.raises(Stopped, match=r"^right: Stopped after step 2.*all clips go on with: .*--resume latest") as end:
        train_clips(run, quiet)
    assert end.value.code == 130
    assert files_in(run.out).keys() == {"down"}
    with pytest.raises(InputError, match="--resume latest"):
        train_clips(run, quiet)
    words = str(end.value).rpartition("go on with: motionlora train ")[2].split()
    steps.clear()
    assert main(["train", *words]) == 0
    assert files_in(run.out) == single
    assert steps == [2]
    steps.clear()
    before = (run.out / "table.md").read_text()
    train_clips(changed(run, resume="latest"), quiet)
    assert (steps, (run.out / "table.md").read_text()) == ([], before)


def test_a_clip_that_fails_is_told_and_stops_no_other(
    recipe: TrainSettings, clips: Path, single: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    (folder / "broken.mp4").write_bytes(b"no video")
    run = changed(recipe, clips=folder, out=tmp_path / "out")
    with pytest.raises(Stopped, match=r"1 of 3 clips failed \(broken\).*--resume latest") as end:
        train_clips(run, quiet)
    assert end.value.code == 2
    assert files_in(run.out) == single
    rows = json.loads((run.out / "table.json").read_text())
    assert [row["clip"] for row in rows if row["failed"]] == ["broken"]
    assert "broken.mp4" in rows[0]["failed"]
    assert rows[0]["failed"] in (run.out / "table.md").read_text()
    assert capsys.readouterr().err.count("motionlora: broken: ") == 1
    (folder / "broken.mp4").unlink()
    shutil.copytree(clips / "down", folder / "broken")
    shutil.copy(clips / "down.txt", folder / "broken.txt")
    train_clips(changed(run, resume="latest"), quiet)
    assert files_in(run.out) == {"broken": single["down"], **single}


def test_a_bug_in_one_clip_shows_its_traceback_and_stops_no_other(
    recipe: TrainSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, seen = loop.training_step, []

    def failing(stage: Stage, *rest: Any) -> Any:
        if not seen:
            seen.append(stage)
            raise KeyError("surprise")
        return step(stage, *rest)

    monkeypatch.setattr(loop, "training_step", failing)
    with pytest.raises(Stopped) as end:
        train_clips(changed(recipe, out=tmp_path / "out"), quiet)
    assert end.value.code == 1
    assert "KeyError: 'surprise'" in capsys.readouterr().err
    assert files_in(tmp_path / "out").keys() == {"right"}


def test_two_processes_share_the_clips_and_each_trains_alone(
    recipe: TrainSettings, clips: Path, single: dict[str, bytes], tmp_path: Path
) -> None:
    """Bit-identical to one process, which DDP would not be; what fails in one is told by the first."""
    folder, out = tmp_path / "clips", tmp_path / "out"
    shutil.copytree(clips, folder)
    (folder / "broken.mp4").write_bytes(b"no video")
    shutil.copytree(clips / "down", folder / "last")
    shutil.copy(clips / "down.txt", folder / "last.txt")

    def work(rank: int) -> None:
        made: list[str] = []
        try:
            train_clips(changed(recipe, clips=folder, out=out), made.append)
        except Stopped as stopped:
            made.append(f"{stopped.code} {stopped}")
        finally:
            (tmp_path / f"said-{rank}").write_text("\n".join(made))

    assert in_processes(work) == [0, 0]
    assert files_in(out) == {**single, "last": single["down"]}
    said = [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)]
    assert "2 1 of 4 clips failed (broken)" in said[0]
    assert "accelerate launch --multi_gpu --num_processes 2" in said[0]
    assert "failed" not in said[1]
    rows = json.loads((out / "table.json").read_text())
    assert [row["clip"] for row in rows] == ["broken", "down", "last", "right"]
    for name in (*CAPTIONS, "last"):
        assert sum(f"{name}: temporal stage" in text for text in said) == 1


@pytest.fixture(scope="module")
def both(recipe: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one LoRA of both clips; not to be written to."""
    out = tmp_path_factory.mktemp("both") / "run"
    train_experts(changed(recipe, together=True, out=out), quiet)
    return out


def folder_of(tmp_path: Path, *clips: Path) -> Path:
    """Copies of clips with their captions, by number."""
    folder = tmp_path / "clips"
    for number, clip in enumerate(clips):
        shutil.copytree(clip, folder / str(number))
        shutil.copy(clip.with_name(f"{clip.name}.txt"), folder / f"{number}.txt")
    return folder


def test_a_folder_of_one_clip_is_that_clip_byte_for_byte(
    recipe: TrainSettings, clips: Path, single: dict[str, bytes], tmp_path: Path
) -> None:
    run = changed(recipe, clips=folder_of(tmp_path, clips / "right"), together=True, out=tmp_path / "out")
    assert main(["train", "--config", written(run, tmp_path)]) == 0
    assert (run.out / "temporal.safetensors").read_bytes() == single["right"]


def written(settings: TrainSettings, folder: Path) -> str:
    """The settings as a file."""
    (folder / "run.yaml").write_text(as_yaml(settings, "train"))
    return str(folder / "run.yaml")


def test_a_clip_given_twice_has_the_weights_of_the_clip_given_once(
    recipe: TrainSettings, clips: Path, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, clips / "down", clips / "down")
    run = changed(recipe, heads="split")
    train_experts(changed(run, clips=folder, together=True, out=tmp_path / "twice"), quiet)
    train_experts(changed(run, clips=None, clip=clips / "down", out=tmp_path / "once"), quiet)
    assert (tmp_path / "once" / "spatial.safetensors").exists()
    assert equal(weights(tmp_path / "twice"), weights(tmp_path / "once"))


def test_the_draw_of_a_clip_takes_nothing_from_the_noise(
    recipe: TrainSettings, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's noise begins where its key puts it, as before there were folders of clips."""
    point, begins = Stage.point, []

    def watched(stage: Stage, generator: torch.Generator) -> Any:
        begins.append(generator.get_state())
        return point(stage, generator)

    monkeypatch.setattr(Stage, "point", watched)
    train_experts(changed(recipe, together=True, out=tmp_path / "out"), quiet)
    keys = [keyed_generator(0, "temporal", step, 0, 0).get_state() for step in range(3)]
    assert len(begins) == 3
    assert all(torch.equal(begin, key) for begin, key in zip(begins, keys, strict=True))


def test_one_lora_of_two_clips_is_neither_ones_and_names_both(
    both: Path, recipe: TrainSettings, clips: Path, single: dict[str, bytes], tmp_path: Path
) -> None:
    lora = load_lora(both / "temporal.safetensors")
    hashes = [read_clip(clips / name, frames=9, say=quiet).content_hash() for name in CAPTIONS]
    assert lora.provenance["clip_hash"].split() == lora.provenance["identity"]["clip"].split() == hashes
    assert lora.provenance["caption"].splitlines() == list(CAPTIONS.values())
    assert str(clips) not in json.dumps(dict(lora.provenance))
    assert {"reference.mp4", "reference-2.mp4"} <= {path.name for path in both.iterdir()}
    for name, file in single.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "temporal.safetensors").write_bytes(file)
        assert not equal(weights(both), weights(tmp_path / name))


def test_heads_of_several_clips_have_the_mean_of_their_scores(
    recipe: TrainSettings, clips: Path, tmp_path: Path
) -> None:
    run, scores = changed(recipe, out=tmp_path / "out", stages=("heads",)), []
    rows = train_clips(run, quiet)
    assert [(row["file"], row["loss"]) for row in rows] == [("down/heads.json", None), ("right/heads.json", None)]
    train_experts(changed(run, together=True, out=tmp_path / "both"), quiet)
    scores = [HeadMap.load(run.out / name / "heads.json").scores for name in CAPTIONS]
    assert not np.allclose(scores[0], scores[1], rtol=1e-4)
    mean = HeadMap.load(tmp_path / "both" / "heads.json").scores
    np.testing.assert_allclose(mean, (scores[0] + scores[1]) / 2, rtol=1e-6)


def test_an_interrupted_lora_of_two_clips_goes_on_bit_identical(
    both: Path, recipe: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = changed(recipe, together=True, out=tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupting(patch, at=1)
        with pytest.raises(Stopped):
            train_experts(run, quiet)
    train_experts(changed(run, resume="latest"), quiet)
    assert (run.out / "temporal.safetensors").read_bytes() == (both / "temporal.safetensors").read_bytes()


def test_other_clips_are_refused_on_the_way_on(both: Path, recipe: TrainSettings, clips: Path, tmp_path: Path) -> None:
    shutil.copytree(both, tmp_path / "run")
    other = folder_of(tmp_path, clips / "down", clips / "down")
    (other / "1.txt").write_text(CAPTIONS["right"])
    with pytest.raises(InputError, match="was made with clip = "):
        train_experts(changed(recipe, clips=other, together=True, out=tmp_path / "run", resume="latest"), quiet)


def test_every_batch_is_of_one_clip_and_clips_are_drawn_alike(both: Path) -> None:
    """Of 900 draws each of three clips gets 300, give or take 5 times the deviation of a binomial, 14."""
    stages = [plain_stage(caption) for caption in range(3)]
    stage = of_all(stages)
    drawn = [stage.drawn(keyed_generator("test", number)).latents for number in range(900)]
    counts = [sum(latents is each.latents for latents in drawn) for each in stages]
    assert sum(counts) == 900
    assert all(abs(count - 300) < 5 * 14.2 for count in counts)
    alone = plain_stage(7)
    assert of_all([alone]).drawn(keyed_generator("test")).latents is alone.latents


def plain_stage(number: int) -> Stage:
    settings = TrainSettings()
    return Stage(
        name="temporal", latents=torch.full((1, 2, 1, 1, 1), float(number)), prompt=Prompt(torch.zeros(1, 1, 1)),
        chosen=np.ones((1, 1), bool), positions=torch.zeros(1), motion="none", motion_weight=0.0,
        noise=settings.noise, settings=settings.temporal,
    )  # fmt: skip


def test_what_is_drawn_is_told_its_own_caption(recipe: TrainSettings, clips: Path, tmp_path: Path) -> None:
    """With the captions exchanged other weights are learned, though clips, draws and noise are the same."""
    folder = folder_of(tmp_path, clips / "down", clips / "right")
    run = changed(recipe, clips=folder, together=True)
    train_experts(changed(run, out=tmp_path / "right"), quiet)
    for number, caption in enumerate(reversed(CAPTIONS.values())):
        (folder / f"{number}.txt").write_text(caption)
    train_experts(changed(run, out=tmp_path / "wrong"), quiet)
    assert not equal(weights(tmp_path / "right"), weights(tmp_path / "wrong"))


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip": Path("x.mp4")}, "--clip and --clips were both given"),
        ({"caption": "a star"}, "--caption is of one clip"),
        ({"clips": Path("nowhere")}, "nowhere cannot be read as a folder of clips"),
        ({"clips": Path("empty")}, "holds no clips"),
        ({"clips": Path("clips/down")}, "is one clip, for --clip"),
        ({"out": Path("clips/out")}, "lies in --clips"),
        ({"out": Path("clips")}, "lies in --clips"),
        ({"frames": 8}, r"4k \+ 1"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    recipe: TrainSettings,
    clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    together: bool,
    changes: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clips, "clips")
    Path("empty").mkdir()
    run = changed(recipe, **{"clips": Path("clips"), "out": Path("out"), "together": together, **changes})
    with pytest.raises(InputError, match=words):
        (train_experts if together else train_clips)(run, quiet)
    assert {path.name for path in tmp_path.iterdir()} == {"clips", "empty"}
    assert {path.name for path in Path("clips").iterdir()} == {path.name for path in clips.iterdir()}


def test_refusals_of_one_way_alone(recipe: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = changed(recipe, out=tmp_path / "out")
    with pytest.raises(InputError, match="--together makes one LoRA of a folder"):
        train_experts(changed(run, clips=None, together=True), quiet)
    with pytest.raises(InputError, match="set together"):
        train_experts(run, quiet)
    with pytest.raises(InputError, match="give --resume latest"):
        train_clips(changed(run, resume="out/down/checkpoints/temporal-000001"), quiet)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="launch with --multi_gpu"):
        train_clips(run, quiet)
    assert not run.out.exists()


def test_clips_of_one_name_or_of_two_sizes_are_refused(recipe: TrainSettings, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    write_moving(folder, "down")
    (folder / "down.mp4").write_bytes(b"")
    with pytest.raises(InputError, match=r"down and down\.mp4 would have one folder"):
        train_clips(changed(recipe, clips=folder, out=tmp_path / "out"), quiet)
    (folder / "down.mp4").unlink()
    write_moving(folder, "down-large", side=32)
    with pytest.raises(InputError, match=r"down-large has 9 frames of 32x32 at 16 fps, and down has .* 16x16 at 16"):
        train_experts(changed(recipe, clips=folder, together=True, out=tmp_path / "out"), quiet)
    assert not (tmp_path / "out").exists()


def test_together_at_a_size_that_was_set_all_clips_are_cut_to_it(recipe: TrainSettings, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    write_moving(folder, "down")
    write_moving(folder, "right-large", side=32)
    run = changed(recipe, clips=folder, together=True, height=16, width=16, out=tmp_path / "out")
    train_experts(run, quiet)
    assert len(load_lora(run.out / "temporal.safetensors").provenance["clip_hash"].split()) == 2


def test_a_private_run_says_the_folder_again_to_go_on(recipe: TrainSettings) -> None:
    run = changed(recipe, private=True)
    assert f"--clips {run.clips}" in resume_command(run, 1)
    assert "--clips" not in resume_command(recipe, 1)
