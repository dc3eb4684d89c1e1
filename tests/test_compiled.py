"""Laws of compiled blocks: numbers as without but for the last digits, masks and stops too, nothing left behind."""

import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_train import changed, clip, equal, interrupt_at, quiet, recipe, weights
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from motionlora.data.clip import read_clip
from motionlora.data.errors import InputError
from motionlora.heads import compiled as room
from motionlora.heads.capture import layers_of
from motionlora.heads.compiled import compiled, plain
from motionlora.heads.load import load_model
from motionlora.heads.lora import attach
from motionlora.heads.tiny import TINY
from motionlora.heads.wan_outline import outline_of
from motionlora.infer.generate import generate
from motionlora.infer.guide_flowmotion import FlowMotion
from motionlora.infer.order import refuse_uncompilable
from motionlora.infer.settings import GenerateSettings, SampleSettings
from motionlora.train.cards import Card
from motionlora.train.command import settings_of
from motionlora.train.identity import identity, refuse_changes
from motionlora.train.launch import refuse_other_numbers
from motionlora.train.loop import Stopped
from motionlora.train.memory import fitting, plans_of
from motionlora.train.refusals import refuse_early
from motionlora.train.run import TrainResult, train
from motionlora.train.settings import TrainSettings

__all__ = ["clip"]
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at whatever comes in


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """How many were made. Blocks are traced, and cut into forward and backward, as ever; kernels are the plain ones."""
    torch.compiler.set_default_backend("aot_eager")
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.set_default_backend("inductor")


@pytest.fixture(scope="module")
def lesson(twin_folder: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    """Both stages on the random twin, with captions that are dropped, so that prompts have two lengths."""
    folder = tmp_path_factory.mktemp("lesson")
    told = {"caption_dropout": 0.5, "batch": 1}
    start = recipe(twin_folder, clip, folder / "heads", folder / "cache")
    head_map = train(changed(start, stages=("heads",)), say=quiet).head_map
    assert head_map is not None
    ratio = float(np.median(head_map.scores[..., 1] / head_map.scores[..., 0]))
    return changed(start, heads={"ratio": ratio}, spatial=told, temporal=told, checkpoint_every=100, compile=True)


@pytest.fixture(scope="module")
def eager(lesson: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(changed(lesson, compile=False, out=tmp_path_factory.mktemp("eager") / "run"), say=quiet)


def test_both_stages_learn_the_same_by_compiled_blocks(lesson, eager, graphs, tmp_path) -> None:
    told: list[str] = []
    result = train(changed(lesson, out=tmp_path / "run"), say=told.append)
    assert sum("compiled in the first step" in line for line in told) == 2, "the first step is slow: it is said why"
    assert graphs() >= 2
    assert not counters["graph_break"]
    for stage in ("spatial", "temporal"):
        found, wanted = weights(result, stage), weights(eager, stage)
        assert found.keys() == wanted.keys()
        for key, weight in wanted.items():
            torch.testing.assert_close(found[key], weight, atol=1e-5, rtol=1e-4)
            assert torch.equal(found[key] == 0, weight == 0), "masks hold"


def test_a_stopped_run_that_runs_blocks_twice_goes_on_to_the_same_bits(lesson, graphs, tmp_path, monkeypatch) -> None:
    short = changed(lesson, memory="low", heads={"heads": "all"}, temporal={"steps": 3})
    resumed_equals_whole(short, tmp_path, monkeypatch)
    assert graphs() >= 4, "two lengths of a caption, and the first block, whose input needs no gradient"


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits_by_compiled_kernels(lesson, eager, tmp_path, monkeypatch) -> None:
    whole = resumed_equals_whole(lesson, tmp_path, monkeypatch)
    for stage in ("spatial", "temporal"):
        for key, weight in weights(eager, stage).items():
            torch.testing.assert_close(weights(whole, stage)[key], weight, atol=1e-5, rtol=1e-3)


def resumed_equals_whole(lesson: TrainSettings, folder: Path, monkeypatch: pytest.MonkeyPatch) -> TrainResult:
    whole = train(changed(lesson, out=folder / "whole"), say=quiet)
    stopped = changed(lesson, out=folder / "stopped")
    interrupt_at(monkeypatch, "temporal", 2, signal.SIGINT)
    with pytest.raises(Stopped):
        train(stopped, say=quiet)
    resumed = train(changed(stopped, resume="latest"), say=quiet)
    assert equal(weights(resumed, "temporal"), weights(whole, "temporal"))
    return whole


def test_kernels_that_are_made_for_it_give_the_same_numbers(twin) -> None:
    """The one test that compiles to the end: a block's forward, since that takes half a minute."""
    block, seen = layers_of(twin.transformer)[0], []
    hook = block.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        twin.velocity(torch.randn(1, 16, 3, 8, 8), torch.tensor([0.5]), twin.embed(["a red circle"]))
        hook.remove()
        before = block(*seen[0])
        with compiled(alone(block)):
            after = block(*seen[0])
            with plain():
                assert torch.equal(block(*seen[0]), before)
        assert not torch.equal(before, after), "nothing was compiled"
        torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-4)
        assert torch.equal(block(*seen[0]), before), "nothing is left behind"


def alone(block: torch.nn.Module) -> torch.nn.Module:
    """A network of one block."""
    network = torch.nn.Module()
    network.blocks = torch.nn.ModuleList([block])
    return network


def test_without_a_compiler_one_sentence_says_what_to_do(lesson, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(inductor.cpp, "cxx", (None, str(tmp_path / "no compiler")))
    with pytest.raises(InputError, match=r"No working C\+\+ compiler.*leave --compile out"):
        train(changed(lesson, out=tmp_path / "run"), say=quiet)


@pytest.mark.parametrize("error", [None, RuntimeError("from within")])
def test_nothing_is_left_behind(twin, graphs, error) -> None:
    before = velocity(twin)
    expected = pytest.raises(RuntimeError, match="from within") if error else nullcontext()
    with expected, compiled(twin.transformer):
        velocity(twin)
        assert graphs()
        if error:
            raise error
    assert not any(block._compiled_call_impl for block in layers_of(twin.transformer))
    counters.clear()
    assert torch.equal(velocity(twin), before)
    assert not graphs()


@torch.no_grad()
def velocity(model: Any) -> torch.Tensor:
    latent = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.velocity(latent, torch.tensor([0.5]), model.embed(["a red circle"]))


@pytest.mark.parametrize("kind", ["2B", "5B"])
def test_the_blocks_of_cogvideox_are_compiled_too(cogvideox_folders, graphs, kind) -> None:
    model = load_model(cogvideox_folders[kind])
    layers = attach(model.transformer, "x", np.eye(3, 4, dtype=bool), rank=2, seed=0)
    wanted = gradients(model, layers)
    with compiled(model.transformer):
        found = gradients(model, layers)
    assert graphs() >= 2
    assert any(weight.any() for weight in wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def gradients(model: Any, layers: Any) -> list[torch.Tensor]:
    latent = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model.velocity(latent, torch.tensor([0.5]), model.embed(["a red circle"])).square().mean().backward()
    found = [weight.grad.clone() for weight in layers.parameters()]
    for weight in layers.parameters():
        weight.grad = None
    return found


def test_blocks_that_would_go_on_uncompiled_are_an_error(lesson, graphs, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(room, "VARIANTS", 1)
    with pytest.raises(InputError, match="cannot compile the model's blocks"):
        train(changed(lesson, out=tmp_path / "run"), say=quiet)


def test_clips_on_the_way_are_made_by_the_plain_blocks(lesson, graphs, tmp_path) -> None:
    check = {"every": 2, "sample": {"steps": 1}}
    short = changed(lesson, heads={"heads": "all"}, temporal={"steps": 2, "caption_dropout": 0.0}, validation=check)
    train(changed(short, out=tmp_path / "run"), say=quiet)
    assert graphs() == 2
    assert len(list((tmp_path / "run" / "validation").iterdir())) == 1


def test_a_run_goes_on_as_it_was_begun_and_older_ones_count_as_plain(lesson) -> None:
    plain_run = changed(lesson, compile=False)
    assert "compile" not in identity(plain_run, "temporal")
    with pytest.raises(InputError, match="compile = None, now it is True"):
        refuse_changes(identity(plain_run, "temporal"), identity(lesson, "temporal"), stage="temporal", what="It")


def test_what_does_not_go_with_compiled_blocks_is_refused(lesson, monkeypatch) -> None:
    for memory in ("4bit", "lowest"):
        monkeypatch.setattr("motionlora.train.refusals.refuse_absent", lambda _: None)
        with pytest.raises(InputError, match=f"--compile does not go with --memory {memory}"):
            refuse_early(changed(lesson, memory=memory))
    zero = SimpleNamespace(zero_stage=2, gradient_clipping="auto")
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=zero), gradient_accumulation_steps=1)
    with pytest.raises(InputError, match="leave --compile and --optimizer out"):
        refuse_other_numbers(accelerator, lesson)


def test_auto_does_not_take_what_cannot_be_compiled(lesson, monkeypatch) -> None:
    monkeypatch.setattr("motionlora.train.memory.plan_of", lambda *_, **__: SimpleNamespace(peak_bytes=2))
    small, auto, any_model = Card("a card", 1, 1.0, 1.0), changed(lesson, memory="auto"), outline_of(TINY)
    assert list(plans_of(auto, any_model, torch.float32, small)) == ["fast", "low"]
    assert list(plans_of(changed(auto, compile=False), any_model, torch.float32, small)) == ["fast", "low", "lowest"]
    with pytest.raises(InputError, match="or leave --compile out"):
        fitting(auto, any_model, torch.float32, small, quiet)


@pytest.mark.parametrize("kind", ["twin", "experts"])
def test_clips_of_compiled_blocks_are_those_of_plain_ones(
    twin_folder, experts_folder, strong_lora, graphs, tmp_path, kind
) -> None:
    """Two captions of different lengths and, where there are two experts, each with its own numbers."""
    model, on = {"twin": (twin_folder, ""), "experts": (experts_folder, "@high")}[kind]
    settings = GenerateSettings(
        model=str(model), caption=("a red star", "a circle"),
        lora=(f"{strong_lora}:1.0{on}",), frames=9, height=32, width=32, fps=12.0, cache=None, device="cpu",
        sample=SampleSettings(steps=3, scale=3.0, lora_until=None if on else 0.5),
    )  # fmt: skip
    plain_clips = generate(settings.model_copy(update={"out": tmp_path / "plain"}), quiet)
    assert not graphs()
    found = generate(settings.model_copy(update={"out": tmp_path / "compiled", "compile": True}), quiet)
    assert graphs() >= 2, "with the LoRA and where it rests"
    assert not counters["graph_break"]
    for one, other in zip(found, plain_clips, strict=True):
        off = read_clip(one).pixels.astype(int) - read_clip(other).pixels
        assert abs(off).max() <= 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("--guidance", {"guidance": FlowMotion()}),
        ("--positions", {"positions": Path("found.safetensors")}),
        ("--memory", {"memory": "low"}),
        ("--context-parallel", {"context_parallel": "ulysses"}),
    ],
)
def test_clips_that_cannot_be_made_by_compiled_blocks_are_refused(name, change) -> None:
    refuse_uncompilable(GenerateSettings().model_copy(update=change))
    refuse_uncompilable(settings_of("generate", ["--caption", "a circle", "--compile"]))
    with pytest.raises(InputError, match=f"--compile does not go with {name}: "):
        refuse_uncompilable(GenerateSettings(compile=True).model_copy(update=change))
