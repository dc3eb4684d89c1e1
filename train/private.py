"""What of a run may leave the machine: captions and paths unless they are private, tokens and keys never.

Imports no torch: the command line uses it for every sentence that it prints.
"""

import os
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motionlora.data.errors import InputError

if TYPE_CHECKING:
    from motionlora.data.clip import Clip
    from motionlora.train.settings import TrainSettings

PATHS = ("clip", "model", "out", "cache", "resume")
"""Settings that name places of this machine; the header of a LoRA file never has them."""
WORDS = ("caption", "validation.captions", "validation.negative")
"""Settings that a user wrote in words."""
SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)
"""How variables of the environment are called whose values nobody may see: HF_TOKEN, WANDB_API_KEY."""
SHORTEST = 8
"""Characters of a secret; shorter values (`1`, `none`) are settings, and hiding them would maim ordinary words."""


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


def refuse_secrets(tree: Mapping[str, Any], environ: Mapping[str, str] = os.environ, prefix: str = "--") -> None:
    """InputError naming a setting that holds a token or key of the environment: it would be written into files."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            refuse_secrets(value, environ, f"{prefix}{name}.")
        elif found := next((key for key, secret in secrets(environ).items() if secret in str(value)), None):
            raise InputError(
                f"{prefix}{name} holds the value of {found}, and settings are written into files: take it out; "
                f"libraries read {found} from the environment by themselves."
            )


def without_secrets(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with `<HF_TOKEN>` in place of that variable's value, and so on: errors of libraries may quote it."""
    for name, secret in secrets(environ).items():
        text = text.replace(secret, f"<{name}>")
    return text


def secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Variable -> value of all tokens and keys, the longest value first: one may be part of another."""
    found = {name: value for name, value in environ.items() if SECRET.search(name) and len(value) >= SHORTEST}
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def model_name(name: str, source: str | Path, private: bool) -> str:
    """What files call the model: its name, or in a private run nothing of a folder of this machine."""
    return "a local folder" if private and source != "tiny" and Path(source).exists() else name
