"""What a tiny Wan is trained on: latents of random sprite scenes with their captions, and at which noise.

What a caption says of a sprite's shape counts in a band of noise: above it nothing is seen, below it the noisy sprite
itself shows its shape. Most steps train there.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from motionlora.data.sprites import FRAMES, random_scene, render
from motionlora.train.block_codec import normalised, raw_latent

TRAIN_SHIFT = 3.0
DECIDING, DECIDING_IN_CLIPS = (0.72, 0.97), (0.78, 0.98)
"""Noise levels at which a wrong shape in the caption costs most, of single frames and of clips (`results/log.md`)."""
STARS = 0.2
"""Share of the scenes in which one sprite is made a star, the shape that is learned last."""
PAIRS, BARS = 0.5, 0.2
"""Shares of the scenes with two sprites and with a bar in front: which is which, and a star behind a bar, come last."""


def draw(step: int, generator: np.random.Generator, *, early: bool) -> tuple[Tensor, list[str]]:
    """Latents "b c f h w" and captions. Of ten early steps 7 are of 1 frame, 1 of 17, 2 of all; later 3, 1, 6."""
    place = step % 10
    if place == (5 if early else 8):
        return scenes(5, generator, frames=17, fastest=3.0)
    if place in ((3, 8) if early else (1, 2, 4, 5, 7, 9)):
        return scenes(2, generator, frames=FRAMES)
    return scenes(24, generator, frames=1)


def noise_levels(latent: Tensor, generator: np.random.Generator) -> Tensor:
    """Noise levels "b" in 0..1, spread evenly over the batch: in most steps over `DECIDING`, else over all, shifted.

    Whole clips see all levels in 6 of 10 steps, not 3.5, because how they move is to be learned as well.
    """
    frames, count = latent.shape[2], len(latent)
    u = torch.from_numpy((np.arange(count) + generator.random()) / count).float()
    if generator.random() < (0.6 if frames == 1 + (FRAMES - 1) // 4 else 0.35):
        return TRAIN_SHIFT * u / (1 + (TRAIN_SHIFT - 1) * u)
    low, high = DECIDING if frames == 1 else DECIDING_IN_CLIPS
    return low + (high - low) * u


def scenes(
    count: int, generator: np.random.Generator, *, frames: int, fastest: float = 1.0
) -> tuple[Tensor, list[str]]:
    """Normalised latents of random scenes, "b c f h w", with captions; half of them up to `fastest` times as fast."""
    clips = []
    for index in range(count):
        speed = float(generator.uniform(1, fastest)) if index % 2 else 1.0
        scene = random_scene(generator, frames=frames, speed=speed, pairs=PAIRS, bars=BARS)
        if generator.random() < STARS:
            star = int(generator.integers(len(scene.sprites)))
            looks = [replace(one, shape="star") if i == star else one for i, one in enumerate(scene.sprites)]
            scene = replace(scene, sprites=tuple(looks))
        clips.append(render(scene))
    return torch.stack([normalised(raw_latent(clip.pixels)) for clip in clips]), [clip.caption for clip in clips]
