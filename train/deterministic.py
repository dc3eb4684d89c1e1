"""The same LoRA twice on the same machine: only algorithms whose sums have one order."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from motionlora.data.errors import InputError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch refuses operations that could give other bits the next time; afterwards all is as before.

    Noise, times and frame order are keyed by the seed in any case, and on a CPU torch's sums have one order for one
    number of threads. On a GPU this picks the algorithms of cuBLAS, cuDNN and the attention that have one, too.

    Raises:
        InputError: an operation of the run has no such algorithm on this device.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    # Read when cuBLAS makes its first handle, which no part of a run has done yet.
    os.environ.setdefault(WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "use_deterministic_algorithms" not in str(error):
            raise
        what = str(error).split(" does not have")[0]
        raise InputError(
            f"{what} has no deterministic form in torch {torch.__version__} on this device: leave --deterministic out."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def machine(device: torch.device) -> dict[str, Any]:
    """What the bits depend on beside versions and settings: the GPU's name, or the CPU's threads."""
    if device.type == "cuda":
        return {"machine": torch.cuda.get_device_name(device)}
    return {"machine": f"CPU with {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
