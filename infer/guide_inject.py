"""KV injection: in early steps chosen blocks attend to the reference's keys and values instead of the clip's own.

Source: the baseline of DiTFlow, arXiv 2412.07776, and of its public code, which adds it to every method it compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from motionlora.infer.guidance import GuidanceSettings, guided_steps, guided_until, noised, reference_of

if TYPE_CHECKING:
    from motionlora.heads.backbone import Latent
    from motionlora.infer.guidance import Steer, Time, Walk


class Injection(GuidanceSettings):
    """In early steps chosen blocks attend to the reference's keys and values instead of the clip's own."""

    paper: ClassVar[str] = "baseline of DiTFlow, arXiv 2412.07776"

    blocks: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    """Whose self-attention, counted from zero (paper and code: 0); none injects nothing."""
    share: float = Field(default=0.2, ge=0, le=1)
    """Of the steps, the first ones, in which it is done (paper and code: 0.2)."""

    def forwards(self, steps: int, passes: int, blocks: int) -> float:
        """A guided step adds a forward of the reference that ends in the last of the chosen blocks."""
        part = (max(self.blocks) + 1) / blocks if self.blocks else 0
        return steps * passes + guided_steps(self.share, steps) * part

    def dose_bound(self, steps: int) -> float:
        """The latent itself is not moved."""
        del steps
        return 0.0

    @contextmanager
    def steering(self, walk: Walk) -> Iterator[Steer]:
        """In each guided step the reference is noised to the step's time with the walk's own noise, and its keys and
        values are put in place of the clip's in all passes of that step, with caption and without.

        Raises:
            InputError: a block that the model does not have.
        """
        import torch

        if not self.blocks or self.share == 0:
            yield lambda latent, now: latent
            return
        reference, until = reference_of(walk), guided_until(walk.times, self.share)
        with walk.model.injecting(self.blocks) as injected:

            @torch.no_grad()
            def steer(latent: Latent, now: Time) -> Latent:
                if now <= until:
                    injected.clear()
                    return latent
                source = noised(reference, walk.noise, now)
                injected.record(lambda: walk.model.velocity(source, now.expand(source.shape[0]), walk.prompt))
                return latent

            yield steer
