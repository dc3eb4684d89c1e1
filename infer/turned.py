"""Selectivity of the rows of a comparison: a method beside its clip backwards, chance beside another chance."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from motionlora.data.clip import Clip
from motionlora.infer.measure_names import BY_REVERSAL, names
from motionlora.infer.measure_pair import Judge
from motionlora.infer.row import Row
from motionlora.infer.studio import Cell

PARTNERS = {"none": "reversed:{}", "dose": "re{}"}
"""Of a row's control: what its method's other run is called."""
UNSEEN = "undefined here: no frames in which both outputs show what moves, or a reference that is its own reversal"


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
            found = judge.turning(clip_of(cell), clip_of(other), cell.pair.source) if other else None
            if found and np.isfinite(found).all():
                row = replace(row, values=row.values | dict(zip(names(BY_REVERSAL), found, strict=True)))
            else:
                why = "is measured of guidances and of random moves, with --selective"
                if other:
                    why = UNSEEN if found else judge.why_not
                row = replace(row, missing=row.missing | dict.fromkeys(names(BY_REVERSAL), why))
        made.append(row)
    return made
