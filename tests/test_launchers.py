"""Laws of a run in several processes: they do what one does, stop and go on together, and none is lost in silence."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from processes import free_port, in_processes

from motionlora.data.errors import InputError
from motionlora.data.settings import as_yaml
from motionlora.heads.four_bit import installed
from motionlora.heads.lora_file import load_lora
from motionlora.train import fsdp, launch, loop
from motionlora.train.checkpoint import checkpoints, load_checkpoint
from motionlora.train.experts import train_experts
from motionlora.train.run import train
from motionlora.train.settings import TrainSettings

LR = 1e-2
NEEDS_FOUR_BIT = pytest.mark.skipif(not installed(), reason="the extra motionlora[4bit] is not installed")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def settings(
    twin_folder: Path, tmp_path_factory: pytest.TempPathFactory, moving_square: Callable[[Path, int], Path]
) -> TrainSettings:
    """Both stages on 9 frames; the ratio leaves heads of both kinds."""
    folder = moving_square(tmp_path_factory.mktemp("clip"), 9)
    values = {
        "model": str(twin_folder), "clip": folder, "caption": "a red square", "frames": 9, "fps": None, "device": "cpu",
        "cache": None, "lora": {"rank": 2}, "heads": {"ratio": 1.0}, "checkpoint_every": 1,
        "spatial": {"steps": 2, "lr": LR}, "temporal": {"steps": 4, "lr": LR, "stride": 2},
    }  # fmt: skip
    return TrainSettings.model_validate(values)


def changed(settings: TrainSettings, **changes: Any) -> TrainSettings:
    return TrainSettings.model_validate({**settings.model_dump(), **changes})


def two_processes(work: Callable[..., None], *words: Any) -> list[int | None]:
    """The exit codes of two processes that do `work(rank, *words)`."""
    return in_processes(lambda rank: work(rank, *words), patience=120)


def training(
    rank: int, settings: TrainSettings, end: Callable[[int], None] | None = None, at: tuple[int, int] = (9, 9)
) -> None:
    """Trains; the process `at[0]` calls `end` in temporal step `at[1]`. What ended the run goes to `said-RANK`."""
    step = loop.training_step

    def ending(stage: Any, model: Any, optimizer: Any, now: int, run: Any, book: Any) -> Any:
        if end and stage.name == "temporal" and (rank, now) == at:
            end(rank)
        return step(stage, model, optimizer, now, run, book)

    loop.training_step = ending
    try:
        train_experts(settings, say=lambda line: None)
    except loop.Stopped as stopped:
        (settings.out / f"said-{rank}").write_text(f"{stopped.code} {stopped}")


def die(rank: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(rank: int) -> None:
    signal.raise_signal(signal.SIGTERM)


def terminate_twice(rank: int) -> None:
    terminate(rank)
    terminate(rank)


def weights(out: Path, stage: str) -> dict[str, torch.Tensor]:
    return dict(load_lora(out / f"{stage}.safetensors").weights)


@pytest.fixture(scope="module")
def whole(settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes without interruption; not to be written to."""
    out = tmp_path_factory.mktemp("two") / "run"
    assert two_processes(training, changed(settings, out=out)) == [0, 0]
    return out


def test_two_processes_do_what_one_does_with_twice_the_batches(
    settings: TrainSettings, whole: Path, tmp_path: Path
) -> None:
    one = train(changed(settings, out=tmp_path / "run", gradient_accumulation=2), say=lambda line: None)
    for stage in ("spatial", "temporal"):
        shared, alone = weights(whole, stage), weights(tmp_path / "run", stage)
        assert shared.keys() == alone.keys()
        for name, weight in shared.items():
            # The halves of a mean are added in another order; AdamW divides small gradients by their own size.
            torch.testing.assert_close(weight, alone[name], atol=0.005 * LR, rtol=1e-3)
        logs = [[json.loads(line) for line in (out / f"log-{stage}.jsonl").open()] for out in (whole, tmp_path / "run")]
        for here, there in zip(*logs, strict=True):
            assert here["loss"] == pytest.approx(there["loss"], rel=1e-4), "the log tells of one process alone"
        assert load_lora(whole / f"{stage}.safetensors").provenance["identity"]["processes"] == 2
    assert {path.name for path in one.paths.values()} <= {path.name for path in whole.iterdir()}


@pytest.mark.slow
def test_two_processes_learn_the_same_by_compiled_blocks(settings: TrainSettings, tmp_path: Path) -> None:
    run = changed(settings, compile=True, stages=("heads", "temporal"), out=tmp_path / "run")
    assert two_processes(traced_training, run) == [0, 0]
    assert len(list(run.out.glob("graphs-*"))) == 2, "each process has compiled"
    plain = changed(run, compile=False, out=tmp_path / "plain", gradient_accumulation=2)
    train(plain, say=lambda line: None)
    for name, weight in weights(plain.out, "temporal").items():
        torch.testing.assert_close(weights(run.out, "temporal")[name], weight, atol=0.005 * LR, rtol=1e-3)


def traced_training(rank: int, settings: TrainSettings) -> None:
    """Trains by blocks that are traced; their kernels are the plain ones, so that it takes seconds."""
    from torch._dynamo.utils import counters

    warnings.filterwarnings("ignore", "The .grad attribute")  # torch.compile looks at whatever comes in
    torch.compiler.set_default_backend("aot_eager")
    training(rank, settings)
    if counters["stats"]["unique_graphs"]:
        (settings.out / f"graphs-{rank}").touch()


def test_both_experts_by_two_processes_are_those_of_one(
    settings: TrainSettings, experts_folder: Path, tmp_path: Path
) -> None:
    heads, stages = {"ratio": 1.0, "times": (0.9998, 0.8)}, ("heads", "temporal")
    run = changed(settings, model=str(experts_folder), expert="both", heads=heads, stages=stages, out=tmp_path / "two")
    assert two_processes(training, run) == [0, 0]
    train_experts(changed(run, out=tmp_path / "one", gradient_accumulation=2), say=lambda line: None)
    for expert in ("high", "low"):
        shared, alone = (weights(tmp_path / out / expert, f"temporal-{expert}") for out in ("two", "one"))
        for name, weight in shared.items():
            torch.testing.assert_close(weight, alone[name], atol=0.005 * LR, rtol=1e-3)


def test_a_signal_to_one_process_stops_both_and_they_go_on_bit_identical(
    settings: TrainSettings, whole: Path, tmp_path: Path
) -> None:
    run = changed(settings, out=tmp_path / "run", checkpoint_every=100)
    assert two_processes(training, run, terminate, (1, 1)) == [0, 0]
    assert [(run.out / f"said-{rank}").read_text().startswith("143 Stopped after step 2") for rank in (0, 1)] == [
        True
    ] * 2
    assert not (run.out / "temporal.safetensors").exists()
    assert two_processes(training, changed(run, resume="latest")) == [0, 0]
    assert_equal(run.out, whole)


def assert_equal(out: Path, whole: Path) -> None:
    for stage in ("spatial", "temporal"):
        mine, theirs = weights(out, stage), weights(whole, stage)
        assert mine.keys() == theirs.keys()
        assert [name for name, weight in mine.items() if not torch.equal(weight, theirs[name])] == []


@pytest.mark.parametrize("dying", [0, 1])
def test_a_process_that_is_killed_ends_the_other_with_a_sentence_and_both_go_on(
    settings: TrainSettings, whole: Path, tmp_path: Path, dying: int
) -> None:
    run = changed(settings, out=tmp_path / "run")
    codes = two_processes(training, run, die, (dying, 2))
    assert codes[dying] == -signal.SIGKILL
    said = (run.out / f"said-{1 - dying}").read_text()
    assert re.match(rf"1 Process {1 - dying} of 2 had to end: .*temporal-000002, go on with: accelerate launch", said)
    assert checkpoints(run.out / "checkpoints", "temporal")[-1].name == "temporal-000002"
    assert two_processes(training, changed(run, resume="latest")) == [0, 0]
    assert_equal(run.out, whole)


def test_a_second_signal_is_answered_at_once_by_the_sentence(settings: TrainSettings, tmp_path: Path) -> None:
    """As launchers send it when they have lost a process."""
    run = changed(settings, out=tmp_path / "run", stages=("temporal",), heads={"heads": "all"})
    assert two_processes(training, run, terminate_twice, (1, 2)) == [0, 0]
    assert (run.out / "said-1").read_text().startswith("143 Process 1 of 2 had to end: ")
    assert (run.out / "said-0").read_text().startswith("1 Process 0 of 2 had to end: ")


@pytest.mark.parametrize(("memory", "weights"), [("lowest", "fp8"), pytest.param("4bit", "nf4", marks=NEEDS_FOUR_BIT)])
def test_frozen_weights_in_fp8_or_4_bits_are_not_sent_between_processes(
    settings: TrainSettings, tmp_path: Path, memory: str, weights: str
) -> None:
    """gloo cannot send fp8, and on a GPU DDP would refuse weights that wait elsewhere."""
    run = changed(settings, out=tmp_path / "run", memory=memory, stages=("temporal",), heads={"heads": "all"})
    assert two_processes(training, run) == [0, 0]
    assert load_lora(run.out / "temporal.safetensors").provenance["identity"]["weights"] == weights


@pytest.mark.slow
def test_launched_killed_and_launched_again_by_the_line_that_was_told(settings: TrainSettings, tmp_path: Path) -> None:
    """torchrun, `kill -9` of a process, then what the other one printed, word for word, by `accelerate launch`."""
    run = changed(settings, out=tmp_path / "run", temporal={**settings.temporal.model_dump(), "steps": 30})
    (tmp_path / "run.yaml").write_text(as_yaml(run, "train"))
    command = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command += ["-m", "motionlora.train", "--config", str(tmp_path / "run.yaml")]
    launched = subprocess.Popen([sys.executable, "-m", *command], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while launched.poll() is None and not checkpoints(run.out / "checkpoints", "temporal"):
        time.sleep(0.1)
    psutil.Process(launched.pid).children()[1].kill()
    said = launched.communicate(timeout=300)[1]
    assert launched.returncode not in (0, None)
    assert not (run.out / "temporal.safetensors").exists()
    told = re.search(r"motionlora: Process . of 2 had to end: .*go on with: accelerate launch (.*)", said)
    assert told, said
    assert "bug of motionlora" not in said
    again = ["accelerate.commands.launch", "--main_process_port", str(free_port()), *shlex.split(told[1])]
    ended = subprocess.run([sys.executable, "-m", *again], capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert load_lora(run.out / "temporal.safetensors").provenance["identity"]["processes"] == 2
    assert len((run.out / "log-temporal.jsonl").read_text().splitlines()) == 30


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra motionlora[deepspeed] is not installed")
@pytest.mark.parametrize("zero", [2, 3])
def test_deepspeed_ends_where_two_plain_processes_do_and_resumes_bit_identically(
    settings: TrainSettings, tmp_path: Path, zero: int
) -> None:
    assert two_processes(training, changed(settings, out=tmp_path / "plain")) == [0, 0]
    run = changed(settings, out=tmp_path / "run", device="auto")
    first, then = ("heads", "spatial"), ("temporal",)
    starts = [first + then] if zero == 2 else [first, then]  # ZeRO-3 takes one stage a start
    for stages in starts:
        by_deepspeed(changed(run, stages=stages), zero)
    for stage in ("spatial", "temporal"):
        plain, own = weights(tmp_path / "plain", stage), weights(run.out, stage)
        for name, weight in plain.items():
            torch.testing.assert_close(own[name], weight, atol=0.005 * LR, rtol=1e-3)
            assert ((own[name] == 0) == (weight == 0)).all(), name  # the masks hold
    plain, own = (load_checkpoint(checkpoints(tmp_path / out / "checkpoints")[-1]).moments for out in ("plain", "run"))
    assert plain.keys() == own.keys()
    for name, moment in plain.items():
        torch.testing.assert_close(own[name], moment, atol=1e-6, rtol=2e-2)

    again, half = changed(run, out=tmp_path / "again"), {**run.temporal.model_dump(), "steps": 2}
    for stages in starts:
        by_deepspeed(changed(again, stages=stages, temporal=half), zero)
    by_deepspeed(changed(again, stages=starts[-1]), zero, "--resume", "latest")
    resumed, whole = weights(again.out, "temporal"), weights(run.out, "temporal")
    assert [name for name, weight in whole.items() if not weight.equal(resumed[name])] == []

    other = changed(run, out=tmp_path / "other")  # what plain processes began
    assert two_processes(training, changed(other, device="cpu", temporal=half)) == [0, 0]
    by_deepspeed(changed(other, stages=starts[-1]), zero, "--resume", "latest")
    for name, weight in weights(other.out, "temporal").items():
        torch.testing.assert_close(weight, whole[name], atol=0.005 * LR, rtol=1e-3)


def by_deepspeed(settings: TrainSettings, zero: int, *words: str) -> None:
    """A run in two processes that `accelerate launch` starts with ZeRO of a stage; one that hangs fails."""
    path = settings.out.with_suffix(".yaml")
    path.write_text(as_yaml(settings, "train"))
    command = ["accelerate.commands.launch", "--use_deepspeed", "--zero_stage", str(zero), "--gradient_clipping", "1"]
    command += ["--num_processes", "2", "--main_process_port", str(free_port()), "-m", "motionlora.train"]
    line = [sys.executable, "-m", *command, "--config", str(path), *words]
    subprocess.run(line, check=True, env=ENVIRONMENT, timeout=300)


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"dtype": "bf16", "memory": "low", "gradient_accumulation": 2}, marks=pytest.mark.slow)],
)
def test_fsdp2_ends_where_two_plain_processes_do_and_resumes_bit_identically(
    settings: TrainSettings, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = changed(settings, **changes)
    run, first, then = changed(settings, out=tmp_path / "run"), ("heads", "spatial"), ("temporal",)
    assert two_processes(training, changed(settings, out=tmp_path / "plain")) == [0, 0]
    for stages in (first, then):
        assert two_processes(split_training, changed(run, stages=stages)) == [0, 0]
    for stage in ("spatial", "temporal"):
        plain, own = weights(tmp_path / "plain", stage), weights(run.out, stage)
        assert plain.keys() == own.keys()
        for name, weight in plain.items():
            off = (own[name] - weight).abs()
            assert off.mean() < 0.005 * LR if "dtype" not in changes else off.mean() < 0.05 * LR
            assert ((own[name] == 0) == (weight == 0)).all(), name  # the masks hold
    plain, own = (load_checkpoint(checkpoints(tmp_path / out / "checkpoints")[-1]).moments for out in ("plain", "run"))
    assert plain.keys() == own.keys()
    if changes:
        return
    for name, moment in plain.items():
        torch.testing.assert_close(own[name], moment, atol=1e-6, rtol=2e-2)

    again = changed(run, out=tmp_path / "again", checkpoint_every=100)
    assert two_processes(split_training, changed(again, stages=first)) == [0, 0]
    assert two_processes(split_training, changed(again, stages=then), terminate, (1, 1)) == [0, 0]
    said = (again.out / "said-0").read_text()
    assert "143 Stopped after step 2" in said
    assert "accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 -m motionlora.train" in said
    assert two_processes(split_training, changed(again, stages=then, resume="latest")) == [0, 0]
    assert_equal(again.out, run.out)

    other = changed(run, out=tmp_path / "other")  # what plain processes began
    half = {**run.temporal.model_dump(), "steps": 2}
    assert two_processes(training, changed(other, temporal=half)) == [0, 0]
    assert two_processes(split_training, changed(other, stages=then, resume="latest")) == [0, 0]
    for name, weight in weights(other.out, "temporal").items():
        assert (weight - weights(run.out, "temporal")[name]).abs().mean() < 0.005 * LR


def split_training(rank: int, *words: Any) -> None:
    """As `accelerate launch --use_fsdp --fsdp_version 2` starts it; fails where nothing was split."""
    from torch.distributed.tensor import DTensor

    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    step, kinds = loop.training_step, set[bool]()

    def watched(stage: Any, model: Any, *rest: Any) -> Any:
        kinds.update(isinstance(weight, DTensor) for weight in model.transformer.parameters())
        return step(stage, model, *rest)

    loop.training_step = watched
    training(rank, *words)
    assert kinds == {True}


@pytest.mark.slow
def test_accelerate_launches_fsdp2_by_our_file(settings: TrainSettings, whole: Path, tmp_path: Path) -> None:
    run = changed(settings, out=tmp_path / "run")
    file = Path(__file__).parent.parent / "configs" / "accelerate_fsdp2.yaml"
    for stages in (("heads", "spatial"), ("temporal",)):
        (tmp_path / "run.yaml").write_text(as_yaml(changed(run, stages=stages), "train"))
        command = ["accelerate.commands.launch", "--config_file", str(file), "--main_process_port", str(free_port())]
        line = [sys.executable, "-m", *command, "-m", "motionlora.train", "--config", str(tmp_path / "run.yaml")]
        subprocess.run(line, check=True, env=ENVIRONMENT, timeout=300)
    for name, weight in weights(whole, "temporal").items():
        torch.testing.assert_close(weights(run.out, "temporal")[name], weight, atol=0.005 * LR, rtol=1e-3)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "set fsdp_version to 2"),
        ({"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "sets fsdp_offload_params"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, r"configs/accelerate_fsdp2\.yaml"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"motionlora\[deepspeed\]"),
    ],
)
def test_a_launcher_that_cannot_work_is_refused(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=words):
        train(changed(settings, out=tmp_path / "run"), say=print)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("plugin", "changes", "words"),
    [
        ({}, {}, None),
        ({"gradient_clipping": 0.5}, {}, "sets 0.5 where max_grad_norm is 1"),
        ({"gradient_clipping": "auto"}, {"max_grad_norm": 2.0}, "sets 1 where max_grad_norm is 2"),
        ({}, {"gradient_accumulation": 2}, "sets 1 where gradient_accumulation is 2"),
        ({}, {"mixed_precision": "bf16"}, "--dtype bf16"),
        ({"zero_stage": 0}, {}, "--zero_stage 2 or 3"),
        ({"zero_stage": 3}, {}, "a second stage needs a start of its own"),
        ({"zero_stage": 3}, {"stages": ("temporal",)}, None),
        ({"zero_stage": 3}, {"stages": ("temporal",), "validation": {"every": 1}}, "--validation.every 0"),
    ],
)
def test_numbers_of_the_launcher_that_differ_and_what_deepspeed_cannot_do_are_refused(
    settings: TrainSettings, plugin: dict[str, Any], changes: dict[str, Any], words: str | None
) -> None:
    whole = SimpleNamespace(**{"zero_stage": 2, "gradient_clipping": 1.0, **plugin})
    accelerator: Any = SimpleNamespace(gradient_accumulation_steps=1, state=SimpleNamespace(deepspeed_plugin=whole))
    if words is None:
        launch.refuse_other_numbers(accelerator, changed(settings, **changes))
        return
    with pytest.raises(InputError, match=words):
        launch.refuse_other_numbers(accelerator, changed(settings, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "a second stage needs a start of its own"),
        ({"stages": ("temporal",), "validation": {"every": 1}}, "--validation.every 0"),
        ({"stages": ("temporal",), "compile": True}, "leave --compile and --optimizer out"),
        ({"stages": ("temporal",), "optimizer": "adamw_fused"}, "leave --compile and --optimizer out"),
        ({"stages": ("temporal",)}, None),
    ],
)
def test_what_fsdp2_cannot_do_is_refused(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str | None
) -> None:
    monkeypatch.setenv(fsdp.OURS, "true")
    state = SimpleNamespace(deepspeed_plugin=None)
    accelerator: Any = SimpleNamespace(gradient_accumulation_steps=1, state=state, num_processes=2)
    if words is None:
        launch.refuse_other_numbers(accelerator, changed(settings, **changes))
        return
    with pytest.raises(InputError, match=words):
        launch.refuse_other_numbers(accelerator, changed(settings, **changes))
