"""CogVideoX on random twins: LoRA on its heads, both stages, its native loss, and the law sheet of guidances."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_guidance as laws
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from torch import Tensor

from motionlora.data.clip import write_clip
from motionlora.data.errors import InputError
from motionlora.heads.backbone import Prompt
from motionlora.heads.load import load_model
from motionlora.heads.lora import MotionLora, attach, load_into, unload
from motionlora.heads.lora_file import load_lora, save_lora
from motionlora.heads.lora_inspect import inspect_lora, touched_heads
from motionlora.heads.schedule import trained_times, trained_weight
from motionlora.infer.guidance_list import guidance_class
from motionlora.infer.guide_none import NoGuidance
from motionlora.infer.sample import sample
from motionlora.train.command import main
from motionlora.train.loss import denoising_loss, path_point
from motionlora.train.noise import drawn_times, keyed_generator

test_no_trace = laws.test_it_leaves_no_trace_and_no_weight_changed
test_no_trace_of_a_failure = laws.test_it_leaves_no_trace_when_the_model_fails
test_plain_at_strength_zero = laws.test_at_strength_zero_it_is_plain_sampling_bit_for_bit
test_the_same_seed = laws.test_the_same_seed_gives_the_same_result
test_a_batch = laws.test_a_batch_of_seeds_is_each_alone
test_the_dose = laws.test_the_dose_stays_below_its_bound
test_the_cost = laws.test_it_costs_what_it_says
test_no_graph = laws.test_no_graph_is_kept_and_no_weight_gets_a_gradient
test_computed_again = laws.test_blocks_that_are_computed_again_give_the_same_clip
test_references_that_do_not_fit = laws.test_a_reference_that_does_not_fit_is_refused
test_the_reference_matters = laws.test_the_reference_matters


@pytest.fixture(scope="module")
def model(cogvideox_two_blocks: Path) -> Any:
    """The 5B kind, of two blocks, for the law sheet."""
    return load_model(cogvideox_two_blocks)


@pytest.fixture(scope="module")
def cogvideox_two_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from motionlora.heads.tiny import random_cogvideox

    return random_cogvideox(tmp_path_factory.mktemp("twin") / "cogvideox", rotary=True, blocks=2, seed=3)


@pytest.fixture(scope="module")
def prompts(model: Any) -> Any:
    return model.embed([laws.CAPTION]), model.embed([laws.NEGATIVE])


@pytest.mark.parametrize("name", laws.STEERING)
def test_every_guidance_steers_the_2b_kind_and_leaves_no_trace(cogvideox_folders: dict[str, Path], name: str) -> None:
    model = load_model(cogvideox_folders["2B"])
    prompts = model.embed([laws.CAPTION]), model.embed([laws.NEGATIVE])
    before = laws.state_of(model)
    plain, steered = (sample(laws.walk_on(model, prompts, steps=2), how) for how in (NoGuidance(), laws.eager(name)))
    assert torch.isfinite(steered).all()
    assert not torch.equal(steered, plain)
    assert laws.state_of(model) == before


def test_positions_are_optimised_where_they_are_rotary(model: Any, prompts: Any, cogvideox_folders: Any) -> None:
    cls: Any = guidance_class("ditflow")
    guidance = cls(share=1.0, iterations=1, optimise="positions")
    before, walk = laws.state_of(model), laws.walk_on(model, prompts, steps=2)
    assert not torch.equal(sample(walk, guidance), sample(walk, NoGuidance()))
    assert laws.state_of(model) == before
    other = load_model(cogvideox_folders["2B"])
    with pytest.raises(InputError, match="no rotary positions"):
        sample(laws.walk_on(other, prompts, steps=2), guidance)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shift", [1.0, 3**0.5])
def test_the_weight_is_that_of_errors_of_v_and_of_diffusers_training(shift: float) -> None:
    """diffusers trains CogVideoX on x0 with the weight 1 / (1 - alphas_cumprod), x0 from v by the scheduler."""
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        snr_shift_scale=shift**2,
    )  # fmt: skip
    config = dict(scheduler.config) | {"_class_name": "CogVideoXDDIMScheduler"}
    x0, eps, error = (drawn(1, 2, 2, 2, 2, seed=seed) for seed in range(3))
    for step in (0, 300, 998, 999):
        cumulative = scheduler.alphas_cumprod[step].float()
        a, b = cumulative.sqrt(), (1 - cumulative).sqrt()
        x, v = a * x0 + b * eps, a * eps - b * x0 + error
        native = ((a * x - b * v - x0) ** 2).mean() / (1 - cumulative)
        time = trained_times(config)[step : step + 1]
        ours = denoising_loss((b * x + a * v) - (a * x - b * v), eps - x0) * trained_weight(config, time)
        torch.testing.assert_close(ours[0], native, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours[0], error.square().mean(), rtol=1e-4, atol=1e-6)
        point = path_point(x0, eps, time)
        torch.testing.assert_close(point.latent, x / (a + b), atol=1e-6, rtol=0)
    assert torch.equal(trained_weight({}, torch.tensor([0.25, 1.0])), torch.ones(2))


def test_noise_levels_are_those_of_time_steps_all_equally_likely() -> None:
    known = torch.arange(1, 5) / 4
    times = drawn_times(4000, 5.0, keyed_generator("times"), known=known)
    for level in known:
        assert abs((times == level).float().mean() - 0.25) < 0.03


CHOSEN = np.zeros((3, 4), dtype=bool)
CHOSEN[1, 2] = CHOSEN[2, 0] = True


@pytest.mark.parametrize("kind", ["2B", "5B"])
def test_a_lora_on_heads_does_the_same_in_the_stock_pipeline(
    cogvideox_folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    model: Any = load_model(cogvideox_folders[kind])
    latent, prompt = drawn(1, 16, 3, 4, 8), Prompt(drawn(1, 226, 32))

    @torch.no_grad()
    def said() -> Tensor:
        return model.velocity(latent, torch.tensor([0.5]), prompt)

    plain = said()
    layers = attach(model.transformer, "new", CHOSEN, rank=2, seed=0)
    assert torch.equal(said(), plain)
    # r (i + o) of q, k, v with 16 of 64 rows and of o with 16 of 64 columns, for two heads in two blocks
    assert layers.parameter_count() == 2 * 4 * 2 * (64 + 16)
    model.velocity(latent, torch.tensor([0.5]), prompt).square().sum().backward()
    torch.optim.SGD(layers.parameters(), lr=1e-2).step()
    model.velocity(latent, torch.tensor([0.5]), prompt).square().sum().backward()
    torch.optim.SGD(layers.parameters(), lr=1e-2).step()
    trained, lora = said(), layers.lora("temporal")
    layers.remove()
    assert torch.equal(said(), plain)
    assert (trained - plain).abs().max() > 1e-3
    assert touched_heads(lora, 4) == {1: [2], 2: [0]}
    save_lora(lora, tmp_path / "new.safetensors")
    load_into(model.transformer, load_lora(tmp_path / "new.safetensors"), "again")
    torch.testing.assert_close(said(), trained, atol=1e-6, rtol=0)
    unload(model.transformer, "again")
    absent: Any = None
    stock = CogVideoXPipeline(absent, absent, absent, model.transformer, absent)
    stock.load_lora_weights(str(tmp_path / "new.safetensors"), adapter_name="stock", use_safetensors=True)
    torch.testing.assert_close(said(), trained, atol=1e-5, rtol=0)
    assert "transformer.transformer_blocks" not in inspect_lora(tmp_path / "new.safetensors").split("header")[0]


def test_a_lora_of_a_wan_or_in_its_layouts_is_refused(cogvideox_folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(cogvideox_folders["5B"])
    layers = attach(model.transformer, "new", CHOSEN, rank=2, seed=0)
    lora = layers.lora("temporal")
    layers.remove()
    for layout in ("native", "kohya"):
        with pytest.raises(InputError, match=f"no names in the layout {layout}: save its LoRA as diffusers"):
            save_lora(lora, tmp_path / "new.safetensors", layout)  # pyright: ignore[reportArgumentType]
    weights = {key.removeprefix("transformer_"): value for key, value in lora.weights.items()}
    with pytest.raises(InputError, match="does not have: choose the model that it was trained on"):
        load_into(model.transformer, MotionLora(weights, 2, 2.0), "wan")


@pytest.mark.parametrize("kind", ["2B", "5B"])
def test_both_stages_train_and_the_file_moves_a_clip(
    cogvideox_folders: dict[str, Path], random_clip: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_clip(random_clip(17, 16, 16), tmp_path / "clip.webp")
    words = ["--model", str(cogvideox_folders[kind]), "--device", "cpu", "--frames", "17", "--cache", "None"]
    words += ["--height", "16", "--width", "16"]
    train = ["train", *words, "--clip", "clip.webp", "--caption", "a star", "--out", "run", "--fps", "None"]
    train += ["--lora.rank", "2", "--heads.ratio", "1", "--temporal.stride", "2", "--memory", "low"]
    train += ["--noise.weighting", "none", "--noise.shift", "1"]
    for stage in ("spatial", "temporal"):
        train += [f"--{stage}.steps", "2", f"--{stage}.lr", "0.01"]
    assert main(train) == 0
    told = load_lora(Path("run/temporal.safetensors"))
    assert told.provenance["trained_grid"] == {"frames": 3, "height": 2, "width": 2}
    assert set(told.provenance["heads"]["chosen"]) <= {"0", "1", "2"}
    made = ["generate", *words, "--caption", "a star", "--suffix", "webp"]
    made += ["--sample.steps", "1", "--sample.scale", "1"]
    for out, lora in (("plain", []), ("moved", ["--lora", "run/temporal.safetensors:1"])):
        assert main([*made, "--out", out, *lora]) == 0
    assert Path("plain/a-star-seed0.webp").read_bytes() != Path("moved/a-star-seed0.webp").read_bytes()
