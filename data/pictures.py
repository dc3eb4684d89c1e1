"""Clips kept as pictures: reads folders of numbered images and animated WebP, writes GIF and WebP; by Pillow."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from motionlora.data.errors import InputError
from motionlora.data.frames import GRAIN, Footage, Frame, Unreadable, check_picture, checked_rate
from motionlora.data.limits import MB, limits
from motionlora.data.say import Say

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
FOLDER_FPS = 16.0
"""The rate that Wan 2.1 was trained at, taken for a folder where the caller names none."""
DAMAGE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises on broken pictures; SyntaxError is its word for a broken PNG."""


def open_folder(folder: Path, fps: float | None, say: Say) -> Footage:
    """The pictures of a folder in natural order (2 before 10), shown at `fps`, or 16 a second where that is None.

    Raises:
        InputError: no pictures, pictures of different sizes, one that cannot be read, or a rate that is not above 0.
    """
    paths = sorted((path for path in folder.iterdir() if _is_picture(path)), key=_natural)
    if not paths:
        raise InputError(f"{folder} holds no pictures ({', '.join(IMAGES)}): name a folder that does, or a video.")
    rate = FOLDER_FPS if fps is None else checked_rate(fps)
    if fps is None:
        say(f"{folder}: pictures have no rate, taken as {FOLDER_FPS:g} fps; if they were shot at another, give it, or "
            "the clip's speed changes.")  # fmt: skip
    limits().refuse_over("frames", len(paths), f"{folder} holds {{}} pictures", "keep those that are meant")
    _say_gaps(folder, paths, say)
    sizes = [_size(path) for path in paths]
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            raise InputError(
                f"{path} is {size[0]} x {size[1]} pixels and {paths[0].name} is {sizes[0][0]} x {sizes[0][1]}: "
                "make all pictures of a clip one size."
            )
    stamps = np.arange(len(paths)) / rate
    return _footage(folder, "pictures", stamps, len(paths) / rate, sizes[0], partial(_load, paths))


def open_animation(path: Path) -> Footage:
    """An animated WebP, which no video library reads; each picture lasts as long as the file says.

    Raises:
        InputError: the file is damaged, or a single picture.
    """
    try:
        with Image.open(path) as image:
            check_picture(str(path), image.height, image.width)
            lengths, count = [], getattr(image, "n_frames", 1)
            limits().refuse_over("frames", count, f"{path} has {{}} frames", "cut it to what is meant")
            for index in range(count):
                image.seek(index)
                image.load()
                lengths.append(max(float(image.info.get("duration", 0)), 1.0) / 1000)
            size = image.size
    except InputError:
        raise
    except (*DAMAGE, EOFError) as fault:
        raise InputError(f"{path} is damaged ({fault}): export it again.") from fault
    if len(lengths) < 2:
        raise InputError(f"{path} is a single picture, not a clip: name a video, or a folder of numbered pictures.")
    ends = np.cumsum(lengths)
    return _footage(path, "webp", np.concatenate([[0.0], ends[:-1]]), float(ends[-1]), size, partial(_seek, path), 1e-3)


def write_animation(pixels: UInt8[np.ndarray, "frame height width 3"], fps: float, path: Path, comment: str) -> None:
    """Writes GIF or WebP by suffix, endlessly repeating; `comment` becomes GIF's comment or WebP's Exif description.

    Both count time in whole ticks (10 ms, 1 ms): each picture starts at the last tick before its moment, so the clip as
    a whole keeps its speed, and reading at `fps` finds every picture.
    """
    gif = path.suffix.lower() == ".gif"
    tick = 10 if gif else 1
    starts = np.floor(np.arange(len(pixels) + 1) * 1000 / fps / tick + 1e-6).astype(int) * tick
    lengths = [max(int(length), tick) for length in np.diff(starts)]
    first, *rest = [Image.fromarray(np.ascontiguousarray(frame)) for frame in pixels]
    exif = Image.Exif()
    exif[0x010E] = comment
    extra: dict[str, Any] = {"comment": comment.encode()} if gif else {"exif": exif, "quality": 90, "method": 2}
    first.save(path, save_all=True, append_images=rest, duration=lengths, loop=0, **extra)


def _footage(
    path: Path,
    kind: str,
    stamps: np.ndarray,
    seconds: float,
    size: tuple[int, int],
    read: Callable[[Sequence[int]], Iterator[Frame]],
    clock: float = 0.0,
) -> Footage:
    width, height = size
    return Footage(
        name=str(path),
        stamps=stamps,
        seconds=seconds,
        clock=clock,
        height=height,
        width=width,
        aspect=1.0,
        rotation=0,
        kind=kind,
        readers=(("Pillow", read),),
        check=partial(_check, path, stamps, read),
    )


def _check(path: Path, stamps: np.ndarray, read: Callable[[Sequence[int]], Iterator[Frame]], until: float) -> None:
    """Reads every picture up to a time, letting each go."""
    try:
        for _ in read(np.flatnonzero(stamps <= until + GRAIN).tolist()):
            pass
    except Unreadable as fault:
        raise InputError(f"{path} is damaged ({fault}): copy it again.") from fault


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in IMAGES and not path.name.startswith(".") and path.is_file()


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts = re.findall(r"\d+|\D+", path.stem.lower())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _say_gaps(folder: Path, paths: Sequence[Path], say: Say) -> None:
    """Says where the numbers of the pictures jump: a missing picture is a jump of the motion."""
    numbers = [int(found[-1]) for path in paths if (found := re.findall(r"\d+", path.stem))]
    steps = np.diff(numbers)
    if len(numbers) == len(paths) and len(steps) and (steps != steps.min()).any():
        at = int(np.argmax(steps != steps.min()))
        say(f"{folder}: numbers jump from {paths[at].name} to {paths[at + 1].name}; the motion will jump there too.")


def _size(path: Path) -> tuple[int, int]:
    """Width and height as seen, from the header."""
    try:
        limits().refuse_over("file_mb", path.stat().st_size / MB, f"{path} has {{}} MB", "make it smaller")
        with Image.open(path) as image:
            check_picture(str(path), image.height, image.width)
            if image.mode[0] in "IF":
                raise InputError(f"{path} has more than 8 bits a channel ({image.mode}): save it as 8-bit RGB or grey.")
            turned = image.getexif().get(0x0112, 1) >= 5
            return (image.height, image.width) if turned else image.size
    except UnidentifiedImageError as fault:
        raise InputError(f"{path} is not a picture that can be read: export it again.") from fault
    except InputError:
        raise
    except DAMAGE as fault:
        raise InputError(f"{path} cannot be read ({fault}): check its permissions or export it again.") from fault


def _load(paths: Sequence[Path], indexes: Sequence[int]) -> Iterator[Frame]:
    for index in indexes:
        try:
            with Image.open(paths[index]) as image:
                frame = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except DAMAGE as fault:
            raise Unreadable(f"{paths[index].name}: {fault}") from fault
        yield frame


def _seek(path: Path, indexes: Sequence[int]) -> Iterator[Frame]:
    try:
        with Image.open(path) as image:
            for index in indexes:
                image.seek(index)
                yield np.asarray(image.convert("RGB"))
    except (*DAMAGE, EOFError) as fault:
        raise Unreadable(str(fault)) from fault
