"""What `motionlora clip sprite` makes: a scene drawn from a seed, or a reference of the sprite protocol."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from motionlora.data import sprites
from motionlora.data.benchmark import references
from motionlora.data.clip import Clip
from motionlora.data.errors import InputError, meant


def sprite_clip(
    *,
    seed: int = 0,
    shape: str | None = None,
    colour: str | None = None,
    background: str | None = None,
    motion: str | None = None,
    frames: int = sprites.FRAMES,
) -> Clip:
    """The clip that `ClipSpriteSettings` names; its caption says what is seen, never how it moves.

    Raises:
        InputError: a word that the sprite world does not know, frames that are not 4k + 1, or another number of them
            than a reference has.
    """
    _refuse_frames(frames, motion)
    _refuse_word("shape", shape, sprites.SHAPES)
    _refuse_word("colour", colour, sprites.COLOURS)
    _refuse_word("background", background, sprites.BACKGROUNDS)
    _refuse_word("motion", motion, (*sprites.FAMILIES, *(reference.name for reference in references())))
    scene = _scene(motion, seed, frames)
    first, *others = scene.sprites
    first = replace(first, shape=shape or first.shape, colour=colour or first.colour)
    return sprites.render(replace(scene, sprites=(first, *others), background=background or scene.background))


def _scene(motion: str | None, seed: int, frames: int) -> sprites.Scene:
    """The reference called `motion`, else a scene drawn from the seed, in which one sprite moves as `motion` says."""
    for reference in references():
        if reference.name == motion:
            return reference.scene
    generator = np.random.default_rng(seed)
    scene = sprites.random_scene(generator, frames=frames)
    if motion is None:
        return scene
    first = scene.sprites[0]
    reach = sprites.SIZE / 2 - 1.05 * first.radius
    path = sprites.random_path(generator, frames, reach=reach, family=motion)
    moved = replace(first, path=path + sprites.SIZE / 2 - 0.5)
    return replace(scene, sprites=(moved,), pan=np.zeros_like(scene.pan))


def _refuse_frames(frames: int, motion: str | None) -> None:
    if frames % 4 != 1:
        low = max(5, frames - (frames - 1) % 4)
        raise InputError(f"--frames must be 4k + 1, got {frames}: set it to {low} or {low + 4}.")
    if frames != sprites.FRAMES and motion in [reference.name for reference in references()]:
        raise InputError(
            f"--motion {motion} is a reference of the sprite protocol, which has {sprites.FRAMES} frames, got "
            f"--frames {frames}: leave --frames out."
        )


def _refuse_word(option: str, came: str | None, allowed: Iterable[str]) -> None:
    names = list(allowed)
    if came is not None and came not in names:
        raise InputError(f"--{option} is {came!r}: it should be one of {', '.join(names)} ({meant(came, names)}).")
