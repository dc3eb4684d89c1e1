"""Selectivity of the rows of a comparison: a method beside its clip backwards, chance beside another chance."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from motionlora.data.clip import Clip
from motionlora.infer.measure_pair import TURNING, Judge, Measured
from motionlora.infer.row import Row
from motionlora.infer.studio import Cell

PARTNERS = {"none": "reversed:{}", "dose": "re{}"}
"""Of a row's control: what its method's other run is called."""
UNASKED = Measured(missing=dict.fromkeys(TURNING, "is measured of guidances and of random moves, with --selective"))


def with_selectivity(
    cells: Sequence[Cell], rows: Sequence[Row], judge: Judge, clip_of: Callable[[Cell], Clip]
) -> list[Row]:
    """The rows, those whose other run was made with their selectivity, the others with the reason why there is none.

    Args:
        cells, rows: in the same order.
    """
    done = {(r.pairing, r.method): cell for cell, r in zip(cells, rows, strict=True) if r.status == "done"}
    made = []
    for cell, row in zip(cells, rows, strict=True):
        other = done.get((row.pairing, PARTNERS.get(row.control, "").format(row.method)))
        if row.status == "done":
            found = judge.turning(clip_of(cell), clip_of(other), cell.pair.source) if other else UNASKED
            row = replace(row, values=row.values | found.values, missing=row.missing | found.missing)
        made.append(row)
    return made
