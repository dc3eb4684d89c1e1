"""`motionlora bench sprites ablation`: what each part of the main method is worth, one thing changed at a time.

Every variant learns a LoRA from every reference with the same seed, and makes the same clips with it; each LoRA and
each clip is made once and found again. Tables are written after each ablation, so that a run can be stopped at any time
and goes on with the same command.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from motionlora.data.benchmark import protocol_hash
from motionlora.data.errors import Stopped, StorageError
from motionlora.data.say import Say, silent
from motionlora.data.settings import InputError
from motionlora.infer.bench_sprites import SPRITES, protocol_pairs
from motionlora.infer.compare import Bench, brief, opened, raise_worst, row_of, sentence_of, unmade
from motionlora.infer.compare_settings import AblationSettings
from motionlora.infer.method import PLAIN, Method, parsed_method
from motionlora.infer.pace import Pace, spoken
from motionlora.infer.pairs import Pair
from motionlora.infer.row import Row
from motionlora.infer.settings import lora_choice
from motionlora.infer.studio import Cell, Studio
from motionlora.train.ablation_table import Chapter, write_chapters
from motionlora.train.ablations import Ablation, Variant, chosen_ablations, latent_frames
from motionlora.train.lesson import Lesson, codes_of, learn, lesson_of, prepare
from motionlora.train.settings import TrainSettings

SECONDS = 0.009
"""Of one latent frame through the embedded tiny Wan on one CPU core: 300 s for a LoRA of 400 steps of 4 x 7 frames."""


def ablate(settings: AblationSettings, say: Say = print) -> list[Chapter]:
    """The ablations of the settings; their files go to `settings.out`.

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
        say(prediction(plan, costs_of(plan, studio), recipe))
        return []
    bench = opened(pairs, settings, SPRITES, strength=recipe.lora.strength)
    plan = [planned(ablation, pairs, recipe, bench.studio.model.fingerprint, settings.out) for ablation in chosen]
    work = Work(bench, Pace([cost for part in costs_of(plan, bench.studio) for half in part for cost in half]), say)
    told = f"sprite protocol, hash {protocol_hash()}, form {settings.form}, references: {', '.join(kept)}"
    name = Path(settings.recipe).name if settings.private else settings.recipe
    method = f"{name}, {recipe.temporal.steps} temporal steps, seed {recipe.seed}"
    say(f"{told}; {len(chosen)} ablations go to {settings.out}")
    began, chapters = time.perf_counter(), []
    for part in plan:
        chapters.append(Chapter(part.ablation, bench.with_diversity(part.cells, work.rows_of(part))))
        heading = {"protocol": told, "main method": method, "training code": _codes(plan), **bench.heading}
        heading["seconds"] = f"{time.perf_counter() - began:.0f} in this call"
        folder = settings.out / part.ablation.name
        bench.write(part.cells, chapters[-1].rows, folder, {"question": part.ablation.question, **heading})
        write_chapters(chapters, settings.out, heading)
        say(f"{part.ablation.name} is done: look at {settings.out / 'ablation.md'} and {folder / 'report.html'}")
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


@dataclass(frozen=True, eq=False)
class Part:
    """One ablation of a plan: lessons by variant and clip, and cells of them and of every control."""

    ablation: Ablation
    lessons: list[tuple[Variant, Lesson]]
    cells: list[Cell]


def planned(ablation: Ablation, pairs: Sequence[Pair], recipe: TrainSettings, fingerprint: str, out: Path) -> Part:
    """What an ablation has to learn and to make. A wrong motion is the LoRA of the next reference."""
    root = out / "lessons"
    lessons = {
        (variant.name, pair.source.name): (variant, lesson_of(variant, pair.source, recipe, fingerprint, root))
        for variant in ablation.variants
        for pair in pairs
    }
    cells = []
    for at, pair in enumerate(pairs):
        for control in ("none", "static", "reference"):
            cells += [Cell(pair, parsed_method(control), seed, pair) for seed in pair.seeds]
        others = [other for other in (*pairs[at + 1 :], *pairs[:at]) if other.source is not pair.source]
        for variant in ablation.variants:
            donors = {variant.name: pair} | ({f"wrong:{variant.name}": others[0]} if others else {})
            for name, donor in donors.items():
                lora = lessons[variant.name, donor.source.name][1].lora(variant)
                method = Method(name, lora=True, control="none" if donor is pair else "wrong")
                cells += [Cell(pair, method, seed, replace(donor, lora=lora)) for seed in pair.seeds]
    return Part(ablation, list(lessons.values()), cells)


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
    failed: dict[str, Exception] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)

    def rows_of(self, part: Part) -> list[Row]:
        """Learns what is missing, then makes and measures every cell; what fails is a row."""
        name = part.ablation.name
        for number, (variant, lesson) in enumerate(part.lessons, 1):
            title = f"{name}, LoRA {number}/{len(part.lessons)}, {variant.name} of {lesson.source.name}"
            with self.pace.telling(title, self.say) as told:
                told.append(self._learned(variant, lesson))
        rows = []
        for number, cell in enumerate(part.cells, 1):
            title = f"{name}, clip {number}/{len(part.cells)}, {cell.method.name} on {cell.pair.source.name}"
            with self.pace.telling(title, self.say) as told:
                rows.append(self._made(cell, title))
                told.append(rows[-1].sentence or brief(rows[-1]))
        return rows

    def _learned(self, variant: Variant, lesson: Lesson) -> str:
        """What came of a lesson, in words."""
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
            self.errors.append(error)
            self.failed[lesson.lora(variant)] = error
            return sentence_of(error)
        return came

    def _made(self, cell: Cell, title: str) -> Row:
        if cell.method.lora and (lacking := self.failed.get(cell.donor.lora)):
            return unmade(cell, lacking)
        row, error = row_of(cell, self.bench.studio, self.bench.judge, title, self.say)
        self.errors += [error] if error else []
        return row


def costs_of(plan: Sequence[Part], studio: Studio) -> list[tuple[list[float], list[float]]]:
    """Latent frames through the model for lessons and cells of each part; 0 for what is there, or came up before."""
    sample, seen = studio.how.sample, set()
    walk = float(sample.steps * sample.passes * latent_frames(SPRITES.frames, 1))

    def cost(name: str, is_done: bool, whole: float) -> float:
        new = name not in seen and not is_done
        seen.add(name)
        return whole if new else 0.0

    def is_made(cell: Cell) -> bool:
        learned = not cell.method.lora or lora_choice(cell.donor.lora).path.is_file()
        return learned and studio.is_done(cell)

    def cell_name(cell: Cell) -> str:
        which = cell.donor.lora if cell.method.lora else PLAIN
        return f"{cell.pair.source.name} {cell.pair.caption} {cell.seed} {which}"

    costs = []
    for part in plan:
        lessons = [cost(str(lesson.folder), lesson.is_done, lesson.work) for _, lesson in part.lessons]
        walks = [0.0 if cell.method.control == "reference" else walk for cell in part.cells]
        cells = [cost(cell_name(cell), is_made(cell), each) for cell, each in zip(part.cells, walks, strict=True)]
        costs.append((lessons, cells))
    return costs


def prediction(plan: Sequence[Part], costs: Sequence[tuple[list[float], list[float]]], recipe: TrainSettings) -> str:
    """The grid, what is missing of it, and how long that takes."""
    names = ("LoRAs", "to learn", "clips", "to make")
    lines = [f"{'ablation':<10}" + "".join(f"{name:>10}" for name in (*names, "time")) + "   variants"]
    for part, (lessons, cells) in zip(plan, costs, strict=True):
        counts = (len(lessons), sum(map(bool, lessons)), len(cells), sum(map(bool, cells)))
        told = "".join(f"{count:>10}" for count in counts) + f"{spoken(SECONDS * sum((*lessons, *cells))):>10}"
        lines.append(
            f"{part.ablation.name:<10}{told}   {', '.join(variant.name for variant in part.ablation.variants)}"
        )
    total = spoken(SECONDS * sum(cost for part in costs for half in part for cost in half))
    lines.append(
        f"{total} in all on one CPU core by the embedded tiny Wan, {recipe.temporal.steps} temporal steps; what two "
        "ablations share counts where it comes first"
    )
    return "\n".join(lines)


def _codes(plan: Sequence[Part]) -> str:
    """Whether one state of the training code made all LoRAs."""
    codes = sorted(code[:12] for code in codes_of([lesson for part in plan for _, lesson in part.lessons]))
    if len(codes) < 2:
        return f"all LoRAs were trained by one state of the training code, {', '.join(codes)}"
    told = f"LoRAs were trained by {len(codes)} states of the training code ({', '.join(codes)})"
    return f"{told}: remove the folder lessons to train all by one"
