"""`motionlora bench sprites ablation`: what each part of the main method is worth, one thing changed at a time.

Every variant learns a LoRA from every reference with the same seed, and makes the same clips with it; each LoRA and
each clip is made once and found again. Tables are written after each ablation, so that a run can be stopped at any time
and goes on with the same command. Of several processes each learns a LoRA alone, then they share the clips.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from motionlora.data.benchmark import protocol_hash
from motionlora.data.errors import Stopped, StorageError
from motionlora.data.say import Say, silent
from motionlora.data.settings import InputError
from motionlora.infer.bench_sprites import SPRITES, protocol_pairs
from motionlora.infer.compare import Bench, brief, opened, raise_worst, row_of, sentence_of, unmade
from motionlora.infer.compare_settings import AblationSettings
from motionlora.infer.pace import Pace
from motionlora.infer.row import Row
from motionlora.infer.studio import Cell, Studio
from motionlora.infer.workers import ALONE, Workers, shared, units_of
from motionlora.train.ablation_plan import Part, costs_of, planned, prediction
from motionlora.train.ablation_table import Chapter, write_chapters
from motionlora.train.ablations import Variant, chosen_ablations
from motionlora.train.lesson import Lesson, codes_of, learn, prepare
from motionlora.train.settings import TrainSettings


def ablate(settings: AblationSettings, say: Say = print, workers: Workers = ALONE) -> list[Chapter]:
    """The ablations of the settings; files in `settings.out` and chapters are those of the first of the workers.

    Raises:
        InputError: a setting, the recipe or the model is wrong, before anything is made; or some parts failed for such
            a reason, after all else is written.
        NumbersError: likewise, some LoRAs or clips became NaN.
        StorageError: something cannot be written; the same command goes on later.
        Stopped: Ctrl-C or SIGTERM during training, after saving.
    """
    recipe = recipe_of(settings)
    chosen, pairs = chosen_ablations(settings.only, recipe), protocol_pairs(settings.form)
    kept = list(dict.fromkeys(pair.source.name for pair in pairs))[: settings.references]
    pairs = [pair for pair in pairs if pair.source.name in kept]
    captions = [pair.caption for pair in pairs]
    if settings.dry_run:
        studio = Studio(settings, SPRITES, recipe.lora.strength, captions)
        plan = [planned(ablation, pairs, recipe, studio.model.fingerprint, settings.out) for ablation in chosen]
        workers.heard(say)(prediction(plan, costs_of(plan, studio), recipe))
        return []
    with workers.first():
        bench = opened(pairs, settings, SPRITES, strength=recipe.lora.strength)
    plan = [planned(ablation, pairs, recipe, bench.studio.model.fingerprint, settings.out) for ablation in chosen]
    costs = [cost for part in costs_of(plan, bench.studio) for half in part for cost in half]
    work = Work(bench, Pace(costs, workers.count), say, workers)
    told = f"sprite protocol, hash {protocol_hash()}, form {settings.form}, references: {', '.join(kept)}"
    name = Path(settings.recipe).name if settings.private else settings.recipe
    method = f"{name}, {recipe.temporal.steps} temporal steps, seed {recipe.seed}"
    workers.heard(say)(f"{told}; {len(chosen)} ablations go to {settings.out}")
    began, chapters = time.perf_counter(), []
    for part in plan:
        rows = work.rows_of(part)
        if workers.index:
            continue
        chapters.append(Chapter(part.ablation, bench.with_diversity(part.cells, rows)))
        heading = {"protocol": told, "main method": method, "training code": _codes(plan), **bench.heading}
        heading["seconds"] = workers.lasted(began)
        folder = settings.out / part.ablation.name
        bench.write(part.cells, chapters[-1].rows, folder, {"question": part.ablation.question, **heading})
        write_chapters(chapters, settings.out, heading)
        say(f"{part.ablation.name} is done: look at {settings.out / 'ablation.md'} and {folder / 'report.html'}")
    if not workers.index:
        raise_worst(work.errors, sum(len(chapter.rows) for chapter in chapters), settings.out)
    return chapters


def recipe_of(settings: AblationSettings) -> TrainSettings:
    """The main method: the training settings of the recipe, for the protocol's clips.

    Raises:
        InputError: the recipe cannot be read.
    """
    from motionlora.train.command import settings_of

    recipe: TrainSettings = settings_of("train", ["--config", settings.recipe])
    if recipe.validation.every:
        raise InputError(f"{settings.recipe} makes clips during training: set validation.every to 0 for an ablation.")
    temporal = {"steps": settings.steps} if settings.steps else {}
    shared = {name: getattr(settings, name) for name in ("model", "device", "dtype", "cache")}
    shared |= {"frames": SPRITES.frames, "height": SPRITES.height, "width": SPRITES.width, "fps": SPRITES.fps}
    fixed = {"clip": None, "caption": None, "resume": "", "tracker": "none"}
    return recipe.model_copy(update={**shared, **fixed, "temporal": recipe.temporal.model_copy(update=temporal)})


@dataclass(eq=False)
class Work:
    """A plan on its way.

    Attributes:
        failed: why a LoRA, as cells name it, is not there.
        errors: everything that failed, each once.
    """

    bench: Bench
    pace: Pace
    say: Say
    workers: Workers = ALONE
    failed: dict[str, Exception] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)

    def rows_of(self, part: Part) -> list[Row]:
        """Learns what is missing, then makes and measures every cell; what fails is a row."""
        name = part.ablation.name

        def learned(at: int, place: int) -> tuple[str, Exception | None]:
            variant, lesson = part.lessons[at]
            title = f"{name}, LoRA {place}/{len(part.lessons)}, {variant.name} of {lesson.source.name}"
            with self.pace.telling(title, self.say) as told:
                came, error = self._learned(variant, lesson)
                told.append(came)
            return lesson.lora(variant), self.workers.told(error)

        def made(at: int, place: int) -> tuple[Row, Exception | None]:
            cell = part.cells[at]
            title = f"{name}, clip {place}/{len(part.cells)}, {cell.method.name} on {cell.pair.source.name}"
            with self.pace.telling(title, self.say) as told:
                row, error = self._made(cell, title)
                told.append(row.sentence or brief(row))
            return row, self.workers.told(error)

        lessons = shared(part.neighbours, learned, self.workers, self.pace, f"LoRAs of {name}")
        self.failed |= {lora: error for lora, error in lessons if error}
        cells = shared(units_of(part.cells), made, self.workers, self.pace, f"clips of {name}")
        self.errors += [error for _, error in (*lessons, *cells) if error]
        return [row for row, _ in cells]

    def _learned(self, variant: Variant, lesson: Lesson) -> tuple[str, Exception | None]:
        """What came of a lesson in words, and what ended it."""
        came = "was there" if lesson.is_done else "learned"
        try:
            learn(lesson, silent)
            prepare(lesson, variant)
        except Stopped as stop:
            told = f"Stopped, and saved in {lesson.folder}: the same command goes on from there."
            raise Stopped(told, stop.code) from stop
        except StorageError:
            raise
        except Exception as error:
            return sentence_of(error), error
        return came, None

    def _made(self, cell: Cell, title: str) -> tuple[Row, Exception | None]:
        if cell.method.lora and (lacking := self.failed.get(cell.donor.lora)):
            return unmade(cell, lacking), None
        return row_of(cell, self.bench.studio, self.bench.judge, title, self.say)


def _codes(plan: Sequence[Part]) -> str:
    """Whether one state of the training code made all LoRAs."""
    codes = sorted(code[:12] for code in codes_of([lesson for part in plan for _, lesson in part.lessons]))
    if len(codes) < 2:
        return f"all LoRAs were trained by one state of the training code, {', '.join(codes)}"
    told = f"LoRAs were trained by {len(codes)} states of the training code ({', '.join(codes)})"
    return f"{told}: remove the folder lessons to train all by one"
