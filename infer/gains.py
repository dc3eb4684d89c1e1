"""What a comparison says of its methods: figures of each, and gains over baselines in the same pairs.

Pairs share clip, caption and seed; intervals are bootstraps over references, p values are sign flips of references'
mean differences, corrected after Holm among the methods that one baseline is compared with.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from motionlora.infer.measure_names import MEASURES
from motionlora.infer.method import PLAIN
from motionlora.infer.row import Row
from motionlora.infer.statistics import (
    Groups,
    holm,
    mean_interval,
    mean_of,
    median_interval,
    median_of,
    sign_flip_p,
)

SECONDS = ("seconds_tuning", "seconds_reference", "seconds_sample", "seconds_decode")
COSTS = ("forwards", "gradients", "dose_rms", "dose_max", *SECONDS, "peak_gib")
BASELINES = (PLAIN, "static", "wrong", "dose")
OF_A_METHOD = BASELINES[2:]
"""Baselines that each method has for itself."""


@dataclass(frozen=True)
class Figure:
    """One measure or cost of one method: `cells` that have it of `asked`, over `references`; 95 % intervals."""

    method: str
    measure: str
    asked: int
    cells: int
    references: int
    mean: float
    mean_low: float
    mean_high: float
    median: float
    median_low: float
    median_high: float


@dataclass(frozen=True)
class Gain:
    """How much one method has over another in the same pairs: the mean difference, its interval, p, p after Holm."""

    method: str
    against: str
    measure: str
    pairs: int
    references: int
    mean: float
    low: float
    high: float
    p: float
    p_holm: float

    @property
    def baseline(self) -> str:
        """Which of `BASELINES` it is over."""
        return self.against.partition(":")[0]


def figures_of(rows: Sequence[Row]) -> list[Figure]:
    """Every measure and cost of every method, in the order in which they came."""
    found = []
    for method in methods_in(rows):
        own = [row for row in rows if row.method == method]
        for name in (*(measure.name for measure in MEASURES), *COSTS):
            values = ((row, row.values.get(name, row.cost.get(name))) for row in own)
            groups = _by_clip((row, value) for row, value in values if value is not None)
            cells = sum(map(len, groups))
            middle = (mean_of(groups), *mean_interval(groups), median_of(groups), *median_interval(groups))
            found.append(Figure(method, name, len(own), cells, len(groups), *middle))
    return found


def gains_of(rows: Sequence[Row]) -> list[Gain]:
    """Every method over no transfer, the standing clip, itself with a wrong motion and random moves of its dose.

    Where they are there.

    Holm's family is one measure and one kind of baseline, over all methods that are no controls.
    """
    methods = dict.fromkeys(row.method for row in rows if row.method != PLAIN and row.control == "none")
    found: list[Gain] = []
    for measure in MEASURES:
        for baseline in BASELINES:
            against = {name: f"{baseline}:{name}" if baseline in OF_A_METHOD else baseline for name in methods}
            found += family(rows, against, measure.name)
    return found


def family(rows: Sequence[Row], against: Mapping[str, str], measure: str) -> list[Gain]:
    """The gain of each method over its baseline where they share a pair, corrected after Holm among themselves."""
    groups = {name: paired(rows, name, other, measure) for name, other in against.items()}
    groups = {name: found for name, found in groups.items() if found}
    ps = [sign_flip_p(found) for found in groups.values()]
    gains = []
    for (name, found), p, p_holm in zip(groups.items(), ps, holm(ps), strict=True):
        counts, middle = (sum(map(len, found)), len(found)), (mean_of(found), *mean_interval(found))
        gains.append(Gain(name, against[name], measure, *counts, *middle, p, p_holm))
    return gains


def paired(rows: Sequence[Row], method: str, against: str, measure: str) -> Groups:
    """Differences of a measure between two methods in the same clip, caption and seed, grouped by clip."""
    other = {
        row.pairing: value for row in rows if row.method == against and (value := row.values.get(measure)) is not None
    }
    own = [row for row in rows if row.method == method and measure in row.values and row.pairing in other]
    return _by_clip((row, row.values[measure] - other[row.pairing]) for row in own)


def methods_in(rows: Sequence[Row]) -> list[str]:
    """Their names, in the order in which they came."""
    return list(dict.fromkeys(row.method for row in rows))


def _by_clip(pairs: Iterable[tuple[Row, float]]) -> Groups:
    """Values grouped by the clip of their row."""
    groups: dict[str, list[float]] = {}
    for row, value in pairs:
        groups.setdefault(row.clip, []).append(float(value))
    return list(groups.values())
