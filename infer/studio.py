"""Where the clips of a comparison are made, each once: a clip is found again by the hash of all that it depends on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch

from motionlora.data.cache import content_key, write_text
from motionlora.data.clip import Clip, read_clip, write_clip
from motionlora.data.errors import InputError, StorageError
from motionlora.data.say import Say, silent
from motionlora.heads.backbone import Prompt
from motionlora.heads.lora import unload
from motionlora.heads.memory import ROUNDED
from motionlora.infer.compare_settings import StudioSettings
from motionlora.infer.effort import walked
from motionlora.infer.generate import loaded_model
from motionlora.infer.guide_random import same_dose
from motionlora.infer.learned import learned_beside
from motionlora.infer.machine import versions
from motionlora.infer.method import PLAIN, Method
from motionlora.infer.order import chosen_device, loaded_lora, settled
from motionlora.infer.own_code import code_hash
from motionlora.infer.pace import Stopwatch
from motionlora.infer.pairs import Pair, Source
from motionlora.infer.reference import Reference, encoded
from motionlora.infer.sample import Bar, new_walk, refuse_size
from motionlora.infer.settings import GenerateSettings, lora_choice

ADAPTER = "compared"
DOSED = ("dose", "redose")
"""Controls that move the latent at random; their places are the numbers of their draws."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One clip of a comparison. `donor` is the pair whose clip and LoRA are used: `pair` itself but in a control."""

    pair: Pair
    method: Method
    seed: int
    donor: Pair


@dataclass(frozen=True)
class Size:
    """Of every clip of a comparison, in frames, pixels and frames a second."""

    frames: int
    height: int
    width: int
    fps: float

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.width}x{self.height} at {self.fps:g} fps"


class Studio:
    """A loaded model that makes cells; LoRA and reference stay loaded until a cell needs others.

    Raises:
        InputError: the model or the size cannot be used, or a caption is too long.
    """

    def __init__(self, settings: StudioSettings, size: Size, strength: float, captions: Iterable[str]) -> None:
        shared = {key: getattr(settings, key) for key in ("model", "negative", "sample", "device", "dtype", "cache")}
        self.how = GenerateSettings(**shared, **asdict(size), attention=settings.attention, memory=settings.memory)
        self.size, self.exact, self.strength = size, settings.exact, strength
        self.folder = settings.out / "cells"
        self.device = chosen_device(settings.device)
        self.model = loaded_model(self.how, self.device)
        refuse_size(self.model, size.frames, size.height, size.width)
        texts = list(dict.fromkeys([*captions, settings.negative, ""]))
        embedded = self.model.embed(texts)
        self.prompts: dict[str, Prompt] = {text: embedded[index].to("cpu") for index, text in enumerate(texts)}
        self._loaded = ""
        self._read = lru_cache(1)(lambda lora: [loaded_lora(lora, strength)] if lora else [])
        self._facts = cache(lambda lora: self._read(lora)[0].facts() if lora else {})
        self.source_clip: Callable[[Source], Clip] = lru_cache(1)(lambda source: source.read())
        self._encoded = lru_cache(1)(self._encode)

    def key(self, cell: Cell) -> str:
        """Of the clip: equal wherever everything that goes into it is equal, whichever comparison asks.

        Of our own code all that makes the clip counts, so that no clip outlives a change of it.
        """
        method = self._dosed(cell).method if cell.method.control in DOSED else cell.method
        if method.control == "reference":
            return content_key("reference", cell.pair.source.content)
        model = self.model
        weights = f"{model.dtype} {ROUNDED.get(self.how.memory, '')}".strip()
        network = (model.fingerprint, model.parts.text_hash, model.parts.vae_hash, weights, self.device.type)
        walk = (self.how.attention, self.how.sample.model_dump_json(), repr(self.size), self.exact)
        asked = (cell.pair.caption, self.how.negative, cell.seed)
        guidance = type(method.guidance)
        code = code_hash(__name__, guidance.__module__)
        if method.control == "static":
            return content_key("static", *map(str, (*network, *walk, *asked, code)))
        steering = (method.guidance_name, method.guidance.model_dump_json())
        reference = cell.donor.source.content if guidance.needs_reference else ""
        lora = self._facts(_lora_of(cell))
        learned = f"{lora['sha256']} at {lora['strength']}{lora.get('expert', '')}" if lora else ""
        return content_key("cell", *map(str, (*network, *walk, *asked, *steering, reference, learned, code)))

    def is_done(self, cell: Cell) -> bool:
        """Whether nothing has to be walked for it."""
        if cell.method.control == "reference":
            return True
        if cell.method.control in DOSED and not self.is_done(_steered(cell)):
            return False
        key = self.key(_plain(cell) if cell.method.control == "static" else cell)
        return self._file(key, "json").is_file() and self._file(key, "mp4").is_file()

    def clip(self, cell: Cell, title: str, say: Say) -> tuple[Clip, dict[str, float]]:
        """The cell's clip as it is stored, made where it is not there, and what it took (empty for a mere copy).

        Raises:
            InputError, NumbersError: the cell cannot be made.
            StorageError: it cannot be kept.
        """
        if cell.method.control == "reference":
            return self.source_clip(cell.pair.source), {}
        if cell.method.control == "static":
            moving, _ = self.clip(_plain(cell), title, say)
            return replace(moving, pixels=np.repeat(moving.pixels[:1], moving.frames, 0)), {}
        if cell.method.control in DOSED:
            self.clip(_steered(cell), title, say)
            cell = self._dosed(cell)
        key = self.key(cell)
        stored = self._stored(key, say)
        if stored is None:
            self._make(cell, key, title)
            stored = self._stored(key, say)
        if stored is None:
            raise StorageError(f"{self._file(key, 'mp4')} cannot be read again after it was written: check the disk.")
        return stored

    def _make(self, cell: Cell, key: str, title: str) -> None:
        """Walks, and keeps clip and story; the story last, so that where it is the clip is whole."""
        watch, method = Stopwatch(), cell.method
        with watch.timed("reference"):
            which = _lora_of(cell)
            lora = self._facts(which)
            self._load(which)
            needed = type(method.guidance).needs_reference
            reference = self._encoded(cell.donor.source, which) if needed else Reference()
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        with watch.timed("sample"):
            walk = new_walk(
                self.model,
                self.prompts[cell.pair.caption],
                self.prompts[self.how.negative],
                seed=cell.seed,
                frames=self.size.frames,
                height=self.size.height,
                width=self.size.width,
                sample=settled(self.how.sample, self._read(which)),
                reference=reference.latent,
                kept=reference.kept,
            )
            latent, effort = walked(walk, method.guidance, self.model.transformer, Bar(title))
        with watch.timed("decode"):
            clip = replace(self.model.decode(latent, self.size.fps), caption=cell.pair.caption)
        cost = asdict(effort) | {f"seconds_{phase}": seconds for phase, seconds in watch.seconds.items()}
        if lora and (tuning := learned_beside(Path(lora["file"])).seconds) is not None:
            cost["seconds_tuning"] = tuning
        if cuda:
            cost["peak_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3)
        story = {"method": method.name, "caption": cell.pair.caption, "seed": cell.seed, "cost": cost, "lora": lora}
        story |= {"guidance": method.guidance.model_dump(mode="json"), "reference": reference.facts}
        story |= {"settings": self.how.model_dump(mode="json"), "device": str(self.device), "versions": versions()}
        write_clip(clip, self._file(key, "mp4"), comment=cell.pair.caption, exact=self.exact)
        write_text(self._file(key, "json"), json.dumps(story, indent=2, ensure_ascii=False) + "\n")

    def _stored(self, key: str, say: Say) -> tuple[Clip, dict[str, float]] | None:
        """A clip and what it took; None, which is said, where one of the two files is damaged."""
        story, film = self._file(key, "json"), self._file(key, "mp4")
        if not (story.is_file() and film.is_file()):
            return None
        try:
            told = json.loads(story.read_text(encoding="utf-8"))
            clip, cost = read_clip(film, multiple=1, caption=told["caption"], say=silent), told["cost"]
        except (InputError, ValueError, KeyError, TypeError) as fault:
            say(f"{film}: damaged, made anew ({fault})")
            story.unlink(missing_ok=True)
            return None
        return replace(clip, fps=self.size.fps), cost

    def _load(self, lora: str) -> None:
        """The transformer with this LoRA alone, or with none for ""."""
        if lora == self._loaded:
            return
        if self._loaded:
            unload(self.model.transformer, ADAPTER)
        self._loaded = ""
        if lora:
            self._read(lora)[0].load_onto(self.model, ADAPTER)
            self._loaded = lora

    def _encode(self, source: Source, lora: str) -> Reference:
        """A clip as guidances take it, kept with what they compute from it under this LoRA."""
        how = self.how.model_copy(update={"reference": Path(source.name)})
        loras = [self._facts(lora)] if lora else []
        return encoded(self.source_clip(source), self.model, how, loras, blank=self.prompts[""].to(self.device))

    def _dosed(self, cell: Cell) -> Cell:
        """The random move of a cell whose method was walked before, as far in each step as that went.

        Raises:
            StorageError: that one is not there any more.
        """
        story = self._file(self.key(_steered(cell)), "json")
        try:
            cost = json.loads(story.read_text(encoding="utf-8"))["cost"]
        except (OSError, ValueError, KeyError) as fault:
            raise StorageError(f"{story} cannot be read again after it was written: {fault}.") from None
        moves = same_dose(cost["doses"], cost["dose_rms"], draw=DOSED.index(cell.method.control))
        return replace(cell, method=Method(cell.method.name, moves, "random"))

    def _file(self, key: str, suffix: str) -> Path:
        return self.folder / f"{key}.{suffix}"


def _plain(cell: Cell) -> Cell:
    """The same caption and seed with no transfer."""
    return replace(cell, method=Method(PLAIN), donor=cell.pair)


def _steered(cell: Cell) -> Cell:
    """The one whose dose a random control has."""
    return replace(cell, method=replace(cell.method, control="none"))


def _lora_of(cell: Cell) -> str:
    """FILE or FILE:STRENGTH of the LoRA that the cell uses, "" for none; the method's own strength goes first."""
    lora, strength = cell.donor.lora, cell.method.strength
    if not cell.method.lora:
        return ""
    return lora if strength is None else str(replace(lora_choice(lora), strength=strength))
