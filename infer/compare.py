"""`motionlora compare`: every method on every clip with every caption and seed, measured, in tables and on a page.

A cell that fails is a row with its sentence, and the others go on. Training is not done here: `lora` takes LoRAs that
are there already, since `train` stands a floor above. Several processes may share the cells (`workers.py`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from motionlora.data.clip import Clip
from motionlora.data.errors import InputError, NumbersError, Stopped, StorageError
from motionlora.data.say import Say, silent
from motionlora.heads.memory import ROUNDED
from motionlora.infer.compare_settings import CompareSettings, GridSettings, StudioSettings
from motionlora.infer.compare_table import write_tables
from motionlora.infer.grid import grid, prediction
from motionlora.infer.guidance_list import guidance_names
from motionlora.infer.measure_encoders import found_encoders
from motionlora.infer.measure_pair import Judge
from motionlora.infer.measure_quality import diversity
from motionlora.infer.method import parsed_methods
from motionlora.infer.order import loaded_lora, open_folder
from motionlora.infer.pace import Pace
from motionlora.infer.pairs import Pair, benchmark_facts, read_pairs
from motionlora.infer.private import model_name, refuse_secrets, without_secrets
from motionlora.infer.row import Row
from motionlora.infer.studio import Cell, Size, Studio
from motionlora.infer.tracker_verdict import judged_tracker
from motionlora.infer.turned import with_selectivity
from motionlora.infer.workers import ALONE, Workers, shared, units_of


def compare(settings: CompareSettings, say: Say = print, workers: Workers = ALONE) -> list[Row]:
    """The comparison of the settings; its files go to `settings.out`, tables and page by the first of the workers.

    Raises:
        InputError: a setting, a clip, the captions, a LoRA or the model is wrong, before anything is made; or some
            cells failed for such a reason, after all else is written.
        NumbersError: likewise, some cells became NaN.
        StorageError: something cannot be written; the same command goes on later.
    """
    facts = benchmark_facts(settings)
    for line in facts.values():
        workers.heard(say)(line)
    pairs = read_pairs(settings, workers.heard(say))
    size = Size(settings.frames, settings.height, settings.width, settings.fps)
    return compared(pairs, settings, size, facts, say, strength=settings.strength, workers=workers)


def compared(
    pairs: Sequence[Pair],
    settings: GridSettings,
    size: Size,
    facts: dict[str, str],
    say: Say = print,
    *,
    strength: float = 1.0,
    workers: Workers = ALONE,
) -> list[Row]:
    """Any pairs by the methods of the settings. `facts` stand at the head of every table.

    Raises:
        As `compare`.
    """
    names = settings.methods or guidance_names()
    methods = parsed_methods(names, controls=settings.controls, selective=settings.selective)
    cells = grid(pairs, methods)
    if settings.dry_run:
        workers.heard(say)(prediction(cells, settings, size))
        return []
    for method in methods:
        method.guidance.refuse(size.frames, size.height, size.width)
    for lora in dict.fromkeys(cell.donor.lora for cell in cells if cell.method.lora):
        loaded_lora(lora, strength)
    began = time.perf_counter()
    with workers.first():
        bench = opened(pairs, settings, size, strength=strength)
    rows, errors = run(cells, bench.studio, bench.judge, say, workers)
    if workers.index:
        return rows
    rows = with_selectivity(cells, bench.with_diversity(cells, rows), bench.judge, bench.clip)
    heading = {**facts, **bench.heading, "seconds": workers.lasted(began)}
    bench.write(cells, rows, settings.out, heading)
    say(f"{len(rows)} cells, {len(errors)} failed; look at {settings.out / 'report.html'} and table.md beside it")
    raise_worst(errors, len(rows), settings.out)
    return rows


@dataclass(frozen=True, eq=False)
class Bench:
    """What a comparison is made with: model and measures, and `heading`, which stands above its tables."""

    studio: Studio
    judge: Judge
    heading: dict[str, str]

    def with_diversity(self, cells: Sequence[Cell], rows: Sequence[Row]) -> list[Row]:
        """The rows with the diversity of clips that differ in their seed alone, or the reason why there is none."""
        groups: dict[tuple[str, str, str], list[Cell]] = {}
        for cell, row in zip(cells, rows, strict=True):
            if row.status == "done":
                groups.setdefault((row.clip, row.caption, row.method), []).append(cell)
        found = {
            which: diversity([self.clip(cell).pixels for cell in same])
            for which, same in groups.items()
            if len(same) > 1
        }
        made = []
        for row in rows:
            which = (row.clip, row.caption, row.method)
            if row.status == "done" and which in found:
                row = replace(row, values=row.values | {"diversity": found[which]})
            elif row.status == "done":
                row = replace(row, missing=row.missing | {"diversity": "needs another seed"})
            made.append(row)
        return made

    def clip(self, cell: Cell) -> Clip:
        """Of a cell that was made."""
        return self.studio.clip(cell, "page", silent)[0]

    def write(self, cells: Sequence[Cell], rows: Sequence[Row], out: Path, heading: dict[str, str]) -> None:
        """Tables and page of cells and their rows, in the same order, into the folder `out`."""
        from motionlora.infer.report import write_report

        write_tables(rows, out, heading)
        write_report(cells, rows, self.clip, self.judge.reference_paths, out / "report.html", heading)


def opened(pairs: Sequence[Pair], settings: StudioSettings, size: Size, *, strength: float = 1.0) -> Bench:
    """The model and the measures of the settings, for these pairs; the tracker is checked first.

    Raises:
        InputError: the model or the size cannot be used, a caption is too long, or a setting holds a key.
        StorageError: `settings.out` cannot be written to.
    """
    refuse_secrets(settings.model_dump(mode="json"))
    open_folder(settings.out)
    studio = Studio(settings, size, strength, (pair.caption for pair in pairs))
    tracker, verdict = judged_tracker(settings.points, settings.out / "measures")
    sources = list({pair.source.content: pair.source for pair in pairs}.values())
    encoders = found_encoders(settings.encoders, studio.device)
    judge = Judge(sources, tracker, settings.out / "measures", verdict, encoders)
    return Bench(studio, judge, _heading(studio, settings, size, verdict) | {"encoders": encoders.told})


def run(
    cells: Sequence[Cell], studio: Studio, judge: Judge, say: Say, workers: Workers = ALONE
) -> tuple[list[Row], list[Exception]]:
    """Every cell made or found, and measured; what failed is a row with its sentence, and comes back as an error.

    Each of several processes makes its share, and has the rows of all in the end.
    """
    walk, blocks = studio.how.sample, studio.model.blocks
    units = units_of(cells)
    order = [number for unit in units for number in unit]
    whole = [cells[at].method.forwards(walk.steps, walk.passes, blocks) for at in order]
    costs = [0.0 if studio.is_done(cells[at]) else cost for at, cost in zip(order, whole, strict=True)]
    pace = Pace(costs, workers.count)
    idle = sum(not cost for cost in costs)
    workers.heard(say)(f"{len(cells)} cells, {idle} of them need no walk; they go to {studio.folder}")

    def made(at: int, place: int) -> tuple[Row, Exception | None]:
        cell = cells[at]
        title = f"{place}/{len(cells)} {cell.pair.source.name}, {cell.method.name}, seed {cell.seed}"
        with pace.telling(title, say) as told:
            row, error = row_of(cell, studio, judge, title, say)
            told.append(row.sentence or brief(row))
        return row, workers.told(error)

    done = shared(units, made, workers, pace)
    return [row for row, _ in done], [error for _, error in done if error]


def row_of(cell: Cell, studio: Studio, judge: Judge, title: str, say: Say) -> tuple[Row, Exception | None]:
    """A cell made or found, and measured; one that failed is a row with its sentence, beside what ended it.

    Raises:
        StorageError: nothing more can be kept.
        Stopped: this process shall go, or another one is gone.
    """
    try:
        clip, cost = studio.clip(cell, title, say)
        found = judge.measured(clip, cell.pair)
        row = replace(unmade(cell), key=studio.key(cell), cost=cost, values=found.values, missing=found.missing)
        return replace(row, paths=found.paths), None
    except KeyboardInterrupt:
        say(f"stopped at {title}: what is done is kept, and the same command goes on from there")
        raise
    except (StorageError, Stopped):
        raise
    except Exception as error:
        return unmade(cell, error), error


def unmade(cell: Cell, error: Exception | None = None) -> Row:
    """The row of a cell before it is made, or of one that cannot be."""
    pair, method = cell.pair, cell.method
    row = Row(pair.source.name, pair.kind, pair.caption, method.name, cell.seed, method.control)
    return replace(row, status="failed", sentence=sentence_of(error)) if error else row


def sentence_of(error: Exception) -> str:
    """What ended a cell, on one line."""
    ours = isinstance(error, InputError | NumbersError)
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory: take fewer frames or a smaller size"
    return without_secrets(text if ours else f"a bug of motionlora, {type(error).__name__}: {text}")


def brief(row: Row) -> str:
    """A made cell's main figures."""
    parts = [f"{name} {row.values[name]:.2f}" for name in ("smf", "acc", "mf_star") if name in row.values]
    return ", ".join([*parts, f"{row.cost.get('seconds_sample', 0.0):.1f} s sampling"])


def _heading(studio: Studio, settings: StudioSettings, size: Size, verdict: str) -> dict[str, str]:
    from motionlora.infer.machine import machine

    walk, model = settings.sample, studio.model
    name = model_name(model.name, settings.model, settings.private)
    command = {} if settings.private else {"command": without_secrets(" ".join(["motionlora", *sys.argv[1:]]))}
    base = f", {ROUNDED[settings.memory]} base" if settings.memory in ROUNDED else ""
    return {
        "model": f"{name} ({model.fingerprint[:12]}), {model.dtype} on {studio.device}{base}",
        "clips": f"{size}; {walk.steps} steps, scale {walk.scale:g}, shift {walk.shift:g}",
        "tracker": verdict,
        "machine": machine(),
    } | command


def raise_worst(errors: Sequence[Exception], cells: int, out: Path) -> None:
    """The first failure, as it would have ended the run alone; none where all is well."""
    if not errors:
        return
    worst = next((error for error in errors if not isinstance(error, InputError | NumbersError)), errors[0])
    told = f"{len(errors)} of {cells} cells failed, the rest is in {out}; one reason: {sentence_of(worst)}"
    if isinstance(worst, InputError | NumbersError):
        raise type(worst)(told) from worst
    raise RuntimeError(told) from worst
