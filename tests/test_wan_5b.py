"""Wan 2.2 TI2V-5B on a random twin: laws of a backbone, the stock pipeline's numbers, both stages, guidance."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from motionlora.data.clip import Clip, write_clip
from motionlora.data.errors import InputError
from motionlora.heads.backbone import Backbone, TokenGrid
from motionlora.heads.lora_file import load_lora
from motionlora.heads.positions import sparse_positions
from motionlora.heads.wan import WanBackbone
from motionlora.heads.wan_outline import outline_of
from motionlora.infer.guidance_list import guidance_class, guidance_names
from motionlora.infer.guide_none import NoGuidance
from motionlora.infer.sample import new_walk, refuse_size, sample
from motionlora.infer.settings import SampleSettings
from motionlora.train.run import train
from motionlora.train.settings import TrainSettings

# S2V2V follows points, which noise on so small a grid has not.
STEERING = [name for name in guidance_names() if guidance_class(name).needs_reference and name != "s2v2v"]
SIZE: dict[str, Any] = {"frames": 9, "height": 64, "width": 96}
EAGER: dict[str, Any] = {"share": 1.0, "start": 0.9, "channels": 0.25, "iterations": 1}


@pytest.fixture(scope="module")
def pipeline(twin_5b: WanBackbone, twin_5b_folder: Path) -> WanPipeline:
    """The stock pipeline over the twin's own transformer and VAE."""
    parts: Any = {"transformer": twin_5b.transformer}
    with twin_5b.parts.vae() as vae:
        stock = WanPipeline.from_pretrained(twin_5b_folder, vae=vae, **parts)
    stock.set_progress_bar_config(disable=True)
    return stock


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_it_answers_the_protocol(twin_5b: WanBackbone) -> None:
    model: Backbone = twin_5b
    assert (model.channels, model.spatial_factor, model.multiple, model.frame_multiple) == (48, 16, 32, 4)
    assert model.grid(drawn(1, 48, 3, 4, 6)) == TokenGrid(3, 2, 3)
    assert twin_5b.parts.token_times
    assert outline_of(twin_5b.source).without_weights(torch.float32).parts.token_times


def test_every_token_is_fed_its_clips_time(twin_5b: WanBackbone) -> None:
    seen: list[torch.Tensor] = []
    watch = twin_5b.transformer.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["timestep"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            twin_5b.velocity(drawn(2, 48, 3, 4, 6), torch.tensor([0.25, 0.5]), twin_5b.embed(["a star"]))
    finally:
        watch.remove()
    assert torch.equal(seen[0], torch.tensor([[250.0], [500.0]]).expand(2, 18))


def test_a_walk_and_its_pixels_are_the_stock_pipelines(twin_5b: WanBackbone, pipeline: WanPipeline) -> None:
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=3.0)
    prompt, negative = twin_5b.embed(["a red circle"]), twin_5b.embed(["a star"])
    options: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2}
    options |= {"guidance_scale": 5.0, "prompt_embeds": prompt.embeds, "negative_prompt_embeds": negative.embeds}
    options["generator"] = torch.Generator().manual_seed(3)
    theirs: Any = pipeline(**options, output_type="latent")
    walk = new_walk(twin_5b, prompt, negative, seed=3, sample=SampleSettings(steps=2), **SIZE)
    ours = sample(walk, NoGuidance())
    assert torch.equal(ours, theirs.frames)
    options["generator"] = torch.Generator().manual_seed(3)
    stock: Any = pipeline(**options, output_type="np")
    assert (twin_5b.decode(ours, 24.0).pixels == (stock.frames[0] * 255).round().astype("uint8")).all()


def test_encode_is_the_normalised_mode_and_a_frame_alone_its_first_latent(twin_5b: WanBackbone, random_clip) -> None:
    clip = random_clip(9, 32, 64)
    latent = twin_5b.encode(clip)
    assert latent.shape == (1, 48, 3, 2, 4)
    pixels = torch.from_numpy(clip.pixels).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with twin_5b.parts.vae() as vae, torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()  # pyright: ignore[reportAttributeAccessIssue]
    mean, std = (torch.linspace(*ends, 48).view(1, -1, 1, 1, 1) for ends in ((-0.5, 0.5), (0.5, 1.5)))
    torch.testing.assert_close(latent * std + mean, mode, atol=1e-5, rtol=0)
    first = twin_5b.encode(Clip(clip.pixels[:1], clip.fps, clip.caption))
    torch.testing.assert_close(first, latent[:, :, :1], atol=1e-5, rtol=0)


def test_positions_of_whole_numbers_are_stock_and_others_act(twin_5b: WanBackbone) -> None:
    latent, time, prompt = drawn(1, 48, 3, 4, 6), torch.tensor([0.5]), twin_5b.embed(["a star"])
    with torch.no_grad():
        plain = twin_5b.velocity(latent, time, prompt)
        with twin_5b.positioned(torch.arange(3.0)):
            assert torch.equal(twin_5b.velocity(latent, time, prompt), plain)
        with twin_5b.positioned(sparse_positions("aligned", frames=25, stride=3)):
            assert not torch.allclose(twin_5b.velocity(latent, time, prompt), plain, atol=1e-4)


@pytest.mark.parametrize("size", [(48, 96), (64, 80)])
def test_sizes_that_are_no_multiples_of_32_are_refused(twin_5b: WanBackbone, random_clip, size) -> None:
    with pytest.raises(InputError, match="multiples of 32"):
        refuse_size(twin_5b, 9, *size)
    with pytest.raises(InputError, match="multiples of 32"):
        twin_5b.encode(random_clip(5, *size))


def test_both_stages_train_and_the_file_moves_the_stock_pipeline(
    twin_5b_folder: Path, pipeline: WanPipeline, random_clip, tmp_path: Path
) -> None:
    write_clip(random_clip(9, 64, 64), tmp_path / "clip.mp4")
    small: dict[str, Any] = {"steps": 2, "lr": 1e-2}
    settings = TrainSettings.model_validate(
        {
            "model": str(twin_5b_folder), "clip": tmp_path / "clip.mp4", "caption": "a star", "out": tmp_path / "run",
            "frames": 9, "fps": None, "cache": None, "device": "cpu", "lora": {"rank": 2}, "heads": {"ratio": 1.0},
            "spatial": small, "temporal": {**small, "stride": 2}, "memory": "low",
        }
    )  # fmt: skip
    result = train(settings, say=lambda line: None)
    assert {"heads", "spatial", "temporal"} <= result.paths.keys()
    assert load_lora(result.paths["temporal"]).provenance["trained_grid"] == {"frames": 2, "height": 2, "width": 2}
    options: dict[str, Any] = {
        "prompt_embeds": drawn(1, 512, 32),
        "guidance_scale": 1.0,
        "latents": drawn(1, 48, 1, 2, 2),
    }
    options |= {"height": 32, "width": 32, "num_frames": 1, "num_inference_steps": 1, "output_type": "latent"}
    own = WanPipeline.from_pretrained(twin_5b_folder)
    own.set_progress_bar_config(disable=True)
    before: Any = own(**options)
    own.load_lora_weights(str(result.paths["temporal"]))
    after: Any = own(**options)
    assert not torch.equal(before.frames, after.frames)


@pytest.mark.parametrize("name", STEERING)
def test_every_guidance_steers_and_leaves_no_trace(twin_5b: WanBackbone, name: str) -> None:
    cls = guidance_class(name)
    guidance: Any = cls(**{key: value for key, value in EAGER.items() if key in cls.model_fields})
    prompt = twin_5b.embed(["a red circle"])

    def walk(**reference: Any) -> Any:
        how = SampleSettings(steps=2, scale=1.0)
        return new_walk(twin_5b, prompt, prompt, seed=3, sample=how, **reference, **SIZE)

    plain = sample(walk(), NoGuidance())
    hooks = [len(module._forward_hooks) for module in twin_5b.transformer.modules()]
    steered = sample(walk(reference=drawn(1, 48, 3, 4, 6)), guidance)
    assert torch.isfinite(steered).all()
    assert [len(module._forward_hooks) for module in twin_5b.transformer.modules()] == hooks
    assert torch.equal(sample(walk(), NoGuidance()), plain)
