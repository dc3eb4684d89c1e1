"""Adam on a latent: how every guidance with a loss moves, and how far that can be. Imports torch when it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from motionlora.heads.backbone import Latent

BETAS = (0.9, 0.999)


def descended(latent: Latent, gradient: Callable[[Latent], Latent], lr: float, iterations: int) -> Latent:
    """The latent after some iterations of a fresh Adam (arXiv 1412.6980, algorithm 1, its own betas and epsilon).

    No element moves by more than `reach(lr, iterations)`, whatever the scale of the loss. Holds four latents.

    Args:
        gradient: of the loss at the latent it is given; the latent's own shape, no graph.
        lr: in units of the latent, whose deviation is about 1.
    """
    return descended_by(latent, gradient, [lr] * iterations)


def descended_by(
    latent: Latent, gradient: Callable[[Latent], Latent], rates: Sequence[float], decay: float = 0.0
) -> Latent:
    """As `descended`, with a rate for each iteration: no element moves by more than `reach_by(rates)`.

    With `decay` it is AdamW (arXiv 1711.05101, algorithm 2): an iteration also takes rate * decay of each element away,
    which no bound but its own size holds.
    """
    from torch.optim import AdamW

    moving = latent.detach().clone()
    optimiser = AdamW([moving], betas=BETAS, weight_decay=decay)
    for rate in rates:
        optimiser.param_groups[0]["lr"] = rate
        moving.grad = gradient(moving)
        optimiser.step()
    moving.grad = None
    return moving


def reach(lr: float, iterations: int) -> float:
    """The farthest that an element can go in `iterations` of a fresh Adam: 3.005 lr in three, not quite 3 lr.

    An update is lr m / sqrt(v) with m and v weighted means of g and g^2 (algorithm 1), at most the root of the sum of
    m's weights squared over v's (Cauchy-Schwarz). All signs equal gives 1; growing gradients give a little more.
    """
    return reach_by([lr] * iterations)


def reach_by(rates: Sequence[float]) -> float:
    """The same with a rate for each iteration."""
    return sum(rate * _longest_update(step) for step, rate in enumerate(rates, 1))


def _longest_update(step: int) -> float:
    (m, v), ages = BETAS, range(step)
    of_m = [(1 - m) * m**age / (1 - m**step) for age in ages]
    of_v = [(1 - v) * v**age / (1 - v**step) for age in ages]
    return math.sqrt(sum(a * a / b for a, b in zip(of_m, of_v, strict=True)))
