"""The sprite protocol, version 2: sixteen references with exactly known motion, and the captions to move it to.

None of the references' motion families is in pre-training (`data/sprites.py`, `FAMILIES`). The definition is hashed,
and the hash is printed with every table: figures with different hashes must not be compared.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from motionlora.data.sprites import FRAMES, SIZE, Change, Scene, Sprite, recaptioned, render

Kind = Literal["open", "closed", "camera", "pair", "occluded", "turning"]
Form = Literal["short", "sweep", "objects", "standard", "full"]
CENTRE, REACH, RADIUS = SIZE / 2 - 0.5, 18.0, 11.5
Curve = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Reference:
    """A clip's scene and the name of its motion."""

    name: str
    kind: Kind
    scene: Scene

    def reversed(self) -> "Reference":
        """The same clip played backwards."""
        return Reference(f"{self.name}-reversed", self.kind, played_backwards(self.scene))


@dataclass(frozen=True, eq=False)
class Case:
    """One cell of a table: move `reference`'s motion to `target` (only its caption and looks count) with `seed`."""

    reference: Reference
    change: Change
    target: Scene
    seed: int


def _tent(t: np.ndarray, legs: int) -> np.ndarray:
    """From -1 to 1 and back in `legs` straight legs."""
    return 1 - 2 * np.abs((t * legs) % 2 - 1)


def _square(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    side = (t * 4) % 4
    return np.clip(np.abs(side - 2.0) * 2 - 2, -1, 1) * -1, np.clip(np.abs((side + 3) % 4 - 2) * 2 - 2, -1, 1)


OPEN: dict[str, Curve] = {
    "v": lambda t: (_tent(t, 2), 2 * t - 1),
    "zigzag": lambda t: (0.75 * _tent(t, 4), 2 * t - 1),
    "s": lambda t: (2 * t - 1, np.sin(2 * np.pi * t)),
    "accelerating-turn": lambda t: (-np.cos(1.25 * np.pi * t**2), np.sin(1.25 * np.pi * t**2)),
}
CLOSED: dict[str, Curve] = {
    "circle": lambda t: (np.sin(2.3 * np.pi * t), np.cos(2.3 * np.pi * t)),
    "eight": lambda t: (0.7 * np.sin(4 * np.pi * t), np.sin(2 * np.pi * t)),
    "spiral": lambda t: ((0.15 + 0.85 * t) * np.sin(3.5 * np.pi * t), (0.15 + 0.85 * t) * np.cos(3.5 * np.pi * t)),
    "square": _square,
}
LOOKS = (
    ("red", "circle", "dark"), ("blue", "square", "cloudy"), ("yellow", "star", "striped"),
    ("green", "triangle", "light"), ("magenta", "square", "light"), ("cyan", "circle", "checkered"),
    ("green", "star", "dark"), ("red", "triangle", "cloudy"),
)  # fmt: skip


def references() -> tuple[Reference, ...]:
    """All 16, in the protocol's order: 4 open, 4 closed paths, 4 cameras, 2 pairs, 1 occlusion, 1 turn and zoom."""
    paths = {**OPEN, **CLOSED}
    made = [
        Reference(name, "open" if name in OPEN else "closed", _scene(LOOKS[i], path_of(curve), seed=i))
        for i, (name, curve) in enumerate(paths.items())
    ]
    for i, (name, background) in enumerate(
        zip(("v", "s", "circle", "eight"), ("checkered", "cloudy") * 2, strict=True)
    ):
        colour, shape, _ = LOOKS[i]
        scene = _scene((colour, shape, background), np.full((FRAMES, 2), CENTRE), seed=20 + i)
        made.append(Reference(f"camera-{name}", "camera", replace(scene, pan=path_of(paths[name]) - CENTRE)))
    for i, (left, right) in enumerate((("circle", "v"), ("s", "zigzag"))):
        halves = [
            path_of(paths[n]) * np.array([0.9, 0.36]) + np.array([3.0, 20 + s]) for n, s in ((left, -16), (right, 16))
        ]
        first, second = (
            _scene((LOOKS[i + k][0], LOOKS[i + k][1], "dark"), path, seed=30 + i, radius=9.0)
            for k, path in enumerate(halves)
        )
        pair = replace(first, sprites=first.sprites + second.sprites)
        made.append(Reference(f"pair-{left}-{right}", "pair", pair))
    hidden = replace(_scene(LOOKS[2], path_of(OPEN["s"]), seed=40), bar=(40.0, 8.0))
    made.append(Reference("occluded-s", "occluded", hidden))
    turning = _scene(LOOKS[4], path_of(OPEN["v"]), seed=41)
    turn = replace(turning.sprites[0], angle=np.linspace(0, 3 * np.pi, FRAMES), scale=np.geomspace(0.85, 1.1, FRAMES))
    made.append(Reference("turning-v", "turning", replace(turning, sprites=(turn,))))
    return tuple(made)


def path_of(curve: Curve) -> np.ndarray:
    """A curve on the canvas, (y, x) in pixels at each frame."""
    return np.stack(curve(np.linspace(0, 1, FRAMES)), -1) * REACH + CENTRE


def cases(form: Form) -> list[Case]:
    """short: 4 references; sweep: the 8 object motions; objects: x 2 seeds; standard: 16 x 1 caption x 2 seeds; full:
    x 3 captions."""
    chosen = references()
    if form == "short":
        chosen = tuple(r for r in chosen if r.name in ("v", "zigzag", "circle", "camera-v"))
    if form in ("sweep", "objects"):
        chosen = chosen[:8]
    seeds = (0,) if form in ("short", "sweep") else (0, 1)
    changes = get_args(Change)
    made = []
    for number, reference in enumerate(chosen):
        wanted = changes if form == "full" else (changes[number % 3],)
        made += [Case(reference, change, target_of(reference, change), seed) for change in wanted for seed in seeds]
    return made


def target_of(reference: Reference, change: Change) -> Scene:
    """What a caption of a class asks for, drawn from the reference's name. A camera keeps a texture to show it."""
    seed = int.from_bytes(hashlib.sha256(f"{reference.name}/{change}".encode()).digest()[:4], "big")
    generator = np.random.default_rng(seed)
    target = recaptioned(reference.scene, change, generator)
    if reference.kind == "camera" and target.background != reference.scene.background:
        other = {"checkered": "cloudy", "cloudy": "checkered"}[reference.scene.background]
        target = replace(target, background=other)
    return target


def played_backwards(scene: Scene) -> Scene:
    """The scene from its last frame to its first."""
    turned = (replace(s, path=s.path[::-1], angle=s.angle[::-1], scale=s.scale[::-1]) for s in scene.sprites)
    return replace(scene, sprites=tuple(turned), pan=scene.pan[::-1])


def protocol_hash() -> str:
    """First 12 hex digits of the hash over every reference's pixels and every caption of the full form."""
    digest = hashlib.sha256()
    for reference in references():
        digest.update(render(reference.scene).pixels.tobytes())
    for case in cases("full"):
        digest.update(f"{case.reference.name} {case.change} {case.target.caption} {case.seed}".encode())
    return digest.hexdigest()[:12]


def _scene(look: tuple[str, str, str], path: np.ndarray, *, seed: int, radius: float = RADIUS) -> Scene:
    colour, shape, background = look
    still = np.zeros(FRAMES)
    sprite = Sprite(shape, colour, radius, path, still, still + 1)
    return Scene((sprite,), background, np.zeros((FRAMES, 2)), 1000 + seed)
