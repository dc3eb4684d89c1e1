"""Laws of a training run, on the random twin: stages, files, stopping and resuming, what may never change."""

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from motionlora.data.clip import Clip
from motionlora.data.errors import InputError, NumbersError, StorageError
from motionlora.heads.lora_file import load_lora
from motionlora.heads.wan import WanBackbone
from motionlora.train import loop, run
from motionlora.train.checkpoint import checkpoints, load_checkpoint
from motionlora.train.journal import Journal
from motionlora.train.lock import holding
from motionlora.train.refusals import refuse_mute_clips
from motionlora.train.run import TrainResult, train
from motionlora.train.settings import TemporalSettings, TrainSettings
from motionlora.train.stages import Stage, check_stride, sparse_clip, temporal_stage

CAPTION = "a red circle over a dark background"


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """17 frames of 32 x 32 in which a square moves, as numbered images."""
    folder = tmp_path_factory.mktemp("clip")
    for index in range(17):
        pixels = np.full((32, 32, 3), 40, np.uint8)
        pixels[8:16, index : index + 8, 0] = 220
        Image.fromarray(pixels).save(folder / f"{index:04d}.png")
    return folder


@pytest.fixture(scope="module")
def balanced(twin_folder, clip, tmp_path_factory) -> TrainSettings:
    """The recipe, with the ratio by which half of the random twin's heads are temporal."""
    folder = tmp_path_factory.mktemp("scored")
    start = recipe(twin_folder, clip, folder / "heads", folder / "cache")
    head_map = train(changed(start, stages=("heads",)), say=quiet).head_map
    assert head_map is not None
    scores = head_map.scores
    return changed(start, heads={"ratio": float(np.median(scores[..., 1] / scores[..., 0]))})


@pytest.fixture(scope="module")
def whole(balanced, tmp_path_factory) -> TrainResult:
    """A run without interruption, never written to; `finished` is a copy."""
    return train(changed(balanced, out=tmp_path_factory.mktemp("whole") / "run"), say=quiet)


@pytest.fixture
def settings(balanced, tmp_path) -> TrainSettings:
    return changed(balanced, out=tmp_path / "run")


@pytest.fixture
def finished(whole, settings) -> TrainSettings:
    """Settings that go on with a copy of the finished run."""
    shutil.copytree(whole.paths["temporal"].parent, settings.out)
    return changed(settings, resume="latest")


def recipe(twin_folder: Path, clip: Path, out: Path, cache: Path) -> TrainSettings:
    values = {
        "model": str(twin_folder), "clip": clip, "caption": CAPTION, "out": out, "frames": 17, "fps": None,
        "device": "cpu", "cache": cache, "lora": {"rank": 4}, "schedule": "cosine", "warmup": 1,
        "spatial": {"steps": 3, "lr": 1e-2, "batch": 2}, "temporal": {"steps": 4, "lr": 1e-2, "stride": 2},
        "checkpoint_every": 1, "log_every": 2,
    }  # fmt: skip
    return TrainSettings.model_validate(values)


def changed(settings: TrainSettings, **changes) -> TrainSettings:
    """The settings with some replaced, nested ones by a dictionary of what changes."""
    values = settings.model_dump()
    for name, value in changes.items():
        values[name] = merged(values[name], value)
    return TrainSettings.model_validate(values)


def merged(old, new):
    return old | {name: merged(old[name], value) for name, value in new.items()} if isinstance(new, dict) else new


def quiet(line: str) -> None:
    del line


def weights(result: TrainResult, stage: str) -> dict[str, torch.Tensor]:
    return dict(load_lora(result.paths[stage]).weights)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def interrupt_at(monkeypatch, stage: str, step: int, number: int) -> None:
    """Let a signal arrive while `step` of `stage` is being written down, once."""
    write = Journal.write

    def write_and_signal(book: Journal, at: int, **values: float) -> None:
        write(book, at, **values)
        if (book.stage, at) == (stage, step):
            monkeypatch.setattr(Journal, "write", write)
            signal.raise_signal(number)

    monkeypatch.setattr(Journal, "write", write_and_signal)


def test_a_run_leaves_everything_that_it_promises(whole):
    out = whole.paths["temporal"].parent
    assert set(whole.paths) == {"reference", "heads", "spatial", "temporal"}
    names = {"settings.yaml", "heads.png", "log-spatial.jsonl", "log-temporal.jsonl"}
    assert names <= {path.name for path in out.iterdir()}
    assert {"load", "heads", "encode", "spatial", "temporal"} == set(whole.seconds)
    rows = [json.loads(line) for line in (out / "log-temporal.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) and row["motion"] > 0 for row in rows)
    assert len(rows[1]["loss_by_time"]) == 10


def test_before_the_first_step_it_is_said_what_will_happen(settings):
    told: list[str] = []
    train(changed(settings, temporal={"steps": 1}, spatial={"steps": 1}), say=told.append)
    text = "\n".join(told)
    for word in ("9 of 17 frames of 32x32", "tokens", "of 12 heads", "trainable parameters", str(settings.out)):
        assert word in text


def test_the_file_knows_how_it_was_made(whole):
    lora = load_lora(whole.paths["temporal"])
    assert (lora.stage, lora.rank, lora.alpha) == ("temporal", 4, 4)
    assert lora.provenance["strength"] == 0.5
    assert lora.provenance["caption"] == CAPTION
    assert lora.provenance["settings"]["temporal"]["stride"] == 2
    assert {"torch", "peft", "diffusers"} <= lora.provenance["versions"].keys()
    assert str(whole.paths["temporal"].parent) not in json.dumps(dict(lora.provenance))


@pytest.mark.parametrize("stage", ["spatial", "temporal"])
def test_each_stage_moves_its_own_heads_only(whole, balanced, stage):
    chosen = whole.head_map.chosen(stage, balanced.heads.rule, balanced.heads.ratio)
    trained = weights(whole, stage)
    for key, weight in trained.items():
        block, o = int(key.split(".")[1]), "to_out" in key
        kept = torch.from_numpy(np.repeat(chosen[block], weight.shape[1 if o else 0] // chosen.shape[1]))
        if key.endswith("lora_A.weight" if o else "lora_B.weight"):
            assert ((weight[:, ~kept] if o else weight[~kept]) == 0).all()
        assert weight.any()
    assert {int(key.split(".")[1]) for key in trained} == set(np.flatnonzero(chosen.any(axis=1)).tolist())


@pytest.mark.parametrize(
    ("stage", "step", "number", "code"),
    [("spatial", 1, signal.SIGINT, 130), ("spatial", 3, signal.SIGTERM, 143), ("temporal", 3, signal.SIGTERM, 143)],
)
def test_a_stopped_and_resumed_run_ends_bit_identical(whole, settings, monkeypatch, stage, step, number, code):
    settings = changed(settings, checkpoint_every=100)
    interrupt_at(monkeypatch, stage, step, number)
    with pytest.raises(loop.Stopped, match=rf"Stopped after step {step} of .*--resume latest") as stopped:
        train(settings, say=quiet)
    assert stopped.value.code == code
    torch.rand(7)  # whatever happens to the global generator in between
    resumed = train(changed(settings, resume="latest"), say=quiet)
    assert equal(weights(resumed, "spatial"), weights(whole, "spatial"))
    assert equal(weights(resumed, "temporal"), weights(whole, "temporal"))
    steps = [json.loads(line)["step"] for line in (settings.out / f"log-{stage}.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def test_going_back_to_a_named_checkpoint_ends_bit_identical(whole, finished):
    (finished.out / "temporal.safetensors").unlink()
    back = finished.out / "checkpoints" / "temporal-000003"
    assert equal(weights(train(changed(finished, resume=str(back)), say=quiet), "temporal"), weights(whole, "temporal"))
    steps = [json.loads(line)["step"] for line in (finished.out / "log-temporal.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_run_with_gradient_accumulation_resumes_bit_identical(settings, monkeypatch):
    settings = changed(settings, gradient_accumulation=2, spatial={"steps": 0}, temporal={"steps": 3})
    step, draws = loop.training_step, []
    # As a layer with dropout would draw, from the global generator.
    monkeypatch.setattr(loop, "training_step", lambda *given: (draws.append(torch.rand(()).item()), step(*given))[1])
    torch.manual_seed(1)
    at_once = train(changed(settings, out=settings.out.with_name("at_once")), say=quiet)
    interrupt_at(monkeypatch, "temporal", 1, signal.SIGINT)
    torch.manual_seed(1)
    with pytest.raises(loop.Stopped):
        train(settings, say=quiet)
    torch.manual_seed(2)
    resumed = train(changed(settings, resume="latest"), say=quiet)
    assert equal(weights(resumed, "temporal"), weights(at_once, "temporal"))
    assert draws[:3] == draws[3:]


def test_an_attention_backend_changes_the_way_and_not_the_result(whole, settings, monkeypatch):
    chosen, use = [], WanBackbone.use_attention
    monkeypatch.setattr(WanBackbone, "use_attention", lambda model, name: (chosen.append(name), use(model, name)))
    other = weights(train(changed(settings, attention="_native_math"), say=quiet), "temporal")
    assert chosen == ["_native_math"]
    for key, weight in weights(whole, "temporal").items():
        assert (weight - other[key]).abs().mean() < 1e-4, "a hundredth of a step; AdamW makes much of small gradients"
    with pytest.raises(InputError, match="Attention backend 'nothing' cannot be used"):
        train(changed(settings, out=settings.out.with_name("other"), attention="nothing"), say=quiet)


def test_gradient_checkpointing_changes_memory_and_not_the_result(whole, settings):
    other = weights(train(changed(settings, memory="low"), say=quiet), "temporal")
    for key, weight in weights(whole, "temporal").items():
        torch.testing.assert_close(weight, other[key], atol=1e-5, rtol=1e-4)


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps one state a process, which holds the first precision that was asked for."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_mixed_precision_acts_in_both_stages_and_lora_stays_fp32(settings, monkeypatch):
    seen: dict[str, set[torch.dtype]] = {}
    step = loop.training_step

    def watched(stage, model, *rest):
        linear = model.transformer.blocks[0].ffn.net[2]
        hook = linear.register_forward_hook(lambda _, __, out: seen.setdefault(stage.name, set()).add(out.dtype))
        report = step(stage, model, *rest)
        hook.remove()
        return report

    monkeypatch.setattr(loop, "training_step", watched)
    result = train(changed(settings, mixed_precision="bf16"), say=quiet)
    assert seen == {"spatial": {torch.bfloat16}, "temporal": {torch.bfloat16}}
    assert all(weight.dtype == torch.float32 for weight in weights(result, "temporal").values())


def test_a_finished_run_is_not_done_again_and_a_folder_in_use_is_refused(whole, finished):
    again = train(finished, say=quiet)
    assert not {"spatial", "temporal"} & set(again.seconds)
    for stage in ("spatial", "temporal"):
        assert again.paths[stage].read_bytes() == whole.paths[stage].read_bytes()
    with pytest.raises(InputError, match="--resume latest"):
        train(changed(finished, resume=""), say=quiet)


def test_a_changed_setting_that_matters_is_refused_by_name(finished):
    with pytest.raises(InputError, match=r"temporal\.lr"):
        train(changed(finished, temporal={"lr": 1e-3}), say=quiet)
    (finished.out / "temporal.safetensors").unlink()
    with pytest.raises(InputError, match=r"temporal\.motion"):
        train(changed(finished, temporal={"motion": "code"}), say=quiet)
    train(changed(finished, checkpoint_every=7, log_every=1, lora={"strength": 1.0}), say=quiet)


def test_with_a_level_learning_rate_a_finished_stage_can_be_made_longer(settings):
    short = changed(settings, schedule="constant", spatial={"steps": 0}, temporal={"steps": 2})
    told: list[str] = []
    train(changed(short, resume="latest"), say=told.append)
    assert any("no checkpoint of the temporal stage" in line for line in told), "nothing to go on with is told"
    longer = train(changed(short, resume="latest", temporal={"steps": 4}), say=quiet)
    at_once = train(changed(short, out=short.out.with_name("at_once"), temporal={"steps": 4}), say=quiet)
    assert equal(weights(longer, "temporal"), weights(at_once, "temporal"))
    longer.paths["temporal"].unlink()
    with pytest.raises(InputError, match=r"has done 4 steps, and 3 are asked for: set --temporal\.steps to 4 or more"):
        train(changed(short, resume="latest", temporal={"steps": 3}), say=quiet)


def test_a_checkpoint_is_small_and_holds_no_pickle_and_only_two_are_kept(whole):
    folder = whole.paths["temporal"].parent / "checkpoints"
    assert [path.name for path in checkpoints(folder, "temporal")] == ["temporal-000003", "temporal-000004"]
    assert {path.name for path in folder.iterdir()} == {path.name for path in checkpoints(folder)}
    for path in checkpoints(folder):
        sizes = {file.name: file.stat().st_size for file in path.iterdir()}
        assert set(sizes) == {"lora.safetensors", "optimizer.safetensors", "state.json"}
        numbers = sum(weight.numel() for weight in load_checkpoint(path).lora.values())
        assert sum(sizes.values()) < 3 * 4 * numbers + 60_000


def test_after_damage_the_run_goes_on_from_the_checkpoint_before_and_ends_bit_identical(whole, finished):
    (finished.out / "temporal.safetensors").unlink()
    last = finished.out / "checkpoints" / "temporal-000004"
    (last / "optimizer.safetensors").write_bytes(b"gone")
    with pytest.raises(StorageError, match=r"--resume .*temporal-000003"):
        train(changed(finished, resume=str(last)), say=quiet)
    told: list[str] = []
    resumed = train(finished, say=told.append)
    assert [line for line in told if "temporal-000004 is damaged" in line and "the one before is used" in line]
    assert equal(weights(resumed, "temporal"), weights(whole, "temporal"))


def test_a_second_run_in_the_folder_is_refused_and_touches_nothing(settings):
    with holding(settings.out, quiet), pytest.raises(InputError, match=r"in use by process \d+ .*--out"):
        train(settings, say=quiet)
    assert not settings.out.exists()


def spoil(monkeypatch, *steps: int) -> None:
    """The temporal stage's latents are NaN in these steps, from 0."""
    step, kept = loop.training_step, []

    def spoiled(stage, model, optimizer, at, run, book):
        kept[:] = kept or [stage.latents.clone()]
        if stage.name == "temporal":
            stage.latents.copy_(kept[0] if at not in steps else torch.full_like(kept[0], float("nan")))
        return step(stage, model, optimizer, at, run, book)

    monkeypatch.setattr(loop, "training_step", spoiled)


def test_bad_numbers_in_a_row_end_the_run_and_leave_the_good_checkpoint(settings, monkeypatch):
    settings = changed(settings, spatial={"steps": 0}, temporal={"steps": 9}, schedule="constant")
    spoil(monkeypatch, 2, 3, 4, 5)
    told: list[str] = []
    with pytest.raises(NumbersError, match=r"at step 5, bad step 3 in a row.*temporal-000004.*temporal\.lr is 0\.01"):
        train(settings, say=told.append)
    good = load_checkpoint(settings.out / "checkpoints" / "temporal-000004")
    assert equal(good.lora, load_checkpoint(settings.out / "checkpoints" / "temporal-000003").lora)
    assert all(weight.isfinite().all() for weight in (good.lora | good.moments).values())
    assert len([line for line in told if "which was skipped" in line]) == 2
    assert not (settings.out / "temporal.safetensors").exists()


def test_one_bad_step_is_skipped_and_written_down(settings, monkeypatch):
    settings = changed(settings, spatial={"steps": 0}, temporal={"steps": 3})
    spoil(monkeypatch, 1)
    told: list[str] = []
    result = train(settings, say=told.append)
    rows = [json.loads(line) for line in (settings.out / "log-temporal.jsonl").read_text().splitlines()]
    assert [(row["skipped"], row["loss"] is None) for row in rows] == [(0, False), (1, True), (0, False)]
    assert "1 of 3 steps of the temporal stage were skipped: their numbers were bad." in told
    assert all(weight.isfinite().all() for weight in weights(result, "temporal").values())


def test_all_heads_train_in_the_temporal_stage_alone(settings):
    result = train(changed(settings, heads={"heads": "all"}), say=quiet)
    assert set(result.paths) == {"reference", "temporal"}
    assert all(row.any() for key, weight in weights(result, "temporal").items() if "lora_B" in key for row in weight)


def test_a_reference_whose_heads_are_all_of_one_kind(settings):
    result = train(changed(settings, heads={"ratio": 1e-6}, temporal={"steps": 1}), say=quiet)
    assert "spatial" not in result.paths
    none = changed(settings, out=settings.out.with_name("none"), heads={"ratio": 1e6}, spatial={"steps": 1})
    with pytest.raises(InputError, match="ratio"):
        train(none, say=quiet)
    assert (none.out / "heads.json").exists()
    assert not (none.out / "spatial.safetensors").exists(), "refused only after the spatial stage"


def test_stages_can_be_run_one_by_one(whole, settings):
    for stage in ("heads", "spatial", "temporal"):
        result = train(changed(settings, stages=(stage,)), say=quiet)
    assert equal(weights(result, "temporal"), weights(whole, "temporal"))


def test_validation_makes_clips_and_changes_nothing(whole, settings):
    with_clips = changed(settings, validation={"every": 2, "captions": ("a blue star",), "sample": {"steps": 2}})
    result = train(with_clips, say=quiet)
    folder = settings.out / "validation"
    assert {path.name for path in folder.iterdir()} == {"step-000002", "step-000004"}
    assert {path.name for path in (folder / "step-000004").iterdir()} == {"a-blue-star.mp4", "sheet.png"}
    assert equal(weights(result, "temporal"), weights(whole, "temporal"))


def test_the_model_is_as_before_after_a_run(settings, monkeypatch):
    """Positions, adapters, hooks and accelerate's wrapping are gone: the velocity is bit-identical."""
    kept = []
    load = WanBackbone.load

    def watched(*args, **kwargs):
        kept.append(load(*args, **kwargs))
        kept.append(velocity(kept[0]))
        return kept[0]

    monkeypatch.setattr(WanBackbone, "load", watched)
    train(changed(settings, temporal={"steps": 1}, spatial={"steps": 1}), say=quiet)
    assert torch.equal(velocity(kept[0]), kept[1])


@torch.no_grad()
def velocity(model: WanBackbone) -> torch.Tensor:
    latent = torch.randn(1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.velocity(latent, torch.tensor([0.5]), model.embed([CAPTION]))


@pytest.mark.parametrize(
    ("steps", "warmup", "step", "share"), [(10, 0, 0, 1), (10, 5, 0, 0.2), (10, 0, 5, 0.5), (1, 3, 0, 1 / 3)]
)
def test_the_learning_rate_rises_and_falls_as_told(balanced, steps, warmup, step, share):
    settings = changed(balanced, warmup=warmup, spatial={"steps": steps, "lr": 1.0})
    assert loop.learning_rate(settings, settings.spatial, step) == pytest.approx(share)


@pytest.mark.parametrize(("frames", "good"), [(81, [1, 2, 4, 5, 10, 20]), (49, [1, 2, 3, 4, 6, 12])])
def test_a_stride_must_leave_4k_plus_1_frames(frames, good):
    for stride in range(1, frames + 2):
        if stride in good:
            check_stride(frames, stride)
        else:
            with pytest.raises(InputError, match="set it to"):
                check_stride(frames, stride)


@pytest.mark.parametrize(("dropout", "least", "most"), [(0.0, 0, 0), (0.5, 60, 140), (1.0, 200, 200)])
def test_a_share_of_samples_is_told_nothing(twin, dropout, least, most):
    temporal = TemporalSettings(batch=200, stride=2, caption_dropout=dropout)
    clip = Clip(np.zeros((9, 16, 16, 3), np.uint8), 12.0, CAPTION)
    stage = temporal_stage(twin, clip, np.ones((2, 2), bool), TrainSettings(frames=9, temporal=temporal))
    silent = twin.embed([""]).embeds
    told = stage.told(torch.Generator().manual_seed(0)).embeds
    assert len(told) == 200
    assert least <= int((told == silent).all((1, 2)).sum()) <= most
    assert int(((told == silent).all((1, 2)) | (told == twin.embed([CAPTION]).embeds).all((1, 2))).sum()) == 200


def test_the_temporal_stage_learns_every_look_by_its_own_words(twin, settings, monkeypatch):
    trained: dict[str, Stage] = {}
    with monkeypatch.context() as patch:
        patch.setattr(run, "train_stage", lambda shop, stage, *_, **__: trained.update({stage.name: stage}))
        train(changed(settings, temporal={"looks": 3}), say=quiet)
    first, *others = trained["temporal"], *trained["temporal"].others
    for stage, colour in zip((first, *others), ("red", "blue", "green"), strict=True):
        assert torch.equal(stage.prompt.embeds, twin.embed([CAPTION.replace("red", colour)]).embeds)
    assert len({stage.latents.numpy().tobytes() for stage in (first, *others)}) == 3
    assert not trained["spatial"].others
    said: list[str] = []
    short = {"steps": 1, "looks": 3}
    learned = train(changed(settings, stages=("heads", "temporal"), temporal=short), say=said.append)
    assert sum("9 of 17 frames in 3 looks" in line for line in said) == 1
    assert load_lora(learned.paths["temporal"]).provenance["settings"]["temporal"]["looks"] == 3


@pytest.mark.parametrize("until", [0.0, 0.6, 0.9])
def test_a_lora_learns_no_noise_below_its_level_and_its_file_says_so(twin, settings, until):
    clip = Clip(np.zeros((9, 32, 32, 3), np.uint8), 12.0, CAPTION)
    temporal = TemporalSettings(stride=2, batch=100, until=until)
    stage = temporal_stage(twin, clip, np.ones((2, 2), bool), TrainSettings(frames=9, temporal=temporal))
    times = stage.point(torch.Generator().manual_seed(0)).time
    assert until <= times.min() < until + 0.15
    assert times.max() > 0.98
    short = {**settings.temporal.model_dump(), "steps": 1, "until": until}
    result = train(changed(settings, temporal=short), say=quiet)
    assert load_lora(result.paths["temporal"]).provenance.get("until", 0.0) == until
    assert "until" not in load_lora(result.paths["spatial"]).provenance


def test_the_sparse_clip_plays_as_long_as_the_whole():
    clip = Clip(np.arange(49, dtype=np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2).repeat(3, 3), 12.0, "")
    sparse = sparse_clip(clip, 3)
    assert sparse.pixels[:, 0, 0, 0].tolist() == list(range(0, 49, 3))
    assert len(sparse.pixels) / sparse.fps == pytest.approx(49 / 12, rel=0.05)


def test_a_clip_of_which_nobody_said_what_it_shows_is_not_learned(settings):
    with pytest.raises(InputError, match=r"has no caption: .*--caption"):
        train(changed(settings, caption=None), say=quiet)
    assert not (settings.out / "settings.yaml").exists()
    mute = [Clip(np.zeros((1, 16, 16, 3), np.uint8), 12.0, " ")]
    for allowed in ({"caption": ""}, {"caption": None, "stages": ("heads",)}):
        refuse_mute_clips(changed(settings, **allowed), [settings.clip], mute)
    refuse_mute_clips(changed(settings, caption=None), [settings.clip], [replace(mute[0], caption="a dog")])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"clip": None}, "--clip"),
        ({"frames": 18}, "4k"),
        ({"temporal": {"stride": 3}}, "stride"),
        ({"device": "tpu"}, "device"),
        ({"resume": "runs/nowhere"}, "--resume latest"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(settings, monkeypatch, changes, word):
    monkeypatch.setattr("motionlora.train.run.opened", None)  # nor is a model loaded
    with pytest.raises(InputError, match=word):
        train(changed(settings, **changes), say=quiet)
    assert not settings.out.exists()
