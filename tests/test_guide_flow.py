"""Known answers of DiTFlow and FastVMT (losses by arithmetic, costs, reused gradients, positions instead of latents).

That the loss falls in a guided step is a law of MotionClone, too.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from motionlora.data.clip import read_clip, write_clip
from motionlora.data.errors import InputError
from motionlora.data.say import silent
from motionlora.heads.backbone import Prompt
from motionlora.heads.schedule import euler_times
from motionlora.heads.token_grid import TokenGrid
from motionlora.heads.wan import WanBackbone
from motionlora.infer import attention_flow
from motionlora.infer.adam import descended, descended_by, reach, reach_by
from motionlora.infer.attention_flow import Compared, mean_of_logits, queries_keys
from motionlora.infer.attention_windows import Sliding
from motionlora.infer.effort import walked
from motionlora.infer.features import FeatureGuidance
from motionlora.infer.found import Reuse, load_found
from motionlora.infer.guidance import Walk, noised
from motionlora.infer.guide_ditflow import DiTFlow, flow_error
from motionlora.infer.guide_fastvmt import FastVMT, default_tile, default_window, reused, window_change
from motionlora.infer.guide_fastvmt import flow_error as weighted_error
from motionlora.infer.guide_inject import Injection
from motionlora.infer.guide_motionclone import MotionClone
from motionlora.infer.guide_none import NoGuidance
from motionlora.infer.guide_sdedit import SDEdit
from motionlora.infer.sample import sample
from motionlora.train.command import main, settings_of

POSITIONS: dict[str, Any] = {"optimise": "positions", "lr": 0.05, "iterations": 2}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def walk_on(model: WanBackbone, *, steps: int = 10, clips: int = 1, scale: float = 3.0, grid: Any = (3, 4, 8)) -> Walk:
    embeds, noise, reference = drawn(5, 2, 512, 32), drawn(1, clips, 16, *grid), drawn(99, 1, 16, *grid)
    times = euler_times({}, steps, 3.0)
    return Walk(model, Prompt(embeds[:1]), Prompt(embeds[1:]), scale, times, noise, reference, torch.Generator())


def test_only_what_moves_in_the_reference_is_compared() -> None:
    theirs, ours = torch.zeros(1, 2, 3, 2), torch.zeros(2, 2, 3, 2)
    theirs[0, 0, 1] = torch.tensor([3.0, 0.0])
    theirs[0, 1, 2] = torch.tensor([0.0, -1.0])
    ours[0] = theirs[0]
    ours[0, 0, 0] = 5.0  # stands still in the reference
    ours[1, 0, 1] = torch.tensor([1.0, 1.0])
    # Second clip: errors (2, 1) and (0, 1), their squares averaged over x and y, then over the two entries.
    assert flow_error(ours, theirs, "moving").tolist() == [0, ((4 + 1) / 2 + 1 / 2) / 2]
    everywhere = (ours - theirs).square().flatten(1).mean(1)
    assert torch.allclose(flow_error(ours, theirs, "all"), everywhere)
    assert flow_error(ours, torch.zeros_like(theirs), "moving").tolist() == [0, 0]


def test_near_frames_count_most_and_entries_are_averaged() -> None:
    ours, theirs = torch.zeros(1, 4, 6, 2), torch.zeros(1, 4, 6, 2)
    ours[..., 0] = 3.0
    ours[..., 1] = 4.0
    apart = torch.tensor([1, 2, 3, 4])
    assert weighted_error(ours, theirs, apart, 5).item() == pytest.approx(25 * (1 + 0.95 + 0.9 + 0.85) / 4)
    assert weighted_error(ours, theirs, torch.tensor([1, 1, 1, 1]), 2).item() == pytest.approx(25)


def test_a_windows_change_is_the_length_of_its_mean_keys_difference() -> None:
    drift = torch.zeros(2, 3, 4, 5)
    drift[0, ..., :2] = torch.tensor([3.0, 4.0])
    assert window_change(drift, "squared").tolist() == [25, 0]
    assert window_change(drift, "plain").tolist() == [5, 0]
    assert window_change(drift[:, :0], "squared").tolist() == [0, 0]
    sums = FastVMT(flow_weight=2, window_weight=3)
    shown = Sliding(torch.full((2, 1, 4, 2), 1.0), torch.tensor([1]), drift)
    assert sums.loss(shown, {"displacements": torch.zeros(1, 1, 4, 2)}).tolist() == [2 * 2 + 3 * 25, 2 * 2]


@pytest.mark.parametrize(("side", "tile", "window"), [((30, 52), (3, 4), 21), ((8, 8), (2, 2), 5), ((2, 4), (2, 2), 3)])
def test_tile_and_window_follow_the_grid(side: tuple[int, int], tile: tuple[int, int], window: int) -> None:
    grid = TokenGrid(1, *side)
    assert (default_tile(grid), default_window(grid)) == (tile, window)


def test_gradients_are_reused_and_an_interval_of_one_reuses_none() -> None:
    start, pulls = drawn(0, 5), drawn(1, 10, 5)
    for interval, asked in ((1, [*range(10)]), (3, [0, 3, 6, 9]), (4, [0, 4, 8]), (20, [0])):
        calls: list[int] = []
        held = reused(lambda latent, calls=calls: calls.append(0) or pulls[len(calls) - 1], interval)
        given = [held(start) for _ in range(10)]
        assert len(calls) == len(asked)
        assert all(torch.equal(given[at], pulls[asked.index(max(a for a in asked if a <= at))]) for at in range(10))
        assert FastVMT(interval=interval).asked == len(asked)
    assert FastVMT(iterations=0).asked == 0
    moved = [descended(start, reused(lambda latent: latent**3, k), 0.1, 6) for k in (1, 2)]
    assert torch.equal(moved[0], descended(start, lambda latent: latent**3, 0.1, 6))
    assert not torch.equal(moved[0], moved[1])


def test_rates_fall_within_a_step_and_bound_the_dose() -> None:
    assert FastVMT().rates(50) == pytest.approx([0.003 - 0.0001 * j for j in range(10)])
    assert 0.255 < (FastVMT(decay=0).dose_bound(50) or 0) < 0.27
    assert FastVMT().dose_bound(50) is None
    assert FastVMT(decay=0, sdedit=SDEdit(start=0.9)).dose_bound(50) is None
    assert DiTFlow().rates(50) == pytest.approx([0.002 - 0.0001 * step for step in range(10)])
    assert 0.0775 < (DiTFlow().dose_bound(50) or 0) < 0.0786
    assert DiTFlow(optimise="positions").dose_bound(50) == 0
    rates = [0.3, 0.2, 0.1]
    assert reach_by([0.2] * 3) == pytest.approx(reach(0.2, 3))
    growing = iter([torch.tensor([0.5]), torch.tensor([1.0]), torch.tensor([1.0])])
    assert 0.5 < -descended_by(torch.zeros(1), lambda _: next(growing), rates).item() <= reach_by(rates)


def test_decay_takes_its_part_of_each_element() -> None:
    start = drawn(0, 50)
    still = descended_by(start, torch.zeros_like, [0.3, 0.2], decay=0.1)
    assert torch.allclose(still, start * (1 - 0.03) * (1 - 0.02))
    assert torch.equal(descended_by(start, torch.zeros_like, [0.3, 0.2]), start)


def test_costs_are_those_of_the_papers_arithmetic() -> None:
    # methods.md 5.4: 10 guided steps of half a forward for the reference and 4 (or 10) gradients from the same depth.
    fast, slow = FastVMT(), FastVMT(interval=1)
    assert (fast.depth(30), fast.depth(40), DiTFlow().depth(30)) == (14, 19, 15)
    assert (fast.forwards(50, 2, 30), fast.gradients(50, 30)) == (100 + 10 * 5 * 0.5, 20)
    assert (slow.forwards(50, 2, 30), slow.gradients(50, 30)) == (100 + 10 * 11 * 0.5, 50)
    assert DiTFlow().forwards(50, 2, 30) == pytest.approx(100 + 51 * 16 / 30)
    assert DiTFlow(optimise="positions").gradients(50, 30) == pytest.approx(50 * 15 / 30)
    assert DiTFlow(block=3, more_blocks=(7, 3)).read_blocks(30) == [3, 7]
    assert DiTFlow(more_blocks=(20, 10)).gradients(50, 30) == pytest.approx(50 * 21 / 30)


@pytest.mark.parametrize("blocks", [[0], [1], [0, 2]])
def test_a_truncated_forward_shows_what_hooks_on_a_full_one_do(twin: WanBackbone, blocks: list[int]) -> None:
    walk = walk_on(twin)
    with torch.no_grad():
        found = queries_keys(twin, walk.noise, walk.times[2], walk.prompt, blocks, mean_of_logits)
        with twin.capturing(blocks, "qk") as seen:
            assert twin.velocity(walk.noise, walk.times[2:3], walk.prompt) is not None
    for block in blocks:
        q, k = seen[block]
        assert torch.equal(found[block].q, q.reshape(1, 3, 8, 48))
        assert torch.equal(found[block].k, k.reshape(1, 3, 8, 48))


def test_one_more_block_is_one_more_flow_in_the_mean(twin: WanBackbone) -> None:
    walk = walk_on(twin)
    assert walk.reference is not None
    losses = []
    for guidance in (DiTFlow(block=1), DiTFlow(block=2), DiTFlow(block=2, more_blocks=(1,))):
        with torch.no_grad():
            target = guidance.target(guidance.features(walk, walk.reference, walk.times[-1], walk.blank()))
            losses.append(guidance.loss(guidance.features(walk, walk.noise, walk.times[1], walk.prompt), target))
    assert torch.allclose((losses[0] + losses[1]) / 2, losses[2])


@pytest.mark.parametrize("guidance", [DiTFlow(tau=1e4, compares="all"), FastVMT(window_weight=0)], ids=["all", "fast"])
def test_the_reference_itself_has_no_error(guidance: Any) -> None:
    sharp = 5 * drawn(0, 1, 4, 30, 8)
    seen = Compared(sharp, sharp.roll(1, 1), 1.0, TokenGrid(4, 5, 6))
    if isinstance(guidance, DiTFlow):
        assert guidance.loss({1: seen}, guidance.target({1: seen})).item() < 1e-4
        return
    from motionlora.infer.attention_windows import by_mean, cut, sliding

    shown = sliding(seen, 3, 1.0, cut(seen.grid, 2, 2, sharp.device), 3, by_mean)
    assert guidance.loss(shown, guidance.target(shown)).item() == 0


def gradient_of(guidance: FeatureGuidance, walk: Walk) -> Tensor:
    assert walk.reference is not None
    with torch.no_grad():
        target = guidance.target(guidance.features(walk, walk.reference, walk.times[-1], walk.blank()))
    leaf = walk.noise.clone().requires_grad_()
    loss = guidance.loss(guidance.features(walk, leaf, walk.times[1], walk.prompt), target).sum()
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("guidance", [DiTFlow(tau=5.0), FastVMT()], ids=["ditflow", "fastvmt"])
def test_the_latents_gradient_is_the_same_in_chunks_and_with_checkpointed_blocks(
    twin: WanBackbone, guidance: FeatureGuidance, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = walk_on(twin, clips=2)
    plain = gradient_of(guidance, walk)
    assert plain.abs().amax((1, 2, 3, 4)).min() > 1e-6  # far above Adam's epsilon
    monkeypatch.setattr(attention_flow, "CHUNK_BYTES", 1)
    twin.transformer.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
    try:
        assert torch.allclose(gradient_of(guidance, walk), plain, rtol=1e-4, atol=1e-7)
    finally:
        twin.transformer.disable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]


VARIANTS = [
    DiTFlow(lr=0.01),
    DiTFlow(lr=0.01, heads="logits_of_means", compares="all", span=1, tau=5.0),
    DiTFlow(lr=0.01, reference_noise="matched", more_blocks=(0, 2)),
    FastVMT(lr=0.01, iterations=4),
    FastVMT(lr=0.01, iterations=4, reference_noise="clean", seek="most", window_norm="plain", span=2, tile=(1, 3)),
    FastVMT(lr=0.01, iterations=4, window=8, interval=1, window_weight=0),
    MotionClone(lr=0.01),
    MotionClone(lr=0.01, reference_noise="matched"),
]


@pytest.mark.parametrize("guidance", VARIANTS, ids=str)
def test_the_loss_falls_in_a_guided_step(twin: WanBackbone, guidance: FeatureGuidance) -> None:
    walk = walk_on(twin)
    now = walk.times[1]
    with guidance.steering(walk) as steer, torch.no_grad():
        moved = steer(walk.noise, now)
        level = now if guidance.reference_noise == "matched" else walk.times[-1]
        assert walk.reference is not None
        source = noised(walk.reference, walk.noise, level)
        target = guidance.target(guidance.features(walk, source, level, walk.blank()))
        before, after = (
            guidance.loss(guidance.features(walk, latent, now, walk.prompt), target).item()
            for latent in (walk.noise, moved)
        )
    assert after < before


def test_positions_are_found_and_the_latent_stays(twin: WanBackbone) -> None:
    walk, guidance = walk_on(twin, steps=4), DiTFlow(share=0.5, **POSITIONS)
    plain = walk.velocity(walk.noise, walk.times[0])
    assert walk.reference is not None
    with guidance.steering(walk) as steer, torch.no_grad():
        target = guidance.target(guidance.features(walk, walk.reference, walk.times[-1], walk.blank()))
        losses, said = [], []
        for now in walk.times[:4]:
            losses.append(guidance.loss(guidance.features(walk, walk.noise, walk.times[0], walk.prompt), target).item())
            assert steer(walk.noise, now) is walk.noise
            said.append(walk.velocity(walk.noise, walk.times[0]))
    # They are carried on, serve the passes of their step, and are dropped behind the guided steps.
    assert losses[0] > losses[1]
    assert losses[1] > losses[2]
    assert not torch.allclose(said[0], plain, atol=1e-4)
    assert not torch.allclose(said[1], said[0], atol=1e-4)
    assert torch.equal(said[2], plain)
    assert torch.equal(walk.velocity(walk.noise, walk.times[0]), plain)


@pytest.mark.parametrize("inject", [(), (0,)])
@pytest.mark.parametrize("noise", ["clean", "matched"])
def test_positions_cost_what_they_say_and_move_no_latent(twin: WanBackbone, inject: Any, noise: Any) -> None:
    guidance = DiTFlow(share=0.5, inject=Injection(blocks=inject, share=0.5), reference_noise=noise, **POSITIONS)
    hooks = [len(module._forward_hooks) for module in twin.transformer.modules()]
    latent, effort = walked(walk_on(twin, steps=4), guidance, twin.transformer)
    assert effort.dose_max == guidance.dose_bound(4) == 0
    assert effort.forwards == pytest.approx(guidance.forwards(4, 2, 3))
    assert effort.gradients == pytest.approx(guidance.gradients(4, 3))
    assert [len(module._forward_hooks) for module in twin.transformer.modules()] == hooks
    plain = sample(walk_on(twin, steps=4), Injection(blocks=inject, share=0.5))
    assert not torch.allclose(latent, plain, atol=1e-3)
    for off in ({"lr": 0.0}, {"iterations": 0}, {"share": 0.0}):
        still = DiTFlow(**{**guidance.model_dump(), **off})
        assert torch.equal(sample(walk_on(twin, steps=4), still), plain)


def test_positions_of_a_batch_are_those_of_each_clip_alone(twin: WanBackbone) -> None:
    walk, guidance = walk_on(twin, steps=3, clips=2), DiTFlow(share=0.7, **POSITIONS)
    together = sample(walk, guidance)
    for index in range(2):
        alone = sample(replace(walk, noise=walk.noise[index : index + 1]), guidance)
        assert (together[index : index + 1] - alone).abs().mean() < 1e-3


@pytest.mark.parametrize("guidance", [DiTFlow(lr=0.01), FastVMT(lr=0.01), DiTFlow(**POSITIONS)], ids=str)
def test_they_go_with_injection_of_other_blocks(twin: WanBackbone, guidance: FeatureGuidance) -> None:
    both, clash, gone = (
        type(guidance)(**{**guidance.model_dump(), **more})
        for more in ({"inject": {"blocks": (0,), "share": 0.4}}, {"inject": {"blocks": (0, 1)}}, {"block": 3})
    )
    walk = walk_on(twin, steps=5)
    assert not torch.equal(sample(walk, both), sample(walk, guidance))
    with pytest.raises(InputError, match="Block 1 gets the reference's keys"):
        sample(walk, clash)
    with pytest.raises(InputError, match="blocks 0 to 2"):
        sample(walk, gone)


def test_fastvmt_may_start_from_the_noised_reference_and_needs_two_frames(twin: WanBackbone) -> None:
    walk = walk_on(twin, steps=5)
    still = FastVMT(iterations=0, sdedit=SDEdit(start=0.9))
    assert torch.equal(sample(walk, still), sample(walk, SDEdit(start=0.9)))
    assert torch.equal(sample(walk, FastVMT(iterations=0)), sample(walk, NoGuidance()))
    with pytest.raises(InputError, match="one latent frame"):
        sample(walk_on(twin, steps=5, grid=(1, 4, 8)), FastVMT())
    sample(walk_on(twin, steps=5, grid=(1, 4, 8)), DiTFlow())
    sample(walk_on(twin, steps=5, grid=(2, 6, 6)), FastVMT(iterations=1))


@pytest.mark.parametrize("optimise", ["latent", "positions"])
def test_what_was_found_is_used_again_at_the_cost_of_plain_sampling(
    twin: WanBackbone, tmp_path: Path, optimise: Any
) -> None:
    kind, other = ("latents", "positions") if optimise == "latent" else ("positions", "latents")
    path, walk = tmp_path / "new" / "found.safetensors", walk_on(twin, steps=4)
    steered = sample(walk, DiTFlow(**{**POSITIONS, "optimise": optimise}, share=0.5, save=path))
    unaided = replace(walk, reference=None)
    again, effort = walked(unaided, Reuse(path, load_found(path, kind)), twin.transformer)
    assert torch.equal(again, steered)
    assert (effort.forwards, effort.gradients) == (8, 0)
    elsewhere = replace(unaided, prompt=Prompt(drawn(6, 1, 512, 32)), noise=drawn(7, 2, 16, 3, 4, 8))
    assert not torch.equal(sample(elsewhere, Reuse(path, load_found(path, kind))), sample(elsewhere, NoGuidance()))
    for wrong, words in (
        (replace(walk, times=euler_times({}, 5, 3.0)), "noise levels .* take the --sample.steps"),
        (replace(walk, noise=drawn(1, 1, 16, 3, 4, 4)), "this walk needs .* the frames and the size"),
    ):
        with pytest.raises(InputError, match=words):
            sample(wrong, Reuse(path, load_found(path, kind)))
    with pytest.raises(InputError, match=f"holds {kind}, times and no saved {other}"):
        load_found(path, other)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=f"cannot be read as saved {kind} .*--guidance.save FILE"):
        load_found(path, kind)
    with pytest.raises(InputError, match="Nothing is optimised"):
        sample(walk, DiTFlow(save=path, iterations=0))


def test_generate_uses_what_was_found(
    twin_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    random_clip: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_clip(random_clip(9, 16, 32), Path("ref.webp"))
    size = ["--frames", "9", "--height", "16", "--width", "32", "--suffix", "webp", "--sample.steps", "2"]
    plain = ["generate", "--model", str(twin_folder), *size, "--device", "cpu", "--caption", "a red circle"]
    flow = ["--guidance", "ditflow", "--guidance.share", "0.5", "--guidance.save", "found", "--reference", "ref.webp"]
    stories = []
    for out, more in (
        ("flow", [*flow, "--guidance.optimise", "positions", "--guidance.lr", "0.05"]),
        ("again", ["--positions", "found"]),
    ):
        assert main([*plain, "--out", out, *more]) == 0
        (picture,) = Path(out).glob("*.webp")
        stories.append((json.loads(picture.with_suffix(".json").read_text()), hash_of(picture)))
    assert stories[0][1] == stories[1][1]
    assert stories[1][0]["effort"]["forwards"] == 4
    assert stories[1][0]["settings"]["positions"] == "found"
    capsys.readouterr()
    for more, words in (
        (["--positions", "found", "--latents", "found"], "leave the other out"),
        (["--positions", "found", "--guidance", "sdedit", "--reference", "ref.webp"], "leave the other out"),
        (["--latents", "nowhere"], "nowhere cannot be read as saved latents"),
        ([*flow, "--seed", "0", "1"], "2 clips are to be made"),
    ):
        assert main([*plain, "--out", "refused", *more]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert words in said
    assert not Path("refused").exists()


def hash_of(path: Path) -> str:
    return read_clip(path, multiple=1, say=silent).content_hash()


def test_settings_are_read_from_words() -> None:
    words = ["--guidance", "fastvmt", "--guidance.tile", "3", "4", "--guidance.window", "21", "--guidance.sdedit.start"]
    guidance: Any = settings_of("generate", [*words, "0.955"]).guidance
    assert (guidance.tile, guidance.window, guidance.sdedit.start, guidance.lr) == ((3, 4), 21, 0.955, 0.003)
    words = ["--guidance", "ditflow", "--guidance.more-blocks", "10", "20", "--guidance.optimise", "positions"]
    guidance = settings_of("generate", [*words, "--guidance.inject.blocks", "0"]).guidance
    assert (guidance.more_blocks, guidance.optimise, guidance.inject.blocks) == ((10, 20), "positions", (0,))
