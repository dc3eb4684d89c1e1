"""No guidance: the walk goes where the model leads. The file to copy for a guidance of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from motionlora.infer.guidance import GuidanceSettings

if TYPE_CHECKING:
    from motionlora.heads.backbone import Latent
    from motionlora.infer.guidance import Steer, Time, Walk


class NoGuidance(GuidanceSettings):
    """Nothing steers; a motion comes from LoRAs alone."""

    needs_reference: ClassVar[bool] = False

    @contextmanager
    def steering(self, walk: Walk) -> Iterator[Steer]:
        """Every latent stays where it is."""
        del walk
        yield _unmoved


def _unmoved(latent: Latent, time: Time) -> Latent:
    del time
    return latent
