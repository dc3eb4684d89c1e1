"""What a run writes down at every step: its own JSONL log, always, and accelerate's tracker where one is wanted."""

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motionlora.data.cache import replacing
from motionlora.data.errors import StorageError
from motionlora.train.identity import flattened
from motionlora.train.loss import LossByTime
from motionlora.train.private import shared
from motionlora.train.settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

QUIET_WANDB = {"console": "off", "disable_git": True, "save_code": False, "x_disable_meta": True}


class Journal:
    """One stage's log: a JSON object a step, and every `every` steps the loss in ten bins of noise level."""

    def __init__(self, path: Path, stage: str, accelerator: "Accelerator", *, every: int, offset: int) -> None:
        self.stage, self.accelerator, self.every, self.offset = stage, accelerator, every, offset
        self.by_time = LossByTime()
        self.path = path if accelerator.is_main_process else Path(os.devnull)

    def write(self, step: int, **values: float) -> None:
        """Note the numbers of `step`, from 1; JSON knows no NaN, which is null there.

        Trackers drop steps that go back, so theirs count on over stages.
        """
        row: dict[str, Any] = {"step": step} | {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }
        numbers = dict(values)
        if step % self.every == 0:
            row["loss_by_time"] = means = self.by_time.means()
            numbers |= {f"loss_by_time/{bin_ / 10:.1f}": mean for bin_, mean in enumerate(means) if mean is not None}
            self.by_time = LossByTime()
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise StorageError(f"Cannot write {self.path} ({error}): free space, then --resume latest.") from error
        tracked = {f"{self.stage}/{name}": value for name, value in numbers.items()}
        self.accelerator.log(tracked, step=self.offset + step)


def journal(settings: TrainSettings, stage: str, accelerator: "Accelerator", *, first: int, offset: int) -> Journal:
    """The log of a stage that goes on after `first` steps; what an interrupted run wrote beyond them is cut off."""
    path = settings.out / f"log-{stage}.jsonl"
    if accelerator.is_main_process:
        _keep_until(path, first)
    return Journal(path, stage, accelerator, every=settings.log_every, offset=offset)


def start_trackers(accelerator: "Accelerator", settings: TrainSettings) -> None:
    """Start accelerate's tracker with the flattened settings; wandb stays offline where no key or mode is set.

    By itself wandb also keeps the command line, the working folder and what is printed: not so in a private run.
    """
    tree = shared(settings.model_dump(mode="json"), settings.private)
    config = {name: _plain(value) for name, value in flattened(tree).items()}
    wandb: dict[str, Any] = {"dir": str(settings.out)}
    wandb |= {"settings": QUIET_WANDB} if settings.private else {"name": settings.out.name}
    if not {"WANDB_MODE", "WANDB_API_KEY"} & os.environ.keys():
        wandb["mode"] = "offline"
    accelerator.init_trackers("motionlora", config=config, init_kwargs={"wandb": wandb})


def _keep_until(path: Path, steps: int) -> None:
    if not path.exists():
        return
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= steps]
    with replacing(path) as draft:
        draft.write_text("".join(f"{line}\n" for line in rows), encoding="utf-8")


def _step_of(line: str) -> float:
    """The step of a row; infinity for a row that was cut off by a crash."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _plain(value: Any) -> int | float | str | bool:
    return value if isinstance(value, int | float | str | bool) else json.dumps(value)
