"""How a reference may steer a walk from noise to a clip. Letters: b batch, c latent channel, f latent frame, h, w.

A guidance is a frozen settings class in a file `guide_NAME.py` with the one method below. What it changes in the model
it changes on entry and undoes on exit; what it changes in the latent it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor

    from motionlora.heads.backbone import Backbone, Latent, Prompt

Steer: TypeAlias = "Callable[[Latent, Time], Latent]"
"""The latent that a step shall start from, given the one reached and its time."""
Time: TypeAlias = "Float[Tensor, '']"
"""A noise level in [0, 1], fp32 on the CPU; a tensor, since Python's floats round otherwise than the stock walk."""


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
    """

    model: Backbone
    prompt: Prompt
    negative: Prompt
    scale: float
    times: Float[Tensor, " steps+1"]
    noise: Latent
    reference: Latent | None
    generator: torch.Generator

    def velocity(self, latent: Latent, time: Time) -> Latent:
        """With classifier-free guidance (arXiv 2207.12598, eq. 6 with scale = 1 + w): v = v_u + scale (v_c - v_u).

        Two passes, the caption's first, and a single one where `scale` is 1 or below: as `WanPipeline` has it.
        """
        times = time.expand(latent.shape[0])
        conditional = self.model.velocity(latent, times, self.prompt)
        if self.scale <= 1:
            return conditional
        unconditional = self.model.velocity(latent, times, self.negative)
        return unconditional + self.scale * (conditional - unconditional)


class Guidance(Protocol):
    """One way to let a reference clip steer a walk."""

    def steering(self, walk: Walk) -> AbstractContextManager[Steer]:
        """Inside the context the walk is steered; outside, model and walk are as before."""
        ...
