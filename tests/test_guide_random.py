"""The random control: its dose is exact in each step and in sum that of the method it stands for; its way is chance."""

from typing import Any

import pytest
import torch
from torch import Tensor

from motionlora.data.errors import InputError
from motionlora.heads.backbone import Prompt
from motionlora.heads.schedule import euler_times
from motionlora.heads.wan import WanBackbone
from motionlora.infer.effort import walked
from motionlora.infer.guidance import GuidanceSettings, Walk
from motionlora.infer.guide_flowmotion import FlowMotion
from motionlora.infer.guide_none import NoGuidance
from motionlora.infer.guide_random import RandomGradient, same_dose
from motionlora.infer.method import parsed_method
from motionlora.infer.sample import sample

STEPS = 5


def walk_on(model: Any, *, seed: int = 1) -> Walk:
    draws = torch.Generator().manual_seed(seed)
    embeds, noise = torch.randn(2, 512, 32, generator=draws), torch.randn(1, 16, 5, 8, 8, generator=draws)
    reference = torch.randn(noise.shape, generator=draws)
    return Walk(
        model, Prompt(embeds[:1]), Prompt(embeds[1:]), 3.0, euler_times({}, STEPS, 3.0), noise, reference, draws
    )


def steps_of(guidance: GuidanceSettings, walk: Walk) -> list[Tensor]:
    """What it adds in each step, to a latent of zeros."""
    zeros = torch.zeros_like(walk.noise)
    with guidance.steering(walk) as steer:
        return [steer(zeros, now) for now in walk.times[:-1]]


def cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()))


def test_without_a_dose_it_is_plain_sampling_bit_for_bit(twin: WanBackbone) -> None:
    plain = sample(walk_on(twin), NoGuidance())
    for guidance in (RandomGradient(dose=0), RandomGradient(share=0), RandomGradient(doses=(0.0, 0.0))):
        assert torch.equal(sample(walk_on(twin), guidance), plain), guidance
    assert not torch.equal(sample(walk_on(twin), RandomGradient(share=0.4)), plain)


def test_each_element_moves_by_the_dose_of_its_step_and_no_step_behind_is_moved() -> None:
    doses = [0.03, 0.0, 0.01]
    added = steps_of(RandomGradient(doses=tuple(doses)), walk_on(None))
    for step, wanted in zip(added, [*doses, 0.0, 0.0], strict=True):
        assert torch.equal(step.abs(), torch.full_like(step, wanted))
    added = steps_of(RandomGradient(dose=0.02, share=0.4), walk_on(None))
    assert [round(step.abs().max().item(), 6) for step in added] == [0.02, 0.02, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("alike", [0.0, 0.3, 1.0])
def test_two_steps_have_the_cosine_that_is_asked_for_and_draws_and_seeds_none(alike: float) -> None:
    guidance = RandomGradient(share=1.0, alike=alike)
    added = steps_of(guidance, walk_on(None))
    deviation = 4 / added[0].numel() ** 0.5
    for first in range(STEPS):
        for second in range(first):
            assert cosine(added[first], added[second]) == pytest.approx(alike, abs=deviation)
    other = steps_of(guidance.model_copy(update={"draw": 1}), walk_on(None))
    others = steps_of(guidance, walk_on(None, seed=2))
    assert max(abs(cosine(added[0], strange[0])) for strange in (other, others)) < deviation
    assert abs(float(added[0].mean())) < deviation * guidance.dose


def test_it_moves_as_far_as_the_method_that_it_stands_for(twin: WanBackbone) -> None:
    _, method = walked(walk_on(twin), FlowMotion(lr=0.01, share=0.6), twin.transformer)
    assert [dose > 0 for dose in method.doses] == [True, True, True, False, False]
    guidance = same_dose(method.doses, method.dose_rms)
    _, control = walked(walk_on(twin), guidance, twin.transformer)
    assert control.doses == pytest.approx(method.doses, rel=1e-4)
    assert control.dose_rms == pytest.approx(method.dose_rms, rel=0.05)
    assert (control.forwards, control.gradients) == (2 * STEPS, 0)
    # alike is not at an end of its range, where the sum would be right by clamping alone
    assert 0.05 < guidance.alike < 0.95


def test_a_single_step_and_a_walk_that_was_not_moved_have_their_control_too() -> None:
    assert same_dose((0.0, 0.5, 0.0), 0.5).planned(3) == (0.0, 0.5)
    assert same_dose((0.0, 0.0), 0.0).dose_bound(2) == 0


def test_more_doses_than_steps_are_refused() -> None:
    with pytest.raises(InputError, match="6 numbers and the walk 5 steps"):
        steps_of(RandomGradient(doses=(0.1,) * 6), walk_on(None))


def test_it_is_a_method_of_a_comparison_that_takes_no_motion() -> None:
    method = parsed_method("random:doses=[0.01,0.02],draw=1")
    assert method.guidance == RandomGradient(doses=(0.01, 0.02), draw=1)
    assert not method.takes_motion
