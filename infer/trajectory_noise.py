"""A start whose coarse noise moves with boxes, so that what grows out of it tends to move with them.

Letters: b clip, c latent channel, f latent frame, h, w, o object.

Source: the noise of FreeTraj, arXiv 2406.16863, as in its public script: in every frame the box holds the same noise,
and all frequencies but the low ones are those of the noise as it was. Ours: the noise of a box is the clip's own in the
first frame, so that a seed stays a seed, and the filter is sharp, so that the deviation stays 1 wherever both parts are
the same noise, and where they are not. At the script's cut in time, 0.1, a clip of 13 latent frames keeps of the moving
noise its mean over time alone; a higher cut keeps more of the motion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from motionlora.infer.points import Boxes, by_latent_frame, read_boxes
from motionlora.infer.track_points import Tracks

if TYPE_CHECKING:
    from pathlib import Path

    from motionlora.heads.backbone import Backbone, Latent


@dataclass(frozen=True)
class Window:
    """A box in one latent frame, in latent cells; its size is that of the object's first one."""

    top: int
    left: int
    height: int
    width: int

    @property
    def cells(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


def moving_noise(noise: Latent, model: Backbone, file: Path, cut: tuple[float, float]) -> Latent:
    """The noise of a walk of that model, along the boxes of a file.

    Raises:
        InputError: the file does not fit.
    """
    (frames, height, width), factor, every = noise.shape[2:], model.spatial_factor, model.frame_multiple
    boxes = read_boxes(file, ((frames - 1) * every + 1, height * factor, width * factor))
    return noise_along(noise, boxes, factor, every, cut)


def noise_along(noise: Latent, boxes: Boxes, factor: int, every: int, cut: tuple[float, float]) -> Latent:
    """The noise, its low frequencies being those of noise that moves with the boxes.

    Args:
        factor, every: pixels of a latent cell and frames of a latent frame.
        cut: in space and in time, as shares of the highest frequency (script: 0.25 and 0.1); 0 keeps nothing.
    """
    moving = noise.clone()
    for windows in windows_of(boxes, noise.shape[2:], factor, every):
        seen = [(frame, window) for frame, window in enumerate(windows) if window]
        if seen:
            rows, columns = seen[0][1].cells
            patch = noise[:, :, seen[0][0], rows, columns]
            for frame, window in seen:
                rows, columns = window.cells
                moving[:, :, frame, rows, columns] = patch
    sides = (-3, -2, -1)
    waves = torch.fft.fftn((moving - noise).float(), dim=sides)
    return noise + torch.fft.ifftn(waves * low_pass(noise.shape[2:], cut).to(noise.device), dim=sides).real.to(noise)


def low_pass(size: Sequence[int], cut: tuple[float, float]) -> Float[Tensor, "f h w"]:
    """1 at frequencies whose distance from 0, in units of the cut, is at most 1, else 0; nothing passes a cut of 0."""
    if not all(cut):
        return torch.zeros(tuple(size))
    space, time = cut
    shares = [torch.fft.fftfreq(length) * 2 / share for length, share in zip(size, (time, space, space), strict=True)]
    along_time, down, across = torch.meshgrid(*shares, indexing="ij")
    return (along_time.square() + down.square() + across.square() <= 1).float()


def windows_of(boxes: Boxes, size: Sequence[int], factor: int, every: int) -> list[list[Window | None]]:
    """Of each object in each latent frame; None where it is not seen. Moved as a whole into the frame."""
    tracks = by_latent_frame(boxes.tracks, every)
    sides = by_latent_frame(Tracks(boxes.sizes, boxes.tracks.visible), every).positions / factor
    middles = (tracks.positions + 0.5) / factor
    found: list[list[Window | None]] = []
    for way, lengths, visible in zip(middles, sides, tracks.visible, strict=True):
        first = int(np.argmax(visible))
        side = np.clip(np.rint(lengths[first]), 1, size[1:]).astype(int)
        corners = np.clip(np.rint(way - side / 2), 0, np.array(size[1:]) - side).astype(int)
        places = [Window(int(top), int(left), int(side[0]), int(side[1])) for top, left in corners]
        found.append([place if seen else None for place, seen in zip(places, visible, strict=True)])
    return found
