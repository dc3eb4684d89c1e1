"""Several processes of a test, which find each other as under a launcher. They are forks: what is patched stays so."""

import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_processes(work: Callable[[int], Any], count: int = 2, patience: float = 240) -> list[int | None]:
    """The exit codes of processes that do `work`, which gets their number: 99 for an exception, None for what hung."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    context: Any = torch.multiprocessing.start_processes(
        _begin, args=(work, address), nprocs=count, join=False, start_method="fork"
    )
    for process in context.processes:
        process.join(patience)
    found = [process.exitcode for process in context.processes]
    for process in context.processes:
        process.kill()
    return found


def together(work: Callable[[int], Any], folder: Path, codes: Sequence[int] = (0, 0)) -> list[str]:
    """What the processes said that did `work`, which returns their exit code, and ended with these."""

    def heard(rank: int) -> None:
        sys.stdout = sys.stderr = (folder / f"said-{rank}").open("w", buffering=1)
        sys.exit(work(rank))

    found = in_processes(heard, len(codes))
    said = [(folder / f"said-{rank}").read_text() for rank in range(len(codes))]
    assert found == [*codes], said
    return said


def _begin(rank: int, work: Callable[[int], Any], address: dict[str, str]) -> None:
    from accelerate.state import AcceleratorState, GradientState

    os.environ |= {**address, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": address["WORLD_SIZE"]}
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate warns, and warnings fail
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    try:
        work(rank)
    except Exception:
        traceback.print_exc()
        sys.exit(99)
