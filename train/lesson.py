"""One LoRA of an ablation: trained once, found again by what it is trained on and how.

Of our own code it does not depend on a hash, unlike clips: an hour of training shall not be lost to a changed comment.
Which code trained it is kept beside it instead, and the table says where it was not the same for all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from motionlora.data.cache import content_key, write_text
from motionlora.data.clip import write_clip
from motionlora.heads.head_map import HeadMap
from motionlora.heads.lora_combine import merged
from motionlora.heads.lora_file import load_lora, save_lora
from motionlora.infer.own_code import code_hash
from motionlora.infer.pairs import Source
from motionlora.train.ablations import Ranking, Variant, work_of
from motionlora.train.checkpoint import checkpoints
from motionlora.train.run import train
from motionlora.train.settings import TrainSettings

APART = {
    "clip", "caption", "out", "cache", "resume", "model", "device", "tracker", "checkpoint_every", "keep_checkpoints",
    "log_every", "private", "recompute_every", "clips", "together",
}  # fmt: skip
"""Settings that do not enter the numbers, or whose content does by itself."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """A training run of an ablation.

    Attributes:
        settings: without clip and folder.
        folder: where it goes; equal for equal lessons.
    """

    source: Source
    settings: TrainSettings
    ranking: Ranking
    folder: Path

    @property
    def is_done(self) -> bool:
        return (self.folder / "temporal.safetensors").is_file() and (self.folder / "lesson.json").is_file()

    @property
    def work(self) -> float:
        """Latent frames through the model, as `work_of`."""
        return work_of(self.settings, self.settings.heads.heads == "split" and self.settings.spatial.steps > 0)

    def file(self, variant: Variant) -> Path:
        """What a variant loads; `prepare` makes it where it is not a run's own."""
        if not variant.spatial:
            return self.folder / "temporal.safetensors"
        return self.folder / f"temporal-{variant.strength:g}-spatial-{variant.spatial:g}.safetensors"

    def lora(self, variant: Variant) -> str:
        """FILE or FILE:STRENGTH; strengths of several are in the file."""
        strength = "" if variant.strength is None else f":{1.0 if variant.spatial else variant.strength:g}"
        return f"{self.file(variant)}{strength}"


def lesson_of(variant: Variant, source: Source, recipe: TrainSettings, fingerprint: str, root: Path) -> Lesson:
    """What a variant has to learn from a clip; `root` holds all lessons, `fingerprint` is the model's.

    Lessons that differ in the number of temporal steps alone are neighbours, of which one goes on from the other.
    """
    settings = variant.settings(recipe)
    told = settings.model_dump(mode="json", exclude=APART)
    if settings.schedule == "constant":
        told["temporal"] = {name: value for name, value in told["temporal"].items() if name != "steps"}
    key = content_key("lesson", fingerprint, source.content, variant.ranking, json.dumps(told, sort_keys=True))
    return Lesson(source, settings, variant.ranking, root / f"{source.name}-{key[:12]}" / str(settings.temporal.steps))


def learn(lesson: Lesson, say: Callable[[str], None]) -> None:
    """Trains what is not there yet; goes on where it was stopped, or from a neighbour with fewer steps.

    Raises:
        As `train`.
    """
    if lesson.is_done:
        return
    settings = lesson.settings.model_copy(
        update={"clip": _clip(lesson), "caption": lesson.source.read().caption, "out": lesson.folder}
    )
    if not lesson.folder.exists():
        _take_over(lesson)
    if lesson.ranking != "scored":
        _rank_otherwise(lesson, settings, say)
    train(settings.model_copy(update={"resume": "latest"}), say)
    told = {"clip": lesson.source.name, "ranking": lesson.ranking, "code": code_hash("motionlora.train.run")}
    write_text(lesson.folder / "lesson.json", json.dumps(told, indent=1) + "\n")


def prepare(lesson: Lesson, variant: Variant) -> None:
    """Makes the file that a variant loads from what was learned.

    Raises:
        InputError: it needs a spatial LoRA and there is none.
    """
    if not variant.spatial or lesson.file(variant).is_file():
        return
    stages = (("temporal", variant.strength or 0.0), ("spatial", variant.spatial))
    parts = [(load_lora(lesson.folder / f"{stage}.safetensors"), strength) for stage, strength in stages]
    save_lora(merged(parts), lesson.file(variant))


def codes_of(lessons: list[Lesson]) -> set[str]:
    """Hashes of the code that trained them."""
    files = [lesson.folder / "lesson.json" for lesson in lessons]
    return {json.loads(file.read_text(encoding="utf-8"))["code"] for file in files if file.is_file()}


def _clip(lesson: Lesson) -> Path:
    """The reference as a file, every pixel kept."""
    path = lesson.folder.parent / "clip.mp4"
    if not path.is_file():
        clip = lesson.source.read()
        write_clip(clip, path, comment=clip.caption, exact=True)
    return path


def _take_over(lesson: Lesson) -> None:
    """The folder of the neighbour with the most steps below these, without what it ended with: training goes on."""
    found = [folder for folder in lesson.folder.parent.glob("*") if folder.name.isdigit()]
    fewer = [folder for folder in found if int(folder.name) < int(lesson.folder.name)]
    fewer = [folder for folder in fewer if (folder / "lesson.json").is_file() and checkpoints(folder / "checkpoints")]
    if not fewer or lesson.settings.schedule != "constant":
        return
    draft = lesson.folder.with_name(f".{lesson.folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    ended = shutil.ignore_patterns("temporal*.safetensors", "lesson.json", "settings.yaml", ".*")
    shutil.copytree(max(fewer, key=lambda folder: int(folder.name)), draft, ignore=ended)
    draft.rename(lesson.folder)


def _rank_otherwise(lesson: Lesson, settings: TrainSettings, say: Callable[[str], None]) -> None:
    """Puts a head map into the folder in which other heads count as temporal than those that are."""
    path = lesson.folder / "heads.json"
    if path.is_file():
        return
    scored = lesson.folder / "scored"
    train(settings.model_copy(update={"stages": ("heads",), "out": scored}), say)
    measured, rule, ratio = HeadMap.load(scored / "heads.json"), settings.heads.rule, settings.heads.ratio
    seed = sha256(f"{lesson.source.name} {settings.seed}".encode()).digest()[:8]
    temporal = reranked(measured.temporal(rule, ratio), lesson.ranking, int.from_bytes(seed, "big"))
    replace(measured, scores=np.stack([~temporal, temporal], -1).astype(float)).save(path, rule, ratio)


def reranked(temporal: np.ndarray, ranking: Ranking, seed: int) -> np.ndarray:
    """Bool "block head": the heads themselves, all others, or as many drawn at random."""
    if ranking == "random":
        return np.random.default_rng(seed).permutation(temporal.ravel()).reshape(temporal.shape)
    return ~temporal if ranking == "exchanged" else temporal
