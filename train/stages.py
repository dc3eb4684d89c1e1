"""What differs between the spatial and the temporal stage: clips, heads, positions, loss.

n latents to draw from, b samples of a batch, c channels, f latent frames, h height, w width.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Generator, Tensor

from motionlora.data.clip import Clip
from motionlora.data.errors import InputError
from motionlora.heads.backbone import Backbone, Prompt
from motionlora.heads.positions import sparse_positions
from motionlora.heads.schedule import preserves_variance, trained_times, trained_weight
from motionlora.train.loss import PathPoint, denoising_loss, motion_loss, path_point, weight_of_time
from motionlora.train.noise import drawn_times
from motionlora.train.settings import Motion, NoiseSettings, SpatialSettings, TemporalSettings, TrainSettings

if TYPE_CHECKING:
    from motionlora.heads.positions import Positions


@dataclass(frozen=True, eq=False)
class Parts:
    """One batch's loss: `total` is differentiated; `denoise` and `motion` are unweighted, one number a sample."""

    total: Float[Tensor, ""]
    denoise: Float[Tensor, " b"]
    motion: Float[Tensor, " b"]


@dataclass(frozen=True, eq=False)
class Stage:
    """A stage: what is drawn, which heads learn it, at which time positions, by which loss."""

    name: Literal["spatial", "temporal"]
    latents: Float[Tensor, "n c f h w"]
    prompt: Prompt
    """The clip's caption, and behind it the empty one where captions may be dropped."""
    chosen: np.ndarray
    positions: "Positions"
    motion: Motion
    motion_weight: float
    noise: NoiseSettings
    settings: SpatialSettings | TemporalSettings
    times: tuple[float, float] = (0.0, 1.0)
    """The lowest and the highest noise level that is drawn: those of the expert that is trained."""
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """The model's own, which says how it was trained; none is a straight path with weight 1."""
    others: "tuple[Stage, ...]" = ()
    """The same stage of further clips, where several show one motion."""

    def drawn(self, generator: Generator) -> "Stage":
        """The stage of one of the clips, all equally likely."""
        every = (self, *self.others)
        return every[int(torch.randint(len(every), (), generator=generator))]

    def point(self, generator: Generator) -> PathPoint:
        """A batch on the path: clips, noise levels and noise drawn in this order from `generator` (on the CPU)."""
        batch = self.settings.batch
        clean = self.latents[torch.randint(len(self.latents), (batch,), generator=generator).to(self.latents.device)]
        time = drawn_times(batch, self.noise.shift, generator, self.times, self.known_times)
        noise = torch.randn(clean.shape, generator=generator)
        return path_point(clean, noise.to(clean.device), time.to(clean.device))

    @cached_property
    def known_times(self) -> Float[Tensor, " n"] | None:
        """The noise levels that a variance-preserving model knows, at the shift of the settings; None of others."""
        return trained_times(self.scheduler, self.noise.shift) if preserves_variance(self.scheduler) else None

    def told(self, generator: Generator) -> Prompt:
        """What each sample of a batch is told: the caption, or nothing with the probability `caption_dropout`."""
        batch, dropout = self.settings.batch, self.settings.caption_dropout
        if not dropout:
            return self.prompt.expand(batch)
        return self.prompt.picked((torch.rand(batch, generator=generator) < dropout).long())

    def loss(self, model: Backbone, point: PathPoint, told: Prompt) -> Parts:
        """`w(t) (denoising + weight * motion)`, mean over the batch (methods.md sections 2.5 and 2.6).

        The denoising loss has the weight that the model was trained with (`trained_weight`).
        """
        predicted = model.velocity(point.latent, point.time, told)
        denoise = denoising_loss(predicted, point.target) * trained_weight(self.scheduler, point.time)
        motion = motion_loss(predicted, point.target, self.motion)
        weight = weight_of_time(self.noise.weighting, self.noise.shift)(point.time)
        total = (weight * (denoise + self.motion_weight * motion)).mean()
        return Parts(total=total, denoise=denoise.detach(), motion=motion.detach())


def of_all(stages: Iterable[Stage]) -> Stage:
    """One stage of several clips: that of the first, which knows the others."""
    first, *others = stages
    return replace(first, others=tuple(others))


def spatial_stage(model: Backbone, clip: Clip, chosen: np.ndarray, settings: TrainSettings) -> Stage:
    """Every pixel frame of `clip` encoded alone, for the spatial heads `chosen`, "block head"."""
    frames = [Clip(frame[None], clip.fps, clip.caption) for frame in clip.pixels]
    return Stage(
        name="spatial",
        latents=torch.cat([model.encode(frame) for frame in frames]),
        prompt=model.embed(captions_of(clip, settings.spatial)),
        chosen=chosen,
        positions=torch.zeros(1, dtype=torch.float64),
        motion="none",
        motion_weight=0.0,
        noise=settings.noise,
        settings=settings.spatial,
        times=model.experts.times,
        scheduler=model.scheduler_config,
    )


def temporal_stage(model: Backbone, clip: Clip, chosen: np.ndarray, settings: TrainSettings) -> Stage:
    """Every stride-th frame of `clip` encoded as a clip of its own, at the time positions of the full clip."""
    temporal = settings.temporal
    return Stage(
        name="temporal",
        latents=model.encode(sparse_clip(clip, temporal.stride)),
        prompt=model.embed(captions_of(clip, temporal)),
        chosen=chosen,
        positions=sparse_positions(temporal.positions, frames=clip.frames, stride=temporal.stride),
        motion=temporal.motion,
        motion_weight=temporal.motion_weight,
        noise=settings.noise,
        settings=temporal,
        times=_learned_times(model, temporal.until),
        scheduler=model.scheduler_config,
    )


def _learned_times(model: Backbone, until: float) -> tuple[float, float]:
    """The lowest and the highest noise level that is drawn: those of an expert, or not below `until`."""
    if not until:
        return model.experts.times
    if model.experts.boundary:
        raise InputError(
            f"temporal.until is {until:g}, and {model.name} has two experts, each with noise levels of its own: set it "
            "to 0, and choose by --expert."
        )
    return until, 1.0


def check_expert(model: Backbone, settings: TrainSettings) -> None:
    """InputError where heads would be scored, or clips made on the way, at noise levels of an expert not loaded."""
    if (expert := model.experts.only) is None:
        return
    low, high = model.experts.times
    scored = settings.heads.times if heads_are_scored(settings) else ()
    if odd := [time for time in scored if not low <= time <= high]:
        raise InputError(
            f"heads.times has {odd[0]:g}, and the {expert}-noise expert is trained, whose noise levels are {low:g} to "
            f"{high:g}: set --heads.times to such levels, {(low + high) / 2:.2g} say."
        )
    if settings.validation.every:
        raise InputError(
            f"validation.every is {settings.validation.every}, and a clip takes both experts, of which the "
            f"{expert}-noise one alone is loaded for training: set it to 0 and use `motionlora generate` afterwards."
        )


def heads_are_scored(settings: TrainSettings) -> bool:
    """Whether a run asks which heads are temporal: where they are trained apart, or nothing else is wanted."""
    return settings.heads.heads == "split" or settings.stages == ("heads",)


def captions_of(clip: Clip, settings: SpatialSettings | TemporalSettings) -> list[str]:
    """What a stage may say of the clip: its caption, and nothing if captions are dropped."""
    return [clip.caption, ""] if settings.caption_dropout else [clip.caption]


def sparse_clip(clip: Clip, stride: int) -> Clip:
    """Frames 0, stride, 2 stride, ... as a clip that plays as long as the whole; InputError if they are not 4k + 1."""
    check_stride(clip.frames, stride)
    return Clip(clip.pixels[::stride], clip.fps / stride, clip.caption)


def check_stride(frames: int, stride: int) -> None:
    """InputError with the nearest strides that reach the last frame and leave 4k + 1 frames, at least 5.

    The VAE drops any others unseen. `frames` is 4k + 1 and at least 5.
    """
    fitting = [other for other in range(1, frames) if (frames - 1) % (4 * other) == 0]
    if stride not in fitting:
        nearest = sorted(sorted(fitting, key=lambda other: abs(other - stride))[:2])
        raise InputError(
            f"temporal.stride {stride} does not divide the {frames - 1} steps between {frames} frames into 4k parts: "
            f"set it to {' or '.join(map(str, nearest))}."
        )
