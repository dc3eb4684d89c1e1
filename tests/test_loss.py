"""Laws of the loss, its weight, the noise levels and the path."""

import math

import pytest
import torch
from torch import Tensor

from motionlora.train.loss import (
    LossByTime,
    denoising_loss,
    motion_loss,
    path_point,
    release_weight,
    weight_of_time,
)
from motionlora.train.noise import drawn_times, keyed_generator, shifted

KINDS = ("frame", "channel", "code")


def velocity(key: str, frames: int = 5) -> Tensor:
    return torch.randn(3, 16, frames, 4, 6, generator=keyed_generator(key))


@pytest.mark.parametrize("kind", KINDS)
def test_motion_loss_of_a_perfect_prediction_is_zero(kind):
    assert motion_loss(velocity("a"), velocity("a"), kind).abs().max() < 1e-6


@pytest.mark.parametrize(("kind", "loss"), [("frame", 2.0), ("channel", 2.0), ("code", 0.0)])
def test_motion_loss_of_a_negated_prediction(kind, loss):
    assert motion_loss(-velocity("a"), velocity("a"), kind) == pytest.approx([loss] * 3, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.1, 7.0])
def test_motion_loss_does_not_see_scale_or_a_still_offset(kind, scale):
    moved = scale * velocity("a") + velocity("still", frames=1)
    torch.testing.assert_close(motion_loss(moved, velocity("b"), kind), motion_loss(velocity("a"), velocity("b"), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_motion_loss_of_still_velocities_is_finite_with_finite_gradient(kind):
    still = torch.zeros(1, 16, 5, 4, 6, requires_grad=True)
    loss = motion_loss(still, velocity("a")[:1], kind).sum()
    loss.backward()
    assert math.isfinite(loss.item())
    assert still.grad is not None
    assert still.grad.isfinite().all()


@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_motion_loss_of_one_latent_frame_is_zero(kind):
    assert motion_loss(velocity("a", frames=1), velocity("b", frames=1), kind).tolist() == [0, 0, 0]


def test_motion_loss_none_is_zero():
    assert motion_loss(velocity("a"), velocity("b"), "none").tolist() == [0, 0, 0]


def test_absolute_differences_along_time_leave_a_small_range_for_unrelated_noise():
    big = torch.randn(2, 1, 16, 5, 40, 40, generator=keyed_generator("big"))
    assert motion_loss(big[0], big[1], "code").item() == pytest.approx(1 - 0.72, abs=0.03)  # methods.md 2.6


def test_motion_loss_of_unrelated_noise_is_one_where_signs_count():
    big = torch.randn(2, 1, 16, 5, 40, 40, generator=keyed_generator("big"))
    assert motion_loss(big[0], big[1], "frame").item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_release_weight_has_mean_one_over_the_grid_and_never_goes_negative(shift):
    grid = shifted(torch.arange(1, 1001, dtype=torch.float64) / 1000, shift)
    weight = release_weight(grid, shift)
    assert weight.mean().item() == pytest.approx(1, abs=1e-9)
    assert weight.min() >= 0


def test_release_weight_has_the_values_of_the_release():
    weight = release_weight(torch.tensor([1.0, 0.5, 0.9, 0.1]), 5.0)
    assert weight == pytest.approx([0, 2.08, 0.63, 0.63], abs=0.01)  # methods.md 2.5


def test_weight_off_is_one():
    assert weight_of_time("none", 5.0)(torch.tensor([0.1, 1.0])).tolist() == [1, 1]


def test_drawn_times_follow_the_shift():
    times = drawn_times(20000, 5.0, keyed_generator("times"))
    assert times.min() > 0
    assert times.max() <= 1
    assert times.median().item() == pytest.approx(5 / 6, abs=0.01)
    assert (times > 0.9).float().mean().item() == pytest.approx(0.36, abs=0.02)  # methods.md 2.5
    back = times / (5 - 4 * times)
    assert back.mean().item() == pytest.approx(0.5, abs=0.01)


def test_shift_one_is_the_identity():
    assert shifted(torch.tensor([0.0, 0.25, 1.0]), 1.0).tolist() == [0, 0.25, 1]


def test_a_point_moves_along_its_velocity_from_clip_to_noise():
    clean, noise = velocity("clean"), velocity("noise")
    point = path_point(clean, noise, torch.tensor([0.0, 0.4, 1.0]))
    torch.testing.assert_close(point.latent[0], clean[0])
    torch.testing.assert_close(point.latent[2], noise[2])
    torch.testing.assert_close(point.latent[1] - 0.4 * point.target[1], clean[1])


def test_denoising_loss_is_the_mean_square_of_each_sample():
    off = torch.tensor([0.0, 1.0, 2.0]).reshape(3, 1, 1, 1, 1)
    assert denoising_loss(velocity("a") + off, velocity("a")) == pytest.approx([0, 1, 4], abs=1e-5)


def test_loss_by_time_keeps_ten_bins():
    bins = LossByTime()
    bins.add(torch.tensor([0.05, 0.95, 1.0]), torch.tensor([3.0, 1.0, 2.0]))
    assert bins.means() == [3, None, None, None, None, None, None, None, None, 1.5]


def test_equal_keys_draw_equal_noise_and_no_part_of_the_key_is_without_effect():
    def draw(*key: int | str) -> float:
        return torch.randn((), generator=keyed_generator(*key)).item()

    keys = [
        (0, "spatial", 1, 0),
        (1, "spatial", 1, 0),
        (0, "temporal", 1, 0),
        (0, "spatial", 2, 0),
        (0, "spatial", 1, 1),
    ]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(*keys[0]) == draw(*keys[0])
