"""Save and resume so that the next loss is the same number.

A checkpoint is a folder `<stage>-<step>` of three files: the LoRA and the optimiser's moments as safetensors, the rest
as JSON. It never holds the frozen model and never a pickle. It is written beside its place and then renamed.
"""

import base64
import json
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from motionlora.data.errors import InputError, StorageError
from motionlora.train.settings import TrainSettings

STAGES = ("spatial", "temporal")
KEPT = 2
IRRELEVANT = (
    "out", "clip", "caption", "model", "resume", "device", "cache", "tracker", "checkpoint_every", "log_every",
    "stages", "gradient_checkpointing", "lora.strength",
)  # fmt: skip
"""Settings that may change between a run and its continuation: they do not enter the numbers, or their content does."""


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


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write `folder/<stage>-<step>` in one go and drop all but the last two of the stage; StorageError if it cannot."""
    from safetensors.torch import save_file

    target, unfinished = folder / checkpoint.name, folder / f".{checkpoint.name}.unfinished"
    state = {"stage": checkpoint.stage, "step": checkpoint.step, "identity": checkpoint.identity}
    state |= {"versions": versions(), "random": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()}
    try:
        for left_over in folder.glob(".*.unfinished"):
            shutil.rmtree(left_over)
        unfinished.mkdir(parents=True)
        save_file(_plain(checkpoint.lora), unfinished / "lora.safetensors")
        save_file(_plain(checkpoint.moments), unfinished / "optimizer.safetensors")
        (unfinished / "state.json").write_text(json.dumps(state, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(unfinished, target)
        for old in checkpoints(folder, checkpoint.stage)[:-KEPT]:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise StorageError(
            f"Cannot write checkpoint {target} ({error}): free space or choose another --out."
        ) from error
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint; StorageError if it is damaged, naming the next older one."""
    from safetensors.torch import load_file

    if not path.is_dir():
        raise InputError(f"No checkpoint {path}: give --resume latest or a folder <out>/checkpoints/<stage>-<step>.")
    try:
        state = json.loads((path / "state.json").read_text())
        loaded = Checkpoint(
            stage=state["stage"],
            step=int(state["step"]),
            lora=load_file(path / "lora.safetensors"),
            moments=load_file(path / "optimizer.safetensors"),
            identity=state["identity"],
            random=state["random"],
        )
        if loaded.name != path.name:
            raise ValueError(f"it says {loaded.name}")
        return loaded
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        before = [str(other) for other in checkpoints(path.parent) if _order(other) < _order(path)]
        cure = f"continue from the one before with --resume {before[-1]}" if before else "train anew with another --out"
        raise StorageError(f"Checkpoint {path} is damaged ({error}): {cure}.") from error


def checkpoints(folder: Path, stage: str | None = None) -> list[Path]:
    """Finished checkpoints in a folder, of one stage or of all, oldest first."""
    found = [path for path in folder.glob("*-*") if path.is_dir() and _order(path) != NOWHERE]
    return sorted((path for path in found if stage in (None, path.name.split("-")[0])), key=_order)


def drop_newer(path: Path) -> list[Path]:
    """Remove the checkpoints after `path`: a run that goes back to it would otherwise find them as its latest."""
    newer = [other for other in checkpoints(path.parent) if _order(other) > _order(path)]
    for other in newer:
        shutil.rmtree(other)
    return newer


def identity(settings: TrainSettings, stage: str, **content: str) -> dict[str, Any]:
    """What a stage's numbers depend on: settings by dotted name, and `content` (hashes of clip, model, heads, LoRA)."""
    flat = flattened(settings.model_dump(mode="json"))
    apart = ("validation.", "temporal." if stage == "spatial" else "spatial.")
    kept = {name: value for name, value in flat.items() if name not in IRRELEVANT and not name.startswith(apart)}
    return kept | content


def refuse_changes(before: dict[str, Any], now: dict[str, Any], *, stage: str, what: str) -> None:
    """InputError naming the first thing that differs. With a level learning rate, `<stage>.steps` may differ."""
    may_differ = {f"{stage}.steps"} if now.get("schedule") == "constant" else set()
    for name in sorted((before.keys() | now.keys()) - may_differ):
        if before.get(name) != now.get(name):
            raise InputError(
                f"{what} was made with {name} = {before.get(name)}, now it is {now.get(name)}: "
                f"set it back to continue, or train anew with another --out."
            )


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names; lists stay values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def moments_of(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """AdamW's `exp_avg`, `exp_avg_sq` and `step` as `<parameter>|<moment>`; parameters in the order of `names`.

    Nothing under DeepSpeed, which keeps its own moments in parts: a run resumed there begins with new ones.
    """
    if not optimizer.state:
        return {}
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


def restore_random(state: str) -> None:
    """Put torch's global CPU generator back. Our draws do not read it; a layer with dropout would."""
    if state:
        torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8))


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: version(name) for name in ("motionlora", "torch", "diffusers", "peft", "accelerate")}


NOWHERE = (-1, -1)


def _order(path: Path) -> tuple[int, int]:
    stage, _, step = path.name.partition("-")
    return (STAGES.index(stage), int(step)) if stage in STAGES and step.isdigit() else NOWHERE


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
