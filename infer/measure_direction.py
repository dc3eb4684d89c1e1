"""Does the output turn round when the reference does? The cheapest strong evidence that a motion was transferred.

A method is given a reference and its time reversal (or mirror image), with the same seed: motion that the model makes
by itself is in both outputs and cancels. Ours, after the direction-selectivity test of the field.
"""

import numpy as np

from motionlora.infer.measure_motion import velocity_field
from motionlora.infer.recognise_sprites import Observation
from motionlora.infer.track_points import Paths


def selectivity(
    forwards: np.ndarray, backwards: np.ndarray, reference_forwards: np.ndarray, reference_backwards: np.ndarray
) -> tuple[float, float]:
    """Score (cosine, -1..1) and gain (1 is fully turned).

    Velocities, all of one shape: of the outputs steered by the reference and by its reversal (or mirror image) from the
    same seed, and of those two references. With d the difference of the first two and r of the last two, the score is
    d.r / (|d| |r|), 0 for outputs that do not differ, and the gain d.r / |r|^2. Motion that both outputs share cancels.
    Entries with a NaN are left out; NaN, NaN where the references do not differ.
    """
    ours, theirs = forwards - backwards, reference_forwards - reference_backwards
    both = np.isfinite(ours) & np.isfinite(theirs)
    ours, theirs = ours[both], theirs[both]
    power, size = float(theirs @ theirs), float(np.linalg.norm(ours))
    if power < 1e-12:
        return float("nan"), float("nan")
    along = float(ours @ theirs)
    return (along / (size * power**0.5) if size > 1e-6 else 0.0), along / power


def main_path(seen: Observation) -> np.ndarray:
    """Centre of the largest sprite, "frame 2"; NaN where there is none."""
    return np.array([blobs[0].centre if blobs else (np.nan, np.nan) for blobs in seen.blobs])


def turning(there: Observation, back: Observation, path: np.ndarray, *, pooled: int = 4) -> tuple[float, float]:
    """Selectivity and its gain of two outputs of one seed, steered by a reference and by its time reversal.

    Velocities of the largest sprite are means over `pooled` frames, those of a latent frame, because the test is one of
    fields pooled to the model's tokens. With 1 what trembles from frame to frame counts too: the references themselves,
    encoded and decoded by the tiny's VAE, then reach 0.9 in place of 1.

    Args:
        path: of the reference, "frame 2".
    """
    paths = (main_path(there), main_path(back), path, path[::-1])
    return selectivity(*(_pooled(np.diff(p, axis=0), pooled) for p in paths))


def turning_of_points(
    there: Paths, back: Paths, reference: Paths, height: int, width: int, *, cells: int = 8, pooled: int = 4
) -> tuple[float, float]:
    """The same by tracked points: fields of cells x cells velocities, of the tiny's tokens unless told.

    Cells that show no point stand still, so that the gain stays below 1.
    """
    paths = (there, back, reference, reference[:, ::-1])
    return selectivity(*(_pooled(velocity_field(p, height, width, cells), pooled) for p in paths))


def _pooled(steps: np.ndarray, frames: int) -> np.ndarray:
    """Means over so many steps "step ..."; those that are left over fall away."""
    whole = steps[: len(steps) // frames * frames]
    return whole.reshape(-1, frames, *steps.shape[1:]).mean(1)
