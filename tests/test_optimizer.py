"""Laws of the optimisers: each is AdamW, leaves what is masked at zero, and is resumed to the same bits."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from test_train import changed, clip, equal, interrupt_at, quiet, recipe, weights

from motionlora.data.errors import InputError
from motionlora.heads.four_bit import installed
from motionlora.train.checkpoint import load_checkpoint
from motionlora.train.identity import identity, refuse_changes
from motionlora.train.launch import refuse_other_numbers
from motionlora.train.loop import Stopped
from motionlora.train.optimizer import MOMENT_BYTES, new_optimizer
from motionlora.train.refusals import refuse_early
from motionlora.train.run import train
from motionlora.train.settings import OptimizerName, TrainSettings

__all__ = ["clip"]
needs_package = pytest.mark.skipif(not installed(), reason="the extra motionlora[4bit] is not installed")
NAMES = [pytest.param(name, marks=needs_package if "8bit" in name else ()) for name in get_args(OptimizerName)]
LR, DECAY, BETAS, EPS = 1e-2, 0.5, (0.9, 0.999), 1e-8


@pytest.fixture(scope="module")
def lesson(twin_folder: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    """Four steps of the temporal stage on the random twin; rank 128, so that layers are large enough for 8 bits."""
    folder = tmp_path_factory.mktemp("lesson")
    start = recipe(twin_folder, clip, folder / "run", folder / "cache")
    return changed(start, heads={"heads": "all"}, lora={"rank": 128}, checkpoint_every=100)


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_adamw_as_it_is_written(name) -> None:
    """w <- (1 - lr decay) w - lr m' / (sqrt(v') + eps); 8 bits are off by a few hundredths of a step."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 128, generator=generator))
    with torch.no_grad():
        weight[:16] = 0
    optimizer = new_optimizer(name, [weight], lr=LR, weight_decay=DECAY)
    by_hand = weight.detach().clone()
    m, v = torch.zeros_like(by_hand), torch.zeros_like(by_hand)
    for step in range(1, 6):
        weight.grad = torch.randn(64, 128, generator=generator)
        weight.grad[:16] = 0
        m = BETAS[0] * m + (1 - BETAS[0]) * weight.grad
        v = BETAS[1] * v + (1 - BETAS[1]) * weight.grad.square()
        by_hand *= 1 - LR * DECAY
        by_hand -= LR * (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS)
        optimizer.step()
    assert not weight[:16].any(), "what is masked stays zero"
    off = (weight.detach() - by_hand).abs().mean() / LR
    assert off < (0.1 if name == "adamw_8bit" else 1e-5)
    kept = sum(tensor.nbytes for key, tensor in optimizer.state[weight].items() if key != "step")
    assert 0 <= kept / weight.numel() - MOMENT_BYTES[name] < 0.5, "what a plan counts; 8 bits keep scales beside"


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_stopped_run_goes_on_to_the_same_bits(lesson, tmp_path, monkeypatch, name) -> None:
    lesson = changed(lesson, optimizer=name)
    whole = train(changed(lesson, out=tmp_path / "whole"), say=quiet)
    stopped = changed(lesson, out=tmp_path / "stopped")
    interrupt_at(monkeypatch, "temporal", 2, signal.SIGINT)
    with pytest.raises(Stopped):
        train(stopped, say=quiet)
    kept = load_checkpoint(stopped.out / "checkpoints" / "temporal-000002").moments
    assert (torch.uint8 in {tensor.dtype for tensor in kept.values()}) == (name == "adamw_8bit")
    resumed = train(changed(stopped, resume="latest"), say=quiet)
    assert equal(weights(resumed, "temporal"), weights(whole, "temporal"))
    plain = weights(train(changed(lesson, optimizer="adamw", out=tmp_path / "plain"), say=quiet), "temporal")
    for key, weight in weights(whole, "temporal").items():
        assert (weight - plain[key]).abs().mean() < (2e-3 if name == "adamw_8bit" else 1e-6)


def test_a_run_goes_on_as_it_was_begun_and_older_ones_count_as_torchs(lesson) -> None:
    assert "optimizer" not in identity(lesson, "temporal")
    other = identity(changed(lesson, optimizer="adamw_fused"), "temporal")
    with pytest.raises(InputError, match="optimizer = None, now it is adamw_fused"):
        refuse_changes(identity(lesson, "temporal"), other, stage="temporal", what="It")


def test_what_cannot_be_had_is_refused_before_anything_is_loaded(lesson, monkeypatch) -> None:
    monkeypatch.setattr("motionlora.train.optimizer.installed", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'motionlora\[4bit\]', or set --optimizer adamw"):
        refuse_early(changed(lesson, optimizer="adamw_8bit"))
    zero = SimpleNamespace(zero_stage=2, gradient_clipping="auto")
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=zero), gradient_accumulation_steps=1)
    with pytest.raises(InputError, match="leave --compile and --optimizer out"):
        refuse_other_numbers(accelerator, changed(lesson, optimizer="adamw_fused"))
