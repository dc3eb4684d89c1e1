"""Laws of limits and of the reading process: too large is one sentence with its option, a dead decoder another."""

import io
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motionlora.data import reading_process
from motionlora.data.clip import Clip, describe, read_clip, write_clip
from motionlora.data.errors import InputError
from motionlora.data.limits import Limits
from motionlora.data.say import silent
from motionlora.heads.lora_file import load_lora, save_lora
from motionlora.train.command import main

TROUBLE = """
import os, signal, sys, time
from motionlora.data import reading

def fails(path, say, **values):
    if "die" in path.name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in path.name:
        time.sleep(15)
    if "eat" in path.name:
        bytearray(9 << 30)  # 8 GB are allowed
    if "noise" in path.name:
        os.write(1, b"from C\\n"); os.write(2, b"from C\\n"); print("from Python")
    if "bug" in path.name:
        raise KeyError("ours")
    return {"path": path.name}, None

reading.CALLS["describe"] = fails
reading.serve()
"""


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Thirteen frames of 48 x 32 pixels at 10 fps, some kilobytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (13, 32, 48, 3), dtype=np.uint8)
    write_clip(Clip(pixels, 10.0, ""), tmp_path / "clip.mp4")
    return tmp_path / "clip.mp4"


def whole(path: Path, frames: int | None = None, **size: Any) -> Clip:
    return read_clip(path, frames=frames, say=silent, **size)


# Limits


@pytest.mark.parametrize(
    ("limit", "just", "size"),
    [
        ("pixels", 48 * 32, {}),
        ("frames", 13, {}),
        ("memory_mb", 1, {"height": 160, "width": 160}),  # 13 x 160 x 160 x 3 bytes are 0.95 MB
    ],
)
def test_a_clip_at_a_limit_is_read_and_above_it_the_option_is_named(
    clip: Path, limit: str, just: int, size: dict[str, int]
) -> None:
    with Limits.model_validate({limit: just}).used():
        assert whole(clip, **size).frames == 13
    below: dict[str, Any] = {"memory_mb": 1} if limit == "memory_mb" else {limit: just - 1}
    more = {"height": 176, "width": 176} if limit == "memory_mb" else size
    option = f"--limits.{limit.replace('_', '-')}"
    with Limits.model_validate(below).used(), pytest.raises(InputError, match=option) as refusal:
        whole(clip, **more)
    assert "\n" not in str(refusal.value)
    assert whole(clip, **more).frames == 13


def test_frames_have_their_limit_in_the_file_and_where_they_are_taken(clip: Path) -> None:
    with Limits(frames=12).used(), pytest.raises(InputError, match=r"13 frames or more.* --limits\.frames"):
        whole(clip, frames=5)
    with Limits(frames=13).used(), pytest.raises(InputError, match=r"17 frames would be taken.* --limits\.frames"):
        whole(clip, frames=17, fps=20.0)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ""])
@pytest.mark.parametrize("limit", ["pixels", "frames"])
def test_animations_and_folders_have_the_same_limits(clip: Path, suffix: str, limit: str) -> None:
    from PIL import Image

    path = clip.with_suffix(suffix)
    if suffix:
        write_clip(whole(clip), path)
    else:
        path.mkdir()
        for index, frame in enumerate(whole(clip).pixels):
            Image.fromarray(frame).save(path / f"{index}.png")
    just = {"pixels": 48 * 32, "frames": 13}[limit]
    with Limits.model_validate({limit: just}).used():
        assert whole(path).frames == 13
    with Limits.model_validate({limit: just - 1}).used(), pytest.raises(InputError, match=f"--limits.{limit}"):
        whole(path, frames=5)


def test_a_sparse_file_of_a_terabyte_is_refused_by_its_size(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.safetensors"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**40)
    with pytest.raises(InputError, match=r"1,048,576 MB, and at most 8,192 .* --limits.file-mb"):
        whole(tmp_path / "a.mp4")
    with pytest.raises(InputError, match=r"1,048,576 MB, and at most 8,192 .* --limits.file-mb"):
        load_lora(tmp_path / "a.safetensors")


def test_a_pipe_and_a_device_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match="device or a pipe"):
            whole(path)
        with pytest.raises(InputError, match="device or a pipe"):
            load_lora(path)


@pytest.mark.parametrize(
    "text", ["ffconcat version 1.0\nfile clip.mp4\n", "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nclip.mp4\n"]
)
def test_a_playlist_opens_no_other_file(clip: Path, text: str) -> None:
    clip.with_name("list.m3u8").write_text(text)
    with pytest.raises(InputError, match="not a video"):
        whole(clip.with_name("list.m3u8"))


@pytest.mark.parametrize("beside", [True, False])
def test_a_long_caption_is_refused_not_cut(clip: Path, beside: bool) -> None:
    def read(caption: str) -> str:
        clip.with_suffix(".txt").write_text(caption if beside else "other")
        return whole(clip, frames=5, caption=None if beside else caption).caption

    assert read("x" * 4000) == "x" * 4000
    with pytest.raises(InputError, match=r"4,001 characters or more.* --limits.caption"):
        read("x" * 4001)
    with Limits(caption=4001).used():
        assert read("x" * 4001) == "x" * 4001


def test_a_header_at_the_limit_is_read(tmp_path: Path) -> None:
    import torch

    from motionlora.heads.lora import MotionLora

    weights = {f"blocks.0.attn1.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_lora(MotionLora(weights, 2, 2.0, provenance={"note": "x" * 2**21}), tmp_path / "a.safetensors")
    assert load_lora(tmp_path / "a.safetensors").rank == 2
    with Limits(header_mb=2).used(), pytest.raises(InputError, match=r"header of 3 MB, and at most 2 "):
        load_lora(tmp_path / "a.safetensors")


def test_the_command_line_raises_and_lowers_limits(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clip", "inspect", str(clip)]) == 0
    assert main(["clip", "inspect", str(clip), "--limits.frames", "12"]) == 2
    said = capsys.readouterr().err
    assert "13 frames" in said
    assert "--limits.frames" in said
    assert "Traceback" not in said
    assert main(["clip", "inspect", str(clip)]) == 0


# The reading process


@pytest.fixture
def troubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading process whose decoder does what the clip's name says."""
    monkeypatch.setattr(reading_process, "READER", [sys.executable, "-P", "-c", TROUBLE])
    monkeypatch.setattr(reading_process, "_RUNNING", {})


@pytest.mark.usefixtures("troubled")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("die.mp4", r"decoder dies on it \(SIGSEGV\)"),
        ("hang.mp4", r"longer to read than the 0\.5 s allowed.* --limits\.seconds"),
        ("eat.mp4", r"needs more than the 8,192 MB .* --limits\.memory-mb"),
    ],
)
def test_a_decoder_that_fails_is_one_sentence_and_the_next_clip_is_read(name: str, words: str) -> None:
    assert describe("good.mp4") == {"path": "good.mp4"}
    with Limits(seconds=0.5).used(), pytest.raises(InputError, match=words) as refusal:
        describe(name)
    assert "\n" not in str(refusal.value)
    assert describe("good.mp4") == {"path": "good.mp4"}


@pytest.mark.usefixtures("troubled")
def test_a_decoder_that_dies_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clip", "inspect", "die.mp4"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("troubled")
def test_what_decoders_print_reaches_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    assert describe("noise.mp4") == {"path": "noise.mp4"}
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("troubled")
def test_a_bug_of_ours_is_no_bad_input() -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'ours'"):
        describe("bug.mp4")


@pytest.mark.usefixtures("troubled")
def test_a_question_that_was_interrupted_gets_no_late_answer() -> None:
    def interrupted(signum: int, frame: Any) -> None:
        del signum, frame
        raise KeyboardInterrupt

    describe("good.mp4")
    before = signal.signal(signal.SIGALRM, interrupted)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            describe("hang.mp4")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert describe("good.mp4") == {"path": "good.mp4"}


@pytest.mark.usefixtures("troubled")
def test_the_clock_of_one_clip_does_not_end_the_next() -> None:
    with Limits(seconds=20).used():
        describe("good.mp4")
    clocks = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(clock.finished.is_set() for clock in clocks)


@pytest.mark.usefixtures("troubled")
def test_threads_get_each_their_own_answer() -> None:
    names = [f"{number}.mp4" for number in range(99)]
    with ThreadPoolExecutor(8) as threads:
        assert [found["path"] for found in threads.map(describe, names)] == names
    assert len(reading_process._RUNNING) == 1


def test_pixels_that_end_early_are_no_clip() -> None:
    whole = bytes(range(12))
    assert reading_process._pixels(io.BytesIO(whole), [1, 2, 2, 3]).tobytes() == whole
    with pytest.raises(ValueError, match="end early"):
        reading_process._pixels(io.BytesIO(whole[:-1]), [1, 2, 2, 3])


def test_one_process_reads_all_clips_and_ends_with_its_program(clip: Path, tmp_path: Path) -> None:
    # No `if __name__ == "__main__"`: the script must not be run a second time by the reading process.
    script = tmp_path / "scripts" / "script.py"
    script.parent.mkdir()
    (tmp_path / "av.py").write_text("raise SystemExit('no library, but a file of the working folder')")
    script.write_text(
        "import os\n"
        "from motionlora.data.clip import describe\n"
        "from motionlora.data.reading_process import _RUNNING\n"
        f"assert describe({str(clip)!r}) == describe({str(clip)!r})\n"
        "[(owner, process)] = _RUNNING.items()\n"
        "print(process.pid, flush=True)\n"
        "if os.fork() == 0:\n"  # a fork starts its own, and leaves its parent's alone
        f"    describe({str(clip)!r}); os._exit(0)\n"
        "assert os.wait()[1] == 0 and process.poll() is None\n"
    )
    ended = subprocess.run([sys.executable, "-W", "error", str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    [pid] = ended.stdout.split()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
