"""The walk from noise to a clip, on one screen.

Letters: b batch, c latent channel, f latent frame, h height, w width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

from motionlora.data.errors import InputError, NumbersError
from motionlora.heads.lora import set_strengths, strengths
from motionlora.heads.schedule import euler_times
from motionlora.infer.guidance import Kept, Walk

if TYPE_CHECKING:
    from motionlora.heads.backbone import Backbone, Latent, Prompt
    from motionlora.infer.guidance import Guidance, Time
    from motionlora.infer.settings import SampleSettings

Step: TypeAlias = tuple[Tensor, Tensor]
"""From which time to which."""


class Progress(Protocol):
    """Hands the steps of a walk on, and may show how far it has come."""

    def __call__(self, steps: Sequence[Step]) -> Iterable[Step]: ...


class Silent:
    """Shows nothing."""

    def __call__(self, steps: Sequence[Step]) -> Iterable[Step]:
        return steps


SILENT = Silent()


@dataclass(frozen=True)
class Bar:
    """A bar on stderr, with steps a second and the time left; gone when the walk is over."""

    title: str

    def __call__(self, steps: Sequence[Step]) -> Iterable[Step]:
        from tqdm import tqdm

        return tqdm(steps, desc=self.title, file=sys.stderr, leave=False)


@torch.no_grad()
def sample(walk: Walk, guidance: Guidance, progress: Progress = SILENT) -> Latent:
    """The clean latent at the end of the walk, fp32 "b c f h w"; plain Euler (methods.md section 1.2).

    With no guidance, no LoRA and an fp32 model it is `WanPipeline` with `FlowMatchEulerDiscreteScheduler` bit for bit.
    In bf16 it is not: there the stock pipeline rounds the latent itself to bf16 after each step, ours stays fp32.

    Raises:
        NumbersError: the latent became NaN or infinite; names the step.
    """
    latent = walk.noise
    with resting_loras(walk) as rest, guidance.steering(walk) as steer:
        for step, (now, then) in enumerate(progress(list(pairwise(walk.times)))):
            rest(now)
            latent = steer(latent, now)
            latent = latent + (then - now) * walk.velocity(latent, now)
            refuse_bad_numbers(latent, step, now, len(walk.times) - 1)
    return latent


@contextmanager
def resting_loras(walk: Walk) -> Iterator[Callable[[Time], None]]:
    """Switches all LoRAs of the model off from the first time below `walk.lora_until` to the end of the context."""
    acting = strengths(walk.model.transformer) if walk.lora_until else {}

    def rest(now: Time) -> None:
        if acting and now < walk.lora_until:
            set_strengths(walk.model.transformer, dict.fromkeys(acting, 0.0))

    try:
        yield rest
    finally:
        if acting:
            set_strengths(walk.model.transformer, acting)


def new_walk(
    model: Backbone,
    prompt: Prompt,
    negative: Prompt,
    *,
    seed: int | Sequence[int],
    frames: int,
    height: int,
    width: int,
    sample: SampleSettings,
    reference: Latent | None = None,
    kept: Kept | None = None,
) -> Walk:
    """A walk that starts where the stock pipeline with `generator=torch.Generator().manual_seed(seed)` does, on any
    device.

    Args:
        seed: several make a batch, each with its own noise; then `prompt` holds one caption for all, or one each.
        frames, height, width: of the clip in pixels.
        kept: what other walks by the same model from the same reference have computed; None begins anew.

    Raises:
        InputError: a size that the model cannot make, captions that do not fit the seeds, or settings that it has no
            use for.
    """
    refuse_size(model, frames, height, width)
    if sample.scale_low is not None and not model.experts.boundary:
        raise InputError(
            f"sample.scale_low is {sample.scale_low:g}, and {model.name} has no low-noise expert: leave it out, or set "
            "it to null in the file."
        )
    if sample.lora_until and model.experts.boundary:
        raise InputError(
            f"sample.lora_until is {sample.lora_until:g}, and {model.name} has two experts, each with its own LoRAs: "
            "leave it out, and load LoRAs on the high-noise expert alone."
        )
    seeds = [seed] if isinstance(seed, int) else list(seed)
    for what in (prompt, negative):
        if not seeds or len(what) not in (1, len(seeds)):
            raise InputError(f"{len(seeds)} seeds and {len(what)} captions came: give one caption, or one a seed.")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latent_frames, f = (frames - 1) // model.frame_multiple + 1, model.spatial_factor
    shape = (1, model.channels, latent_frames, height // f, width // f)
    noise = torch.cat([model.noise(shape, generator) for generator in generators])
    return Walk(
        model=model,
        prompt=prompt.to(model.device),
        negative=negative.to(model.device),
        scale=sample.scale,
        times=euler_times(model.scheduler_config, sample.steps, sample.shift),
        noise=noise.to(model.device),
        reference=reference,
        generator=generators[0],
        kept=kept or Kept(),
        lora_until=sample.lora_until or 0.0,
        scale_low=sample.scale_low,
    )


def refuse_size(model: Backbone, frames: int, height: int, width: int) -> None:
    """InputError, with the nearest size, for a clip that the model cannot make."""
    k, m = model.whole_multiple, model.multiple
    if frames < 1 or (frames - 1) % k:
        low = max(frames - (frames - 1) % k, 1)
        raise InputError(f"{model.name} makes clips of {k}k + 1 frames, got {frames}: set it to {low} or {low + k}.")
    if height < m or width < m or height % m or width % m:
        h, w = (max(m, round(side / m) * m) for side in (height, width))
        raise InputError(
            f"{model.name} makes clips whose height and width are multiples of {m}, got {height} x {width}: "
            f"the nearest is {h} x {w}."
        )


def refuse_bad_numbers(latent: Latent, step: int, now: Time, steps: int) -> None:
    """NumbersError where the latent is not finite after a step, counted from zero."""
    if not torch.isfinite(latent).all():
        raise NumbersError(
            f"The latent became NaN or infinite in step {step + 1} of {steps} (time {float(now):.4f}): lower the "
            "strength of the LoRAs or the scale, or use dtype fp32."
        )
