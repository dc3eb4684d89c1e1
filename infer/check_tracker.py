"""How exact a point tracker is on clips whose motion is known: no figure from tracks is worth more than this check.

The clips are pure translations of the sprite world: cameras that pan and sprites that move straight. The check belongs
beside every table of motion measures. Ours.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int
from scipy import ndimage

from motionlora.data.sprites import FRAMES, SIZE, Scene, Sprite, coverage, render
from motionlora.infer.track_points import Points, Tracker, Tracks

LIMIT = 1.0
"""Mean error in pixels from which on a tracker's figures are not used."""
LEAST_SEEN = 0.25
"""Share of points and frames below which a tracker is exact only because it gives up."""


@dataclass(frozen=True)
class TrackerCheck:
    """What a tracker does on pure translations.

    Attributes:
        error: mean distance in pixels of visible points from their true place, over the clips' means.
        worst: the largest mean of one clip.
        seen: share of truly visible points and frames that the tracker has, over the clips' means.
        by_clip: error and seen by the name of the clip.
    """

    error: float
    worst: float
    seen: float
    by_clip: dict[str, tuple[float, float]]

    @property
    def passed(self) -> bool:
        return self.worst < LIMIT and self.seen >= LEAST_SEEN

    def __str__(self) -> str:
        verdict = "good enough" if self.passed else "NOT good enough: do not use its figures"
        return (
            f"Tracker on {len(self.by_clip)} pure translations: mean error {self.error:.2f} px, worst clip "
            f"{self.worst:.2f} px (limit {LIMIT:g}), {self.seen:.0%} of visible points kept: {verdict}."
        )


def check_tracker(tracker: Tracker) -> TrackerCheck:
    """The tracker on the clips of `translations`; points are judged where the moving thing is."""
    by_clip = {name: judged(tracker.track(render(scene)), scene) for name, scene in translations().items()}
    errors, seen = np.array(list(by_clip.values())).T
    # A clip without one visible point has no error to speak of, and fails through the share that was seen.
    return TrackerCheck(float(errors.mean()), float(errors.max()), float(seen.mean()), by_clip)


def judged(tracks: Tracks, scene: Scene) -> tuple[float, float]:
    """Mean error in pixels and share seen, over points that start inside a sprite, or over all where there is none.

    A sprite's outermost pixels are mixed with the background and belong to both: they are not asked. The error is
    infinite where no point was seen after the first frame.
    """
    chosen = tracks.within(ndimage.binary_erosion(sprite_mask(scene), np.ones((3, 3)))) if scene.sprites else tracks
    truth = true_tracks(scene, chosen.positions[:, 0])
    error = np.linalg.norm(chosen.positions - truth.positions, axis=-1)
    shared = (chosen.visible & truth.visible)[:, 1:]
    if not shared.any():
        return float("inf"), 0.0
    return float(error[:, 1:][shared].mean()), float(shared.sum() / truth.visible[:, 1:].sum())


def translations() -> dict[str, Scene]:
    """Three pans of a texture and three straight walks of a sprite. No stripes: nobody sees a motion along them."""
    time = np.linspace(0, 1, FRAMES)[:, None]
    scenes = {}
    for seed, (background, reach) in enumerate((("cloudy", (30, 12)), ("checkered", (-20, 36)), ("cloudy", (-8, -40)))):
        scenes[f"pan-{background}-{seed}"] = Scene((), background, time * np.array(reach), 500 + seed)
    still, turn = np.zeros(FRAMES), np.full(FRAMES, 0.3)
    for seed, (shape, colour, background) in enumerate(
        (("square", "red", "dark"), ("star", "blue", "checkered"), ("triangle", "yellow", "cloudy"))
    ):
        path = np.array([46.0 - 14 * seed, 14.0]) + time * np.array([-26.0 + 26 * seed, 36.0])
        sprite = Sprite(shape, colour, 11.0, path, turn, still + 1)
        scenes[f"walk-{shape}-{background}"] = Scene((sprite,), background, np.zeros((FRAMES, 2)), 510 + seed)
    return scenes


def true_tracks(scene: Scene, points: Points) -> Tracks:
    """Where points (y, x) of the scene's first frame go: with the topmost sprite that they lie on, else with the pan.

    A point is visible inside the frame where nothing lies over what it belongs to; an occluding bar stays where it is.
    """
    owner = _top(scene, points, 0)
    positions = points[:, None] + (scene.pan - scene.pan[0])[None]
    for index, sprite in enumerate(scene.sprites):
        own = owner == index
        positions[own] = _carried(sprite, points[own])
    positions[owner == len(scene.sprites)] = points[owner == len(scene.sprites), None]
    inside = ((positions >= -0.5) & (positions <= SIZE - 0.5)).all(-1)
    frames = range(len(scene.pan))
    return Tracks(positions, inside & np.stack([_top(scene, positions[:, f], f) == owner for f in frames], 1))


def sprite_mask(scene: Scene) -> Bool[np.ndarray, "height width"]:
    """Pixels of the first frame that show a sprite."""
    grid = np.moveaxis(np.indices((SIZE, SIZE)), 0, -1).reshape(-1, 2).astype(float)
    owner = _top(scene, grid, 0).reshape(SIZE, SIZE)
    return (owner >= 0) & (owner < len(scene.sprites))


def _top(scene: Scene, points: Points, frame: int) -> Int[np.ndarray, " point"]:
    """What lies on top at each point of a frame: a sprite's index, -1 the background, past the last sprite the bar."""
    top = np.full(len(points), -1)
    for index, s in enumerate(scene.sprites):
        dy, dx = (points - s.path[frame]).T
        cover = coverage(s.shape, dy, dx, np.asarray(s.radius * s.scale[frame]), np.asarray(s.angle[frame]))
        top[cover > 0.5] = index
    if scene.bar:
        x, width = scene.bar
        top[np.abs(points[:, 1] - x) < width / 2] = len(scene.sprites)
    return top


def _carried(sprite: Sprite, points: Points) -> np.ndarray:
    """Points fixed to a sprite in frame 0, in every frame: moved, turned and scaled with it, "point frame 2"."""
    offset = points - sprite.path[0]
    turn, growth = sprite.angle - sprite.angle[0], sprite.scale / sprite.scale[0]
    dy = offset[:, :1] * np.cos(turn) + offset[:, 1:] * np.sin(turn)
    dx = offset[:, 1:] * np.cos(turn) - offset[:, :1] * np.sin(turn)
    return sprite.path + np.stack([dy, dx], -1) * growth[:, None]
