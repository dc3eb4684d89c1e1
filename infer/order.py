"""What `generate` is asked to make: clips and their file names, LoRA files and strengths; refusals before work."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import torch

from motionlora.data.cache import replacing
from motionlora.data.errors import InputError, StorageError
from motionlora.heads.lora import load_into
from motionlora.heads.lora_file import load_lora
from motionlora.heads.memory import Mode, refuse_absent
from motionlora.heads.settings import Expert
from motionlora.heads.wan_folder import boundary_of, found_folder
from motionlora.infer.guide_none import NoGuidance
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
        for module, layer in model.transformer.named_modules():
            if module.endswith((".lora_A", ".lora_B")):
                layer.to(model.device)  # peft makes them where the layer's own weights wait
        if self.expert:
            model.experts.place(name, self.expert, self.strength)


Choose: TypeAlias = Callable[[GenerateSettings, Sequence[LoadedLora], torch.device], Mode]
"""The mode of memory for what the settings ask of these LoRAs on that device."""


def as_set(settings: GenerateSettings, loras: Sequence[LoadedLora], device: torch.device) -> Mode:
    """The mode that is set.

    Raises:
        InputError: it is `auto`, which takes plans, or one whose package is not installed.
    """
    del loras, device
    refuse_absent(settings.memory)
    if settings.memory == "auto":
        raise InputError("memory is auto, and only `motionlora generate` makes plans: set fast, low, 4bit or lowest.")
    return settings.memory


def asked_loras(settings: GenerateSettings) -> list[LoadedLora]:
    """The LoRAs of the settings, read; InputError for one that cannot be, or has no place on the model."""
    loras = [loaded_lora(text, settings.strength) for text in settings.lora]
    boundary = boundary_of(found_folder(settings.model, weights=False, cogvideox=True))
    for lora in loras:
        lora.refuse_unplaced(boundary, settings.model)
    return loras


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


def refuse_uncompilable(settings: GenerateSettings) -> None:
    """InputError where blocks cannot be compiled: something looks into them, or moves or splits their weights."""
    looks = {"--guidance": not isinstance(settings.guidance, NoGuidance), "--positions": settings.positions is not None}
    moves = {"--memory": settings.memory != "fast", "--context-parallel": settings.context_parallel != "none"}
    odd = [name for name, there in (looks | moves).items() if there]
    if settings.compile and odd:
        raise InputError(
            f"--compile does not go with {odd[0]}: leave it out, or make clips without guidance, with --memory fast, "
            "in one process."
        )


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
    if choice.path.is_dir():
        raise InputError(f"{choice.path} is a folder: name the LoRA in it, such as {choice.path}/temporal.safetensors.")
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


def chosen_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name, for `auto` bf16 on a GPU and fp32 on a CPU."""
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": auto}[name]


def open_folder(folder: Path) -> None:
    """Makes the folder; StorageError where that is impossible or it cannot be written to, before any clip is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / ".writable") as draft:
            draft.touch()
        (folder / ".writable").unlink()
    except OSError as fault:
        raise StorageError(f"{folder} cannot be written to ({fault.strerror}): choose another --out.") from fault
