"""What of a training run may leave the machine: captions and paths unless they are private. Imports no torch."""

from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from motionlora.data.clip import Clip
    from motionlora.train.settings import TrainSettings

PATHS = ("clip", "clips", "model", "out", "cache", "resume")
"""Settings that name places of this machine; the header of a LoRA file never has them."""
WORDS = ("caption", "validation.captions", "validation.negative")
"""Settings that a user wrote in words."""


def told_caption(clip: "Clip", private: bool) -> str:
    """What files say of the caption: itself, or a mark by which a run knows it again that nobody can guess.

    The mark hashes the caption together with the pixels: without the clip, guesses cannot be tried.
    """
    if not private:
        return clip.caption
    return "private " + sha256(clip.pixels.tobytes() + clip.caption.encode()).hexdigest()[:16]


def shared(tree: Mapping[str, Any], private: bool) -> dict[str, Any]:
    """Settings as plain values, in a private run without captions and paths, for files and trackers others may see."""
    if not private:
        return dict(tree)
    hidden = {name.partition(".")[::2] for name in (*PATHS, *WORDS)}
    kept = {name: value for name, value in tree.items() if (name, "") not in hidden}
    inner = {name: {part for outer, part in hidden if outer == name and part} for name in kept}
    return {
        name: {part: each for part, each in value.items() if part not in inner[name]} if inner[name] else value
        for name, value in kept.items()
    }


def needed_again(settings: "TrainSettings") -> list[str]:
    """Command line words for what `settings.yaml` leaves out of a private run, without `resume`."""
    words: list[str] = []
    for name in (*PATHS, *WORDS) if settings.private else ():
        value: Any = settings
        default: Any = type(settings)()
        for part in name.split("."):
            value, default = getattr(value, part), getattr(default, part)
        if value != default and name != "resume":
            words += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words
