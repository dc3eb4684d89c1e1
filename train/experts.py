"""Which experts of a model of two are trained: one, or both one after the other, each a run in a folder of its own."""

import gc
from collections.abc import Callable
from typing import get_args

from motionlora.data.errors import InputError
from motionlora.heads.settings import Expert
from motionlora.heads.wan_folder import boundary_of, found_folder
from motionlora.train.launch import leave_group
from motionlora.train.refusals import refuse_early
from motionlora.train.run import TrainResult, train
from motionlora.train.settings import TrainSettings
from motionlora.train.stages import heads_are_scored


def train_experts(settings: TrainSettings, say: Callable[[str], None] = print) -> list[TrainResult]:
    """`train` for the one expert that is named; for both, the high-noise one into `out/high`, then into `out/low`.

    Raises:
        InputError: both are wanted of a model of one network, or `heads.times` has no level of one; else as `train`.
    """
    runs, results = runs_of(settings), []
    try:
        for run in runs:
            if settings.expert == "both":
                say(f"The {run.expert}-noise expert goes to {run.out}; to go on after a stop, add --resume latest.")
            results.append(train(run, say))
            gc.collect()  # the device may have no room for the next expert beside this one
    finally:
        leave_group()
    return results


def runs_of(settings: TrainSettings) -> list[TrainSettings]:
    """The runs that `train_experts` makes, one an expert.

    Raises:
        InputError: as there, for what can be seen without a model.
    """
    runs = [settings]
    if settings.expert == "both":
        boundary = boundary_of(found_folder(settings.model, weights=False))
        if not boundary:
            raise InputError(
                f"expert is both, and {settings.model} is one network for all noise levels: leave it at high."
            )
        runs = [_of_one(settings, expert, boundary) for expert in get_args(Expert)]
    for run in runs:
        refuse_early(run)
    return runs


def _of_one(settings: TrainSettings, expert: Expert, boundary: float) -> TrainSettings:
    """The run of one expert: its folder, and those of `heads.times` that are its own."""
    if settings.resume not in ("", "latest"):
        raise InputError(f"--resume {settings.resume} is of one expert and both are trained: give --resume latest.")
    times = tuple(time for time in settings.heads.times if (time >= boundary) == (expert == "high"))
    if not times and heads_are_scored(settings):
        side = "at or above" if expert == "high" else "below"
        raise InputError(
            f"heads.times has no noise level of the {expert}-noise expert, {side} {boundary:g}, and both are trained: "
            "give one of each, 0.9998 and 0.8 say."
        )
    heads = settings.heads.model_copy(update={"times": times or settings.heads.times})
    return settings.model_copy(update={"expert": expert, "out": settings.out / expert, "heads": heads})
