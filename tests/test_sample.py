"""Laws of the walk: it is the stock pipeline's, it follows its guidance, and it leaves no trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from torch import Tensor

from motionlora.data.errors import InputError, NumbersError
from motionlora.heads.backbone import Prompt
from motionlora.heads.schedule import euler_times, own_shift
from motionlora.heads.wan import WanBackbone
from motionlora.infer.guidance import Walk
from motionlora.infer.guide_none import NoGuidance
from motionlora.infer.sample import Bar, Silent, new_walk, sample
from motionlora.infer.settings import SampleSettings

CAPTION, NEGATIVE = "a red circle over a dark background", "a blue star"
SIZE: dict[str, Any] = {"frames": 5, "height": 16, "width": 32}
UNIPC = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 5.0, "use_flow_sigmas": True, "solver_order": 2}


@pytest.fixture(scope="module")
def pipeline(twin, twin_folder) -> WanPipeline:
    """The stock pipeline around the twin's own transformer object."""
    stock = WanPipeline.from_pretrained(twin_folder, transformer=twin.transformer)
    stock.set_progress_bar_config(disable=True)
    return stock


def walk_on(twin: WanBackbone, *, seed: Any = 3, steps: int = 3, scale: float = 5.0, shift: float = 3.0) -> Walk:
    settings = SampleSettings(steps=steps, scale=scale, shift=shift)
    prompts = twin.embed([CAPTION]), twin.embed([NEGATIVE])
    return new_walk(twin, *prompts, seed=seed, sample=settings, **SIZE)


def stock_latent(pipeline: WanPipeline, *, steps: int, scale: float, shift: float, **noise: Any) -> Tensor:
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=shift)
    made: Any = pipeline(
        prompt=CAPTION, negative_prompt=NEGATIVE, height=SIZE["height"], width=SIZE["width"],
        num_frames=SIZE["frames"], num_inference_steps=steps, guidance_scale=scale, output_type="latent", **noise,
    )  # fmt: skip
    return made.frames


@pytest.mark.parametrize("scale", [5.0, 1.0, 0.0])
@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (2, 1.0), (4, 5.0), (7, 3.0), (7, 12.5)])
def test_without_guidance_and_lora_it_is_the_stock_pipeline_bit_for_bit(
    twin: WanBackbone, pipeline: WanPipeline, steps: int, shift: float, scale: float
) -> None:
    walk = walk_on(twin, steps=steps, scale=scale, shift=shift)
    ours = sample(walk, NoGuidance())
    theirs = stock_latent(pipeline, steps=steps, scale=scale, shift=shift, latents=walk.noise)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


def test_a_seed_means_the_noise_that_the_stock_pipeline_draws(twin: WanBackbone, pipeline: WanPipeline) -> None:
    theirs = stock_latent(pipeline, steps=2, scale=5.0, shift=3.0, generator=torch.Generator().manual_seed(11))
    assert torch.equal(sample(walk_on(twin, seed=11, steps=2), NoGuidance()), theirs)


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_times_of_a_unipc_folder_are_those_of_euler_made_from_it(steps: int, shift: float) -> None:
    loaded: Any = UniPCMultistepScheduler.from_config(UNIPC)
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(loaded.config, shift=shift)
    scheduler.set_timesteps(steps)
    times = euler_times(UNIPC, steps, shift)
    assert torch.equal(times, scheduler.sigmas)
    assert torch.equal(1000 * times[:-1], scheduler.timesteps)
    assert times[0] == 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()


def test_the_folders_own_shift_is_found_in_either_spelling() -> None:
    assert [own_shift(config) for config in ({"shift": 7.0}, UNIPC, {})] == [7.0, 5.0, 3.0]


@pytest.mark.parametrize("odd", [{"use_dynamic_shifting": True}, {"invert_sigmas": True}, {"num_train_timesteps": 10}])
def test_a_schedule_that_is_not_plain_flow_matching_is_refused(odd: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(odd))):
        euler_times(odd, 4, 3.0)


class Straight:
    """A made-up model: the caption is the clean clip, so that velocity is the same at every time: noise - clean."""

    def __init__(self, noise: Tensor) -> None:
        self.noise, self.asked = noise, []

    def velocity(self, latent: Tensor, time: Tensor, prompt: Prompt) -> Tensor:
        assert time.shape == (latent.shape[0],)
        self.asked.append((time[0].item(), prompt))
        return self.noise - prompt.embeds.mean()


def straight_walk(steps: int, scale: float, clean: float = 4.0, blank: float = 1.0) -> Walk:
    noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    model: Any = Straight(noise)
    prompt, negative = Prompt(torch.full((1, 2, 2), clean)), Prompt(torch.full((1, 2, 2), blank))
    return Walk(model, prompt, negative, scale, euler_times({}, steps, 3.0), noise, None, torch.Generator())


@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, 5.0])
def test_on_a_straight_path_euler_arrives_in_any_number_of_steps(steps: int, scale: float) -> None:
    walk = straight_walk(steps, scale)
    arrived = 4.0 if scale <= 1 else 1.0 + scale * (4.0 - 1.0)
    assert torch.allclose(sample(walk, NoGuidance()), torch.full_like(walk.noise, arrived), atol=1e-4)


@pytest.mark.parametrize(("scale", "passes"), [(0.5, 1), (1.0, 1), (1.01, 2)])
def test_the_caption_is_asked_first_and_the_negative_only_where_it_counts(scale: float, passes: int) -> None:
    walk = straight_walk(3, scale)
    sample(walk, NoGuidance())
    asked: Any = walk.model
    assert [prompt for _, prompt in asked.asked] == [walk.prompt, walk.negative][:passes] * 3
    assert [time for time, _ in asked.asked][::passes] == walk.times[:-1].tolist()


class Recording:
    """A guidance that adds one to each latent, and notes what it sees and that it was left."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.left = False

    @contextmanager
    def steering(self, walk: Walk) -> Iterator[Any]:
        def steer(latent: Tensor, now: Tensor) -> Tensor:
            self.seen.append(float(now))
            return latent + 1.0

        try:
            yield steer
        finally:
            self.left = True


def test_a_guidance_moves_every_latent_before_its_step() -> None:
    walk, guidance = straight_walk(5, 1.0), Recording()
    ended = sample(walk, guidance)
    assert guidance.seen == walk.times[:-1].tolist()
    assert guidance.left
    assert torch.allclose(ended, sample(walk, NoGuidance()) + 5, atol=1e-4)


def test_bad_numbers_end_the_walk_with_the_step_and_the_guidance_is_left() -> None:
    walk, guidance = straight_walk(4, 1.0), Recording()
    model: Any = walk.model
    honest = model.velocity

    def rotten(latent: Tensor, time: Tensor, prompt: Prompt) -> Tensor:
        return honest(latent, time, prompt) * (float("nan") if len(model.asked) == 3 else 1.0)

    model.velocity = rotten
    with pytest.raises(NumbersError, match=r"in step 3 of 4 \(time 0\.\d{4}\)"):
        sample(walk, guidance)
    assert guidance.left


def test_the_same_seed_gives_the_same_latent_and_nothing_else_is_touched(twin: WanBackbone) -> None:
    weights = {name: weight.clone() for name, weight in twin.transformer.state_dict().items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in twin.transformer.modules()]
    state = torch.random.get_rng_state()
    one, same, other = (sample(walk_on(twin, seed=seed, steps=2), NoGuidance()) for seed in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=0.1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(weight, weights[name]) for name, weight in twin.transformer.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in twin.transformer.modules()]


def test_no_guidance_is_a_walk_without_any(twin: WanBackbone) -> None:
    walk = walk_on(twin)
    latent = walk.noise
    with torch.no_grad():
        for now, then in pairwise(walk.times):
            latent = latent + (then - now) * walk.velocity(latent, now)
    assert torch.equal(sample(walk, NoGuidance()), latent)
    with NoGuidance().steering(walk) as steer:
        assert steer(latent, walk.times[0]) is latent


def test_a_batch_of_seeds_is_each_alone(twin: WanBackbone) -> None:
    together = sample(walk_on(twin, seed=[7, 8]), NoGuidance())
    for index, seed in enumerate((7, 8)):
        alone = walk_on(twin, seed=seed)
        assert torch.allclose(together[index : index + 1], sample(alone, NoGuidance()), atol=1e-5)


def test_the_walk_keeps_no_gradient(twin: WanBackbone) -> None:
    walk = walk_on(twin, steps=1)
    walk = replace(walk, noise=walk.noise.clone().requires_grad_())
    assert not sample(walk, NoGuidance()).requires_grad


@pytest.mark.parametrize(
    ("size", "answer"),
    [
        ({"frames": 7}, "set it to 5 or 9"),
        ({"frames": 0}, "set it to 1 or 5"),
        ({"height": 20}, "multiples of 8, got 20 x 32: the nearest is 16 x 32"),
        ({"width": 4}, "the nearest is 16 x 8"),
    ],
)
def test_a_size_that_the_model_cannot_make_is_refused(twin: WanBackbone, size: dict[str, int], answer: str) -> None:
    prompt = twin.embed([CAPTION])
    wrong: dict[str, Any] = SIZE | size
    with pytest.raises(InputError, match=answer):
        new_walk(twin, prompt, prompt, seed=0, sample=SampleSettings(), **wrong)


def test_captions_that_do_not_fit_the_seeds_are_refused(twin: WanBackbone) -> None:
    prompt = twin.embed([CAPTION, NEGATIVE])
    with pytest.raises(InputError, match="3 seeds and 2 captions"):
        new_walk(twin, prompt, prompt[0], seed=[0, 1, 2], sample=SampleSettings(), **SIZE)


def test_the_bar_shows_on_stderr_and_silence_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    sample(straight_walk(3, 1.0), NoGuidance(), Silent())
    assert capsys.readouterr() == ("", "")
    sample(straight_walk(3, 1.0), NoGuidance(), Bar("clip 1/2"))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "clip 1/2" in shown.err
