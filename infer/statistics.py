"""Statistics of paired comparisons: means that count every reference alike, bootstrap intervals, sign flips, Holm.

Values come as groups, one a reference: the clips of one reference resemble each other, so what is drawn is references.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np

Groups = Sequence[Sequence[float]]
DRAWS = 4000
EXACT = 14
"""References up to which all sign flips are tried (16 384); beyond, as many are drawn at random."""


def mean_of(groups: Groups) -> float:
    """Mean over references of each one's mean; NaN for none."""
    return float(np.mean([np.mean(group) for group in groups])) if groups else float("nan")


def median_of(groups: Groups) -> float:
    """Median of all values together; NaN for none."""
    values = [value for group in groups for value in group]
    return float(np.median(values)) if values else float("nan")


def mean_interval(groups: Groups) -> tuple[float, float]:
    """95 % bootstrap interval of `mean_of` over references (percentiles of 4 000 draws, seed 0); NaN below two."""
    means = np.array([np.mean(group) for group in groups])
    if len(means) < 2:
        return float("nan"), float("nan")
    return _percentiles(means[_picks(len(means))].mean(1))


def median_interval(groups: Groups) -> tuple[float, float]:
    """95 % bootstrap interval of `median_of` over references, likewise."""
    if len(groups) < 2:
        return float("nan"), float("nan")
    table = np.full((len(groups), max(map(len, groups))), np.nan)
    for line, group in zip(table, groups, strict=True):
        line[: len(group)] = group
    drawn = np.sort(table[_picks(len(table))].reshape(DRAWS, -1), axis=1)  # NaN, where a group is shorter, goes last
    count = np.isfinite(drawn).sum(1)
    middle = np.stack([(count - 1) // 2, count // 2], 1)
    return _percentiles(np.take_along_axis(drawn, middle, 1).mean(1))


def sign_flip_p(groups: Groups) -> float:
    """Two-sided p of the hypothesis that the references' mean differences are symmetrical about 0; NaN for none.

    Share of sign flips whose mean is as far from 0: all of them up to 14 references, else 16 384 random ones with the
    one observed. With n references it cannot be below 2 / 2**n: four can never show much.
    """
    means = np.array([np.mean(group) for group in groups])
    if not len(means):
        return float("nan")
    if len(means) <= EXACT:
        signs = np.array(list(product((1, -1), repeat=len(means))))
    else:
        drawn = np.random.default_rng(0).choice((1, -1), (2**EXACT, len(means)))
        signs = np.concatenate([np.ones((1, len(means))), drawn])
    return float((np.abs(signs @ means) >= abs(means.sum()) - 1e-12).mean())


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979): adjusted p in the order given.

    The k-th smallest of m is multiplied by m - k + 1, never falls below the one before it, and is at most 1.
    """
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def _picks(count: int) -> np.ndarray:
    """Which references are drawn, "draw reference"."""
    return np.random.default_rng(0).integers(count, size=(DRAWS, count))


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)
