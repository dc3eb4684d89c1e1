"""Settings of a training run, from the clip to the two LoRA files. Imports no torch.

Defaults are those of methods.md section 10 for Wan 2.1 1.3B; the embedded tiny Wan has its own in configs/tiny.yaml.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from motionlora.data.limits import Limits
from motionlora.data.looks import LOOKS
from motionlora.data.settings import Settings
from motionlora.heads.settings import HeadSettings, LoraSettings
from motionlora.infer.settings import MemoryMode, SampleSettings

StageName = Literal["heads", "spatial", "temporal"]
Motion = Literal["frame", "channel", "code", "none"]
Weighting = Literal["release", "none"]
ExpertChoice = Literal["high", "low", "both"]
OptimizerName = Literal["adamw", "adamw_fused", "adamw_8bit"]
PositionKind = Literal["none", "paper", "paper_pixel", "linear", "aligned"]


class NoiseSettings(Settings):
    """Which noise levels are trained on, and how much each counts."""

    shift: float = Field(default=5.0, gt=0)
    """k in s = k u / (1 + (k - 1) u) with u uniform (release of Follow-Your-Motion: 5)."""
    weighting: Weighting = "release"
    """`release`: the bell w(t) of the release, 0 at pure noise, mean 1 over the shifted grid. `none`: 1 everywhere."""


class SpatialSettings(Settings):
    """The spatial stage: single frames, encoded alone, spatial heads."""

    steps: int = Field(default=1000, ge=0)
    """Optimiser steps; 0 leaves the stage out (methods.md section 2.9 advises 500 to 1500)."""
    lr: float = Field(default=1e-4, gt=0)
    """Learning rate of AdamW (release: 1e-4)."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay (paper and release: 0.1)."""
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability with which a sample is told nothing instead of the caption."""
    batch: int = Field(default=1, ge=1)
    """Random frames per step and process (release: 1). A GPU takes several in the time of one."""


class TemporalSettings(Settings):
    """The temporal stage: the sparse clip, temporal heads, spatial LoRA frozen at full strength."""

    steps: int = Field(default=1000, ge=1)
    """Optimiser steps (methods.md section 2.9 advises 500 to 1500)."""
    lr: float = Field(default=1e-4, gt=0)
    """Learning rate of AdamW (release: 1e-4)."""
    weight_decay: float = Field(default=0.5, ge=0)
    """Decoupled weight decay (release: 0.5, paper: 0.99)."""
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability with which a sample is told nothing instead of the caption."""
    batch: int = Field(default=1, ge=1)
    """Noise draws of the clip per step and process (release: 1)."""
    until: float = Field(default=0.0, ge=0, lt=1)
    """Noise levels from 1 down to this are learned, and the LoRA rests below it in clips (release: 0; ours: where
    things go is decided at high noise)."""
    stride: int = Field(default=5, ge=1)
    """Every stride-th pixel frame is kept: 5 makes 17 of 81. 1 trains on all frames."""
    looks: int = Field(default=1, ge=1, le=LOOKS)
    """In how many looks the clip is learned: 1 its own, 3 also with red, green and blue turned round, 6 negatives too.
    The caption's colours change likewise. A motion learned in several is less bound to one (ours; release: 1)."""
    positions: PositionKind = "aligned"
    """Time positions of the sparse latent frames. `aligned` is where their content lies in the full clip."""
    motion: Motion = "frame"
    """Cosine of frame differences: `frame` one a frame, `channel` one a place, `code` as the release, `none` off."""
    motion_weight: float = Field(default=1.0, ge=0)
    """Weight of the motion loss beside the denoising loss (paper: 1)."""


class ValidationSettings(Settings):
    """Clips generated during the temporal stage."""

    every: int = Field(default=0, ge=0)
    """Steps between validations; 0 makes none."""
    captions: tuple[str, ...] = ()
    """What to generate; with none given, the caption of the clip."""
    negative: str = ""
    """What they shall not show."""
    seed: int = Field(default=0, ge=0)
    """Seed of the starting noise, the same at every validation."""
    sample: SampleSettings = SampleSettings.model_validate({"steps": 30})
    """The walk from noise to a clip; Follow-Your-Motion walks 30 steps."""


class TrainSettings(Settings):
    """Everything a training run needs: the clip, the model, the heads, the two stages, the machine."""

    model: str = "tiny"
    """`tiny` (embedded), a diffusers folder or a hub id: Wan (2.1, 2.2 TI2V-5B, 2.2 T2V-A14B) or CogVideoX (2B, 5B)."""
    expert: ExpertChoice = "high"
    """Which one of a model of two (Wan 2.2 T2V-A14B): `high` sets the motion, `both` get a folder each in `out`."""
    clip: Path | None = None
    """The reference: a video file, or a folder of numbered images."""
    clips: Path | None = None
    """Instead of one: a folder of clips, captions in .txt beside them. Each gets a LoRA of its own in `out`/NAME."""
    together: bool = False
    """All of `clips` show the same motion: one LoRA of them all."""
    caption: str | None = None
    """What the clip shows; none reads the .txt beside it."""
    out: Path = Path("runs/train")
    """Where everything goes."""
    seed: int = Field(default=0, ge=0)
    """Seed of LoRA initialisation, noise, times and frame order."""
    frames: int = Field(default=81, ge=5)
    """Pixel frames of the reference, 4k + 1."""
    height: int | None = Field(default=None, ge=16)
    """Pixels; none keeps the clip's own, cut to what the model can divide."""
    width: int | None = Field(default=None, ge=16)
    """Pixels; none keeps the clip's own, cut to what the model can divide."""
    fps: float | None = Field(default=16.0, gt=0)
    """Frames a second the clip is resampled to (Wan 2.1: 16); none keeps its own."""
    stages: tuple[StageName, ...] = ("heads", "spatial", "temporal")
    """Which parts to run; those left out are read from `out` if they are there."""
    heads: HeadSettings = HeadSettings()
    """How heads are told apart."""
    lora: LoraSettings = LoraSettings()
    """Rank and projections."""
    spatial: SpatialSettings = SpatialSettings()
    """The spatial stage."""
    temporal: TemporalSettings = TemporalSettings()
    """The temporal stage."""
    noise: NoiseSettings = NoiseSettings()
    """Noise levels of both stages."""
    validation: ValidationSettings = ValidationSettings()
    """Clips made on the way."""
    optimizer: OptimizerName = "adamw"
    """`adamw` of torch, in one kernel (`adamw_fused`), or with moments in 8 bits (`adamw_8bit`: motionlora[4bit])."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: level, or a half cosine down to 0 at the last step."""
    warmup: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from 0."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of the forward pass; needless where the base itself is bf16."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Batches per optimiser step."""
    memory: MemoryMode = "fast"
    """What is given for memory: `fast` nothing, `low` time, `4bit`, `lowest` digits too; `auto`: the first that is
    predicted to fit, never 4bit."""
    recompute_every: int = Field(default=1, ge=1)
    """Of `low`: every how many blocks one is run twice; 1 spares most."""
    attention: str = "native"
    """Attention backend of diffusers' dispatcher, one that knows the way back (`_native_flash`, `flash`, ...)."""
    compile: bool = False
    """Blocks compiled by torch.compile: a step takes less time, the first one minutes; the last digits differ."""
    checkpoint_every: int = Field(default=250, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of each stage are kept; with 2 there is one to go back to if the disk damages the last."""
    log_every: int = Field(default=100, ge=1)
    """Steps between rows with the loss by noise level."""
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    """Besides the run's own JSONL log, which is always written."""
    resume: str = ""
    """`latest`, or a checkpoint folder of this run; empty starts anew."""
    private: bool = False
    """Leave captions and paths out of LoRA files, settings.yaml, pictures and trackers; `--resume` then needs both."""
    deterministic: bool = False
    """The same LoRA again, bit for bit, on the same machine with the same versions; a GPU is slower for it."""
    device: str = "auto"
    """`auto` takes a GPU where there is one; or `cpu`, or `cuda`."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the frozen model: `auto` is bf16 on a GPU and fp32 on a CPU. LoRA layers are always fp32."""
    cache: Path | None = Path("runs/cache")
    """Latents and prompts are kept here, found by content; none computes them anew."""
    limits: Limits = Field(default=Limits(), exclude=True)
    """How large an input may be."""
