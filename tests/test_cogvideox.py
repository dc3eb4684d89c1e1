"""CogVideoX on random twins of both kinds: its path in our terms, the stock pipeline's numbers, laws of a backbone."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from torch import Tensor, nn

from motionlora.data.errors import InputError
from motionlora.heads.backbone import Backbone, TokenGrid
from motionlora.heads.cogvideox import CogVideoXBackbone
from motionlora.heads.load import load_model
from motionlora.heads.schedule import euler_times, own_shift, trained_times
from motionlora.heads.score import head_scores
from motionlora.heads.wan import WanBackbone
from motionlora.infer.guide_none import NoGuidance
from motionlora.infer.sample import new_walk, refuse_size, sample
from motionlora.infer.settings import SampleSettings
from motionlora.train.command import main

SIZE: dict[str, Any] = {"frames": 9, "height": 16, "width": 32}
SHAPE = (1, 16, 3, 4, 8)


@pytest.fixture(scope="module", params=["2B", "5B"])
def folder(request: pytest.FixtureRequest, cogvideox_folders: dict[str, Path]) -> Path:
    """2B: sinusoidal positions. 5B: rotary ones."""
    return cogvideox_folders[request.param]


@pytest.fixture(scope="module")
def model(folder: Path) -> CogVideoXBackbone:
    """Each kind, loaded in fp32; tests leave it as they found it."""
    model = load_model(folder)
    assert isinstance(model, CogVideoXBackbone)
    return model


@pytest.fixture(scope="module")
def pipeline(folder: Path, model: CogVideoXBackbone) -> Any:
    """The stock pipeline over the twin's own transformer and VAE."""
    transformer: Any = model.transformer
    with model.parts.vae() as vae:
        stock = CogVideoXPipeline.from_pretrained(folder, transformer=transformer, vae=vae)
    stock.set_progress_bar_config(disable=True)
    return stock


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def said(model: CogVideoXBackbone, latent: Tensor, time: float = 0.5, seed: int = 7) -> Tensor:
    """What the model says to a made-up prompt."""
    from motionlora.heads.backbone import Prompt

    prompt = Prompt(drawn(1, 226, 32, seed=seed))
    return model.velocity(latent, torch.tensor([time]), prompt)


@contextmanager
def attention_inputs() -> Iterator[list[tuple[Tensor, ...]]]:
    """Queries, keys and values, each "b h s d" with the text first, as PyTorch's attention gets them."""
    stock, seen = nn.functional.scaled_dot_product_attention, []

    def spy(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        seen.append((q.detach().clone(), k.detach().clone(), v.detach().clone()))
        return stock(q, k, v, **rest)

    nn.functional.scaled_dot_product_attention = spy  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield seen
    finally:
        nn.functional.scaled_dot_product_attention = stock


def by_token(x: Tensor) -> Tensor:
    """The video's part of an input of the attention, "b s h d"."""
    return x[:, :, 226:].transpose(1, 2)


def hooks_of(model: CogVideoXBackbone) -> list[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return [
        (len(getattr(module, kind)), sorted(vars(module))) for module in model.transformer.modules() for kind in kinds
    ]


def test_it_answers_the_protocol(model: CogVideoXBackbone) -> None:
    answered: Backbone = model
    assert (answered.blocks, answered.heads, answered.head_dim, answered.channels) == (3, 4, 16, 16)
    assert (answered.spatial_factor, answered.multiple, answered.frame_multiple, answered.whole_multiple) == (
        4,
        8,
        4,
        8,
    )
    assert answered.grid(drawn(*SHAPE)) == TokenGrid(3, 2, 4)
    assert not any(weight.requires_grad for weight in answered.transformer.parameters())


class Knowing(nn.Module):
    """Instead of a network: knows clip and noise, checks what it is fed, and predicts v = a eps - b x0."""

    def __init__(self, module: nn.Module, x0: Tensor, eps: Tensor, time: float) -> None:
        super().__init__()
        self.module = module
        self.x0, self.eps = x0, eps
        norm = ((1 - time) ** 2 + time**2) ** 0.5
        self.a, self.b = (1 - time) / norm, time / norm

    def forward(self, hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        assert abs(self.a**2 + self.b**2 - 1) < 1e-12
        x = self.a * self.x0 + self.b * self.eps
        torch.testing.assert_close(hidden_states.transpose(1, 2), x, atol=1e-6, rtol=0)
        self.step = timestep
        return ((self.a * self.eps - self.b * self.x0).transpose(1, 2),)


@pytest.mark.parametrize("time", [1.0, 0.9998, 0.7, 0.5, 0.1, 0.0])
def test_clip_and_noise_are_recovered_from_a_v_prediction(model: CogVideoXBackbone, time: float) -> None:
    x0, eps = drawn(*SHAPE, seed=1), drawn(*SHAPE, seed=2)
    knowing = Knowing(model.transformer, x0, eps, time)
    latent = (1 - time) * x0 + time * eps
    velocity = said(replace(model, transformer=knowing), latent, time)
    torch.testing.assert_close(velocity, eps - x0, atol=3e-6, rtol=0)
    torch.testing.assert_close(latent - time * velocity, x0, atol=3e-6, rtol=0)
    torch.testing.assert_close(latent + (1 - time) * velocity, eps, atol=3e-6, rtol=0)
    assert (knowing.step == 999) == (time == 1.0)


def test_levels_of_time_steps_follow_from_the_betas(model: CogVideoXBackbone) -> None:
    """s = b / (a + b), where the first a is kept and the last is zero (arXiv 2305.08891), after a shift of a^2/b^2."""
    shift = model.scheduler_config["snr_shift_scale"]
    assert shift == (1.0 if model.rotates else 3.0)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    ratio = np.cumprod(1 - betas)
    ratio = ratio / (1 - ratio) / shift
    a = (ratio / (1 + ratio)) ** 0.5
    a = (a - a[-1]) * a[0] / (a[0] - a[-1])
    b = (1 - a**2) ** 0.5
    np.testing.assert_allclose(model.times.numpy(), b / (a + b), atol=1e-6)
    assert model.times[-1] == 1


def test_time_steps_come_back_from_their_levels(model: CogVideoXBackbone) -> None:
    assert torch.equal(model.step_of(model.times), torch.arange(1000.0))
    between = (model.times[1:] + model.times[:-1]) / 2
    torch.testing.assert_close(model.step_of(between), torch.arange(999) + 0.5, atol=1e-2, rtol=0)
    assert model.step_of(torch.tensor([0.0, float(model.times[0]) / 2])).tolist() == [0, 0]


@pytest.mark.parametrize("steps", [1, 2, 20, 50, 1000])
def test_a_stock_ddim_step_is_an_euler_step(model: CogVideoXBackbone, steps: int) -> None:
    """Where the steps divide 1000; from pure noise, in between, and into the clip."""
    scheduler: Any = CogVideoXDDIMScheduler.from_config(model.scheduler_config)
    scheduler.set_timesteps(steps)
    times = euler_times(model.scheduler_config, steps, own_shift(model.scheduler_config))
    assert times[0] == 1
    assert times[-1] == 0
    for index in sorted({0, steps // 2, steps - 1}):
        step, (now, then) = int(scheduler.timesteps[index]), times[index : index + 2].tolist()
        ours, stock = both_steps(model, scheduler, step, now, then)
        torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)


def both_steps(model: CogVideoXBackbone, scheduler: Any, step: int, now: float, then: float) -> tuple[Tensor, Tensor]:
    """An Euler step of ours in the scheduler's terms, and its own, from an arbitrary x and v."""
    x, v = drawn(*SHAPE, seed=1).double(), drawn(*SHAPE, seed=2).double()
    a, b = scheduler.alphas_cumprod[step].sqrt(), (1 - scheduler.alphas_cumprod[step]).sqrt()
    assert abs(float(b / (a + b)) - now) < 1e-6
    latent = x / (a + b)
    moved = latent + (then - now) * ((b * x + a * v) - (a * x - b * v))
    norm = ((1 - then) ** 2 + then**2) ** 0.5
    return moved / norm, scheduler.step(v, step, x).prev_sample


def test_where_the_steps_do_not_divide_1000_the_stock_step_stops_at_another_level(model: CogVideoXBackbone) -> None:
    """Stock steps to the level of t - 1000 // steps and then goes on as if it were that of the next time step."""
    scheduler: Any = CogVideoXDDIMScheduler.from_config(model.scheduler_config)
    scheduler.set_timesteps(30)
    first, second = map(int, scheduler.timesteps[:2])
    assert (first, second, first - 1000 // 30) == (999, 966, 966)
    second, third = map(int, scheduler.timesteps[1:3])
    assert (third, second - 1000 // 30) == (932, 933)
    now = float(model.times[second])
    ours, stock = both_steps(model, scheduler, second, now, float(model.times[933]))
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)
    times = euler_times(model.scheduler_config, 30, own_shift(model.scheduler_config))
    assert times[2] == model.times[932]


def test_a_shift_takes_the_place_of_the_models_own(model: CogVideoXBackbone) -> None:
    """The square root of `snr_shift_scale`: s / (1 - s) is multiplied by it, before a = 0 is reached at the end."""
    config = model.scheduler_config
    assert own_shift(config) == pytest.approx(1.0 if model.rotates else 3**0.5)
    for shift in (1.0, 2.0):
        scheduler: Any = CogVideoXDDIMScheduler.from_config(config, snr_shift_scale=shift**2)
        torch.testing.assert_close(
            trained_times(config, shift), trained_times(dict(scheduler.config) | {"_class_name": "CogVideoX"})
        )
    assert torch.equal(trained_times(config, round(own_shift(config), 3)), model.times)


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type = epsilon.*v_prediction"),
        ({"rescale_betas_zero_snr": False}, "rescale_betas_zero_snr"),
        ({"timestep_spacing": "leading"}, "timestep_spacing = leading"),
        ({"set_alpha_to_one": False}, "set_alpha_to_one"),
    ],
)
def test_a_scheduler_of_another_path_is_refused(cogvideox_folders: dict[str, Path], changes: Any, answer: str) -> None:
    config = json.loads((cogvideox_folders["2B"] / "scheduler/scheduler_config.json").read_text())
    with pytest.raises(InputError, match=answer):
        euler_times(config | changes, 4, 1.0)
    with pytest.raises(InputError, match="1001 steps"):
        euler_times(config, 1001, 1.0)


@pytest.mark.parametrize(("steps", "scale"), [(4, 6.0), (5, 1.0)])
def test_a_walk_and_its_pixels_are_the_stock_pipelines(
    model: CogVideoXBackbone, pipeline: Any, steps: int, scale: float
) -> None:
    prompt, negative = model.embed(["a red circle"]), model.embed(["a star"])
    options: dict[str, Any] = {"height": 16, "width": 32, "num_frames": 9, "num_inference_steps": steps}
    options |= {"prompt_embeds": prompt.embeds, "guidance_scale": scale}
    options |= {"negative_prompt_embeds": negative.embeds} if scale > 1 else {}
    latents = pipeline(**options, output_type="latent", generator=torch.Generator().manual_seed(3)).frames
    stock = pipeline(**options, output_type="np", generator=torch.Generator().manual_seed(3)).frames[0]
    how = SampleSettings(steps=steps, scale=scale, shift=own_shift(model.scheduler_config))
    ours = sample(new_walk(model, prompt, negative, seed=3, sample=how, **SIZE), NoGuidance())
    torch.testing.assert_close(ours.transpose(1, 2), latents, atol=2e-5, rtol=0)
    clip = model.decode(ours, 8.0)
    assert clip.pixels.shape == (9, 16, 32, 3)
    assert np.abs(clip.pixels - stock * 255).max() < 0.51


def test_another_size_than_the_trained_one_is_the_stock_pipelines_too(model: CogVideoXBackbone, pipeline: Any) -> None:
    latent, prompt = drawn(1, 16, 5, 8, 6), model.embed(["a star"])
    options: dict[str, Any] = {"height": 32, "width": 24, "num_frames": 17, "num_inference_steps": 1}
    options |= {"prompt_embeds": prompt.embeds, "guidance_scale": 1.0, "output_type": "latent"}
    stock = pipeline(**options, latents=latent.transpose(1, 2)).frames
    with torch.no_grad():
        ours = latent - model.velocity(latent, torch.ones(1), prompt)
    torch.testing.assert_close(ours.transpose(1, 2), stock, atol=1e-5, rtol=0)


def test_embeddings_are_the_stock_pipelines(model: CogVideoXBackbone, pipeline: Any) -> None:
    captions = ["a red circle on a dark background", "", "unknown wörds"]
    embeds = model.embed(captions).embeds
    assert embeds.shape == (3, 226, 32)
    with torch.no_grad():
        for row, caption in enumerate(captions):
            stock, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, device="cpu")
            torch.testing.assert_close(embeds[row : row + 1], stock, atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="at most 226"):
        model.embed(["red " * 300])


@pytest.mark.parametrize("frames", [1, 5, 9, 13])
def test_encode_is_the_scaled_mode(model: CogVideoXBackbone, random_clip: Any, frames: int) -> None:
    clip = random_clip(frames, 16, 16)
    pixels = torch.from_numpy(clip.pixels).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with model.parts.vae() as vae, torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()
    latent = model.encode(clip)
    assert latent.shape == (1, 16, (frames - 1) // 4 + 1, 4, 4)
    torch.testing.assert_close(latent, mode * (0.7 if model.rotates else 1.15258426), atol=1e-6, rtol=1e-6)


def test_clips_that_the_vae_would_not_give_back_are_refused(model: CogVideoXBackbone) -> None:
    with model.parts.vae() as vae, torch.no_grad():
        assert vae.decode(drawn(1, 16, 2, 2, 2)).sample.shape[2] == 8
    with pytest.raises(InputError, match=r"odd number of latent frames, got 2.*8k \+ 1"):
        model.decode(drawn(1, 16, 2, 4, 4), 8.0)
    with pytest.raises(InputError, match=r"8k \+ 1 frames, got 13: set it to 9 or 17"):
        refuse_size(model, 13, 16, 16)
    refuse_size(model, 17, 16, 16)


def edited(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


PICTURES = "takes pictures or clips; supported is CogVideoX 2B or 5B"
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "channels": ("transformer/config.json", {"in_channels": 32}, PICTURES),
    "pipeline": ("model_index.json", {"_class_name": "CogVideoXImageToVideoPipeline"}, PICTURES),
    "learned": ("transformer/config.json", {"use_learned_positional_embeddings": True}, PICTURES),
    "1.5": ("transformer/config.json", {"patch_size_t": 2}, r"CogVideoX 1\.5; supported is CogVideoX 2B or 5B"),
    "text": ("model_index.json", {"text_encoder": ["transformers", "UMT5EncoderModel"]}, "with a UMT5EncoderModel"),
    "scheduler": ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "v_prediction"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_of_the_family_are_refused_with_what_is_supported(
    cogvideox_folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    copy = Path(shutil.copytree(cogvideox_folders["5B"], tmp_path / "copy"))
    file, changes, answer = OTHERS[name]
    edited(copy, file, **changes)
    with pytest.raises(InputError, match=answer) as refusal:
        load_model(copy)
    assert "\n" not in str(refusal.value)


def test_the_folder_says_which_backbone_it_is(cogvideox_folders: dict[str, Path], twin_folder: Path) -> None:
    assert type(load_model(twin_folder)) is WanBackbone
    with pytest.raises(InputError, match=r"is a CogVideoX, and this is for Wan 2\.1"):
        WanBackbone.load(cogvideox_folders["2B"])
    with pytest.raises(InputError, match="is no CogVideoX"):
        CogVideoXBackbone.load(twin_folder)


def test_bf16_says_nearly_the_same(model: CogVideoXBackbone, folder: Path) -> None:
    low, latent = load_model(folder, dtype=torch.bfloat16), drawn(*SHAPE)
    assert low.fingerprint == model.fingerprint
    with torch.no_grad():
        ours, exact = said(low, latent), said(model, latent)  # pyright: ignore[reportArgumentType]
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_attention_backends_are_native_alone(model: CogVideoXBackbone) -> None:
    model.use_attention("native")
    with pytest.raises(InputError, match="native alone"):
        model.use_attention("flash")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("stop", [False, True])
def test_captured_are_the_videos_inputs_of_the_attention(model: CogVideoXBackbone, stop: bool, grad: bool) -> None:
    before, latent = hooks_of(model), drawn(*SHAPE).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        with attention_inputs() as inputs:
            plain = said(model, latent)
        with model.capturing([0, 2], "qkv", stop=stop) as seen:
            result = seen.run(lambda: said(model, latent))
    assert stop == (result is None) or torch.equal(result, plain)  # pyright: ignore[reportArgumentType]
    assert hooks_of(model) == before
    for block in (0, 2):
        for ours, theirs in zip(seen[block], inputs[block], strict=True):
            assert ours.shape == (1, 24, 4, 16)
            torch.testing.assert_close(ours.detach(), by_token(theirs), atol=0, rtol=0)
            if grad:
                (gradient,) = torch.autograd.grad(ours.square().sum(), latent, retain_graph=True)
                assert gradient.abs().max() > 0


def test_block_outputs_are_the_videos(model: CogVideoXBackbone) -> None:
    entered: list[Tensor] = []
    layer = model.transformer.get_submodule("transformer_blocks.2")
    handle = layer.register_forward_pre_hook(
        lambda _, __, inputs: entered.append(inputs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad(), model.capturing([1], "block") as seen:
        said(model, drawn(*SHAPE))
    handle.remove()
    assert torch.equal(seen[1], entered[0])


def test_scores_are_the_shares_of_what_stays_in_the_video(model: CogVideoXBackbone) -> None:
    from motionlora.heads.backbone import Prompt

    latent, prompt = drawn(*SHAPE), Prompt(drawn(1, 226, 32, seed=7))
    scores = head_scores(model, latent, prompt, [0.8], torch.Generator().manual_seed(1))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    with attention_inputs() as inputs, torch.no_grad():
        said(model, 0.2 * latent + 0.8 * noise, 0.8)
    for block, (q, k, _) in enumerate(inputs):
        weights = (q[:, :, 226:].double() @ k[:, :, 226:].double().mT / 16**0.5).softmax(dim=-1)
        order, frames = torch.arange(24), torch.arange(24) // 8
        for mask, place in enumerate((order, (order % 8) * 3 + frames)):
            inside = (place[:, None] - place[None]).abs() < 8
            shares = (weights * inside).sum((0, 2, 3)) / 24
            np.testing.assert_allclose(scores[block][:, mask], shares.numpy(), atol=1e-5)


def test_positions_of_whole_numbers_are_stock_and_others_act(model: CogVideoXBackbone) -> None:
    before, latent = hooks_of(model), drawn(*SHAPE)
    with torch.no_grad():
        plain = said(model, latent)
        for wrapped in (model, replace(model, transformer=Wrapper(model.transformer))):
            with wrapped.positioned(torch.arange(3.0)):
                torch.testing.assert_close(said(wrapped, latent), plain, atol=1e-6, rtol=0)
        with model.positioned(torch.tensor([0.0, 2.5, 4.0])):
            moved = said(model, latent)
            with model.positioned(torch.arange(3.0)):
                torch.testing.assert_close(said(model, latent), plain, atol=1e-6, rtol=0)
            assert torch.equal(said(model, latent), moved)
        assert (moved - plain).abs().max() > 1e-4
        with pytest.raises(InputError, match="2 positions for 3 latent"), model.positioned(torch.arange(2.0)):
            said(model, latent)
        with pytest.raises(InputError, match="finite"), model.positioned(torch.tensor([0.0, float("nan"), 1.0])):
            pass
        assert torch.equal(said(model, latent), plain)
    assert hooks_of(model) == before


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def test_sparse_frames_stand_where_they_do_in_the_whole_clip(model: CogVideoXBackbone) -> None:
    """What the network is given at positions 0, 2, 4 is what frames 0, 2, 4 of five frames have."""
    seen: list[Tensor] = []

    def told(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rope = kwargs["image_rotary_emb"]
        tokens = torch.cat([args[0] if args else kwargs["hidden_states"]])
        seen.append(torch.cat(rope, -1) if rope is not None else tokens[0])

    layer = model.transformer.get_submodule("transformer_blocks.0")
    handle = layer.register_forward_pre_hook(told, with_kwargs=True)
    frame = drawn(1, 16, 1, 4, 8)
    try:
        with torch.no_grad():
            said(model, frame.expand(-1, -1, 5, -1, -1))
            with model.positioned(torch.tensor([0.0, 2.0, 4.0])):
                said(model, frame.expand(-1, -1, 3, -1, -1))
    finally:
        handle.remove()
    whole, sparse = (x.unflatten(0, (-1, 8)) for x in seen)
    torch.testing.assert_close(sparse, whole[::2], atol=1e-5, rtol=0)


def test_tables_of_their_own_turn_the_video_alone(cogvideox_folders: dict[str, Path]) -> None:
    model: Any = load_model(cogvideox_folders["5B"])
    before, latent = hooks_of(model), drawn(*SHAPE)
    with torch.no_grad(), model.turning() as turned, attention_inputs() as inputs:
        plain = said(model, latent)
        tables = turned.stock(latent)
        assert tables.shape == (1, 4, 24, 8)
        turned.put(tables)
        torch.testing.assert_close(said(model, latent), plain, atol=1e-6, rtol=0)
        turned.put(torch.cat([-tables[:, :2], tables[:, 2:]], dim=1))
        with model.capturing([0], "qk") as seen:
            assert not torch.allclose(said(model, latent), plain, atol=1e-4)
        (q, k, _), (other_q, other_k, _) = inputs[0], inputs[6]
        torch.testing.assert_close(by_token(other_q), -by_token(q), atol=1e-6, rtol=0)
        torch.testing.assert_close(other_q[:, :, :226], q[:, :, :226], atol=0, rtol=0)
        torch.testing.assert_close(other_k, k, atol=1e-6, rtol=0)
        torch.testing.assert_close(seen[0][0], by_token(other_q), atol=0, rtol=0)
    with model.turning() as turned:
        leaf = turned.stock(latent).requires_grad_()
        turned.put(leaf)
        said(model, latent).square().sum().backward()
    assert leaf.grad.abs().amax((0, 2, 3)).min() > 0
    assert hooks_of(model) == before


def test_rotary_tables_of_a_model_without_are_refused(cogvideox_folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"adds its positions.*choose guidance\.optimise latent"):
        load_model(cogvideox_folders["2B"]).turning()


@pytest.mark.parametrize("blocks", [[1], [0, 1]])
def test_own_keys_and_values_change_nothing_and_others_are_the_videos_alone(
    model: CogVideoXBackbone, blocks: list[int]
) -> None:
    one, other = drawn(*SHAPE), drawn(*SHAPE, seed=5)
    with torch.no_grad(), model.injecting(blocks) as injected, attention_inputs() as inputs:
        plain = said(model, one)
        injected.record(lambda: said(model, one))
        torch.testing.assert_close(said(model, one), plain, atol=0, rtol=0)
        injected.clear()
        inputs.clear()
        said(model, other)
        injected.record(lambda: said(model, other))
        assert not torch.allclose(said(model, one), plain, atol=1e-4)
        assert len(inputs) == 3 + 1 + 3
        for block in blocks:
            (_, k, v), (_, own_k, own_v) = inputs[block], inputs[4 + block]
            torch.testing.assert_close(by_token(own_k), by_token(k), atol=0, rtol=0)
            torch.testing.assert_close(by_token(own_v), by_token(v), atol=0, rtol=0)
        # With block 0's as well the text of block 1 has seen nothing else than there.
        assert torch.equal(inputs[5][1][:, :, :226], inputs[1][1][:, :, :226]) == (0 in blocks)


def test_a_clip_is_made_from_the_command_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["generate", "--model", str(folder), "--caption", "a red circle", "--out", "out", "--device", "cpu"]
    words += ["--frames", "9", "--height", "16", "--width", "32", "--suffix", "webp", "--sample.steps", "2"]
    assert main(words) == 0
    assert json.loads(next(Path("out").glob("*.json")).read_text())["model"]["name"] == folder.name


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_what_is_not_there_yet_is_one_sentence(
    cogvideox_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(cogvideox_folders["5B"])
    assert "is a CogVideoX" in refused(["plan", "--model", model, "--height", "16", "--width", "32"], capsys)
    words = ["generate", "--model", model, "--caption", "a star", "--device", "cpu", "--height", "16", "--width", "32"]
    assert "8k + 1 frames, got 13" in refused([*words, "--frames", "13"], capsys)
