"""GPUs by their published figures, and the settings of `motionlora plan`. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from motionlora.train.settings import TrainSettings

GIB = 2**30
RESERVE_SHARE, RESERVE_BYTES = 0.05, GIB
"""Memory that is not planned for: a share that the allocator loses between blocks, and the driver's context (ours)."""
SHARE = 0.5
"""Of a card's published matrix rate that training is assumed to reach (third-party runs: 0.35 to 0.55)."""


@dataclass(frozen=True)
class Card:
    """What a plan needs of a device: its memory, and the FLOPs a second that training is taken to reach on it."""

    name: str
    nbytes: int
    rate: float
    fp32_rate: float
    gpu: bool = True

    def holds(self, nbytes: int) -> bool:
        """Whether a peak of `nbytes` fits beside what is kept in reserve."""
        return nbytes <= self.nbytes * (1 - RESERVE_SHARE) - RESERVE_BYTES


CardName = Literal["here", "rtx4090", "l40s", "a100", "h100", "h200"]
PUBLISHED_CARDS: dict[str, tuple[str, int, float]] = {
    "rtx4090": ("RTX 4090 24 GB", 24, 165.2e12),
    "l40s": ("L40S 48 GB", 48, 362.0e12),
    "a100": ("A100 80 GB", 80, 312.0e12),
    "h100": ("H100 SXM 80 GB", 80, 989.4e12),
    "h200": ("H200 SXM 141 GB", 141, 989.4e12),
}
"""Name, memory in the maker's 10^9 bytes, dense bf16 FLOPs a second with fp32 sums (NVIDIA's data sheets)."""


class PlanSettings(TrainSettings):
    """A training run that is only planned, and the card that it is planned for, which no file of a run names."""

    card: CardName = Field(default="here", exclude=True)
    """`here` measures this machine's matrix rate; the others are taken at their published rate."""
    share: float = Field(default=SHARE, gt=0, le=1, exclude=True)
    """Of the card's matrix rate that the training is assumed to reach."""


def published(name: str, share: float = SHARE) -> Card:
    """A card of the table at a share of its rate; fp32 (the VAE) at an eighth of bf16's (TF32 convolutions, ours)."""
    title, gigabytes, rate = PUBLISHED_CARDS[name]
    return Card(title, gigabytes * 10**9, share * rate, share * rate / 8)
