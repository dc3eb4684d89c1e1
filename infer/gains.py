"""What a comparison says of its methods: figures of each, and gains over baselines in the same pairs.

Pairs share clip, caption and seed; intervals are bootstraps over references, p values are sign flips of references'
mean differences, corrected after Holm among the methods that one baseline is compared with.
"""

from collections.abc import Iterable, Sequence
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
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def figures_of(rows: Sequence[Row]) -> list[Figure]:
    """Every measure and cost of every method, in the order in which they came."""
    found = []
    for method in methods_in(rows):
        own = [row for row in rows if row.method == method]
        for name in (*(measure.name for measure in MEASURES), *COSTS):
            groups = _by_clip((row, value) for row in own if (value := _value(row, name)) is not None)
            cells = sum(map(len, groups))
            middle = (mean_of(groups), *mean_interval(groups), median_of(groups), *median_interval(groups))
            found.append(Figure(method, name, len(own), cells, len(groups), *middle))
    return found


def gains_of(rows: Sequence[Row]) -> list[Gain]:
    """Every method over no transfer, over the standing clip and over itself with a wrong motion, where they are there.

    Holm's family is one measure and one kind of baseline, over all methods that are no controls.
    """
    methods = [name for name in methods_in(rows) if name != PLAIN and _row_of(rows, name).control == "none"]
    found: list[Gain] = []
    for measure in (measure.name for measure in MEASURES):
        for against in (lambda name: PLAIN, lambda name: "static", lambda name: f"wrong:{name}"):
            family = [(name, against(name), paired(rows, name, against(name), measure)) for name in methods]
            family = [(name, other, groups) for name, other, groups in family if groups]
            ps = [sign_flip_p(groups) for _, _, groups in family]
            for (name, other, groups), p, corrected in zip(family, ps, holm(ps), strict=True):
                count = (sum(map(len, groups)), len(groups))
                found.append(Gain(name, other, measure, *count, mean_of(groups), *mean_interval(groups), p, corrected))
    return found


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


def _row_of(rows: Sequence[Row], method: str) -> Row:
    return next(row for row in rows if row.method == method)


def _value(row: Row, name: str) -> float | None:
    return row.values.get(name, row.cost.get(name))


def _by_clip(pairs: Iterable[tuple[Row, float]]) -> Groups:
    """Values grouped by the clip of their row."""
    groups: dict[str, list[float]] = {}
    for row, value in pairs:
        groups.setdefault(row.clip, []).append(float(value))
    return list(groups.values())
