"""A random gradient of a given dose: the control for every guidance that moves the latent. It knows no reference.

Source: ours, for the null of the direction-selectivity test. Each element moves by exactly plus or minus the dose of
the step, as under the sign that Adam follows: root mean square and largest element are the dose, whatever the size of
the clip. What a method of ours did is in its JSON (`effort` of a clip, `cost` of a compared one); `same_dose` makes of
it the control that moves the latent as far in each step and, in the mean, as far in sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from motionlora.data.errors import InputError
from motionlora.infer.guidance import GuidanceSettings, guided_steps

if TYPE_CHECKING:
    from torch import Tensor

    from motionlora.heads.backbone import Latent
    from motionlora.infer.guidance import Steer, Time, Walk

COMMON = -1
"""In place of a step's number: the direction that all steps share."""


class RandomGradient(GuidanceSettings):
    """Moves early latents at random by a given dose: the control that every other guidance has to beat."""

    needs_reference: ClassVar[bool] = False

    dose: float = Field(default=0.01, ge=0, le=10)
    """What a guided step adds, root mean square and largest element, in units of the latent; 0 moves nothing."""
    share: float = Field(default=0.2, ge=0, le=1)
    """Of the steps, the first ones, that are guided."""
    doses: tuple[Annotated[float, Field(ge=0, le=10)], ...] = ()
    """The dose of each of the first steps, in place of `dose` and `share`, as a method's JSON has them."""
    alike: float = Field(default=0.5, ge=0, le=1)
    """Mean cosine of what two guided steps add: 1 goes on in one direction, 0 takes another one in each step."""
    draw: int = Field(default=0, ge=0)
    """Which random directions: every number is a control of its own."""

    def planned(self, steps: int) -> Sequence[float]:
        """The dose of each guided step."""
        return self.doses or (self.dose,) * guided_steps(self.share, steps)

    def dose_bound(self, steps: int) -> float:
        """Reached where all steps go in one direction."""
        return sum(self.planned(steps))

    @contextmanager
    def steering(self, walk: Walk) -> Iterator[Steer]:
        """Early latents are moved; each clip of a batch as it would be alone.

        Raises:
            InputError: more doses than the walk has steps.
        """
        steps = len(walk.times) - 1
        planned = self.planned(steps)
        if len(planned) > steps:
            raise InputError(f"guidance.doses has {len(planned)} numbers and the walk {steps} steps: give one a step.")
        seeds = [_content(clip) for clip in walk.noise]

        def steer(latent: Latent, now: Time) -> Latent:
            step = int((walk.times > now).sum())
            dose = planned[step] if step < len(planned) else 0.0
            return latent + dose * self._signs(latent, seeds, step) if dose else latent

        yield steer

    def _signs(self, latent: Latent, seeds: Sequence[str], step: int) -> Latent:
        """Of each element -1 or 1: the common sign with the probability at which two steps have the cosine `alike`."""
        import torch

        rows = []
        for seed in seeds:
            common = (_uniform(latent[0], f"{seed} {self.draw} {COMMON}") < 0.5).float() * 2 - 1
            kept = _uniform(latent[0], f"{seed} {self.draw} {step}") < (1 + math.sqrt(self.alike)) / 2
            rows.append(torch.where(kept, common, -common))
        return torch.stack(rows).to(latent)


def same_dose(doses: Sequence[float], dose_rms: float, draw: int = 0) -> RandomGradient:
    """The control of a walk whose steps were moved by `doses` and that was moved by `dose_rms` in sum (`Effort`).

    A sum of steps of the mean cosine a has the mean square a (sum d)^2 + (1 - a) sum d^2, which is solved for a.
    """
    apart, together = sum(dose**2 for dose in doses), sum(doses) ** 2
    alike = (dose_rms**2 - apart) / (together - apart) if together > apart else 1.0
    guided = max((step for step, dose in enumerate(doses, 1) if dose), default=0)
    return RandomGradient(dose=0, doses=tuple(doses[:guided]), alike=min(1.0, max(0.0, alike)), draw=draw)


def _content(clip: Tensor) -> str:
    """What tells a clip's seed: the noise that it starts from."""
    return sha256(clip.cpu().contiguous().numpy().tobytes()).hexdigest()


def _uniform(like: Tensor, key: str) -> Tensor:
    """Numbers in [0, 1) on the CPU, of a generator of their own."""
    import torch

    seed = int.from_bytes(sha256(key.encode()).digest()[:8], "big") >> 1
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(seed))
