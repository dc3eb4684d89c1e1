"""What each subcommand of `motionlora` is made of: its settings, and the few lines that call the room for the work.

Settings classes import no torch; every room is imported when its subcommand runs.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from motionlora.data.limits import Limits
from motionlora.data.settings import Settings
from motionlora.heads.settings import HeadSettings
from motionlora.infer.compare_settings import AblationSettings, BenchSpritesSettings, CompareSettings
from motionlora.infer.guidance_list import guidance_table
from motionlora.infer.settings import GenerateSettings
from motionlora.train import lora_commands as lora
from motionlora.train.cards import PlanSettings
from motionlora.train.compare_commands import ablation, bench_sprites, compare, launched
from motionlora.train.settings import ExpertChoice, TrainSettings


class ClipInspectSettings(Settings):
    """Which clip to look at."""

    file: Path
    """A video file, or a folder of numbered images."""
    limits: Limits = Field(default=Limits(), exclude=True)
    """How large an input may be."""


class ClipSpriteSettings(Settings):
    """A clip of the sprite world; what is not named is drawn from the seed."""

    out: Path
    """Where it goes: .mp4, .gif or .webp; its caption goes into a .txt beside it."""
    seed: int = Field(default=0, ge=0)
    """Every seed is another scene."""
    shape: str | None = None
    """Of the first sprite: circle, square, triangle, star."""
    colour: str | None = None
    """Of the first sprite: red, green, blue, yellow, magenta, cyan."""
    background: str | None = None
    """dark, light, cloudy, striped, checkered."""
    motion: str | None = None
    """static, linear, ease, throw, smooth: how one sprite moves over a background that stays; or a reference of the
    sprite protocol, whose motion and looks it has: v, zigzag, s, accelerating-turn, circle, eight, spiral, square,
    camera-v, camera-s, camera-circle, camera-eight, pair-circle-v, pair-s-zigzag, occluded-s, turning-v."""
    frames: int = Field(default=49, ge=5)
    """How many, 4k + 1; a reference of the sprite protocol has 49."""


class HeadsSettings(Settings):
    """Which clip shows which heads of which model are temporal; the same names mean the same in `train`."""

    model: str = "tiny"
    """`tiny` (embedded), a diffusers folder or a hub id: Wan (2.1, 2.2 TI2V-5B, 2.2 T2V-A14B) or CogVideoX (2B, 5B)."""
    expert: ExpertChoice = "high"
    """Which one of a model of two (Wan 2.2 T2V-A14B); `both` makes a folder for each in `out`."""
    clip: Path | None = None
    """The reference: a video file, or a folder of numbered images."""
    caption: str | None = None
    """What the clip shows; none reads the .txt beside it."""
    scores: Path | None = None
    """A head map made before (heads.json): the rule is applied to its scores anew, without model and clip."""
    out: Path = Path("runs/heads")
    """Folder for heads.json and heads.png."""
    seed: int = Field(default=0, ge=0)
    """Seed of the noise."""
    frames: int = Field(default=81, ge=5)
    """Pixel frames of the reference, 4k + 1; the full length, since short clips mix the two kinds of heads up."""
    height: int | None = Field(default=None, ge=16)
    """Pixels; none keeps the clip's own, cut to what the model can divide."""
    width: int | None = Field(default=None, ge=16)
    """Pixels; none keeps the clip's own, cut to what the model can divide."""
    fps: float | None = Field(default=16.0, gt=0)
    """Frames a second the clip is resampled to (Wan 2.1: 16); none keeps its own."""
    heads: HeadSettings = HeadSettings()
    """How heads are told apart."""
    device: str = "auto"
    """`auto` takes a GPU where there is one; else a torch device name."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the model: `auto` is bf16 on a GPU and fp32 on a CPU."""
    cache: Path | None = Path("runs/cache")
    """Latents and prompts are kept here, found by content; none computes them anew."""
    limits: Limits = Field(default=Limits(), exclude=True)
    """How large an input may be."""


class GuidanceListSettings(Settings):
    """Which walk the costs are told for."""

    steps: int = Field(default=50, ge=1)
    """Steps of the walk, two forwards each (Wan 2.1: 50)."""
    blocks: int = Field(default=30, ge=1)
    """Blocks of the model (Wan 2.1 1.3B: 30, 14B: 40; tiny: 6)."""


def clip_inspect(settings: ClipInspectSettings) -> None:
    """Prints what a clip is."""
    from motionlora.data.clip import describe

    _show(describe(settings.file))


def clip_sprite(settings: ClipSpriteSettings) -> None:
    """Writes a clip of the sprite world and its caption."""
    from motionlora.data.clip import write_clip
    from motionlora.train.sprite_clip import sprite_clip

    clip = sprite_clip(**settings.model_dump(exclude={"out"}))
    write_clip(clip, settings.out, comment=clip.caption)
    settings.out.with_suffix(".txt").write_text(clip.caption + "\n", encoding="utf-8")
    print(f"{settings.out}: {clip.caption}")


def heads(settings: HeadsSettings) -> None:
    """Scores the heads on a clip, or applies a rule to scores made before; saves the map and its picture."""
    if settings.scores is None:
        from motionlora.train.experts import train_experts
        from motionlora.train.settings import TemporalSettings

        shared = {name: getattr(settings, name) for name in HeadsSettings.model_fields if name != "scores"}
        train_experts(TrainSettings(stages=("heads",), temporal=TemporalSettings(stride=1), **shared))
        return
    from motionlora.heads.head_map import HeadMap
    from motionlora.heads.head_map_picture import draw_head_map

    head_map, rule, ratio = HeadMap.load(settings.scores), settings.heads.rule, settings.heads.ratio
    head_map.save(settings.out / "heads.json", rule, ratio)
    draw_head_map(head_map, settings.out / "heads.png", rule, ratio)
    spatial, temporal = head_map.counts(rule, ratio).sum(axis=0)
    print(f"Heads: {temporal} temporal and {spatial} spatial by rule {rule}, ratio {ratio:g}; {settings.out}")


def plan(settings: PlanSettings) -> None:
    """Prints what a training run would take."""
    from motionlora.train.memory import planned
    from motionlora.train.plan import table

    print(table(*planned(settings)))


def train(settings: TrainSettings) -> None:
    """Trains a motion LoRA."""
    from motionlora.train.clips import train_clips
    from motionlora.train.experts import train_experts

    (train_experts if settings.clips is None or settings.together else train_clips)(settings)


def generate(settings: GenerateSettings) -> None:
    """Makes new clips."""
    from motionlora.infer.generate import generate
    from motionlora.train.sampling_plan import fitting_mode

    farewell = f"clips that were finished are in {settings.out}, and the others are to be made anew."
    with launched(settings.device, farewell, tensors=True) as workers:
        generate(settings, choose=fitting_mode, workers=workers)


def guidance_list(settings: GuidanceListSettings) -> None:
    """Prints every guidance with its cost."""
    print(guidance_table(settings.steps, settings.blocks))


def _show(facts: dict[str, Any] | str) -> None:
    """Facts one a line, names in a column."""
    if isinstance(facts, str):
        print(facts)
        return
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        print(f"{name:<{width}}  {text}")


@dataclass(frozen=True)
class Subcommand:
    """How one subcommand is called: `config` is the file it starts from, `section` its part of the file, `file` the
    setting that a bare word in front stands for."""

    summary: str
    settings: type[BaseModel]
    run: Callable[[Any], None]
    config: str | None = None
    section: str | None = None
    file: str = ""


SUBCOMMANDS: dict[str, Subcommand] = {
    "clip inspect": Subcommand(
        "Say what a clip is: clip inspect FILE.", ClipInspectSettings, clip_inspect, file="file"
    ),
    "clip sprite": Subcommand("Make a clip of the sprite world.", ClipSpriteSettings, clip_sprite),
    "heads": Subcommand("Find the temporal heads of a model on a clip; save the map.", HeadsSettings, heads, "tiny"),
    # Before `train`, whose class stands for the section that both read.
    "plan": Subcommand("Say what a training run would take: FLOPs, bytes, time.", PlanSettings, plan, "tiny", "train"),
    "train": Subcommand(
        "Learn the motion of a clip, or of a folder of clips, as a LoRA.", TrainSettings, train, "tiny", "train"
    ),
    "generate": Subcommand("Make new clips, with any LoRAs.", GenerateSettings, generate, "tiny", "generate"),
    "guidance list": Subcommand(
        "Name the ways in which a reference clip can steer `generate`.", GuidanceListSettings, guidance_list
    ),
    "compare": Subcommand(
        "Compare methods on clips: tables, and a page to look at.", CompareSettings, compare, "tiny", "compare"
    ),
    "bench sprites": Subcommand(
        "Run the sprite protocol: known motions, every control.", BenchSpritesSettings, bench_sprites, "tiny"
    ),
    "bench sprites ablation": Subcommand(
        "Measure what each part of the main method is worth.", AblationSettings, ablation, "tiny"
    ),
    "lora inspect": Subcommand(
        "Say what a file holds: lora inspect FILE.", lora.LoraInspectSettings, lora.lora_inspect, file="file"
    ),
    "lora convert": Subcommand(
        "Write a file anew: lora convert FILE --layout X --out Y.",
        lora.LoraConvertSettings,
        lora.lora_convert,
        file="file",
    ),
    "lora merge": Subcommand(
        "Make one file of several: lora merge A:1 B:0.5 --out Y.",
        lora.LoraMergeSettings,
        lora.lora_merge,
        file="files",
    ),
    "lora resize": Subcommand(
        "Make the rank smaller: lora resize FILE --rank 8 --out Y.",
        lora.LoraResizeSettings,
        lora.lora_resize,
        file="file",
    ),
    "lora verify": Subcommand(
        "See whether stock diffusers does the same: lora verify FILE.",
        lora.LoraVerifySettings,
        lora.lora_verify,
        file="file",
    ),
}
SECTIONS: dict[str, type[BaseModel]] = {
    subcommand.section: subcommand.settings for subcommand in SUBCOMMANDS.values() if subcommand.section
}
