"""The processes that share the cells of a comparison, the clips of a training, or the LoRAs of an ablation.

    accelerate launch --multi_gpu --num_processes 4 --no_python motionlora compare ...

(or `torchrun --nproc_per_node 4 --no-python motionlora compare ...`). Each takes what nobody has taken yet, so that
none waits for the slowest. They share the folder and no tensors, and talk over gloo, whatever the model runs on. Those
of `generate` make each clip together (`motionlora.heads.context_parallel`). Tested on a CPU, not on GPUs.
"""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from motionlora.data.errors import InputError
from motionlora.data.say import Say, silent

if TYPE_CHECKING:
    from torch.distributed import Store

    from motionlora.infer.pace import Pace
    from motionlora.infer.studio import Cell

T = TypeVar("T")
PATIENCE = timedelta(days=1)
"""How long processes wait for each other where nothing tells that one is gone."""


@dataclass(frozen=True, eq=False)
class Workers:
    """This process, counted from 0, among all; the first one writes tables and page. `store` counts what is taken."""

    index: int = 0
    count: int = 1
    store: Store | None = None

    def heard(self, say: Say) -> Say:
        """For what every process would say alike: only the first is heard."""
        return silent if self.index else say

    @contextmanager
    def first(self) -> Iterator[None]:
        """The first process does the body alone, then the others do it and find what it left in the folder."""
        if self.index:
            self._meet()
        yield
        if not self.index:
            self._meet()

    def taken(self, units: Sequence[T], of: str = "taken") -> Iterator[T]:
        """Those of the same sequence in every process that fall to this one: each goes to whoever is free first.

        Args:
            of: a name of the sequence, another one for each that these processes share.
        """
        if self.store is None:
            yield from units
            return
        while (at := self.store.add(of, 1) - 1) < len(units):
            yield units[at]

    def told(self, error: Exception | None) -> Exception | None:
        """An error as every process can have it."""
        return error if error is None or self.count == 1 else portable(error)

    def merged(self, part: Mapping[int, T]) -> dict[int, T]:
        """What all processes have, by number, once all have come so far."""
        parts: list[Any] = [part]
        if self.count > 1:
            import torch.distributed as dist

            parts *= self.count
            dist.all_gather_object(parts, part)
        return {number: thing for each in parts for number, thing in each.items()}

    def lasted(self, began: float) -> str:
        """The seconds since `began` (`time.perf_counter`), for the head of a table."""
        together = f" of {self.count} processes at once; those of a cell are its own process's"
        return f"{time.perf_counter() - began:.0f} in this call" + (together if self.count > 1 else "")

    def _meet(self) -> None:
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier()


ALONE = Workers()


@contextmanager
def joined(device: str, *, tensors: bool = False) -> Iterator[Workers]:
    """The processes that a launcher started with this one, on a GPU each where `device` is not cpu; else one alone.

    With `tensors` they exchange those of their GPUs, too, and wait an hour at most.

    Raises:
        InputError: processes and GPUs do not go together, or the launcher does not say where the others are.
        RuntimeError: inside, where another process is gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    _choose_gpu(device)
    try:
        store, index, count = next(dist.rendezvous("env://", timeout=PATIENCE))
    except ValueError as fault:
        raise InputError(f"{fault}: start several processes with accelerate launch or torchrun.") from fault
    talk = "cpu:gloo,cuda:nccl" if tensors and device != "cpu" and torch.cuda.is_available() else "gloo"
    patience = timedelta(hours=1) if tensors else PATIENCE
    dist.init_process_group(talk, store=store, rank=index, world_size=count, timeout=patience)
    try:
        yield Workers(index, count, store)
    finally:
        dist.destroy_process_group()


def shared(
    units: Sequence[Sequence[int]], do: Callable[[int, int], T], workers: Workers, pace: Pace, of: str = "taken"
) -> list[T]:
    """What `do` makes of every number of the units, by number, in each process: all do a share and have the whole.

    Args:
        do: called with the number and its place in the order of the units, from 1.
        pace: has what lies ahead in the order of the units, and stands behind them when all are done.
        of: as in `Workers.taken`.
    """
    order = [number for unit in units for number in unit]
    places = {number: place for place, number in enumerate(order)}
    began, made = pace.passed, {}
    for unit in workers.taken(units, of):
        pace.passed = began + places[unit[0]]
        for number in unit:
            made[number] = do(number, places[number] + 1)
    pace.passed = began + len(order)
    whole = workers.merged(made)
    return [whole[number] for number in sorted(whole)]


def units_of(cells: Sequence[Cell]) -> list[list[int]]:
    """The numbers of cells that use each other's work, which one process makes in the order of the grid.

    Together are: all that a guidance makes of one clip, since what it computes of it is kept; no transfer and what
    stands still. So the cell that pays is the same, however many processes there are.
    """
    units: dict[tuple[str, ...], list[int]] = {}
    for number, cell in enumerate(cells):
        method = cell.method
        which = (cell.pair.caption, str(cell.seed), cell.donor.lora if method.lora else "")
        if type(method.guidance).needs_reference:
            which = (cell.donor.source.content,)
        units.setdefault((method.guidance_name, *which), []).append(number)
    return list(units.values())


def portable(error: Exception) -> Exception:
    """The error as another process can raise it, with the traceback of this one as a note."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note("".join(traceback.format_exception(error)))
    return copy


def _choose_gpu(device: str) -> None:
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return
    gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if device not in ("auto", "cuda"):
        raise InputError(f"Several processes were launched, and device is {device} for all: set --device auto.")
    if here >= gpus:
        raise InputError(
            f"More processes were launched than this machine has GPUs: set --num_processes {gpus}, or --device cpu."
        )
    torch.cuda.set_device(here)
