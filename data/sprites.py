"""The sprite world: made-up clips whose motion is known exactly, with captions that never say it.

Anti-aliased shapes in well-separated colours move over neutral backgrounds. A background is a sum of plane waves, so a
camera pan is an exact phase shift at any sub-pixel offset; a shape is a folded wedge with one straight edge, so its
coverage is one formula for every polygon and star. Everything is a pure function of a `Scene`; a `Scene` is drawn from
a seeded generator. Positions are (y, x) in pixels, times in frames.

Ours; the design follows the synthetic-sprite evaluation proposed for weights-free motion transfer.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from motionlora.data.clip import Clip

SIZE, FRAMES, FPS = 64, 49, 12.0
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (40, 170, 60),
    "blue": (45, 75, 225),
    "yellow": (240, 220, 45),
    "magenta": (220, 50, 215),
    "cyan": (45, 210, 220),
}
# shape -> (number of corners, inner radius as a share of the outer one, where a corner of the upright shape points, in
# radians from x to y, that is down); a circle has no corners
SHAPES: dict[str, tuple[int, float, float]] = {
    "circle": (0, 1.0, 0.0),
    "square": (4, float(np.cos(np.pi / 4)), np.pi / 4),
    "triangle": (3, 0.5, -np.pi / 2),
    "star": (5, 0.45, -np.pi / 2),
}
PLAIN, TEXTURED = ("dark", "light"), ("cloudy", "striped", "checkered")
BACKGROUNDS = PLAIN + TEXTURED
FAMILIES = ("static", "linear", "ease", "throw", "smooth")
"""Motion families of pre-training. None of the benchmark's families (`data/benchmark.py`) is among them."""
RADII = (10.5, 12.5)
"""Circumscribed radii of a sprite in pixels, measured to be large enough for the shape recogniser."""
GREY_BAR = 95
Path = np.ndarray  # float "frame 2", (y, x) in pixels


@dataclass(frozen=True, eq=False)
class Sprite:
    """One moving shape. Per frame: `path` its centre, `angle` in radians from upright, `scale` a factor on `radius`."""

    shape: str
    colour: str
    radius: float
    path: Path
    angle: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True, eq=False)
class Scene:
    """A clip's content. `pan`: how far the background has moved (y, x) at each frame; `bar`: an occluder (x, width)."""

    sprites: tuple[Sprite, ...]
    background: str
    pan: Path
    texture_seed: int
    bar: tuple[float, float] | None = None

    @property
    def caption(self) -> str:
        """Names colours, shapes and background; never the motion."""
        subjects = " and ".join(f"a {sprite.colour} {sprite.shape}" for sprite in self.sprites)
        behind = " behind a grey bar" if self.bar else ""
        return f"{subjects}{behind} on a {self.background} background"


def render(scene: Scene) -> Clip:
    """The scene as a clip of `SIZE` x `SIZE` pixels at `FPS`; as many frames as `scene.pan` has."""
    canvas = _background(scene)
    for sprite in scene.sprites:
        _paint(canvas, sprite)
    if scene.bar:
        x, width = scene.bar
        cover = np.clip(width / 2 + 0.5 - np.abs(np.arange(SIZE) - x), 0, 1)[:, None]
        canvas += cover * (GREY_BAR - canvas)
    return Clip(np.clip(canvas + 0.5, 0, 255).astype(np.uint8), FPS, scene.caption)


def random_scene(
    generator: np.random.Generator, *, frames: int = FRAMES, speed: float = 1.0, pairs: float = 0.18, bars: float = 0.08
) -> Scene:
    """A random scene. `speed` > 1 makes the same motions that many times faster.

    `pairs` and `bars` are the shares of scenes with two sprites and with a bar in front; at their defaults the unseen
    pairs of caption and seed are drawn by which the embedded model is judged.
    """
    pair = generator.random() < pairs
    sprites = _random_sprites(generator, 2 if pair else 1, frames, speed)
    background = str(generator.choice(BACKGROUNDS))
    pan = np.zeros((frames, 2))
    if background in TEXTURED and generator.random() < 0.35:
        pan = random_path(generator, frames, reach=40.0, speed=speed)
        pan -= pan[0]
    bar = (float(generator.uniform(20, 44)), float(generator.uniform(8, 12))) if generator.random() < bars else None
    return Scene(sprites, background, pan, int(generator.integers(2**31)), bar)


def random_path(
    generator: np.random.Generator, frames: int, *, reach: float, speed: float = 1.0, family: str | None = None
) -> Path:
    """A path of one of `FAMILIES` around 0 that stays within `reach` pixels of it, "frame 2"."""
    family = family or str(generator.choice(FAMILIES, p=(0.12, 0.16, 0.12, 0.12, 0.48)))
    time = np.linspace(0, 1, frames)[:, None] * (frames - 1) / (FRAMES - 1) * speed
    ends = generator.uniform(-1, 1, (2, 2))
    if family == "static":
        path = np.repeat(ends[:1], frames, 0)
    elif family == "linear":
        path = ends[0] + (ends[1] - ends[0]) * time
    elif family == "ease":
        power = generator.choice((0.5, 2.0, 3.0))
        path = ends[0] + (ends[1] - ends[0]) * np.clip(time / max(time.max(), 1.0), 0, 1) ** power
    elif family == "throw":
        rise = generator.uniform(1.0, 4.0) * generator.choice((-1, 1))
        path = ends[0] + (ends[1] - ends[0]) * time + rise * time * (time - 1) * np.array([1.0, 0.0])
    else:
        path = _smooth_path(generator, time)
    return reach * _folded(path)


def _smooth_path(generator: np.random.Generator, time: np.ndarray) -> Path:
    """A random Fourier series whose highest frequency is drawn: from a lazy curve to several loops."""
    waves = np.arange(1, generator.integers(2, 7)) * 0.5
    weights = generator.normal(size=(2, len(waves), 2)) / waves[:, None]
    phase = 2 * np.pi * (time * waves + generator.random())
    path = np.cos(phase) @ weights[0] + np.sin(phase) @ weights[1]
    path -= path.mean(0)
    amplitude = generator.uniform(0.3, 1.0)
    path *= amplitude / max(float(np.abs(path).max()), 1e-6)
    return path + generator.uniform(-1, 1, 2) * (1 - np.abs(path).max(0))


def _folded(path: Path) -> Path:
    """Reflects a path at -1 and 1, so that it stays inside."""
    return 1 - np.abs((path + 1) % 4 - 2)


def _random_sprites(generator: np.random.Generator, count: int, frames: int, speed: float) -> tuple[Sprite, ...]:
    colours = generator.choice(list(COLOURS), count, replace=False)
    sprites = []
    for index in range(count):
        radius = float(generator.uniform(*RADII)) * (1.0 if count == 1 else 0.85)
        scale = np.ones(frames)
        if generator.random() < 0.08:
            scale = np.geomspace(1, generator.choice((0.8, 1.3)), frames)
        angle = np.zeros(frames)
        if generator.random() < 0.08:
            angle = generator.uniform(0, 2 * np.pi) + generator.normal() * 0.08 * speed * np.arange(frames)
        reach = SIZE / 2 - radius * 1.05
        path = SIZE / 2 - 0.5 + random_path(generator, frames, reach=reach, speed=speed)
        if count == 2:  # one each in the left and the right half, so that two stay two
            half = np.array([1.0, 0.42])
            path = SIZE / 2 - 0.5 + (path - SIZE / 2) * half + np.array([0, (-1, 1)[index] * 16.0])
        shape = str(generator.choice(list(SHAPES)))
        sprites.append(Sprite(shape, str(colours[index]), radius, path, angle, scale))
    return tuple(sprites)


def _background(scene: Scene) -> np.ndarray:
    """float32 "frame height width 3": base luma plus plane waves, shifted by the pan through their phases."""
    generator = np.random.default_rng(scene.texture_seed)
    waves, amplitudes, luma = _waves(scene.background, generator)
    grid = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij"), -1).reshape(-1, 2)
    phase = grid @ waves.T + generator.uniform(0, 2 * np.pi, len(waves))
    shift = scene.pan @ waves.T
    basis = np.concatenate([np.cos(shift) * amplitudes, np.sin(shift) * amplitudes], 1)
    field = luma + basis @ np.concatenate([np.cos(phase), np.sin(phase)], 1).T
    return np.repeat(field.reshape(-1, SIZE, SIZE, 1), 3, -1).astype(np.float32)


def _waves(background: str, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Wave vectors "wave 2" in radians a pixel, amplitudes in luma steps, and the base luma."""
    match background:
        case "dark" | "light":
            return (
                np.zeros((0, 2)),
                np.zeros(0),
                {"dark": 40.0, "light": 205.0}[background] + generator.uniform(-12, 12),
            )
        case "cloudy":
            angle, length = generator.uniform(0, 2 * np.pi, 4), generator.uniform(40, 80, 4)
            amplitude = generator.uniform(7, 13, 4)
        case "striped":
            angle = np.full(2, generator.choice((0.0, np.pi / 2)))
            length, amplitude = 16 / np.array([1.0, 3.0]), np.array([34.0, 6.0])
        case _:
            angle = np.array([np.pi / 4, -np.pi / 4])
            length, amplitude = np.full(2, 14.5), np.array([20.0, 20.0])
    vector = 2 * np.pi / length[:, None] * np.stack([np.sin(angle), np.cos(angle)], 1)
    return vector, amplitude, generator.uniform(115, 135)


def _paint(canvas: np.ndarray, sprite: Sprite) -> None:
    """Blends the sprite over the canvas, inside a window that holds it in every frame."""
    half = int(np.ceil(sprite.radius * sprite.scale.max())) + 2
    corner = np.floor(sprite.path).astype(int) - half + 1
    offsets = np.arange(2 * half)
    dy = (corner[:, :1] + offsets - sprite.path[:, :1])[:, :, None]
    dx = (corner[:, 1:] + offsets - sprite.path[:, 1:])[:, None, :]
    cover = coverage(sprite.shape, dy, dx, (sprite.radius * sprite.scale)[:, None, None], sprite.angle[:, None, None])
    colour = np.array(COLOURS[sprite.colour], np.float32)
    for frame, (top, left) in enumerate(corner):
        rows = slice(max(top, 0), min(top + 2 * half, SIZE))
        columns = slice(max(left, 0), min(left + 2 * half, SIZE))
        window = canvas[frame, rows, columns]
        part = cover[frame, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left, None]
        window += part * (colour - window)


def coverage(shape: str, dy: np.ndarray, dx: np.ndarray, radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Share of each pixel inside the shape, 0..1. `dy`, `dx` are offsets from its centre in pixels.

    The plane is folded into the wedge of half a corner, where the outline is one straight edge from the corner
    (radius, 0) to the inner point (inner * radius, pi / corners); the signed distance to it gives the coverage.
    """
    corners, inner, first = SHAPES[shape]
    reach = np.hypot(dy, dx).astype(np.float32)
    if not corners:
        return np.clip(radius + 0.5 - reach, 0, 1).astype(np.float32)
    wedge = np.pi / corners
    theta = np.abs((np.arctan2(dy, dx).astype(np.float32) - first - angle + wedge) % (2 * wedge) - wedge)
    edge = np.array([inner * np.cos(wedge) - 1, inner * np.sin(wedge)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    distance = (reach * np.cos(theta) - radius) * normal[0] + reach * np.sin(theta) * normal[1]
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


Change = Literal["subject", "background", "scene"]


def recaptioned(scene: Scene, change: Change, generator: np.random.Generator) -> Scene:
    """The scene with other colours and shapes (subject), another background, or both (scene); the motion stays."""
    sprites, background = scene.sprites, scene.background
    if change in ("subject", "scene"):
        taken = {sprite.colour for sprite in sprites}
        colours = generator.permutation([name for name in COLOURS if name not in taken])
        sprites = tuple(
            replace(sprite, colour=str(colour), shape=_another(SHAPES, sprite.shape, generator))
            for sprite, colour in zip(sprites, colours, strict=False)
        )
    if change in ("background", "scene"):
        background = _another(BACKGROUNDS, background, generator)
    return replace(scene, sprites=sprites, background=background)


def _another(names, name: str, generator: np.random.Generator) -> str:
    return str(generator.choice([other for other in names if other != name]))
