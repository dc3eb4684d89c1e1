"""A folder of clips: a LoRA each, one after the other or spread over processes, and one table of them all."""

import gc
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from motionlora.data.cache import write_text
from motionlora.data.errors import InputError, Stopped
from motionlora.infer.learned import learned_beside
from motionlora.infer.table_text import markdown_table
from motionlora.infer.workers import joined
from motionlora.train.endings import ending, exit_code
from motionlora.train.experts import runs_of, train_experts
from motionlora.train.launch import alone, ending_together, refuse_deepspeed, resume_command
from motionlora.train.lock import holding
from motionlora.train.refusals import clip_paths
from motionlora.train.run import TrainResult
from motionlora.train.settings import TrainSettings
from motionlora.train.workshop import settings_file

Row = dict[str, Any]
"""What became of a clip: `clip`, its name; `seconds` of its steps, mean `loss` at their end, `file`, from the table on,
each None where there is none; `failed`, the sentence that says why or ""; `code`, its exit code."""


def train_clips(settings: TrainSettings, say: Callable[[str], None] = print) -> list[Row]:
    """`train_experts` for every clip of `settings.clips`, into `out/NAME`; what became of them, in the clips' order.

    Under a launcher of several processes each trains alone, on a GPU of its own, and takes the next clip when it is
    free; the first one writes `table.md` and `table.json` into `out`.

    Raises:
        InputError: a setting is wrong, `out` is used, there are no clips, or the launcher wants to divide one run.
        Stopped: Ctrl-C or SIGTERM, after saving, or another process is gone; or some clips failed, which did not stop
            the others: the first process says which, with the exit code of the first of them.
    """
    refuse_deepspeed("--clips makes one a process")
    with joined(settings.device) as workers:
        first, again = not workers.index, resume_command(settings, workers.count)
        with (
            ending_together(workers.index, workers.count, lambda: f"go on with: {again}"),
            holding(settings.out, say) if first else nullcontext(),
            alone(),
        ):
            with workers.first():
                runs = _runs(settings, check=first)
                if first:
                    say(f"{len(runs)} clips of {settings.clips}, a LoRA each, go to {settings.out}.")
                    _keep(settings)
            turns = workers.taken(range(len(runs)))
            found = workers.merged({turn: _learned(runs[turn], settings.out, again, say) for turn in turns})
            rows = [row for turn in sorted(found) for row in found[turn]]
            if first:
                _tell(rows, settings.out, again, say)
    return rows


def _runs(settings: TrainSettings, *, check: bool) -> list[TrainSettings]:
    """The run of each clip; with `check` nothing of them can be refused without a model."""
    paths = clip_paths(settings)
    if settings.resume not in ("", "latest"):
        raise InputError(
            f"--resume {settings.resume} is of one clip, and --clips names a folder: give --resume latest."
        )
    named: dict[str, Path] = {}
    for path in paths:
        if (other := named.setdefault(path.stem if path.is_file() else path.name, path)) is not path:
            raise InputError(
                f"{other.name} and {path.name} would have one folder in {settings.out}: rename one of them."
            )
    runs = [
        settings.model_copy(update={"clip": path, "clips": None, "out": settings.out / name})
        for name, path in named.items()
    ]
    for run in runs if check else ():
        runs_of(run)
    return runs


def _keep(settings: TrainSettings) -> None:
    """What `resume_command` starts from."""
    write_text(settings.out / "settings.yaml", settings_file(settings.model_copy(update={"resume": ""})))


def _learned(run: TrainSettings, out: Path, again: str, say: Callable[[str], None]) -> list[Row]:
    """Trains on one clip; a row for each of its LoRAs, or one that says why there is none."""
    name = run.out.name
    try:
        return [_row(result, out) for result in train_experts(run, lambda line: say(f"{name}: {line}"))]
    except Stopped as stopped:
        raise Stopped(f"{name}: {stopped}; all clips go on with: {again}", stopped.code) from stopped
    except BrokenPipeError:
        raise
    except Exception as error:
        exit_code(error, of=f"{name}: ")
        code, sentence = ending(error)
        return [{"clip": name, "seconds": None, "loss": None, "file": None, "failed": sentence, "code": code}]
    finally:
        gc.collect()  # the device may have no room for the next clip beside this one


def _row(result: TrainResult, out: Path) -> Row:
    """Of a run that ended well; its file is the last that it came to."""
    path = list(result.paths.values())[-1]
    known = learned_beside(path)
    losses = [curve[-1][1] for curve in known.curves.values()]
    return {
        "clip": path.parent.relative_to(out).as_posix(),
        "seconds": known.seconds,
        "loss": losses[-1] if losses else None,
        "file": path.relative_to(out).as_posix(),
        "failed": "",
        "code": 0,
    }


def _tell(rows: list[Row], out: Path, again: str, say: Callable[[str], None]) -> None:
    """The table on the screen and as files; Stopped where clips failed, with the exit code of the first of them."""
    lines = [
        [row["clip"], _number(row["seconds"], 1), _number(row["loss"], 4), row["file"] or row["failed"]] for row in rows
    ]
    table = "\n".join(markdown_table(["clip", "seconds", "last loss", "file"], lines))
    write_text(out / "table.md", table + "\n")
    write_text(out / "table.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    say(table)
    if failed := [row for row in rows if row["failed"]]:
        names = ", ".join(row["clip"] for row in failed)
        raise Stopped(
            f"{len(failed)} of {len(rows)} clips failed ({names}), for the reasons in {out / 'table.md'}; the "
            f"others are done; mend these and go on with: {again}",
            failed[0]["code"],
        )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
