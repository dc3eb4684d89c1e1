"""One run a folder: a lock that names its owner and its age, and that a dead owner cannot keep."""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from motionlora.data.errors import InputError, StorageError

NAME = "run.lock"
BEAT = 60.0
"""Seconds between two signs of life of an owner."""
SILENCE = 300.0
"""Seconds without a sign of life after which an owner on another machine counts as dead."""


@contextmanager
def holding(folder: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Inside, `folder` (which is made) is this process's alone.

    The system gives up the lock of a process that dies, in whichever way, so that a killed run never stands in the way
    of its continuation; that a lock was left over is said. Between machines, where that need not work, the owner's
    signs of life count.

    Raises:
        InputError: another run is in the folder; names its process, machine and age; or the folder is a file.
        StorageError: the folder cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file, and a run makes a folder: choose another --out.")
    made, path = not folder.exists(), folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _taken(path, say)
    except OSError as error:
        raise StorageError(f"Cannot write to {folder} ({error}): choose another --out or free space.") from error
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        path.unlink(missing_ok=True)
        os.close(handle)
        if made:
            with suppress(OSError):  # only where nothing came into it
                folder.rmdir()


def _taken(path: Path, say: Callable[[str], None]) -> int:
    """The open and locked lock file with our name in it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        locked = _locked(handle)
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(handle).st_ino:
                break
        os.close(handle)  # its owner took it away while we opened it
    owner, silent = _owner(path), time.time() - path.stat().st_mtime
    elsewhere = owner.get("machine") != socket.gethostname()
    if not locked or (owner and elsewhere and silent < SILENCE):
        os.close(handle)
        raise InputError(
            f"{path.parent} is in use by process {owner.get('process', '?')} on {owner.get('machine', '?')} since "
            f"{_age(owner)}: wait for it, stop it, or choose another --out."
        )
    if owner:
        say(f"{path} was left over by process {owner.get('process')} of {_age(owner)}, which is gone: going on.")
    content = {"process": os.getpid(), "machine": socket.gethostname(), "since": time.time()}
    os.truncate(handle, 0)
    os.pwrite(handle, json.dumps(content).encode(), 0)
    return handle


def _locked(handle: int) -> bool:
    """Whether the system gave us the lock; a disk that knows no locks gives it to everybody."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _owner(path: Path) -> dict[str, Any]:
    """What the last owner wrote about itself; nothing where it did not come to it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _age(owner: dict[str, Any]) -> str:
    """`2026-11-21 08:12:03 (17 minutes)`."""
    since = owner.get("since")
    if not isinstance(since, int | float):
        return "an unknown time"
    minutes = max(0.0, time.time() - since) / 60
    words = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))} ({words})"


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(path)
