"""Known answers of SMM and MOFT, and of the frame that they share."""

from typing import Any

import pytest
import torch
from torch import Tensor

from motionlora.data.errors import InputError
from motionlora.heads.backbone import Prompt
from motionlora.heads.schedule import euler_times
from motionlora.heads.wan import WanBackbone
from motionlora.infer.features import FeatureGuidance, block_features
from motionlora.infer.guidance import Walk, noised
from motionlora.infer.guide_inject import Injection
from motionlora.infer.guide_moft import MOFT, motion_channels
from motionlora.infer.guide_smm import SMM
from motionlora.infer.sample import sample

FRAMES = 6


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (1, 50, FRAMES, 4, 5), generator=torch.Generator().manual_seed(seed))


def loss_of(guidance: FeatureGuidance, ours: Tensor, theirs: Tensor) -> float:
    return guidance.loss(ours, guidance.target(theirs)).item()


def written_out(ours: Tensor, theirs: Tensor) -> float:
    """The loss of SMM in loops."""
    x, y = theirs.mean((-2, -1))[0], ours.mean((-2, -1))[0]
    total = 0.0
    for f in range(FRAMES):
        cosines = [torch.cosine_similarity(y[:, g] - y[:, f], x[:, g] - x[:, f], dim=0) for g in range(FRAMES)]
        total += 1 - sum(float(c) for c in cosines) / FRAMES
    return total / FRAMES


def test_smm_compares_how_frames_differ_and_nothing_else() -> None:
    x, y, smm = drawn(0), drawn(1), SMM()
    assert loss_of(smm, x, x) == pytest.approx(1 / FRAMES, abs=1e-5)
    assert loss_of(smm, y, x) == pytest.approx(written_out(y, x), abs=1e-5)
    offset = drawn(2, 1, 50, 1, 1, 1)
    assert loss_of(smm, x + offset, x) == pytest.approx(1 / FRAMES, abs=1e-5)
    mixed = x.flatten(3)[..., torch.randperm(20, generator=torch.Generator().manual_seed(0))].reshape(x.shape)
    assert loss_of(smm, mixed, x) == pytest.approx(1 / FRAMES, abs=1e-5)
    assert loss_of(smm, x.flip(2), x) > 1 / FRAMES + 0.1
    assert loss_of(smm, 3 * x, x) == pytest.approx(1 / FRAMES, abs=1e-5)
    assert loss_of(smm, x.mean(2, keepdim=True).expand_as(x), x) == pytest.approx(1.0, abs=1e-2)


def test_the_compat_variant_sees_looks() -> None:
    x, compat = drawn(0), SMM(variant="smm_ditflow_compat")
    assert loss_of(compat, x, x) == pytest.approx(0.0, abs=1e-5)
    assert loss_of(compat, x + drawn(2, 1, 50, 1, 1, 1), x) > 0.5


def test_moft_is_blind_to_looks_and_amplitude_and_sees_direction() -> None:
    x, moft = drawn(0), MOFT(channels=0.2)
    for same in (x, x + drawn(2, 1, 50, 1, 4, 5), 3 * x):
        assert loss_of(moft, same, x) == pytest.approx(0.0, abs=1e-5)
    assert loss_of(moft, -x, x) == pytest.approx(2.0, abs=1e-5)
    assert loss_of(moft, x.mean(2, keepdim=True).expand_as(x), x) == pytest.approx(1.0, abs=0.02)
    assert loss_of(moft, x.flip(2), x) > 0.5
    mixed = x.flatten(3).flip(3).reshape(x.shape)
    assert loss_of(moft, mixed, x) > 0.5  # places count, other than with SMM


@pytest.mark.parametrize(("width", "count"), [(48, 2), (128, 5), (1536, 61), (5120, 204)])
def test_motion_channels_are_four_in_a_hundred(width: int, count: int) -> None:
    if width < 1000:
        assert len(motion_channels(drawn(0, 1, width, 3, 2, 2), 0.04)) == count
    assert max(2, int(0.04 * width)) == count


def test_motion_channels_are_those_of_the_principal_component() -> None:
    features = 0.01 * drawn(0)
    features[:, [3, 17, 40]] += drawn(1, 1, 1, FRAMES, 4, 5) * torch.tensor([2.0, -3.0, 1.0]).view(1, 3, 1, 1, 1)
    features[:, 8] += 1000.0  # content: it stays, and does not count
    assert motion_channels(features, 0.06).tolist() == [3, 17, 40]
    assert motion_channels(-features, 0.06).tolist() == [3, 17, 40]
    content_free = (features - features.mean(2, keepdim=True)).movedim(1, -1).reshape(-1, 50)
    first = torch.linalg.svd(content_free).Vh[0].abs()
    assert sorted(first.topk(3).indices.tolist()) == [3, 17, 40]


@pytest.mark.parametrize("guidance", [SMM(), SMM(variant="smm_ditflow_compat"), MOFT(channels=0.2)], ids=str)
def test_gradients_are_finite_also_where_nothing_moves_and_a_step_down_lowers_the_loss(guidance: Any) -> None:
    x = drawn(0)
    for start in (drawn(1), x, torch.zeros_like(x), x.mean(2, keepdim=True).expand_as(x)):
        leaf = start.clone().requires_grad_()
        guidance.loss(leaf, guidance.target(x)).sum().backward()
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
    leaf = drawn(1).requires_grad_()
    before = guidance.loss(leaf, guidance.target(x)).sum()
    before.backward()
    assert leaf.grad is not None
    assert loss_of(guidance, leaf.detach() - leaf.grad, x) < before.item()
    batch = guidance.loss(torch.cat([x, drawn(1)]), guidance.target(x))
    assert batch.shape == (2,)
    assert batch[1].item() == pytest.approx(before.item(), abs=1e-5)


def walk_on(model: WanBackbone, steps: int = 10) -> Walk:
    embeds, noise = drawn(5, 2, 512, 32), drawn(1, 1, 16, 3, 4, 8)
    times, reference = euler_times({}, steps, 3.0), drawn(99, 1, 16, 3, 4, 8)
    return Walk(model, Prompt(embeds[:1]), Prompt(embeds[1:]), 3.0, times, noise, reference, torch.Generator())


def test_rates_fall_in_ten_of_eleven_points() -> None:
    assert SMM().rates(50) == pytest.approx([0.002 - 0.0001 * step for step in range(10)])
    assert SMM().rates(50)[-1] == pytest.approx(0.0011)
    assert SMM().dose_bound(50) == pytest.approx(0.078, abs=6e-4)
    assert SMM(share=0).rates(50) == []


def test_features_are_the_blocks_output_and_the_forward_ends_there(twin: WanBackbone) -> None:
    walk = walk_on(twin)
    now = walk.times[2]
    with torch.no_grad(), twin.capturing([1], "block") as seen:
        walk.model.velocity(walk.noise, now.expand(1), walk.prompt)
        found = block_features(twin, walk.noise, now, walk.prompt, 1)
        assert torch.equal(found.permute(0, 2, 3, 4, 1).reshape(1, 24, 48), seen[1])
    assert found.shape == (1, 48, 3, 2, 4)


def test_the_loss_falls_with_every_guided_step_and_the_block_can_be_chosen(twin: WanBackbone) -> None:
    walk = walk_on(twin)
    now = walk.times[1]
    assert walk.reference is not None
    for guidance in (SMM(lr=0.01), MOFT(lr=0.01, channels=0.2), SMM(lr=0.01, block=0, reference_noise="matched")):
        with guidance.steering(walk) as steer, torch.no_grad():
            moved = steer(walk.noise, now)
            level = now if guidance.reference_noise == "matched" else walk.times[-1]
            source = noised(walk.reference, walk.noise, level)
            block = guidance.depth(twin.blocks)
            target = guidance.target(block_features(twin, source, level, walk.blank(), block))
            found = [block_features(twin, latent, now, walk.prompt, block) for latent in (walk.noise, moved)]
            before, after = (guidance.loss(features, target) for features in found)
        assert after < before
    with pytest.raises(InputError, match="blocks 0 to 2"):
        sample(walk, SMM(block=3))


def test_it_goes_with_injection(twin: WanBackbone) -> None:
    alone, both = (SMM(lr=0.01, iterations=2, inject=inject) for inject in (Injection(share=0), Injection(share=0.5)))
    walk = walk_on(twin, steps=4)  # one guided step, two with injection
    assert not torch.equal(sample(walk, alone), sample(walk, both))
    still = SMM(iterations=0, inject=Injection(share=0.5))
    assert torch.equal(sample(walk, still), sample(walk, Injection(share=0.5)))
