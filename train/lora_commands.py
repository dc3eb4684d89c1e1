"""The `motionlora lora ...` subcommands: their settings, and the few lines that call the rooms for the work.

Imports no torch; every room is imported when its subcommand runs.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from motionlora.data.errors import InputError
from motionlora.data.limits import Limits
from motionlora.data.settings import Settings

if TYPE_CHECKING:
    from motionlora.heads.lora_strength import Alpha
    from motionlora.heads.motion_lora import MotionLora

Written = Literal["native", "diffusers", "kohya"]
Precision = Literal["fp32", "bf16", "fp16"]


class LoraInspectSettings(Settings):
    """Which LoRA file to look at."""

    file: Path
    """A .safetensors file in any layout; `lora inspect` names it."""
    alpha: str | None = None
    """What it was trained with, where the file does not say it: a number, or `rank`."""
    limits: Limits = Field(default=Limits(), exclude=True)
    """How large an input may be."""


class LoraOutSettings(Settings):
    """Where a new file goes, and how it is written."""

    out: Path
    """Where the new file goes."""
    layout: Literal["native", "diffusers"] = "native"
    """`native`: right in diffusers and ComfyUI. `diffusers`: with its metadata."""
    precision: Precision = "fp32"
    """Of the numbers; bf16 and fp16 halve the file and round."""
    limits: Limits = Field(default=Limits(), exclude=True)
    """How large an input may be."""


class LoraConvertSettings(LoraOutSettings, LoraInspectSettings):
    """From any layout of LoRA files to one that loads."""

    layout: Written = "native"  # pyright: ignore[reportIncompatibleVariableOverride]
    """`native`: right in diffusers and ComfyUI. `diffusers`: with its metadata. `kohya`: lora_unet_ names."""
    model: str | None = None
    """For `kohya`: the model that it was made for, so that zeros fill the modules that the LoRA has not got."""


class LoraMergeSettings(LoraOutSettings):
    """Several LoRAs as one file that acts, at strength 1, as all of them together."""

    files: tuple[str, ...]
    """FILE or FILE:STRENGTH each; without a strength the one that the file recommends, else 1."""


class LoraResizeSettings(LoraOutSettings, LoraInspectSettings):
    """A LoRA of a smaller rank, as near as it can be."""

    rank: int = Field(ge=1)
    """Below the rank that it has; what is lost is printed."""


class LoraVerifySettings(LoraInspectSettings):
    """Whether a file does in stock diffusers what it does here."""

    model: str = "tiny"
    """The model that it was made for: `tiny` (embedded), a diffusers folder or a hub id of Wan 2.1 text-to-video."""
    strength: float = 1.0
    """At which both apply it."""
    device: str = "auto"
    """`auto` takes a GPU where there is one; else a torch device name."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the model; bf16 takes half the memory and agrees less exactly."""


def lora_inspect(settings: LoraInspectSettings) -> None:
    """Prints what a LoRA file holds and how it was made."""
    from motionlora.heads.lora_inspect import inspect_lora

    print(inspect_lora(settings.file, alpha_of(settings.alpha)))


def lora_convert(settings: LoraConvertSettings) -> None:
    """Writes a LoRA file in another layout."""
    from motionlora.heads.lora_file import load_lora
    from motionlora.heads.lora_write import padded
    from motionlora.heads.wan_folder import found_folder, read_json

    lora = load_lora(settings.file, alpha_of(settings.alpha))
    if settings.model is not None:
        if settings.layout != "kohya":
            raise InputError(f"--model fills up the kohya layout, and the layout is {settings.layout}: leave it out.")
        lora = padded(lora, read_json(found_folder(settings.model) / "transformer" / "config.json"))
    _write(lora, settings, [settings.file], f"layout {settings.layout}, {settings.precision}")


def lora_merge(settings: LoraMergeSettings) -> None:
    """Writes one file that acts as several."""
    from motionlora.heads.lora_combine import merged
    from motionlora.infer.order import loaded_lora

    if len(settings.files) < 2:
        raise InputError("One LoRA alone cannot be merged: name two or more after --files.")
    parts = [loaded_lora(text, 1.0) for text in settings.files]
    lora = merged([(part.lora, part.strength) for part in parts])
    told = f"{' + '.join(map(str, parts))}, rank {lora.rank}; use it at strength 1"
    _write(lora, settings, [part.path for part in parts], told)


def lora_resize(settings: LoraResizeSettings) -> None:
    """Writes a LoRA of a smaller rank and says what was lost."""
    from motionlora.heads.lora_combine import resized
    from motionlora.heads.lora_file import load_lora

    lora, loss = resized(load_lora(settings.file, alpha_of(settings.alpha)), settings.rank)
    lost = f"{loss.whole:.3%} of the update's norm is lost, at worst {loss.worst:.3%} in {loss.module}"
    _write(lora, settings, [settings.file], f"rank {lora.rank}; {lost}")


def _write(lora: "MotionLora", settings: LoraOutSettings, sources: list[Path], told: str) -> None:
    """Writes a new file and says what it is; InputError where it would take the place of one that it is made from."""
    from motionlora.heads.lora_file import save_lora

    out = settings.out
    if any(out.exists() and out.samefile(source) for source in sources):
        raise InputError(f"--out {out} is the file that is read: choose another name.")
    save_lora(lora, out, settings.layout, settings.precision)
    print(f"{out}: {told}")


def lora_verify(settings: LoraVerifySettings) -> None:
    """Loads a file in the stock pipeline and here, and says whether it does the same."""
    import torch

    from motionlora.heads.lora_file import read_lora
    from motionlora.heads.lora_verify import verify_lora
    from motionlora.heads.wan import WanBackbone
    from motionlora.infer.order import chosen_device

    if settings.strength == 0:
        raise InputError("--strength is 0, at which nothing can be seen: choose another, 1 say.")
    alpha, dtype = alpha_of(settings.alpha), {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.dtype]
    expert = "low" if read_lora(settings.file, alpha).header.get("motion.expert") == "low" else "high"
    model = WanBackbone.load(settings.model, device=chosen_device(settings.device), dtype=dtype, expert=expert)
    verdict = verify_lora(settings.file, model, alpha=alpha, strength=settings.strength)
    print("\n".join([f"{settings.file} in {model.name}, strength {settings.strength:g}", *verdict.lines()]))
    verdict.refuse_disagreement(settings.file)


def alpha_of(text: str | None) -> "Alpha":
    """`--alpha` as a number, "rank" or None; InputError where it is neither."""
    if text is None or text == "rank":
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"--alpha is {text!r}: it should be a number above 0, or `rank`.")
    return value
