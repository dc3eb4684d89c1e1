"""SDEdit: the walk starts from the noised reference and is steered by nothing after. The control for other methods.

Source: SDEdit, arXiv 2108.01073, algorithm 1 in flow matching. A start from the noised reference transfers layout by
itself: whoever starts so has to be compared with this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from motionlora.data.errors import InputError
from motionlora.infer.guidance import GuidanceSettings, noised, reference_of

if TYPE_CHECKING:
    from motionlora.heads.backbone import Latent
    from motionlora.infer.guidance import Steer, Time, Walk


class SDEdit(GuidanceSettings):
    """Starts from the noised reference and steers nothing after: a control, since the start gives layout away."""

    paper: ClassVar[str] = "SDEdit, arXiv 2108.01073"

    start: float = Field(default=0.955, gt=0, le=1)
    """Noise level, taken at the first step at or below it (FastVMT's script: 0.955, its library: 0.988); 1 is plain."""

    @contextmanager
    def steering(self, walk: Walk) -> Iterator[Steer]:
        """At the start level the latent becomes the reference with the walk's own noise.

        The steps above that level are walked and their result is dropped, so that the walk stays one for all methods:
        the cost is that of plain sampling.

        Raises:
            InputError: no step lies at or below the start level.
        """
        reference = reference_of(walk)
        levels = walk.times[:-1]
        if self.start < levels[-1]:
            raise InputError(
                f"guidance.start is {self.start:g} and the last step's level is {levels[-1]:.3g}: raise it, or take "
                "more steps."
            )
        start = levels[levels <= self.start][0]

        def steer(latent: Latent, now: Time) -> Latent:
            return noised(reference, walk.noise, now) if now == start else latent

        yield steer
