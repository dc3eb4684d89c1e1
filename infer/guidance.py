"""How a reference may steer a walk from noise to a clip. Letters: b batch, c latent channel, f latent frame, h, w.

A guidance is a frozen settings class in a file `guide_NAME.py` with the one method `steering`. What it changes in the
model it changes on entry and undoes on exit; what it changes in the latent it returns. Imports no torch: settings are
read before anything heavy is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias

from motionlora.data.cache import cached, content_key
from motionlora.data.errors import InputError
from motionlora.data.settings import Settings

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor

    from motionlora.data.clip import Clip
    from motionlora.heads.backbone import Backbone, Latent, Prompt

Steer: TypeAlias = "Callable[[Latent, Time], Latent]"
"""The latent that a step shall start from, given the one reached and its time."""
Time: TypeAlias = "Float[Tensor, '']"
"""A noise level in [0, 1], fp32 on the CPU; a tensor, since Python's floats round otherwise than the stock walk."""

BLANK = "empty caption"
"""The name of its embedding in `Walk.kept`."""


@dataclass(frozen=True, eq=False)
class Kept:
    """What was computed from a reference, for all walks with the same model, LoRAs and reference.

    Attributes:
        folder: also kept here, for later calls; None keeps it in memory alone.
        identity: what model, LoRAs and reference were, from `content_key`; part of every file's name.
    """

    folder: Path | None = None
    identity: str = ""
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], dict[str, Tensor]], like: Tensor) -> dict[str, Tensor]:
        """The tensors of that name where `like` is; made where they are not known yet.

        `name` says all that they depend on besides the model, its LoRAs and the reference.
        """
        if name not in self.tensors:
            made = cached(self.folder, content_key(self.identity, name), make) if self.folder else make()
            self.tensors[name] = {key: tensor.to(like.device) for key, tensor in made.items()}
        return self.tensors[name]


@dataclass(frozen=True, eq=False)
class Walk:
    """Everything that a way from noise to a clip is made of.

    Attributes:
        model: asked for velocities.
        prompt: what to show; one caption for all of the batch, or one each.
        negative: what to show less of; unused where `scale` is 1 or below.
        scale: of classifier-free guidance.
        times: falling from 1 to 0, fp32 on the CPU; `motionlora.heads.schedule.euler_times`.
        noise: where the walk starts, fp32 on the model's device.
        reference: the latent of the clip that gives the motion; None where there is none.
        generator: on the CPU, for whatever else is drawn on the way.
        kept: what walks with this model, these LoRAs and this reference share.
        lora_until: the noise level below which the model's LoRAs rest; 0 lets them act to the end.
        scale_low: `scale` at noise levels of the low-noise expert, of a model of two; None leaves it.
    """

    model: Backbone
    prompt: Prompt
    negative: Prompt
    scale: float
    times: Float[Tensor, " steps+1"]
    noise: Latent
    reference: Latent | None
    generator: torch.Generator
    kept: Kept = field(default_factory=Kept)
    lora_until: float = 0.0
    scale_low: float | None = None

    def velocity(self, latent: Latent, time: Time) -> Latent:
        """With classifier-free guidance (arXiv 2207.12598, eq. 6 with scale = 1 + w): v = v_u + scale (v_c - v_u).

        Two passes, the caption's first, and a single one where `scale` is 1 or below: as `WanPipeline` has it.
        """
        times = time.expand(latent.shape[0])
        conditional = self.model.velocity(latent, times, self.prompt)
        if self.scale <= 1:
            return conditional
        unconditional = self.model.velocity(latent, times, self.negative)
        low = None if self.scale_low is None or self.model.experts.at(time) == "high" else self.scale_low
        return unconditional + (self.scale if low is None else low) * (conditional - unconditional)

    def blank(self) -> Prompt:
        """No caption: the empty one, embedded once for all walks of a call."""
        from motionlora.heads.backbone import Prompt

        return Prompt(self.kept.once(BLANK, lambda: {BLANK: self.model.embed([""]).embeds}, self.noise)[BLANK])


class Guidance(Protocol):
    """One way to let a reference clip steer a walk."""

    def steering(self, walk: Walk) -> AbstractContextManager[Steer]:
        """Inside the context the walk is steered; outside, model and walk are as before."""
        ...


class GuidanceSettings(Settings):
    """What a guidance can be chosen by, besides its `steering`; the first line of its docstring is shown in the list.

    Attributes:
        paper: where the method comes from.
        needs_reference: whether `Walk.reference` has to be there; where not, one is refused.
    """

    paper: ClassVar[str] = ""
    needs_reference: ClassVar[bool] = True

    @abstractmethod
    def steering(self, walk: Walk) -> AbstractContextManager[Steer]:
        """As `Guidance` has it."""

    def refuse(self, frames: int, height: int, width: int) -> None:
        """Refuses what does not fit a clip of that size, before a model is loaded; here nothing.

        Raises:
            InputError: a file that the method reads is wrong.
        """
        del frames, height, width

    def made_reference(self, frames: int, height: int, width: int, fps: float) -> Clip | None:
        """The clip that stands in for a reference that was not given; here none."""
        del frames, height, width, fps

    def forwards(self, steps: int, passes: int, blocks: int) -> float:
        """How many forwards of the model the first walk of a call takes, one that ends early by its share of blocks.

        `passes` is 2 with classifier-free guidance, else 1. Here the walk's own, and nothing for steering.
        """
        del blocks
        return steps * passes

    def gradients(self, steps: int, blocks: int) -> float:
        """How many passes back through the model a walk takes, counted likewise."""
        del steps, blocks
        return 0.0

    def dose_bound(self, steps: int) -> float | None:
        """How far steering can move an element of the latent in a whole walk; None where nothing bounds it."""
        del steps
        return None


def reference_of(walk: Walk) -> Latent:
    """The reference's latent where the walk's noise is, "1 c f h w" or one for each of the batch.

    Raises:
        InputError: there is none, or it is of another size than the clip to be made.
    """
    if walk.reference is None:
        raise InputError("This guidance takes its motion from a clip and none was given: give the walk a reference.")
    came, asked = tuple(walk.reference.shape), tuple(walk.noise.shape)
    if came[1:] != asked[1:] or came[0] not in (1, asked[0]):
        raise InputError(
            f"The reference's latent is {came} (b c f h w) and the clip's is {asked}: take a reference of as many "
            "frames and of the same size."
        )
    return walk.reference.to(walk.noise)


def noised(clean: Latent, noise: Latent, time: Time) -> Latent:
    """The point at `time` on the straight path from clip to noise (rectified flow, arXiv 2209.03003, eq. 1)."""
    return (1 - time) * clean + time * noise


def guided_steps(share: float, steps: int) -> int:
    """How many of the first steps a share of them is, rounded; one at least of a share that is not 0.

    Else a short walk would not be guided at all and nobody would be told.
    """
    return max(round(share * steps), int(share > 0))


def guided_until(times: Float[Tensor, " steps+1"], share: float) -> Time:
    """The time of the first step that is no longer guided: a step is guided if its time lies above."""
    return times[guided_steps(share, len(times) - 1)]
