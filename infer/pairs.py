"""What a comparison is asked: clips that give the motion, and captions (`captions_file.py`) to move it to."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from motionlora.data.clip import Clip, backwards, read_clip
from motionlora.data.errors import InputError, meant
from motionlora.data.manifest import MANIFESTS, Listed, account
from motionlora.data.pictures import IMAGES
from motionlora.data.say import Say, silent
from motionlora.data.sprites import Scene
from motionlora.infer.captions_file import NAMES, Asked, read_captions
from motionlora.infer.compare_settings import CompareSettings
from motionlora.infer.settings import lora_choice

VIDEOS = {".mp4", ".mov", ".m4v", ".webm", ".mkv", ".gif", ".webp"}


@dataclass(frozen=True, eq=False)
class Source:
    """A clip that gives the motion.

    Attributes:
        name: how tables call it.
        read: the clip, at the size and length that are to be made.
        content: of its pixels, `Clip.content_hash`.
        scene: the true scene, where the clip is made up.
    """

    name: str
    read: Callable[[], Clip]
    content: str
    scene: Scene | None = None

    def backwards(self) -> "Source":
        """The clip from its last frame to its first."""
        name = f"{self.name}, backwards"
        return Source(name, lambda: backwards(self.read()), backwards(self.read()).content_hash())


@dataclass(frozen=True, eq=False)
class Pair:
    """A motion and what it shall be given to.

    Attributes:
        lora: FILE or FILE:STRENGTH of the source's LoRA, "" for none.
        kind: a word that the table shows.
        target: what the caption asks for, where that is known exactly.
    """

    source: Source
    caption: str
    seeds: tuple[int, ...]
    lora: str = ""
    kind: str = ""
    target: Scene | None = None


def read_pairs(settings: CompareSettings, say: Say = print) -> list[Pair]:
    """Every pair of the captions file, with its clip; all clips are read once, so that a bad one is known at once.

    Raises:
        InputError: no such folder, file, clip or LoRA; a clip that cannot be read or is too short; an empty caption; a
            pair that stands twice.
    """
    folder, file = _places(settings)
    clips, entries = _clips(folder, settings), read_captions(file)
    if settings.benchmark is not None:  # of which clips may be missing: `benchmark_facts` tells
        entries = [entry for entry in entries if entry.clip in _names(clips)]
    paths = [_found(entry, clips, folder) for entry in entries]
    left_out = sorted(path.name for path in clips if path not in paths)
    if left_out:
        say(f"{len(left_out)} clip(s) of {folder} without a caption in {file.name} left out: {', '.join(left_out)}")
    _refuse_twins(entries, paths)
    sources: dict[Path, Source] = {}
    for path in dict.fromkeys(paths):
        content = _fitted(path, settings, say).content_hash()
        sources[path] = Source(path.name, partial(_fitted, path, settings, silent), content)
    return [
        Pair(sources[path], entry.caption, settings.seeds, _lora(entry, path, file, settings.loras), entry.kind)
        for entry, path in zip(entries, paths, strict=True)
    ]


def benchmark_facts(settings: CompareSettings) -> dict[str, str]:
    """For the head of every table: how much of the benchmark of the settings there is; nothing where there is none.

    Raises:
        InputError: as `account` and `read_captions`.
    """
    if settings.benchmark is None:
        return {}
    folder, file = _places(settings)
    names = _names(_clips(folder, settings))
    listed = [Listed(entry.clip, entry.kind, entry.place, entry.clip in names) for entry in read_captions(file)]
    return {"benchmark": account(settings.benchmark, listed)}


def clips_in(folder: Path, place: str = "*") -> list[Path]:
    """Video files, and folders of pictures, by name; `place` says where in the folder."""
    try:
        next(folder.iterdir(), None)
        inside = sorted(path for path in folder.glob(place) if not path.name.startswith("."))
    except OSError as fault:
        raise InputError(
            f"{folder} cannot be read as a folder of clips ({fault.strerror}): name one with --clips."
        ) from None
    return [
        path
        for path in inside
        if (path.is_file() and path.suffix.lower() in VIDEOS)
        or (path.is_dir() and any(picture.suffix.lower() in IMAGES for picture in path.iterdir()))
    ]


def _clips(folder: Path, settings: CompareSettings) -> list[Path]:
    """Those of the folder, or of a benchmark's own folders in it."""
    places = MANIFESTS[settings.benchmark].places if settings.benchmark else ("*",)
    return next((clips for place in places if (clips := clips_in(folder, place))), [])


def _names(clips: list[Path]) -> set[str]:
    """By which a captions file may call them."""
    return {name for path in clips for name in (path.name, path.stem)}


def _places(settings: CompareSettings) -> tuple[Path, Path]:
    if settings.clips is None:
        raise InputError("No clips were given: name the folder of the clips that give the motion with --clips.")
    if settings.captions is not None:
        return settings.clips, settings.captions
    found = [settings.clips / name for name in NAMES if (settings.clips / name).is_file()]
    if len(found) != 1:
        what = f"{len(found)} captions files" if found else "no captions file"
        raise InputError(f"{settings.clips} holds {what} ({', '.join(NAMES)}): name one with --captions.")
    return settings.clips, found[0]


def _found(entry: Asked, clips: list[Path], folder: Path) -> Path:
    """The clip that an entry names, by its name with or without suffix."""
    found = [path for path in clips if path.name == entry.clip] or [path for path in clips if path.stem == entry.clip]
    if len(found) == 1:
        return found[0]
    names = [path.name for path in clips]
    if found:
        raise InputError(
            f"{entry.place}: {entry.clip} may be {' or '.join(path.name for path in found)}: add the suffix."
        )
    raise InputError(f"{entry.place}: there is no clip {entry.clip!r} in {folder} ({meant(entry.clip, names)}).")


def _refuse_twins(entries: list[Asked], paths: list[Path]) -> None:
    seen: dict[tuple[Path, str], Asked] = {}
    for entry, path in zip(entries, paths, strict=True):
        first = seen.setdefault((path, entry.caption), entry)
        if first is not entry:
            raise InputError(f"{entry.place}: {entry.clip} has this caption already ({first.place}): keep one of them.")


def _lora(entry: Asked, path: Path, captions: Path, loras: Path | None) -> str:
    """The LoRA of an entry, from the captions file's folder on, or the one in `loras` that has the clip's name."""
    if entry.lora:
        choice = lora_choice(entry.lora)
        file = captions.parent / choice.path
        return str(file) if choice.strength is None else f"{file}:{choice.strength}"
    return lora_in(loras, path.stem)


def lora_in(loras: Path | None, name: str) -> str:
    """The LoRA of a clip of this name in a folder of them, "" where there is none."""
    places = [loras / f"{name}.safetensors", loras / name / "temporal.safetensors"] if loras else []
    return next((str(place) for place in places if place.is_file()), "")


def _fitted(path: Path, settings: CompareSettings, say: Say) -> Clip:
    wanted: dict[str, Any] = {name: getattr(settings, name) for name in ("frames", "fps", "height", "width")}
    return read_clip(path, **wanted, multiple=8, say=say)
