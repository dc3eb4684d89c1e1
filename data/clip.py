"""Clips: read from any video, animation or folder of pictures, written so that browsers play them."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from motionlora.data.cache import replacing
from motionlora.data.errors import InputError
from motionlora.data.frames import Fit
from motionlora.data.pictures import write_animation
from motionlora.data.reading_process import asked
from motionlora.data.say import Say, silent
from motionlora.data.video import write_video

SUFFIXES = (".mp4", ".gif", ".webp")


@dataclass(frozen=True, eq=False)
class Clip:
    """Moving pictures in memory.

    Attributes:
        pixels: uint8 RGB, "frame height width 3".
        fps: frames a second, above 0.
        caption: what is to be seen; "" where nobody said.
    """

    pixels: UInt8[np.ndarray, "frame height width 3"]
    fps: float
    caption: str

    @property
    def frames(self) -> int:
        return self.pixels.shape[0]

    @property
    def height(self) -> int:
        return self.pixels.shape[1]

    @property
    def width(self) -> int:
        return self.pixels.shape[2]

    def content_hash(self) -> str:
        """sha256 hex digest of the pixels and their shape; rate and caption do not count."""
        digest = hashlib.sha256(repr(self.pixels.shape).encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.hexdigest()


def backwards(clip: Clip) -> Clip:
    """The clip from its last frame to its first: the reference whose motion is the opposite in time."""
    return replace(clip, pixels=np.ascontiguousarray(clip.pixels[::-1]))


def mirrored(clip: Clip) -> Clip:
    """The clip with left and right exchanged."""
    return replace(clip, pixels=np.ascontiguousarray(clip.pixels[:, :, ::-1]))


def read_clip(
    path: str | Path,
    *,
    frames: int | None = None,
    fps: float | None = None,
    height: int | None = None,
    width: int | None = None,
    multiple: int = 16,
    fit: Fit = "crop",
    caption: str | None = None,
    say: Say = print,
) -> Clip:
    """The clip in a video file, an animated GIF or WebP, or a folder of numbered pictures, as a model takes it.

    Frames are those on screen at 0, 1/fps, 2/fps ... seconds, so the speed is the clip's own whatever its rate. Pixels
    are made square and turned upright, then cropped or letterboxed to `height` x `width`.

    Args:
        frames: how many, 4k+1; None takes as many as the clip allows.
        fps: the wanted rate; None keeps the clip's. A folder has no rate: it is taken as shot at `fps`, or 16.
        height, width: multiples of `multiple`; None takes the largest that fits.
        caption: None reads the `.txt` beside the clip; "" where there is none.
        say: called with each line that the user should see: what was taken and what was cut.

    Raises:
        InputError: not a readable, whole clip, shorter than asked, an impossible size or count, or above a limit
            (`motionlora.data.limits`). The clip is read in a process of its own: a decoder that dies is refused, too.
    """
    wanted = {"frames": frames, "fps": fps, "height": height, "width": width, "multiple": multiple, "fit": fit}
    facts, pixels = asked("read", Path(path), say, **wanted, caption=caption)
    assert pixels is not None
    return Clip(pixels, facts["fps"], facts["caption"])


def write_clip(clip: Clip, path: str | Path, *, comment: str = "", exact: bool = False) -> None:
    """Writes the clip by suffix: `.mp4` (H.264, yuv420p, plays in browsers), `.gif` or `.webp`, whole or not at all.

    `comment` goes into the file's own metadata. MP4 pixels come back only nearly equal; with `exact`, which is for MP4
    alone, they come back as they were, and browsers do not play the file.

    Raises:
        InputError: another suffix, or an odd height or width for MP4.
        StorageError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path} asks for '{path.suffix}', but clips are written as {', '.join(SUFFIXES)}: rename it.")
    if path.suffix.lower() != ".mp4":
        if exact:
            raise InputError(f"{path} was to keep every pixel, which is written as .mp4: rename it.")
        with replacing(path) as draft:
            write_animation(clip.pixels, clip.fps, draft, comment)
        return
    if clip.height % 2 or clip.width % 2:
        raise InputError(
            f"{path} would be {clip.width} x {clip.height} pixels, but MP4 needs even sides: crop it to "
            f"{clip.width - clip.width % 2} x {clip.height - clip.height % 2}, or write .gif or .webp."
        )
    with replacing(path) as draft:
        write_video(clip.pixels, clip.fps, draft, comment, exact=exact)


def describe(path: str | Path, fps: float | None = None) -> dict[str, Any]:
    """What a file or folder holds, for `motionlora clip inspect`; decodes all of it, so damage is found.

    Keys: path, kind, reader, frames, fps, rate ("constant" or "variable"), seconds, height, width (as seen, upright),
    pixel_aspect (width over height), rotation (degrees, counter-clockwise), frames_4k1 (the most that a model can take
    at this rate), caption. `fps` is the rate of a folder, which knows none.

    Raises:
        InputError: as `read_clip`.
    """
    return asked("describe", Path(path), silent, fps=fps)[0]
