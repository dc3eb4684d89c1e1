"""The process that reads clips for this one, so that a decoder that dies or hangs takes nothing else with it.

One is started at the first clip and kept: its start costs some 0.3 s, a question about a millisecond. It is a plain
`python -m motionlora.data.reading`, neither a fork (which threads of torch do not survive) nor a spawn of
multiprocessing (which runs the caller's script again), so that any program may read clips.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from motionlora.data.errors import InputError
from motionlora.data.limits import limits
from motionlora.data.say import Say

READER = [sys.executable, "-P", "-m", "motionlora.data.reading"]
"""The process; -P leaves out the working folder, whose files may have the names of libraries."""
_LOCK = threading.Lock()
_RUNNING: dict[int, "subprocess.Popen[bytes]"] = {}
"""The reading process of this process, by its own id: a fork of it must not talk into the same pipe."""


def asked(
    call: str, path: Path, say: Say, **values: Any
) -> tuple[dict[str, Any], UInt8[np.ndarray, "frame height width 3"] | None]:
    """What a function of `motionlora.data.reading` returns for a clip; what it says is said.

    Raises:
        InputError: what it refuses; or the decoder died, or took longer than the limit.
    """
    question = {
        "call": call, "path": str(path), "folder": os.getcwd(), "values": values, "limits": limits().model_dump(),
    }  # fmt: skip
    line = json.dumps(question, default=lambda scalar: scalar.item()).encode() + b"\n"  # of NumPy
    with _LOCK:
        answer, pixels = _exchanged(line, path)
    for line in answer["said"]:
        say(line)
    if "refused" in answer:
        raise InputError(answer["refused"])
    if "bug" in answer:
        raise RuntimeError(f"reading {path} failed:\n{answer['bug']}")
    return answer["found"], pixels


def _exchanged(question: bytes, path: Path) -> tuple[Mapping[str, Any], np.ndarray | None]:
    """One question and its answer. A process that was interrupted in between is ended: it would answer out of turn."""
    process = _running()
    assert process.stdin is not None
    assert process.stdout is not None
    late = threading.Event()
    clock = threading.Timer(limits().seconds, lambda: (late.set(), process.kill()))
    clock.start()
    try:
        process.stdin.write(question)
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        pixels = _pixels(process.stdout, answer["shape"]) if answer.get("shape") else None
        return answer, pixels
    except (ValueError, OSError) as fault:  # half an answer, or none
        raise InputError(_why(path, _end(process), late.is_set())) from fault
    except BaseException:
        _end(process)
        raise
    finally:
        clock.cancel()


def _pixels(pipe: Any, shape: list[int]) -> np.ndarray:
    pixels = np.empty(shape, np.uint8)
    if pipe.readinto(pixels.reshape(-1).data) < pixels.size:
        raise ValueError("the pixels end early")
    return pixels


def _why(path: Path, code: int, late: bool) -> str:
    if late:
        return (
            f"{path} took longer to read than the {limits().seconds:g} s allowed: re-encode it or cut it, or raise the "
            "limit with --limits.seconds."
        )
    died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"{path} cannot be read, since its decoder dies on it ({died}): re-encode it, as MP4 say, or copy it again."


def _running() -> "subprocess.Popen[bytes]":
    """The reading process, begun anew where there is none that lives."""
    process = _RUNNING.get(os.getpid())
    if process is not None and process.poll() is None:
        return process
    if process is not None:
        _end(process)
    process = subprocess.Popen(READER, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    _RUNNING[os.getpid()] = process
    atexit.register(_end, process, os.getpid())
    return process


def _end(process: "subprocess.Popen[bytes]", owner: int | None = None) -> int:
    """Ends the process, and gives its exit code; a fork of its `owner` leaves it alone."""
    if owner not in (None, os.getpid()):
        return 0
    process.kill()
    with suppress(OSError), process:  # which closes the pipes; the question may still stand in one
        pass
    return process.wait()
