"""Known answers of MotionClone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from motionlora.data.errors import InputError
from motionlora.heads.backbone import Prompt, TokenGrid
from motionlora.heads.schedule import euler_times
from motionlora.heads.wan import WanBackbone
from motionlora.infer.guidance import Walk
from motionlora.infer.guide_motionclone import MotionClone, time_maps
from motionlora.infer.sample import sample

GRID = TokenGrid(4, 2, 3)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heads(seed: int) -> Tensor:
    return 2 * drawn(seed, 1, GRID.tokens, 3, 8)


def walk_on(model: WanBackbone, *, seed: int = 1, reference: Tensor | None = None) -> Walk:
    embeds, noise, times = drawn(5, 2, 512, 32), drawn(seed, 1, 16, 3, 4, 8), euler_times({}, 10, 3.0)
    reference = drawn(99, 1, 16, 3, 4, 8) if reference is None else reference
    return Walk(model, Prompt(embeds[:1]), Prompt(embeds[1:]), 3.0, times, noise, reference, torch.Generator())


def test_maps_are_the_joint_attention_restricted_to_a_place_and_renormalised() -> None:
    q, k = heads(0), heads(1)
    maps = time_maps(q, k, GRID)
    assert maps.shape == (1, 6, 3, 4, 4)
    assert torch.allclose(maps.sum(-1), torch.ones(1, 6, 3, 4), atol=1e-6)
    joint = (torch.einsum("bshd,bthd->bhst", q, k) / 8**0.5).softmax(-1)[0]
    for place, head in ((0, 0), (4, 2)):
        tokens = [frame * 6 + place for frame in range(4)]
        part = joint[head][tokens][:, tokens]
        assert torch.allclose(maps[0, place, head], part / part.sum(-1, keepdim=True), atol=1e-6)


def test_what_stands_still_attends_to_all_frames_alike() -> None:
    still = heads(0)[:, :6].repeat(1, 4, 1, 1)
    assert torch.allclose(time_maps(still, still, GRID), torch.full((1, 6, 3, 4, 4), 0.25), atol=1e-6)


def test_the_mask_has_the_largest_entries_of_each_row() -> None:
    maps = time_maps(heads(0), heads(1), GRID)
    one = MotionClone().target(maps)
    assert torch.equal(one["entries"], maps.argmax(-1, keepdim=True))
    assert torch.equal(one["attention"], maps.amax(-1, keepdim=True))
    two = MotionClone(top=2).target(maps)
    assert torch.equal(two["attention"], maps.sort(-1, descending=True).values[..., :2])
    assert MotionClone(top=9).target(maps)["entries"].shape[-1] == 4
    others = MotionClone(top=9, exclude_diagonal=True).target(maps)
    assert others["entries"].shape[-1] == 3
    assert not (others["entries"] == torch.arange(4).view(1, 1, 1, 4, 1)).any()
    assert torch.allclose(others["attention"].sum(-1), 1 - maps.diagonal(dim1=-2, dim2=-1), atol=1e-6)


@pytest.mark.parametrize("guidance", [MotionClone(), MotionClone(top=2, exclude_diagonal=True)], ids=str)
def test_the_loss_is_the_error_of_the_chosen_entries_and_nothing_else(guidance: MotionClone) -> None:
    theirs, ours = time_maps(heads(0), heads(1), GRID), time_maps(heads(2), heads(3), GRID)
    target = guidance.target(theirs)
    assert guidance.loss(theirs, target).item() == 0
    missed = (ours.gather(-1, target["entries"]) - target["attention"]).square().mean()
    assert guidance.loss(ours, target).item() == pytest.approx(2000 * missed.item(), rel=1e-5)
    leaf = ours.clone().requires_grad_()
    guidance.loss(leaf, target).sum().backward()
    assert leaf.grad is not None
    chosen = torch.zeros_like(ours, dtype=torch.bool).scatter(-1, target["entries"], value=True)
    assert (leaf.grad[~chosen] == 0).all()
    assert (leaf.grad[chosen] != 0).all()
    both = guidance.loss(torch.cat([theirs, ours]), target)
    assert both.tolist() == pytest.approx([0, 2000 * missed.item()], rel=1e-5)


def test_a_single_frame_says_nothing() -> None:
    alone = time_maps(drawn(0, 1, 6, 3, 8), drawn(1, 1, 6, 3, 8), TokenGrid(1, 2, 3))
    for guidance in (MotionClone(), MotionClone(exclude_diagonal=True)):
        assert guidance.loss(alone, guidance.target(alone)).item() == 0


def test_a_truncated_forward_shows_what_a_full_one_shows(twin: WanBackbone) -> None:
    walk = walk_on(twin)
    now = walk.times[2]
    with torch.no_grad():
        with twin.capturing([1], "qk") as seen:
            assert twin.velocity(walk.noise, now.expand(1), walk.prompt) is not None
        found = MotionClone(block=1).features(walk, walk.noise, now, walk.prompt)
        q, k = seen[1]
        assert torch.equal(found, time_maps(q, k, twin.grid(walk.noise)))
    assert found.shape == (1, 8, 4, 3, 3)


def gradient_of(guidance: Any, walk: Walk, latent: Tensor, target: Any) -> tuple[float, Tensor]:
    """The loss and its gradient at time 0, where the reference was looked at."""
    leaf = latent.clone().requires_grad_()
    loss = guidance.loss(guidance.features(walk, leaf, walk.times[-1], walk.blank()), target).sum()
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad


def test_the_reference_itself_has_no_loss_and_no_gradient(twin: WanBackbone) -> None:
    walk, guidance = walk_on(twin), MotionClone(top=2)
    assert walk.reference is not None
    with torch.no_grad():
        target = guidance.target(guidance.features(walk, walk.reference, walk.times[-1], walk.blank()))
    loss, gradient = gradient_of(guidance, walk, walk.reference, target)
    assert loss < 1e-8
    other_loss, other = gradient_of(guidance, walk, walk.noise, target)
    assert other_loss > 1e-3
    assert gradient.abs().max() < 1e-3 * other.abs().max()
    assert other.abs().mean() > 1e-6  # far above Adam's epsilon of 1e-8


def test_a_block_that_is_not_there_is_refused(twin: WanBackbone) -> None:
    with pytest.raises(InputError, match="blocks 0 to 2"):
        sample(walk_on(twin), MotionClone(block=3))
