"""The embedded tiny Wan: what it is, and that a motion really moves on it (the measured figures are in results/)."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from motionlora.data.benchmark import Case, Reference, references, target_of
from motionlora.data.sprites import random_scene, render
from motionlora.heads.tiny import TINY
from motionlora.heads.wan import WanBackbone
from motionlora.infer.guide_none import NoGuidance
from motionlora.infer.sample import new_walk, sample
from motionlora.infer.settings import SampleSettings
from motionlora.train.demo import judged, learn, shown


@pytest.fixture(scope="module")
def tiny() -> WanBackbone:
    return WanBackbone.load("tiny")


def test_it_ships_small_without_pickles_and_with_its_card():
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".model", ".png"}
    card = (TINY / "README.md").read_text()
    assert "sprite world" in card
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", card)
    assert pictures
    assert all((TINY / picture).is_file() for picture in pictures)


def test_the_vae_gives_a_held_out_clip_back(tiny: WanBackbone):
    clip = render(random_scene(np.random.default_rng(424242)))
    error = tiny.decode(tiny.encode(clip), clip.fps).pixels.astype(np.float64) - clip.pixels
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 27


def test_without_guidance_and_lora_it_is_the_stock_pipeline_bit_for_bit(tiny: WanBackbone):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipeline = WanPipeline.from_pretrained(TINY, transformer=tiny.transformer)
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    caption = "a red circle on a dark background"
    walk = new_walk(
        tiny, tiny.embed([caption]), tiny.embed([""]), seed=3, frames=17, height=64, width=64,
        sample=SampleSettings(steps=2, scale=3.0, shift=float(pipeline.scheduler.config["shift"])),
    )  # fmt: skip
    stock = pipeline(
        prompt_embeds=walk.prompt.embeds, negative_prompt_embeds=walk.negative.embeds, latents=walk.noise.clone(),
        height=64, width=64, num_frames=17, num_inference_steps=2, guidance_scale=3.0,
        output_type="latent", return_dict=False,
    )  # fmt: skip
    assert torch.equal(sample(walk, NoGuidance()), stock[0])


def test_captions_say_which_sprite_has_which_shape(tiny: WanBackbone):
    """A text encoder that passes on a bag of words makes the two captions one."""
    draws = np.random.default_rng(77)
    scenes, exchanged = [], []
    while len(scenes) < 12:
        scene = random_scene(draws, frames=1, pairs=1.0, bars=0.0)
        one, other = scene.sprites
        if one.shape != other.shape and one.colour != other.colour:
            scenes.append(scene)
            sprites = (replace(one, shape=other.shape), replace(other, shape=one.shape))
            exchanged.append(replace(scene, sprites=sprites).caption)
    latent = torch.cat([tiny.encode(render(scene)) for scene in scenes])
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    time = torch.full([len(scenes)], 0.85)

    def error(captions: list[str]) -> float:
        velocity = tiny.velocity(latent.lerp(noise, 0.85), time, tiny.embed(captions))
        return float((velocity - (noise - latent)).square().mean())

    assert error(exchanged) > 1.2 * error([scene.caption for scene in scenes])


@pytest.mark.slow
def test_a_motion_moves_and_the_way_back_moves_back(tiny: WanBackbone, tmp_path: Path):
    reference = next(r for r in references() if r.name == "zigzag")
    cases = [Case(reference, "subject", target_of(reference, "subject"), seed) for seed in (0, 1)]

    def fidelity(learned: Reference | None) -> float:
        lora = learn(learned, tmp_path / learned.name).paths["temporal"] if learned else None
        clips = shown(tiny, cases, lora, "walk")
        return float(np.median([judged(clip, case).smf for clip, case in zip(clips, cases, strict=True)]))

    moved = fidelity(reference)
    assert moved > fidelity(None) + 0.3
    assert moved > fidelity(reference.reversed()) + 0.3
