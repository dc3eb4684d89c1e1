"""What `generate` is asked to make: clips and their file names, LoRA files and strengths; refusals before work."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from motionlora.data.cache import replacing
from motionlora.data.errors import InputError, StorageError
from motionlora.heads.lora_file import load_lora
from motionlora.infer.settings import GenerateSettings, lora_choice

if TYPE_CHECKING:
    from motionlora.heads.lora import MotionLora

SLUG_LENGTH = 60
"""Bytes of a caption in a file name."""


@dataclass(frozen=True, eq=False)
class LoadedLora:
    """A LoRA file, read, and how strongly it acts."""

    path: Path
    strength: float
    lora: MotionLora

    def facts(self) -> dict[str, Any]:
        """For the JSON beside a clip: the file, its bytes' hash, its header."""
        digest = sha256(self.path.read_bytes()).hexdigest()
        lora = {"stage": self.lora.stage, "rank": self.lora.rank, "alpha": self.lora.alpha}
        return {"file": str(self.path), "sha256": digest, "strength": self.strength, **lora} | {
            "provenance": dict(self.lora.provenance)
        }


@dataclass(frozen=True)
class Order:
    """One clip to be made."""

    caption: str
    seed: int
    path: Path


def ordered(settings: GenerateSettings) -> list[Order]:
    """What to make and where it goes.

    Raises:
        InputError: no caption, two clips of one name, or an `out` that is no folder.
    """
    if not settings.caption:
        raise InputError("No caption was given: say what the clips shall show with --caption.")
    if settings.out.exists() and not settings.out.is_dir():
        raise InputError(f"{settings.out} is a file, but clips go into a folder: choose another --out.")
    orders = [
        Order(caption, seed, settings.out / f"{slug(caption)}-seed{seed}.{settings.suffix}")
        for caption in settings.caption
        for seed in settings.seed
    ]
    taken: dict[str, Order] = {}
    for order in orders:
        name = order.path.name.casefold()  # some disks take Name and name for one
        if other := taken.get(name):
            what = f"{order.caption!r} with seed {order.seed}"
            came = f"{what} came twice" if other == order else f"{other.caption!r} and {what} would be one file"
            raise InputError(f"{came}, {order.path.name}: make each clip once, or each in a call with its own --out.")
        taken[name] = order
    return orders


def slug(caption: str) -> str:
    """A caption as part of a file name, letters of any script; a long one is cut and told apart by its hash."""
    words = re.sub(r"[\W_]+", "-", caption.lower()).strip("-") or "clip"
    if len(words.encode()) <= SLUG_LENGTH:
        return words
    cut = words.encode()[:SLUG_LENGTH].decode(errors="ignore").rstrip("-")
    return f"{cut}-{sha256(caption.encode()).hexdigest()[:6]}"


def loaded_lora(text: str, default: float) -> LoadedLora:
    """The LoRA of FILE or FILE:STRENGTH; without a strength its header's own `motion.strength`, else `default`.

    Raises:
        InputError: no such file, or not a LoRA.
    """
    choice = lora_choice(text)
    if not choice.path.is_file():
        raise InputError(f"There is no LoRA file {choice.path}: give FILE or FILE:STRENGTH.")
    lora = load_lora(choice.path)
    recommended = lora.provenance.get("strength")
    strength = next(value for value in (choice.strength, recommended, default) if isinstance(value, int | float))
    return LoadedLora(choice.path, float(strength), lora)


def chosen_device(name: str) -> torch.device:
    """The device of a name, a GPU for `auto` where there is one; InputError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"Device {name!r} cannot be used ({reason}): choose auto, cpu or cuda.") from None


def open_folder(folder: Path) -> None:
    """Makes the folder; StorageError where that is impossible or it cannot be written to, before any clip is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / ".writable") as draft:
            draft.touch()
        (folder / ".writable").unlink()
    except OSError as fault:
        raise StorageError(f"{folder} cannot be written to ({fault.strerror}): choose another --out.") from fault
