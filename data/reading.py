"""How a clip is read, frame by frame, in this very process; and the process that does it for others.

Decoders are large programs in C: on a broken file one may die, hang or take all memory. So `motionlora.data.clip` has
clips read by a process that runs this module (`motionlora.data.reading_process` talks to it): what goes wrong there
costs a clip and not a run.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from motionlora.data.errors import InputError
from motionlora.data.frames import Fit, Footage, Frame, Unreadable, fitted, taken
from motionlora.data.limits import MB, Limits, limits
from motionlora.data.pictures import open_animation, open_folder
from motionlora.data.say import Say, silent
from motionlora.data.video import open_video

Pixels = UInt8[np.ndarray, "frame height width 3"]
WORKSPACE_MB = 4096
"""Megabytes that the reading process may take besides the clip: libraries, decoders, a few frames."""


def read(
    path: Path,
    say: Say,
    *,
    frames: int | None,
    fps: float | None,
    height: int | None,
    width: int | None,
    multiple: int,
    fit: Fit,
    caption: str | None,
) -> tuple[dict[str, Any], Pixels]:
    """What `motionlora.data.clip.read_clip` says, as rate and caption (`fps`, `caption`), and the pixels."""
    footage = _opened(path, fps, say)
    chosen, rate = taken(footage, frames, fps, say)
    window = fitted(footage, height, width, multiple, fit, say)
    shape = (len(chosen), window.height, window.width, 3)
    advice = "take fewer frames or a smaller size"
    limits().refuse_over("memory_mb", np.prod(shape, dtype=float) / MB, f"{path} would take {{}} MB of memory", advice)
    caption = _caption(path) if caption is None else _checked(caption, path)
    footage.check(float(footage.stamps[chosen[-1]]))
    return {"fps": rate, "caption": caption}, _gathered(footage, chosen, window, shape)[1]


def describe(path: Path, say: Say, *, fps: float | None) -> tuple[dict[str, Any], None]:
    """What `motionlora.data.clip.describe` gives; no pixels."""
    del say
    footage = _opened(path, fps, silent)
    footage.check(footage.seconds)
    reader, _ = _gathered(footage, np.array([0]), lambda frame: frame, (1, footage.height, footage.width, 3))
    rate, even = footage.rate()
    most = footage.moments(rate)
    return {
        "path": str(path),
        "kind": footage.kind,
        "reader": reader,
        "frames": footage.frames,
        "fps": round(rate, 3),
        "rate": "constant" if even else "variable",
        "seconds": round(footage.seconds, 3),
        "height": footage.height,
        "width": footage.width,
        "pixel_aspect": round(footage.aspect, 4),
        "rotation": footage.rotation,
        "frames_4k1": most - (most - 1) % 4,
        "caption": _caption(path),
    }, None


CALLS: dict[str, Callable[..., tuple[dict[str, Any], Pixels | None]]] = {"read": read, "describe": describe}


def serve() -> None:
    """Answers requests until there are no more: one JSON line each in, one JSON line and the pixels' bytes out.

    An answer has `said` (lines for the user) and one of `found`, `refused` (a sentence) and `bug` (a traceback).
    """
    asks, answers, nowhere = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"), os.open(os.devnull, os.O_RDWR)
    # Decoders print what they like; only sentences reach the user.
    for stream in range(3):
        os.dup2(nowhere, stream)
    Image.MAX_IMAGE_PIXELS = None  # our own limit stands in its place
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends this process
    for line in asks:
        answer, pixels = _answered(json.loads(line))
        answers.write(json.dumps(answer).encode() + b"\n")
        if pixels is not None:
            answers.write(np.ascontiguousarray(pixels).data)
        answers.flush()


def _answered(request: dict[str, Any]) -> tuple[dict[str, Any], Pixels | None]:
    said: list[str] = []
    allowed = Limits.model_validate(request["limits"])
    try:
        os.chdir(request["folder"])
        _bound_memory(allowed.memory_mb)
        with allowed.used():
            facts, pixels = CALLS[request["call"]](Path(request["path"]), said.append, **request["values"])
        shape = None if pixels is None else pixels.shape
        return {"said": said, "found": facts, "shape": shape}, pixels
    except InputError as refusal:
        return {"said": said, "refused": str(refusal)}, None
    except MemoryError:
        sentence = (
            f"{request['path']} needs more than the {allowed.memory_mb + WORKSPACE_MB:,} MB of memory that reading a "
            "clip may take: make it smaller, or raise the limit with --limits.memory-mb."
        )
        return {"said": said, "refused": sentence}, None
    except Exception:
        return {"said": said, "bug": traceback.format_exc()}, None


def _bound_memory(clip_mb: int) -> None:
    """Where the system can (Linux), allocations beyond the clip and the workspace fail from now on."""
    if sys.platform == "linux":
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        wanted = (clip_mb + WORKSPACE_MB) * MB
        resource.setrlimit(resource.RLIMIT_AS, (wanted if most < 0 else min(wanted, most), most))


def _opened(path: Path, fps: float | None, say: Say) -> Footage:
    try:
        if path.is_dir():
            return open_folder(path, fps, say)
        _check_file(path)
        with path.open("rb") as file:
            head = file.read(16)
    except (OSError, ValueError) as fault:
        if isinstance(fault, InputError):
            raise
        reason = getattr(fault, "strerror", None) or fault
        raise InputError(f"{path} cannot be read ({reason}): check its name and its permissions.") from fault
    if not head:
        raise InputError(f"{path} is an empty file, not a video: copy or download it again.")
    return open_animation(path) if head[:4] == b"RIFF" and head[8:12] == b"WEBP" else open_video(path)


def _check_file(path: Path) -> None:
    facts = path.stat()
    if not S_ISREG(facts.st_mode):
        raise InputError(f"{path} is a device or a pipe, not a file: name a video, or a folder of numbered pictures.")
    limits().refuse_over("file_mb", facts.st_size / MB, f"{path} has {{}} MB", "cut it to the part that is meant")


def _caption(path: Path) -> str:
    """The text beside the clip on one line: clip.txt beside clip.mp4, folder.txt beside or caption.txt in a folder."""
    beside = [path.with_name(f"{path.name}.txt"), path / "caption.txt"] if path.is_dir() else [path.with_suffix(".txt")]
    for text in beside:
        try:
            with text.open(encoding="utf-8") as file:
                return _checked(file.read(limits().caption + 1), text)
        except FileNotFoundError:
            continue
        except (OSError, UnicodeError) as fault:
            raise InputError(f"{text} cannot be read as a caption ({fault}): save it as UTF-8 text.") from fault
    return ""


def _checked(caption: str, source: Path) -> str:
    """The caption on one line; InputError where it is longer than the limit."""
    limits().refuse_over("caption", len(caption), f"The caption of {source} has {{}} characters or more", "shorten it")
    return " ".join(caption.split())


def _gathered(
    footage: Footage, chosen: Sequence[int] | np.ndarray, fit: Callable[[Frame], Frame], shape: tuple[int, ...]
) -> tuple[str, Pixels]:
    """The frames at ascending indexes, fitted, by the first reader that can; and that reader's name."""
    wanted, order = np.unique(chosen, return_inverse=True)
    reasons: list[str] = []
    pixels = np.empty(shape, np.uint8)
    for name, reader in footage.readers:
        try:
            count = 0
            for count, frame in enumerate(reader(wanted.tolist()), 1):
                pixels[order == count - 1] = fit(frame)
            if count == len(wanted):
                return name, pixels
            reasons.append(f"{name} finds {count} of {len(wanted)} frames")
        except Unreadable as fault:
            reasons.append(str(fault))
    raise InputError(f"{footage.name} is damaged ({reasons[-1]}): re-encode it or copy it again.")


if __name__ == "__main__":
    serve()
