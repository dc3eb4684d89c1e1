"""Laws of what a run leaves on disk: whole or not at all, damage is known, one run a folder, no bad step is taken."""

import errno
import itertools
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from motionlora.data.errors import InputError, NumbersError, StorageError
from motionlora.train import checkpoint as rooms
from motionlora.train import lock as locks
from motionlora.train.bad_steps import LIMIT, BadSteps
from motionlora.train.checkpoint import (
    Checkpoint,
    DamagedError,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
    set_damaged_aside,
)
from motionlora.train.lock import NAME, SILENCE, holding

IDENTITY = {"seed": 0, "temporal.lr": 1e-4, "lora.projections": ["q", "k"], "caption": "grün"}


def made(step: int, stage: str = "temporal") -> Checkpoint:
    lora = {"x.lora_A.weight": torch.full((2, 3), float(step)), "x.lora_B.weight": torch.ones(3, 2) / 3}
    moments = {"x.lora_A.weight|exp_avg": torch.full((2, 3), step / 7), "x.lora_A.weight|step": torch.tensor(step)}
    return Checkpoint(stage, step, lora, moments, IDENTITY)


def same(one: Checkpoint, other: Checkpoint) -> bool:
    pairs = [(one.lora, other.lora), (one.moments, other.moments)]
    equal = all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)
    return equal and (one.stage, one.step, one.identity) == (other.stage, other.step, other.identity)


def quiet(line: str) -> None:
    del line


def last_good(folder: Path, say: Callable[[str], None] = quiet) -> Checkpoint:
    set_damaged_aside(folder, "temporal", say)
    return load_checkpoint(checkpoints(folder, "temporal")[-1])


def test_what_was_saved_comes_back_and_two_of_each_stage_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        for stage in ("spatial", "temporal"):
            assert same(load_checkpoint(save_checkpoint(made(step, stage), tmp_path)), made(step, stage))
    names = ["spatial-000002", "spatial-000003", "temporal-000002", "temporal-000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert same(load_checkpoint(save_checkpoint(made(3), tmp_path)), made(3)), "a step that is there is replaced"


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_are_kept_as_wanted(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        save_checkpoint(made(step), tmp_path, keep)
    assert [path.name for path in checkpoints(tmp_path)] == [f"temporal-00000{step}" for step in range(6 - keep, 6)]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    """One bit of a number: a file that safetensors and JSON read without complaint."""
    content = bytearray(path.read_bytes())
    content[-5 if path.suffix == ".safetensors" else content.index(b"0.0001")] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    """The same file of the checkpoint before, whole in itself."""
    shutil.copy(path.parent.with_name("temporal-000001") / path.name, path)


@pytest.mark.parametrize("damage", [cut, flip, swap, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["lora.safetensors", "optimizer.safetensors", "state.json"])
def test_any_damage_is_known_and_the_one_before_is_used(tmp_path: Path, name: str, damage: Callable) -> None:
    for step in (1, 2):
        save_checkpoint(made(step), tmp_path)
    last = tmp_path / "temporal-000002"
    damage(last / name)
    with pytest.raises(DamagedError, match=r"temporal-000002 is damaged .*--resume .*temporal-000001"):
        load_checkpoint(last)
    told: list[str] = []
    assert same(last_good(tmp_path, told.append), made(1))
    assert len(told) == 1
    assert "temporal-000002 is damaged" in told[0]
    assert "temporal-000002.damaged" in told[0]
    assert same(load_checkpoint(save_checkpoint(made(2), tmp_path)), made(2))
    assert (tmp_path / "temporal-000002.damaged").is_dir(), "for whoever wants to look"


def test_a_checkpoint_under_anothers_name_is_damaged(tmp_path: Path) -> None:
    shutil.copytree(save_checkpoint(made(1), tmp_path), tmp_path / "temporal-000002")
    with pytest.raises(DamagedError, match=r"temporal-000002 is damaged \(it says temporal-000001\)"):
        load_checkpoint(tmp_path / "temporal-000002")


def test_without_a_whole_checkpoint_nothing_is_begun_anew_in_silence(tmp_path: Path) -> None:
    set_damaged_aside(tmp_path, "temporal", quiet)
    for step in (1, 2):
        cut(save_checkpoint(made(step), tmp_path) / "state.json")
    with pytest.raises(StorageError, match=r"No checkpoint of the temporal stage .* is whole"):
        set_damaged_aside(tmp_path, "temporal", quiet)


class KilledError(BaseException):
    """As if the process had ended at this call: nothing of ours catches it."""


def dying(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> list[str]:
    """From now on the call number `at` of those that touch the disk raises; returns the names of the calls made."""
    calls: list[str] = []
    monkeypatch.setattr(rooms, "versions", dict)  # reads files of its own, as many as packages have
    places = [(os, "replace"), (os, "fsync"), (rooms.shutil, "rmtree"), (Path, "open"), (Path, "mkdir")]
    for owner, name in places:
        real = getattr(owner, name)

        def counted(*args: Any, real: Callable = real, name: str = name, **more: Any) -> Any:
            calls.append(name)
            if len(calls) == at:
                for half in sorted(Path(args[0]).glob("*"))[:1] if name == "rmtree" else ():
                    half.unlink()
                raise error
            return real(*args, **more)

        monkeypatch.setattr(owner, name, counted)
    return calls


def deaths(place: Path, error: BaseException) -> Iterator[tuple[Path, str]]:
    """Two checkpoints saved well, the third dying at its first call that touches the disk, its second and so on.

    The folder, and what was said; at last of one in which nothing died.
    """
    for at in itertools.count(1):
        folder, said = place / str(at), ""
        for step in (1, 2):
            save_checkpoint(made(step), folder)
        with pytest.MonkeyPatch.context() as patch:
            calls = dying(patch, at, error)
            try:
                save_checkpoint(made(3), folder)
            except (KilledError, StorageError) as ended:
                said = str(ended)
        yield folder, said
        if len(calls) < at:
            assert at > 10
            return


def test_wherever_saving_dies_a_whole_checkpoint_is_last(tmp_path: Path) -> None:
    for folder, _ in deaths(tmp_path, KilledError()):
        for path in checkpoints(folder):
            load_checkpoint(path)  # what bears its name is whole
        kept = last_good(folder)
        assert same(kept, made(3)) or same(kept, made(2))
        assert same(load_checkpoint(save_checkpoint(made(4), folder)), made(4))
        assert {path.name[:9] for path in folder.iterdir()} == {"temporal-"}, "leftovers are cleared"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_or_read_only_disk_is_a_sentence_and_the_state_is_as_before(tmp_path: Path, number: int) -> None:
    said = []
    for folder, line in deaths(tmp_path, OSError(number, os.strerror(number))):
        said += [line] if line else []
        assert same(last_good(folder), made(3)) or same(last_good(folder), made(2))
    assert len(said) >= 10
    assert all(os.strerror(number) in line and "\n" not in line for line in said)


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: (calls.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append(f"-> {new}"), replace(old, new)))
    save_checkpoint(made(1), tmp_path)
    names = [call.removeprefix(f"{tmp_path}/.temporal-000001.unfinished") for call in calls]
    parts = ["/lora.safetensors", "/optimizer.safetensors", "/state.json", ""]
    assert names == [*parts, f"-> {tmp_path / 'temporal-000001'}", str(tmp_path)]


def test_a_second_run_in_the_folder_is_refused_with_owner_and_age(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with holding(folder, quiet):
        (folder / "reference.mp4").touch()
        who = f"process {os.getpid()} on {socket.gethostname()} since .*minutes"
        with pytest.raises(InputError, match=who), holding(folder, quiet):
            pytest.fail("two at once")
        assert (folder / NAME).exists(), "the refused one took the lock of the other away"
    assert [path.name for path in folder.iterdir()] == ["reference.mp4"]
    with holding(tmp_path / "empty", quiet):
        pass
    assert not (tmp_path / "empty").exists(), "a run that wrote nothing leaves nothing"


def test_the_lock_of_a_killed_run_is_known_as_stale(tmp_path: Path) -> None:
    ready, hold = os.pipe()
    child = os.fork()
    if not child:
        with holding(tmp_path, quiet):
            os.write(hold, b"x")
            time.sleep(600)
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(InputError, match=f"process {child}"), holding(tmp_path, quiet):
        pytest.fail("two at once")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / NAME).exists()
    told: list[str] = []
    with holding(tmp_path, told.append):
        pass
    assert len(told) == 1
    assert f"left over by process {child}" in told[0]


@pytest.mark.parametrize(("silent", "refused"), [(0.0, True), (SILENCE + 1, False)])
def test_an_owner_on_another_machine_lives_by_its_signs(tmp_path: Path, silent: float, refused: bool) -> None:
    """A network disk may know no locks: then the time of the last sign of life tells."""
    lock, told = tmp_path / NAME, []
    lock.write_text(json.dumps({"process": 7, "machine": "elsewhere", "since": time.time() - 7200}))
    os.utime(lock, (time.time() - silent, time.time() - silent))
    if refused:
        with pytest.raises(InputError, match=r"process 7 on elsewhere since .* \(2 hours\)"), holding(tmp_path, quiet):
            pytest.fail("two at once")
        assert lock.exists()
        return
    with holding(tmp_path, told.append):
        pass
    assert len(told) == 1
    lock.write_text("not finished")
    with holding(tmp_path, told.append):
        pass
    assert len(told) == 1, "nobody known was there"


def test_a_run_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.01)
    with holding(tmp_path, quiet):
        os.utime(tmp_path / NAME, (0, 0))
        until = time.monotonic() + 10
        while (silent := not (tmp_path / NAME).stat().st_mtime) and time.monotonic() < until:
            time.sleep(0.01)
    assert not silent


def test_a_folder_that_cannot_be_written_to_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="choose another --out"), holding(tmp_path / "file" / "run", quiet):
        pytest.fail("locked")
    with pytest.raises(InputError, match="is a file, and a run makes a folder"), holding(tmp_path / "file", quiet):
        pytest.fail("locked")


def accelerator(processes: int = 1, *, others_bad: bool = False, deepspeed: object = None) -> Any:
    gather = lambda flags: torch.cat([flags, torch.tensor([int(others_bad)])])  # noqa: E731
    state = SimpleNamespace(deepspeed_plugin=deepspeed)
    return SimpleNamespace(num_processes=processes, device="cpu", gather=gather, state=state)


NAN, GOOD = torch.tensor(float("nan")), torch.tensor(0.5)


def test_bad_steps_are_counted_and_a_few_in_a_row_end_the_run(tmp_path: Path) -> None:
    told: list[str] = []
    bad = BadSteps("temporal", 0.25, tmp_path, told.append)
    save_checkpoint(made(7), tmp_path)
    seen = [(NAN, 1.0), (GOOD, 1.0), (GOOD, float("inf")), (GOOD, float("nan")), (GOOD, 2.0)]
    assert [bad.good(step, loss, norm, accelerator()) for step, (loss, norm) in enumerate(seen)] == [
        False, True, False, False, True,
    ]  # fmt: skip
    assert (bad.total, bad.in_a_row) == (3, 0)
    assert [line.partition(" at ")[2].partition(",")[0] for line in told] == ["step 1", "step 3", "step 4"]
    bad.tell(10)
    assert told.pop() == "3 of 10 steps of the temporal stage were skipped: their numbers were bad."
    for step in range(LIMIT - 1):
        assert not bad.good(step, NAN, 1.0, accelerator())
    with pytest.raises(NumbersError) as ended:
        bad.good(LIMIT, NAN, 1.0, accelerator())
    for words in (f"bad step {LIMIT} in a row", "temporal-000007", "temporal.lr is 0.25", "--cache None", "step 4"):
        assert words in str(ended.value)


def test_processes_agree_on_a_bad_step_and_deepspeed_cannot_undo_one(tmp_path: Path) -> None:
    bad = BadSteps("temporal", 0.25, tmp_path, quiet)
    assert bad.good(0, GOOD, 1.0, accelerator(2))
    assert not bad.good(1, GOOD, 1.0, accelerator(2, others_bad=True))
    with pytest.raises(NumbersError, match="which DeepSpeed has taken; there is no checkpoint yet"):
        bad.good(2, NAN, 1.0, accelerator(deepspeed=object()))
