"""Settings of this room: how to walk from noise to a clip, and which clips to make. Imports no torch."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, field_validator

from motionlora.data.errors import InputError
from motionlora.data.limits import Limits
from motionlora.data.settings import Settings
from motionlora.heads.settings import Expert
from motionlora.infer.guide_none import NoGuidance

MemoryMode = Literal["auto", "fast", "low", "4bit", "lowest"]


class SampleSettings(Settings):
    """The walk from noise to a clip: plain Euler with classifier-free guidance."""

    steps: int = Field(default=50, ge=1)
    """Steps of the walk (Wan 2.1: 50; Follow-Your-Motion: 30)."""
    scale: float = Field(default=5.0, ge=0)
    """Classifier-free guidance (Wan 2.1: 5; Follow-Your-Motion: 7); 1 or below makes one pass a step, not two."""
    scale_low: float | None = Field(default=None, ge=0)
    """The same while the low-noise expert of a model of two has its turn (Wan 2.2 A14B: 3); none takes `scale`."""
    shift: float = Field(default=3.0, gt=0)
    """Time shift: 3 for 480p, 5 for 720p (Wan 2.1); 1.732 for CogVideoX 2B, 1 for 5B (square root of its SNR shift)."""
    lora_until: float | None = Field(default=None, ge=0, le=1)
    """Noise level below which LoRAs rest, and the model alone draws what things look like; 0 lets them act to the end.
    None takes what their files recommend: where their training ended (ours)."""

    @property
    def passes(self) -> int:
        """Through the model in a step: one with the caption, and one without where it is guided."""
        return 2 if self.scale > 1 else 1


class GenerateSettings(Settings):
    """Which clips to make: every caption with every seed, by one model with any number of LoRAs."""

    model: str = "tiny"
    """`tiny` (embedded), a diffusers folder or a hub id: Wan (2.1, 2.2 TI2V-5B, 2.2 T2V-A14B) or CogVideoX (2B, 5B)."""
    lora: tuple[str, ...] = ()
    """LoRA files, each FILE or FILE:STRENGTH, as in temporal.safetensors:0.5; for one expert of two that the file does
    not name, @high or @low behind it."""
    strength: float = Field(default=0.5, ge=-4, le=4)
    """Of a LoRA that is given without one and whose header recommends none (Follow-Your-Motion: 0.5)."""
    caption: tuple[str, ...] = ()
    """What the clips show, one caption or several."""
    negative: str = ""
    """What they shall not show."""
    seed: tuple[int, ...] = (0,)
    """Seeds of the starting noise, one clip each."""
    frames: int = Field(default=81, ge=1)
    """Pixel frames of a clip, 4k + 1."""
    height: int = Field(default=480, ge=16)
    """Pixels; a multiple of 16, of 8 for the tiny."""
    width: int = Field(default=832, ge=16)
    """Pixels; a multiple of 16, of 8 for the tiny."""
    fps: float = Field(default=16.0, gt=0, le=1000)
    """Frames a second that the files play at (Wan 2.1: 16)."""
    sample: SampleSettings = SampleSettings()
    """The walk from noise to a clip."""
    guidance: NoGuidance = NoGuidance()
    """How a reference steers the walk besides the LoRAs."""
    reference: Path | None = None
    """The clip whose motion the guidance takes, used frame by frame: of as many frames and of the same size."""
    latents: Path | None = None
    """What `--guidance ditflow --guidance.save FILE` found, used with another caption; no reference, plain cost."""
    positions: Path | None = None
    """The same where positions were optimised (`--guidance.optimise positions`)."""
    out: Path = Path("runs/generate")
    """Folder for the clips, and beside each a JSON file that says how it was made."""
    suffix: Literal["mp4", "gif", "webp"] = "mp4"
    """Kind of file."""
    device: str = "auto"
    """`auto` takes a GPU where there is one; else a torch device name."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the model: `auto` is bf16 on a GPU and fp32 on a CPU. LoRA layers are always fp32."""
    attention: str = "native"
    """Attention backend of diffusers' dispatcher."""
    context_parallel: Literal["none", "ulysses"] = "none"
    """`ulysses`: the processes of a launch make each clip together, each with a part of its tokens (arXiv 2309.14509).
    """
    memory: MemoryMode = "fast"
    """What is given for memory: `fast` nothing, `low` time, `4bit` digits, `lowest` both; `auto`: the first that is
    predicted to fit, never 4bit."""
    compile: bool = False
    """Blocks compiled by torch.compile: the first step takes minutes, the others less; the last digits differ."""
    cache: Path | None = Path("runs/cache")
    """Prompts are kept here, found by content; none computes them anew."""
    limits: Limits = Field(default=Limits(), exclude=True)
    """How large an input may be."""

    @field_validator("frames")
    @classmethod
    def _frames_fit_the_vae(cls, frames: int) -> int:
        if low := (frames - 1) % 4:
            raise ValueError(f"it should be 4k + 1, as {frames - low} or {frames - low + 4} are")
        return frames

    @field_validator("seed")
    @classmethod
    def _seeds_can_be_used(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or not all(0 <= seed < 2**63 for seed in seeds):
            raise ValueError("it should be one or more whole numbers, 0 or above and below 2^63")
        return seeds

    @field_validator("caption")
    @classmethod
    def _captions_say_something(cls, captions: tuple[str, ...]) -> tuple[str, ...]:
        if not all(caption.strip() for caption in captions):
            raise ValueError("it should hold no empty caption; say what each clip shows")
        return captions

    @field_validator("lora")
    @classmethod
    def _loras_can_be_read(cls, loras: tuple[str, ...]) -> tuple[str, ...]:
        for text in loras:
            lora_choice(text)
        return loras


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA file, how strongly it shall act, and on which of two experts; None leaves that to the file's header."""

    path: Path
    strength: float | None
    expert: Expert | None = None

    def __str__(self) -> str:
        strength = "" if self.strength is None else f":{self.strength}"
        return f"{self.path}{strength}" + (f"@{self.expert}" if self.expert else "")


def lora_choice(text: str) -> LoraChoice:
    """`FILE` or `FILE:STRENGTH`, behind it perhaps `@high` or `@low`; a drive letter (C:\\...) is part of the file.

    Where a file has the whole text as its name, that file is meant.

    Raises:
        InputError: what stands after the last colon is no strength from -4 to 4, or no file is named.
    """
    rest, _, word = text.rpartition("@")
    for expert in get_args(Expert):
        if word == expert and not Path(text).is_file():
            return replace(_file_and_strength(rest), expert=expert)
    return _file_and_strength(text)


def _file_and_strength(text: str) -> LoraChoice:
    path, colon, tail = text.rpartition(":")
    if not colon or Path(text).is_file() or (len(path) == 1 and tail[:1] in ("\\", "/")):
        if not text.strip():
            raise InputError("a LoRA has an empty name: give FILE or FILE:STRENGTH.")
        return LoraChoice(Path(text), None)
    try:
        strength = float(tail)
    except ValueError:
        strength = math.nan
    if not path or not -4 <= strength <= 4:
        raise InputError(
            f"LoRA {text!r} should be FILE or FILE:STRENGTH, with a strength from -4 to 4, and of two experts perhaps "
            "@high or @low behind it."
        )
    return LoraChoice(Path(path), strength)
