"""Where the clips of a comparison are made, each once: a clip is found again by the hash of all that it depends on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from motionlora.data.cache import content_key, replacing
from motionlora.data.clip import Clip, read_clip, write_clip
from motionlora.data.errors import InputError, StorageError
from motionlora.heads.backbone import Prompt
from motionlora.heads.lora import load_into, unload
from motionlora.infer.compare_settings import StudioSettings
from motionlora.infer.effort import walked
from motionlora.infer.generate import Stopwatch, loaded_model, versions
from motionlora.infer.learned import learned_beside
from motionlora.infer.method import PLAIN, Method
from motionlora.infer.order import chosen_device, loaded_lora
from motionlora.infer.own_code import code_hash
from motionlora.infer.pairs import Pair, Source
from motionlora.infer.reference import Reference, encoded
from motionlora.infer.sample import Bar, new_walk, refuse_size
from motionlora.infer.settings import GenerateSettings, lora_choice

ADAPTER = "compared"


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
        self.how = GenerateSettings(**shared, **asdict(size), attention=settings.attention)
        self.size, self.exact, self.strength = size, settings.exact, strength
        self.folder = settings.out / "cells"
        self.device = chosen_device(settings.device)
        self.model = loaded_model(self.how, self.device)
        refuse_size(self.model, size.frames, size.height, size.width)
        texts = list(dict.fromkeys([*captions, settings.negative, ""]))
        embedded = self.model.embed(texts)
        self.prompts: dict[str, Prompt] = {text: embedded[index].to("cpu") for index, text in enumerate(texts)}
        self._facts: dict[str, dict[str, Any]] = {}
        self._loaded = ""
        self._reference: tuple[tuple[str, str], Reference] | None = None
        self._clip: tuple[str, Clip] | None = None

    def key(self, cell: Cell) -> str:
        """Of the clip: equal wherever everything that goes into it is equal, whichever comparison asks.

        Of our own code all that makes the clip counts, so that no clip outlives a change of it.
        """
        method = cell.method
        if method.control == "reference":
            return content_key("reference", cell.pair.source.content)
        model = self.model
        network = (model.fingerprint, model.parts.text_hash, model.parts.vae_hash, str(model.dtype), self.device.type)
        walk = (self.how.attention, self.how.sample.model_dump_json(), repr(self.size), self.exact)
        asked = (cell.pair.caption, self.how.negative, cell.seed)
        guidance = type(method.guidance)
        code = code_hash(__name__, guidance.__module__)
        if method.control == "static":
            return content_key("static", *map(str, (*network, *walk, *asked, code)))
        steering = (method.guidance_name, method.guidance.model_dump_json())
        reference = cell.donor.source.content if guidance.needs_reference else ""
        lora = self._lora(cell)
        learned = f"{lora['sha256']} at {lora['strength']}" if lora else ""
        return content_key("cell", *map(str, (*network, *walk, *asked, *steering, reference, learned, code)))

    def is_done(self, cell: Cell) -> bool:
        """Whether nothing has to be walked for it."""
        if cell.method.control == "reference":
            return True
        key = self.key(_plain(cell) if cell.method.control == "static" else cell)
        return self._file(key, "json").is_file() and self._file(key, "mp4").is_file()

    def clip(self, cell: Cell, title: str, say: Callable[[str], None]) -> tuple[Clip, dict[str, float]]:
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
        key = self.key(cell)
        stored = self._stored(key, say)
        if stored is None:
            self._make(cell, key, title)
            stored = self._stored(key, say)
        if stored is None:
            raise StorageError(f"{self._file(key, 'mp4')} cannot be read again after it was written: check the disk.")
        return stored

    def source_clip(self, source: Source) -> Clip:
        """The reference's pixels, kept for the next cell."""
        if self._clip is None or self._clip[0] != source.content:
            self._clip = (source.content, source.read())
        return self._clip[1]

    def _make(self, cell: Cell, key: str, title: str) -> None:
        """Walks, and keeps clip and story; the story last, so that where it is the clip is whole."""
        watch, method = Stopwatch(), cell.method
        with watch.timed("reference"):
            lora = self._lora(cell)
            self._load(cell.donor.lora if method.lora else "", method)
            reference = self._encoded(cell, lora)
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
                sample=self.how.sample,
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
        with replacing(self._file(key, "json")) as draft:
            draft.write_text(json.dumps(story, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _stored(self, key: str, say: Callable[[str], None]) -> tuple[Clip, dict[str, float]] | None:
        """A clip and what it took; None, which is said, where one of the two files is damaged."""
        story, film = self._file(key, "json"), self._file(key, "mp4")
        if not (story.is_file() and film.is_file()):
            return None
        try:
            cost = json.loads(story.read_text(encoding="utf-8"))["cost"]
            caption = json.loads(story.read_text(encoding="utf-8"))["caption"]
            clip = read_clip(
                film, frames=None, fps=None, height=None, width=None, multiple=1, caption=caption, say=_silent
            )
        except (InputError, ValueError, KeyError) as fault:
            say(f"{film}: damaged, made anew ({fault})")
            story.unlink(missing_ok=True)
            return None
        return replace(clip, fps=self.size.fps), cost

    def _lora(self, cell: Cell) -> dict[str, Any]:
        """Facts of the LoRA that the cell uses, {} for none."""
        if not cell.method.lora:
            return {}
        text = _with_strength(cell.donor.lora, cell.method)
        if text not in self._facts:
            self._facts[text] = loaded_lora(text, self.strength).facts()
        return self._facts[text]

    def _load(self, lora: str, method: Method) -> None:
        """The transformer with this LoRA alone, or with none for ""."""
        wanted = _with_strength(lora, method) if lora else ""
        if wanted == self._loaded:
            return
        if self._loaded:
            unload(self.model.transformer, ADAPTER)
            self._loaded = ""
        if wanted:
            found = loaded_lora(wanted, self.strength)
            load_into(self.model.transformer, found.lora, ADAPTER, found.strength)
            self._loaded = wanted

    def _encoded(self, cell: Cell, lora: dict[str, Any]) -> Reference:
        """The donor's clip as the guidance takes it, kept with what guidances compute from it."""
        if not type(cell.method.guidance).needs_reference:
            return Reference()
        source = cell.donor.source
        which = (source.content, self._loaded)
        if self._reference is None or self._reference[0] != which:
            how = self.how.model_copy(update={"reference": Path(source.name)})
            loras = [lora] if lora else []
            blank = self.prompts[""].to(self.device)
            self._reference = (which, encoded(self.source_clip(source), self.model, how, loras, blank=blank))
        return self._reference[1]

    def _file(self, key: str, suffix: str) -> Path:
        return self.folder / f"{key}.{suffix}"


def _plain(cell: Cell) -> Cell:
    """The same caption and seed with no transfer."""
    return replace(cell, method=Method(PLAIN), donor=cell.pair)


def _with_strength(lora: str, method: Method) -> str:
    """FILE:STRENGTH where one is known; the method's own goes before that of the captions file."""
    return lora if method.strength is None else f"{lora_choice(lora).path}:{method.strength}"


def _silent(line: str) -> None:
    del line
