"""What `generate` is asked to make: clips and their file names, LoRA files and strengths; refusals before work."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from motionlora.data.cache import replacing
from motionlora.data.errors import InputError, StorageError
from motionlora.heads.lora import load_into
from motionlora.heads.lora_file import load_lora
from motionlora.heads.settings import Expert
from motionlora.infer.settings import GenerateSettings, SampleSettings, lora_choice

if TYPE_CHECKING:
    from motionlora.heads.backbone import Backbone
    from motionlora.heads.lora import MotionLora

SLUG_LENGTH = 60
"""Bytes of a caption in a file name."""


@dataclass(frozen=True, eq=False)
class LoadedLora:
    """A LoRA file, read, how strongly it acts, and on which expert of a model of two."""

    path: Path
    strength: float
    lora: MotionLora
    expert: Expert | None = None

    def __str__(self) -> str:
        return f"{self.path.name} at {self.strength:g}" + (f" on the {self.expert}-noise expert" if self.expert else "")

    def facts(self) -> dict[str, Any]:
        """For the JSON beside a clip: the file, its bytes' hash, its header."""
        digest = sha256(self.path.read_bytes()).hexdigest()
        lora = {"stage": self.lora.stage, "rank": self.lora.rank, "alpha": self.lora.alpha}
        lora |= {"expert": self.expert} if self.expert else {}
        return {"file": str(self.path), "sha256": digest, "strength": self.strength, **lora} | {
            "provenance": dict(self.lora.provenance)
        }

    @property
    def until(self) -> float:
        """The noise level below which it was not trained and shall rest, by its header; 0 where that says nothing."""
        return float(self.lora.provenance.get("until", 0.0))

    def refuse_unplaced(self, boundary: float, model: str) -> None:
        """InputError where it has no place on a model whose experts have this boundary (0 for one network)."""
        if self.expert and not boundary:
            raise InputError(
                f"{self.path} is for the {self.expert}-noise expert of a model of two, and {model} is one network: "
                "choose the model that it was made for, or leave out what stands behind the @."
            )
        if boundary and not self.expert:
            raise InputError(
                f"{self.path} does not say on which of the two experts of {model} it shall act: give {self.path}@high "
                f"or {self.path}@low, or both."
            )

    def load_onto(self, model: Backbone, name: str) -> None:
        """Adds it to the model as the adapter `name`; of two experts it acts on its own alone.

        Raises:
            InputError: it does not fit the model, or has no place on it.
        """
        self.refuse_unplaced(model.experts.boundary, model.name)
        load_into(model.transformer, self.lora, name, self.strength)
        if self.expert:
            model.experts.place(name, self.expert, self.strength)


def settled(sample: SampleSettings, loras: Sequence[LoadedLora]) -> SampleSettings:
    """The settings of a walk with these LoRAs, `lora_until` as asked or else as their files recommend.

    Raises:
        InputError: the files recommend different levels, and none was asked for.
    """
    if sample.lora_until is not None:
        return sample
    wanted = {lora.until for lora in loras} or {0.0}
    if len(wanted) > 1:
        told = ", ".join(f"{lora.path.name} rests below noise {lora.until:g}" for lora in loras)
        raise InputError(f"{told}, but all rest together: set --sample.lora-until, 0 to let them act to the end.")
    return sample.model_copy(update={"lora_until": wanted.pop()})


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
    """The LoRA of a choice (`lora_choice`); without a strength its header's own `motion.strength`, else `default`.

    Raises:
        InputError: no such file, not a LoRA, one of the other expert than the one that was asked for, or a header
            with an impossible noise level.
    """
    choice = lora_choice(text)
    if not choice.path.is_file():
        raise InputError(f"There is no LoRA file {choice.path}: give FILE or FILE:STRENGTH.")
    lora = load_lora(choice.path)
    recommended = lora.provenance.get("strength")
    strength = next(value for value in (choice.strength, recommended, default) if isinstance(value, int | float))
    own = lora.provenance.get("expert")
    if own not in (None, *get_args(Expert)):
        raise InputError(f"{choice.path} names the expert {own!r:.80} in its header, and there are high and low only.")
    if own and choice.expert not in (None, own):
        raise InputError(
            f"{choice.path} is of the {own}-noise expert by its header, and {choice.expert} was asked for: leave "
            f"@{choice.expert} out, or choose the other file."
        )
    until = lora.provenance.get("until", 0.0)
    if not isinstance(until, int | float) or not 0 <= until <= 1:
        raise InputError(f"{choice.path} says in its header that it rests below noise {until!r:.80}: that is 0 to 1.")
    return LoadedLora(choice.path, float(strength), lora, choice.expert or own)


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
