"""Known answers of the single guidances: FlowMotion, SDEdit, KV injection; and of the Adam that moves latents."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from motionlora.data.errors import InputError
from motionlora.heads.backbone import Prompt
from motionlora.heads.forwards import counting
from motionlora.heads.schedule import euler_times
from motionlora.heads.wan import WanBackbone
from motionlora.infer.adam import descended, reach
from motionlora.infer.guidance import Kept, Walk, guided_steps, guided_until, noised
from motionlora.infer.guide_flowmotion import (
    FlowMotion,
    alignment_gradient,
    all_pairs,
    consecutive,
    latent_alignment,
    regularised,
)
from motionlora.infer.guide_inject import Injection
from motionlora.infer.guide_sdedit import SDEdit
from motionlora.infer.sample import sample

SHAPE = (1, 16, 3, 4, 8)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def walk_on(model: Any, *, steps: int = 10, scale: float = 3.0, seed: int = 1, prompt: int = 5) -> Walk:
    embeds = drawn(prompt, 2, 512, 32)
    return Walk(
        model, Prompt(embeds[:1]), Prompt(embeds[1:]), scale, euler_times({}, steps, 3.0), drawn(seed), drawn(99),
        torch.Generator().manual_seed(seed),
    )  # fmt: skip


class Straight:
    """A made-up model that foresees its prompt's mean everywhere, at every time."""

    device, channels = torch.device("cpu"), 16

    def embed(self, captions: list[str]) -> Prompt:
        return Prompt(torch.zeros(len(captions), 2, 2))

    def velocity(self, latent: Tensor, time: Tensor, prompt: Prompt) -> Tensor:
        return (latent - prompt.embeds.mean()) / time.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_adam_moves_by_its_rate_whatever_the_scale_of_the_loss(scale: float) -> None:
    start, pull = drawn(0), drawn(1)
    moved = descended(start, lambda _: scale * pull, 0.01, 4)
    assert torch.allclose(moved - start, -0.04 * pull.sign(), atol=2e-6 / min(scale, 1))
    assert torch.equal(descended(start, lambda _: pull, 0.0, 3), start)
    assert torch.equal(descended(start, lambda _: pytest.fail("asked"), 1.0, 0), start)


def test_the_reach_of_adam_is_attained_and_never_passed() -> None:
    assert reach(0.01, 1) == pytest.approx(0.01)
    assert 0.009 < reach(0.003, 3) < 0.00902
    # The longest second update: gradients in proportion to m's weights over v's (equality of Cauchy and Schwarz).
    longest = iter([torch.tensor([0.9 / 0.999]), torch.tensor([1.0])])
    moved = descended(torch.zeros(1), lambda _: next(longest), 1.0, 2)
    assert -moved.item() == pytest.approx(reach(1.0, 2), abs=1e-6)
    for seed in range(20):
        pulls = iter(drawn(seed, 6, 500).exp())
        assert descended(torch.zeros(500), lambda _, p=pulls: next(p), 1.0, 6).abs().max() <= reach(1.0, 6) + 1e-5


def test_guided_steps_are_the_first_share_of_them() -> None:
    times = euler_times({}, 50, 3.0)
    for share, count in ((0.2, 10), (0.0, 0), (1.0, 50), (0.03, 2)):
        assert int((times[:-1] > guided_until(times, share)).sum()) == count
    assert [guided_steps(share, 1) for share in (0.0, 0.2, 1.0)] == [0, 1, 1]  # asked for, it acts in a short walk, too


def test_across_the_mean_velocity_little_remains_and_along_it_all() -> None:
    mean, velocity = drawn(0), drawn(1)
    along = (velocity * mean).sum(1, keepdim=True) / mean.square().sum(1, keepdim=True) * mean
    factor = drawn(3, 1, 1, 3, 4, 8)  # another one at each place: the projection is not one over the whole latent
    assert torch.allclose(regularised(factor * mean, mean, 0.1), factor * mean, atol=1e-5)
    assert torch.allclose(regularised(velocity - along, mean, 0.1), 0.1 * (velocity - along), atol=1e-5)
    assert torch.allclose(regularised(velocity, mean, 1.0), velocity, atol=1e-6)
    assert torch.allclose(regularised(velocity, torch.zeros(SHAPE), 0.1), 0.1 * velocity)


def stacked(y: Tensor) -> Tensor:
    """The published script's stack of differences, written out: neighbours, then every frame against all others."""
    frames = y.shape[2]
    rows = [(y[:, :, 1:] - y[:, :, :-1]).abs()]
    for one in range(frames):
        others = [frame for frame in range(frames) if frame != one]
        rows.append((y[:, :, one : one + 1] - y[:, :, others]).abs())
    return torch.stack(rows)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_the_differences_are_those_of_the_published_stack(frames: int) -> None:
    ours, theirs = drawn(0, 1, 4, frames, 2, 3), drawn(1, 1, 4, frames, 2, 3)
    found = sum(all_pairs(ours, theirs), torch.tensor(0.0))
    if frames == 1:
        assert found == 0
        assert list(consecutive(ours, theirs)) == []
        return
    assert torch.allclose(found, (stacked(ours) - stacked(theirs)).square().mean())
    (signed,) = consecutive(ours, theirs)
    assert torch.allclose(signed, (ours.diff(dim=2) - theirs.diff(dim=2)).square().mean())


def test_sizes_of_differences_are_blind_to_the_order_of_frames_and_signed_ones_are_not() -> None:
    y = drawn(0)
    assert sum(all_pairs(y + drawn(1, 1, 16, 1, 4, 8), y), torch.tensor(0.0)) < 1e-10  # looks that stay do not count
    assert sum(all_pairs(-y, y), torch.tensor(0.0)) == 0
    assert next(consecutive(-y, y)) > 1


@pytest.mark.parametrize("differences", ["all_pairs", "consecutive"])
def test_the_gradient_is_that_of_the_whole_loss(differences: Any) -> None:
    settings, source = FlowMotion(differences=differences), drawn(1)
    y = drawn(0).requires_grad_()
    d = stacked if differences == "all_pairs" else lambda x: x.diff(dim=2)
    (20 * (y - source).square().mean() + 5 * (d(y) - d(source)).square().mean()).backward()
    with torch.no_grad():
        assert torch.allclose(alignment_gradient(y, source, settings), y.grad, atol=1e-7)  # pyright: ignore
        both = alignment_gradient(torch.cat([y, y]), source, settings)
    assert torch.allclose(both[1:], y.grad, atol=1e-7)  # pyright: ignore[reportArgumentType]
    alone = alignment_gradient(y.detach(), source, FlowMotion(difference_weight=0))
    assert torch.allclose(alone, 40 * (y.detach() - source) / y.numel(), atol=1e-7)


def forwards_of(model: WanBackbone, walk: Walk, guidance: Any) -> float:
    with counting(model.transformer) as tally:
        sample(walk, guidance)
    return tally.forwards


def test_flowmotion_costs_what_the_bar_says(twin: WanBackbone) -> None:
    plain, kept = 20, Kept()
    walks = [replace(walk_on(twin, prompt=caption), kept=kept) for caption in (5, 6)]
    assert [forwards_of(twin, walk, FlowMotion()) / plain for walk in walks] == [1.7, 1.6]
    other_seed = replace(walk_on(twin, seed=2), kept=kept)
    assert forwards_of(twin, other_seed, FlowMotion()) / plain == 1.6
    assert forwards_of(twin, replace(other_seed, kept=kept), FlowMotion(source_noise="own")) / plain == 1.7
    assert forwards_of(twin, walk_on(twin), FlowMotion(source="clean")) / plain == 1.6
    assert forwards_of(twin, walk_on(twin), FlowMotion(reuse_velocity=True)) / plain == 1.3
    assert forwards_of(twin, walk_on(twin, scale=1.0), FlowMotion()) / 10 == 1.8
    assert FlowMotion().dose_bound(50) == pytest.approx(0.09, rel=2e-3)


def test_a_shared_source_is_the_one_computed_alone(twin: WanBackbone) -> None:
    kept = Kept()
    sample(replace(walk_on(twin, seed=2, prompt=6), kept=kept), FlowMotion())
    assert torch.equal(sample(replace(walk_on(twin), kept=kept), FlowMotion()), sample(walk_on(twin), FlowMotion()))


def test_a_guided_step_moves_the_foreseen_clip_towards_the_reference() -> None:
    walk = walk_on(Straight(), scale=1.0)
    guidance = FlowMotion(source="clean", lr=0.01, reuse_velocity=True)
    now, held = walk.times[0], walk.velocity(walk.noise, walk.times[0])
    with guidance.steering(walk) as steer:
        moved = steer(walk.noise, now)
    before, after = (latent_alignment(latent - now * held, drawn(99)) for latent in (walk.noise, moved))
    assert after < before


def test_the_velocity_is_regularised_from_the_second_step_on() -> None:
    walk = walk_on(Straight(), scale=1.0)
    guidances = [FlowMotion(source="clean", share=1, across=across) for across in (0.0, 1.0)]
    steered = []
    for guidance in guidances:
        with guidance.steering(walk) as steer:
            steered.append([steer(walk.noise + i, now) for i, now in enumerate(walk.times[:2])])
    assert torch.equal(steered[0][0], steered[1][0])
    assert not torch.allclose(steered[0][1], steered[1][1], atol=1e-3)


def test_sdedit_begins_at_the_noised_reference_and_forgets_what_was_before(twin: WanBackbone) -> None:
    walk = walk_on(twin)
    start = walk.times[walk.times <= 0.9][0]
    assert walk.reference is not None
    with SDEdit(start=0.9).steering(walk) as steer:
        for now in walk.times[:-1]:
            latent = drawn(7)
            expected = noised(walk.reference, walk.noise, start) if now == start else latent
            assert torch.equal(steer(latent, now), expected)
    part = replace(walk, times=walk.times[walk.times <= 0.9])
    assert torch.equal(sample(walk, SDEdit(start=0.9)), sample(part, SDEdit()))


def test_sdedit_below_the_last_step_is_refused(twin: WanBackbone) -> None:
    walk = walk_on(twin)
    last = float(walk.times[-2])
    sample(walk, SDEdit(start=last))
    with pytest.raises(InputError, match=r"guidance.start is .* raise it"):
        sample(walk, SDEdit(start=last / 2))


def velocity(model: WanBackbone, latent: Tensor, time: float = 0.5, prompt: int = 5) -> Tensor:
    return model.velocity(latent, torch.tensor([time]), Prompt(drawn(prompt, 1, 512, 32)))


@pytest.mark.parametrize("blocks", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_own_keys_and_values_change_nothing_and_others_do(twin: WanBackbone, blocks: tuple[int, ...]) -> None:
    latent, other = drawn(0), drawn(1)
    plain, foreign = velocity(twin, latent), velocity(twin, other)
    with twin.injecting(blocks) as injected:
        assert torch.equal(velocity(twin, latent), plain)
        injected.record(lambda: velocity(twin, latent))
        assert torch.equal(velocity(twin, latent), plain)
        both = velocity(twin, torch.cat([latent, other]))
        assert torch.allclose(both[:1], plain, atol=1e-5)
        assert not torch.allclose(both[1:], foreign, atol=1e-4)  # every row of a batch gets them
        injected.record(lambda: velocity(twin, other))
        assert not torch.allclose(velocity(twin, latent), plain, atol=1e-4)
        assert torch.equal(velocity(twin, other), foreign)
        injected._seen = {name: torch.zeros_like(seen) for name, seen in injected._seen.items()}
        assert not torch.allclose(velocity(twin, latent), plain, atol=1e-4)
        injected.clear()
        assert torch.equal(velocity(twin, latent), plain)
        injected.record(lambda: velocity(twin, other))
    assert injected._seen == {}
    assert torch.equal(velocity(twin, latent), plain)


def test_the_attention_gets_the_recorded_keys_after_norm_and_rotary_positions(twin: WanBackbone) -> None:
    latent, other = drawn(0), drawn(1)
    with twin.capturing([0, 1], "qkv") as seen:
        velocity(twin, other)
        theirs = {block: seen[block] for block in (0, 1)}
        velocity(twin, latent)
        ours = {block: seen[block] for block in (0, 1)}
    with twin.injecting([0]) as injected, twin.capturing([0, 1], "qkv") as seen:
        injected.record(lambda: velocity(twin, other, prompt=6))  # block 0 does not know the caption
        velocity(twin, latent)
        q, k, v = seen[0]
        assert torch.equal(q, ours[0][0])
        assert torch.equal(k, theirs[0][1])
        assert torch.equal(v, theirs[0][2])
        assert not torch.equal(seen[1][1], theirs[1][1])
        assert not torch.equal(seen[1][1], ours[1][1])


def test_recording_ends_in_the_last_of_the_blocks_and_does_not_see_what_it_recorded_before(twin: WanBackbone) -> None:
    with counting(twin.transformer) as tally, twin.injecting([0, 1]) as injected:
        injected.record(lambda: velocity(twin, drawn(1)))
        assert tally.begun == 2
        first = dict(injected._seen)
        injected.record(lambda: velocity(twin, drawn(0)))
        injected.record(lambda: velocity(twin, drawn(1)))
        assert all(torch.equal(first[name], seen) for name, seen in injected._seen.items())


def test_injecting_a_block_that_is_not_there_is_refused(twin: WanBackbone) -> None:
    with pytest.raises(InputError, match="blocks 0 to 2"):
        sample(walk_on(twin), Injection(blocks=(3,)))


def test_the_reference_with_matched_noise_is_walked_as_without_injection(twin: WanBackbone) -> None:
    walk = walk_on(twin)
    assert walk.reference is not None
    guided, free = walk.times[1], walk.times[5]
    with Injection().steering(walk) as steer, torch.no_grad():
        for now, injected in ((guided, True), (free, False)):
            same, other = noised(walk.reference, walk.noise, now), drawn(8)
            assert steer(other, now) is other
            in_place, elsewhere = walk.velocity(same, now), walk.velocity(other, now)
            steer(other, free)  # behind the guided steps nothing is injected
            assert torch.equal(in_place, walk.velocity(same, now))
            assert torch.equal(elsewhere, walk.velocity(other, now)) == (not injected)
