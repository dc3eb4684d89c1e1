"""Which frames of a clip are taken and how each is fitted to the model: time and geometry, no video library.

Times are seconds from the first frame, rates are frames a second, sizes are pixels. Sizes and boxes speak of the frame
as it is stored after rotation; `shown` sizes are those with square pixels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from motionlora.data.errors import InputError
from motionlora.data.limits import limits
from motionlora.data.say import Say

Frame = UInt8[np.ndarray, "height width 3"]
Fit = Literal["crop", "letterbox"]
GRAIN = 1e-6
"""Seconds by which two times may differ and still be the same moment, beyond the file's own clock."""


class Unreadable(Exception):
    """A reader could not open or decode a file; another one may."""


@dataclass(frozen=True, eq=False)
class Footage:
    """Moving pictures opened for reading.

    Attributes:
        name: how messages call it.
        stamps: when each frame is first shown, seconds, ascending from 0.
        seconds: when the last frame ends.
        clock: seconds of one tick of the file's own clock; stamps are no more exact than that.
        height, width: of a frame as readers give it, rotated but not yet with square pixels.
        aspect: width of a pixel over its height.
        rotation: degrees counter-clockwise that readers have already applied.
        kind: codec or kind of picture.
        readers: name and function, best first; a function yields the frames at the given ascending indexes.
        check: decodes up to the given time and raises InputError where the file is damaged.
        clear: whether the rate is written in the file, or taken from the caller.
    """

    name: str
    stamps: Float[np.ndarray, " frames"]
    seconds: float
    clock: float
    height: int
    width: int
    aspect: float
    rotation: int
    kind: str
    readers: tuple[tuple[str, Callable[[Sequence[int]], Iterator[Frame]]], ...]
    check: Callable[[float], None]

    @property
    def frames(self) -> int:
        return len(self.stamps)

    def rate(self) -> tuple[float, bool]:
        """The rate that explains the stamps, and whether one rate does.

        Even means that a rate explains every stamp to a tick of the file's clock; whole and half rates and 1000/1001 of
        whole ones come first. An uneven clip that drifts by less than half a frame has its mean rate, any other that of
        its median gap, which a phone's dropped frames do not move.
        """
        if self.frames < 2:
            return (round(1 / self.seconds, 3) or 1 / self.seconds if self.seconds > 0 else 16.0), True
        order = np.arange(self.frames)
        mean = (self.frames - 1) / float(self.stamps[-1] - self.stamps[0])
        for rate in (round(mean), round(mean * 1.001) / 1.001, round(mean * 2) / 2, mean):
            if rate > 0 and np.abs(self.stamps - order / rate).max() <= max(self.clock, GRAIN) * 1.001:
                return float(rate), True
        if np.abs(self.stamps * mean - order).max() < 0.5:
            return mean, False
        return float(1 / np.median(np.diff(self.stamps))), False

    def moments(self, fps: float) -> int:
        """How many of the moments 0, 1/fps, 2/fps ... lie before the end."""
        rate, even = self.rate()
        regular = even and abs(self.frames / rate - self.seconds) <= 2 * self.clock + GRAIN
        end = self.frames / rate if regular else self.seconds - self.clock
        return max(1, math.ceil((end - GRAIN) * fps))

    def shown_at(self, times: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Index of the last frame that is shown at or before each time; an even clip's stamps are freed of rounding."""
        rate, even = self.rate()
        stamps, late = (np.arange(self.frames) / rate, GRAIN) if even else (self.stamps, min(self.clock, 1e-3))
        return np.maximum(np.searchsorted(stamps, times + max(late, GRAIN), side="right") - 1, 0)


def taken(
    footage: Footage, frames: int | None, fps: float | None, say: Say
) -> tuple[Int[np.ndarray, " frames"], float]:
    """Index of the frame shown at each wanted moment (the last one at or before it), and the rate.

    `frames` None takes the largest 4k+1 that the footage allows; `fps` None takes the footage's own rate.

    Raises:
        InputError: frames are not 4k+1, the rate is no positive number, or the footage is shorter than asked.
    """
    fps = checked_rate(footage.rate()[0] if fps is None else fps)
    most = footage.moments(fps)
    count = most - (most - 1) % 4 if frames is None else checked_frames(frames)
    if count > most:
        raise InputError(
            f"{footage.name} is shorter than asked: {count} frames at {fps:.4g} fps last {count / fps:.2f} s "
            f"and it lasts {footage.seconds:.2f} s; ask for {most - (most - 1) % 4} frames, or for at least "
            f"{math.ceil(10 * count / footage.seconds - GRAIN) / 10:g} fps."
        )
    limits().refuse_over("frames", count, f"{{}} frames would be taken of {footage.name}", "ask for fewer")
    chosen = footage.shown_at(np.arange(count) / fps)
    _say_time(footage, chosen, fps, say)
    return chosen, fps


def checked_rate(fps: float) -> float:
    """`fps` itself where a clip can have that rate; else InputError."""
    if not 0 < fps <= 1000:
        raise InputError(f"{fps:g} frames a second asked, which must be above 0 and at most 1000: give another fps.")
    return fps


def checked_frames(frames: int) -> int:
    """`frames` itself where it is 4k+1, as the video VAE needs: it silently drops the others.

    Raises:
        InputError: it is not; names the nearest numbers that are.
    """
    if frames >= 1 and frames % 4 == 1:
        return frames
    below = frames - (frames - 1) % 4
    near = f"{below} or {below + 4}" if below >= 1 else "1"
    raise InputError(f"{frames} frames asked, but the model takes 4k+1 (1, 5, 9 ...): ask for {near}.")


def check_picture(name: str, height: int, width: int) -> None:
    """InputError where a frame of this size, known from a header, is above the limit and must not be decoded."""
    what = f"{name} is {width} x {height}, {{}} pixels a frame"
    limits().refuse_over("pixels", height * width, what, "make it smaller")


@dataclass(frozen=True)
class Window:
    """How one frame becomes the model's: the box taken of it, the size of that box's picture, the canvas around it.

    `box` is left, top, right, bottom in pixels of the stored frame; the picture lies in the middle of the canvas.
    """

    box: tuple[float, float, float, float]
    picture_height: int
    picture_width: int
    height: int
    width: int

    def __call__(self, frame: Frame) -> Frame:
        size = (self.picture_width, self.picture_height)
        image = Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC, self.box)
        if size == (self.width, self.height):
            return np.asarray(image)
        canvas = np.zeros((self.height, self.width, 3), np.uint8)
        top, left = (self.height - self.picture_height) // 2, (self.width - self.picture_width) // 2
        canvas[top : top + self.picture_height, left : left + self.picture_width] = np.asarray(image)
        return canvas


def fitted(footage: Footage, height: int | None, width: int | None, multiple: int, fit: Fit, say: Say) -> Window:
    """The window that takes the footage to `height` x `width`, both multiples of `multiple`; says what is cut.

    A side that is None becomes the largest multiple that fits; both None keep the scale. `crop` fills the canvas from
    the centre, `letterbox` keeps all and adds black bars. Pixels come out square: the longer side of a pixel is kept,
    so nothing is lost on the way.

    Raises:
        InputError: a side is no multiple, or the footage is smaller than one multiple.
    """
    high = footage.height * max(1.0, 1 / footage.aspect)
    wide = footage.width * max(1.0, footage.aspect)
    height, width, same = _canvas(footage.name, high, wide, height, width, multiple)
    ratios = (height / high, width / wide)
    if fit == "letterbox":
        scale = min(ratios)
        picture = min(height, max(1, round(high * scale))), min(width, max(1, round(wide * scale)))
        kept = high, wide
    else:
        scale = 1.0 if same else max(ratios)
        picture = height, width
        kept = min(high, height / scale), min(wide, width / scale)
    top, left = (high - kept[0]) / 2, (wide - kept[1]) / 2
    # Without scaling the crop starts on a whole pixel, so that no pixel is changed.
    top, left = (math.floor(top), math.floor(left)) if scale == 1 else (top, left)
    down, across = footage.height / high, footage.width / wide
    right, bottom = min((left + kept[1]) * across, footage.width), min((top + kept[0]) * down, footage.height)
    window = Window((left * across, top * down, right, bottom), *picture, height, width)
    _say_size(footage, window, high, wide, scale, say)
    return window


def _canvas(
    name: str, high: float, wide: float, height: int | None, width: int | None, multiple: int
) -> tuple[int, int, bool]:
    """Height and width of the canvas, and whether both follow from the footage."""
    for side, value in (("height", height), ("width", width)):
        if value is not None and (value < multiple or value % multiple):
            below = max(value - value % multiple, 0)
            near = f"{below} or {below + multiple}" if below else f"{multiple}"
            raise InputError(f"{side} {value} is not a multiple of {multiple}, which the model needs: use {near}.")
    down = math.floor((high if width is None else width * high / wide) / multiple + GRAIN) * multiple
    across = math.floor((wide if height is None else height * wide / high) / multiple + GRAIN) * multiple
    chosen = (height or down, width or across)
    if min(chosen) < multiple:
        raise InputError(
            f"{name} is {wide:.0f} x {high:.0f} pixels, less than the {multiple} that the model needs on a side: "
            f"give height and width to enlarge it."
        )
    return *chosen, height is None and width is None


def _say_time(footage: Footage, chosen: Int[np.ndarray, " frames"], fps: float, say: Say) -> None:
    own, even = footage.rate()
    rate = f"{own:.4g} fps" if even else f"a variable rate around {own:.4g} fps"
    used = min(len(chosen) / fps, footage.seconds)
    say(
        f"{footage.name}: {footage.frames} frames at {rate}, {footage.seconds:.2f} s; takes {len(chosen)} frames at "
        f"{fps:.4g} fps by their time stamps, the first {used:.2f} s at the clip's own speed."
    )
    repeats = len(chosen) - len(np.unique(chosen))
    if repeats:
        say(f"{footage.name}: {repeats} of the frames are repeats, so the motion stutters; a lower fps helps.")


def _say_size(footage: Footage, window: Window, high: float, wide: float, scale: float, say: Say) -> None:
    left, top, right, bottom = window.box
    across, down = wide / footage.width, high / footage.height
    cuts = {"left": left * across, "right": wide - right * across, "top": top * down, "bottom": high - bottom * down}
    bars = {"rows": window.height - window.picture_height, "columns": window.width - window.picture_width}
    parts = [f"cuts {value:.0f} pixels {side}" for side, value in cuts.items() if value >= 0.5]
    parts += [f"adds {value} black {side}" for side, value in bars.items() if value]
    parts += [f"scales by {scale:.3g}"] if abs(scale - 1) > 1e-3 else []
    parts += [f"makes pixels square from {footage.aspect:.4g}:1"] if footage.aspect != 1 else []
    if parts:
        sizes = f"{footage.width} x {footage.height} becomes {window.width} x {window.height}"
        say(f"{footage.name}: {sizes} ({', '.join(parts)}).")
