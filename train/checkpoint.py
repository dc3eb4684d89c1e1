"""Save and resume so that the next loss is the same number.

A checkpoint is a folder `<stage>-<step>` of three files: the LoRA and the optimiser's moments as safetensors, the rest
as JSON. It never holds the frozen model and never a pickle. It is written beside its place, brought to the disk and
then renamed; the JSON holds the hashes of the other two and of itself, by which damage is known.
"""

import base64
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from motionlora.data.errors import InputError, StorageError
from motionlora.train.identity import versions
from motionlora.train.optimizer import counted_by_int

STAGES = ("spatial", "temporal")
LORA, MOMENTS, STATE = "lora.safetensors", "optimizer.safetensors", "state.json"


class DamagedError(StorageError):
    """A checkpoint that is not what was written: a part is missing, cut off or changed."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A stage after `step` optimiser steps. `identity` is what may not change when it continues."""

    stage: str
    step: int
    lora: dict[str, Tensor]
    moments: dict[str, Tensor]
    identity: dict[str, Any]
    random: str = ""

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.step:06d}"


def save_checkpoint(checkpoint: Checkpoint, folder: Path, keep: int = 2) -> Path:
    """Write `folder/<stage>-<step>` whole or not at all, then drop all but the last `keep` of the stage.

    Args:
        keep: 1 or more; with 2 there is one to go back to if the disk damages the last.

    Raises:
        StorageError: the disk is full or read-only; the checkpoints that were there are as before.
    """
    from safetensors.torch import save

    target, unfinished = folder / checkpoint.name, folder / f".{checkpoint.name}.unfinished"
    state = {"stage": checkpoint.stage, "step": checkpoint.step, "identity": checkpoint.identity}
    state |= {"versions": versions(), "random": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()}
    try:
        for left_over in folder.glob(".*.unfinished"):
            shutil.rmtree(left_over)
        unfinished.mkdir(parents=True)
        parts = {LORA: save(_plain(checkpoint.lora)), MOMENTS: save(_plain(checkpoint.moments))}
        state["files"] = {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}
        parts[STATE] = json.dumps(state | {"hash": _hash_of(state)}, indent=1).encode()
        for name, content in parts.items():
            _write_through(unfinished / name, content)
        _sync_folder(unfinished)
        if target.exists():
            _remove(target)
        os.replace(unfinished, target)
        _sync_folder(folder)
        for old in checkpoints(folder, checkpoint.stage)[:-keep]:
            _remove(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise StorageError(
            f"Cannot write checkpoint {target} ({error}): free space or choose another --out; those before are whole."
        ) from error
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and compare it with its hashes.

    Raises:
        InputError: there is none of that name.
        DamagedError: it is not what was written; names the next older one.
        StorageError: it cannot be read.
    """
    from safetensors.torch import load

    if not path.is_dir():
        raise InputError(f"No checkpoint {path}: give --resume latest or a folder <out>/checkpoints/<stage>-<step>.")
    try:
        parts = {name: (path / name).read_bytes() for name in (STATE, LORA, MOMENTS)}
        state = json.loads(parts[STATE])
        _compare(parts, state)
        loaded = Checkpoint(
            stage=state["stage"],
            step=int(state["step"]),
            lora=load(parts[LORA]),
            moments=load(parts[MOMENTS]),
            identity=state["identity"],
            random=state["random"],
        )
        if loaded.name != path.name:
            raise ValueError(f"it says {loaded.name}")
        return loaded
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        before = [str(other) for other in checkpoints(path.parent) if _order(other) < _order(path)]
        cure = f"continue from the one before with --resume {before[-1]}" if before else "train anew with another --out"
        reason = f"{Path(error.filename).name} is missing" if isinstance(error, FileNotFoundError) else str(error)
        raise DamagedError(f"Checkpoint {path} is damaged ({reason}): {cure}.") from error
    except OSError as error:
        raise StorageError(f"Cannot read checkpoint {path} ({error}): mend the disk, or use another --out.") from error


def set_damaged_aside(folder: Path, stage: str, say: Callable[[str], None]) -> None:
    """Rename the last checkpoints of a stage as long as they are damaged, which is said, so that a whole one is last.

    Raises:
        StorageError: there are checkpoints and none is whole, or one cannot be read.
    """
    found = checkpoints(folder, stage)
    for path in reversed(found):
        try:
            load_checkpoint(path)
            return
        except DamagedError as error:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            reason = str(error).partition(": ")[0]
            say(f"{reason}; it is now {aside.name}, and the one before is used.")
    if found:
        raise StorageError(f"No checkpoint of the {stage} stage in {folder} is whole: train anew with another --out.")


def checkpoints(folder: Path, stage: str | None = None) -> list[Path]:
    """Finished checkpoints in a folder, of one stage or of all, oldest first."""
    found = [path for path in folder.glob("*-*") if path.is_dir() and _order(path) != NOWHERE]
    return sorted((path for path in found if stage in (None, path.name.split("-")[0])), key=_order)


def drop_newer(path: Path) -> list[Path]:
    """Remove the checkpoints after `path`: a run that goes back to it would otherwise find them as its latest."""
    newer = [other for other in checkpoints(path.parent) if _order(other) > _order(path)]
    for other in newer:
        _remove(other)
    return newer


def moments_of(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """What AdamW keeps, `exp_avg`, `exp_avg_sq` and `step` say, as `<parameter>|<moment>`; parameters as in `names`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{name}|{moment}": torch.as_tensor(value)
        for name, parameter in zip(names, parameters, strict=True)
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def restore_moments(optimizer: torch.optim.Optimizer, names: list[str], moments: dict[str, Tensor]) -> None:
    """Put `moments_of` back, on the devices of the parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        name, moment = key.split("|")
        state.setdefault(names.index(name), {})[moment] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    counted_by_int(optimizer)


def restore_random(state: str) -> None:
    """Put torch's global CPU generator back. Our draws do not read it; a layer with dropout would."""
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8))


NOWHERE = (-1, -1)


def _order(path: Path) -> tuple[int, int]:
    stage, _, step = path.name.partition("-")
    return (STAGES.index(stage), int(step)) if stage in STAGES and step.isdigit() else NOWHERE


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # Each its own: tables that moments in 8 bits share cannot be shared in a file.
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _hash_of(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _compare(parts: dict[str, bytes], state: dict[str, Any]) -> None:
    """ValueError naming the first part that is not what was written."""
    rest = {name: value for name, value in state.items() if name != "hash"}
    if state.get("hash") != _hash_of(rest):
        raise ValueError(f"{STATE} does not have the hash that it names")
    for name in (LORA, MOMENTS):
        if hashlib.sha256(parts[name]).hexdigest() != state["files"][name]:
            raise ValueError(f"{name} does not have the hash that {STATE} names")


def _write_through(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk, not only in the system's memory."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk; some network disks know no such call, and the rename has to do there."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Take a checkpoint away at once: a process that is killed while deleting leaves no half of it under its name."""
    gone = path.with_name(f".{path.name}.gone.unfinished")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone)
