"""A walk that says what it cost and how far steering moved it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from motionlora.heads.forwards import counting
from motionlora.infer.sample import SILENT, sample

if TYPE_CHECKING:
    from motionlora.heads.backbone import Latent
    from motionlora.infer.guidance import Guidance, Steer, Time, Walk
    from motionlora.infer.sample import Progress


@dataclass(frozen=True)
class Effort:
    """What a walk took.

    Attributes:
        forwards: of the model; two a step with classifier-free guidance; one that ends early counts in part.
        gradients: passes back through the model, counted likewise.
        dose_rms, dose_max: of the sum of all that steering added to the latent, over its elements; its deviation is 1.
        doses: root mean square of what it added in each step.
    """

    forwards: float
    gradients: float
    dose_rms: float
    dose_max: float
    doses: tuple[float, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.forwards:.4g} forwards, {self.gradients:.4g} gradients, dose rms {self.dose_rms:.3g} max "
            f"{self.dose_max:.3g}"
        )


def walked(
    walk: Walk, guidance: Guidance, transformer: nn.Module, progress: Progress = SILENT
) -> tuple[Latent, Effort]:
    """`sample` with its effort. `transformer` is the one behind `walk.model`.

    Raises:
        NumbersError: as `sample`.
    """
    watched = _Watched(guidance)
    with counting(transformer) as tally:
        latent = sample(walk, watched, progress)
    drift = watched.drift
    rms, most = (0.0, 0.0) if drift is None else (_rms(drift).item(), drift.abs().max().item())
    doses = tuple(torch.stack(watched.doses).tolist())
    return latent, Effort(round(tally.forwards, 6), round(tally.gradients, 6), rms, most, doses)


def _rms(drift: Tensor) -> Tensor:
    return drift.square().mean().sqrt()


class _Watched:
    """A guidance that adds up what it does to the latent; as much memory as one latent, none where it does nothing."""

    def __init__(self, guidance: Guidance) -> None:
        self.guidance = guidance
        self.drift: Tensor | None = None
        self.doses: list[Tensor] = []

    @contextmanager
    def steering(self, walk: Walk) -> Iterator[Steer]:
        with self.guidance.steering(walk) as steer:

            def watched(latent: Latent, now: Time) -> Latent:
                moved = steer(latent, now)
                step = moved - latent if moved is not latent else None
                self.doses.append(torch.zeros((), device=latent.device) if step is None else _rms(step))
                if step is not None:
                    self.drift = step if self.drift is None else self.drift + step
                return moved

            yield watched
