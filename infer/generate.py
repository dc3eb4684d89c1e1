"""New clips from captions: the model and its LoRAs are loaded once, then every caption is walked with every seed.

Text encoder and VAE do their work first and are gone when the network is loaded; the VAE comes again for each clip.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from motionlora.data.cache import replacing
from motionlora.data.clip import Clip, write_clip
from motionlora.heads.compiled import compiled
from motionlora.heads.context_parallel import sharing
from motionlora.heads.memory import sampling_memory
from motionlora.infer import sample as walks
from motionlora.infer.context_parallel import refuse_alone_or_crowded, refuse_indivisible
from motionlora.infer.effort import Effort, walked
from motionlora.infer.found import steering_of
from motionlora.infer.guide_none import NoGuidance
from motionlora.infer.machine import versions
from motionlora.infer.order import (
    Choose,
    LoadedLora,
    Order,
    as_set,
    asked_loras,
    chosen_device,
    chosen_dtype,
    open_folder,
    ordered,
    refuse_uncompilable,
    settled,
)
from motionlora.infer.order import slug as slug
from motionlora.infer.pace import Stopwatch
from motionlora.infer.reference import Reference, encoded, read_reference
from motionlora.infer.settings import GenerateSettings, SampleSettings
from motionlora.infer.workers import ALONE, Workers

if TYPE_CHECKING:
    from motionlora.heads.backbone import Backbone, Latent, Prompt
    from motionlora.heads.wan import WanBackbone
    from motionlora.infer.guidance import Guidance
    from motionlora.infer.sample import Progress

UNGUIDED = NoGuidance()
UNMOVED = Reference()


def generate(
    settings: GenerateSettings, say: Callable[[str], None] = print, choose: Choose = as_set, workers: Workers = ALONE
) -> list[Path]:
    """Make a clip of every caption with every seed, and beside each a JSON file that says how it was made.

    Existing files of the same names are replaced, each whole or not at all. Progress is shown on stderr. `choose` says
    what is given for memory, before anything heavy is loaded. Of several `workers` all make each clip together, by
    `settings.context_parallel`, and the first one speaks and writes.

    Returns:
        The clips, `SLUG-OF-CAPTION-seedN.mp4` in `settings.out`; seeds of one caption follow each other.

    Raises:
        InputError: a setting, the model, the reference or a LoRA file is wrong; before the model is loaded where it can
            be known.
        StorageError: something cannot be written.
        NumbersError: a latent became NaN or infinite.
    """
    watch, say = Stopwatch(), workers.heard(say)
    refuse_alone_or_crowded(settings, workers.count)
    refuse_uncompilable(settings)
    orders, device = ordered(settings), chosen_device(settings.device)
    moves, guidance = read_reference(settings, say), steering_of(settings, len(orders))
    loras = asked_loras(settings)
    encoders = encoders_of(settings, device)
    walks.refuse_size(encoders, settings.frames, settings.height, settings.width)
    refuse_indivisible(encoders, settings, workers.count)
    chosen = {"sample": settled(settings.sample, loras), "memory": choose(settings, loras, device)}
    settings = settings.model_copy(update=chosen)
    with workers.first():
        prompts, latent = _prepared(encoders, settings, moves, watch)
    del encoders
    gc.collect()  # they have cycles, and would wait for the collector beside the network
    with watch.timed("load"):
        model = loaded_model(settings, device)
        for index, lora in enumerate(loras):
            lora.load_onto(model, f"lora{index}")
    with workers.first():
        open_folder(settings.out)
    about: dict[str, Any] = {"model": {"name": model.name, "fingerprint": model.fingerprint}}
    about |= {"dtype": str(model.dtype), "loras": [lora.facts() for lora in loras], "versions": versions()}
    reference = UNMOVED
    if moves:
        reference = encoded(moves, model, settings, about["loras"], blank=prompts[""], latent=latent)
        about["reference"] = reference.facts
        if workers.count > 1:  # a file that only one of them finds would let their forwards slip out of step
            reference = replace(reference, kept=replace(reference.kept, folder=None))
    say(announcement(settings, orders, loras, model, workers.count))
    about |= {"device": str(device), "processes": workers.count}
    with sharing(model, workers.count), compiled(model.transformer, settings.compile):
        for number, order in enumerate(orders, 1):
            progress = walks.SILENT if workers.index else walks.Bar(f"clip {number}/{len(orders)}")
            latent, effort = _walked(settings, guidance, order, model, prompts, reference, watch, progress)
            if workers.index:
                continue
            with watch.timed("decode"):
                clip = replace(model.decode(latent, settings.fps), caption=order.caption)
            write(order, clip, settings, {**about, "seconds": dict(watch.seconds), "effort": asdict(effort)})
            seconds = f"{watch.seconds['sample']:.1f} s sampling, {watch.seconds['decode']:.1f} s decoding"
            say(f"{order.path}  ({seconds}, {effort})")
    return [order.path for order in orders]


def generate_clip(
    model: Backbone,
    prompt: Prompt,
    negative: Prompt,
    *,
    seed: int,
    frames: int,
    height: int,
    width: int,
    fps: float,
    sample: SampleSettings,
    guidance: Guidance = UNGUIDED,
    reference: Latent | None = None,
    caption: str = "",
    progress: Progress = walks.SILENT,
) -> Clip:
    """One clip by a model that is loaded, with the LoRAs that it carries at the strengths that they have.

    What their files recommend is not known here: with `sample.lora_until` None they act to the end.
    `caption` is only written into the clip; what is shown is `prompt`.

    Raises:
        InputError: a size that the model cannot make.
        NumbersError: the latent became NaN or infinite.
    """
    walk = walks.new_walk(
        model,
        prompt,
        negative,
        seed=seed,
        frames=frames,
        height=height,
        width=width,
        sample=sample,
        reference=reference,
    )
    return replace(model.decode(walks.sample(walk, guidance, progress), fps), caption=caption)


def encoders_of(settings: GenerateSettings, device: torch.device) -> WanBackbone:
    """The model of the settings without its network (`load_encoders`)."""
    from motionlora.heads.encoders import load_encoders

    dtype = chosen_dtype(settings.dtype, device)
    return load_encoders(settings.model, device=device, dtype=dtype, cache=settings.cache)


def _prepared(
    encoders: WanBackbone, settings: GenerateSettings, moves: Clip | None, watch: Stopwatch
) -> tuple[dict[str, Prompt], Latent | None]:
    """Every caption embedded, the empty one too where a reference is encoded."""
    with watch.timed("embed"):
        asked = [*settings.caption, settings.negative, *([""] if moves else [])]
        texts = list(dict.fromkeys(asked))
        embedded = encoders.embed(texts)
        prompts = {text: embedded[index] for index, text in enumerate(texts)}
    if moves is None:
        return prompts, None
    with watch.timed("encode"):
        return prompts, encoders.encode(moves)


def loaded_model(settings: GenerateSettings, device: torch.device) -> WanBackbone:
    """The model of the settings on its device, sparing memory and with the attention backend as they say."""
    from motionlora.heads.load import load_model

    assert settings.memory != "auto"
    memory, dtype = sampling_memory(settings.memory, gpu=device.type == "cuda"), chosen_dtype(settings.dtype, device)
    model = load_model(settings.model, device=device, memory=memory, dtype=dtype, cache=settings.cache)
    if settings.attention != "native":
        model.use_attention(settings.attention)
    return model


def write(order: Order, clip: Clip, settings: GenerateSettings, about: dict[str, Any]) -> None:
    """The clip with its settings in the file's own metadata, and the JSON with all that is known beside it."""
    own = {"caption": order.caption, "seed": order.seed, "settings": recorded(settings)}
    write_clip(clip, order.path, comment=json.dumps(own, ensure_ascii=False))
    with replacing(order.path.with_suffix(".json")) as draft:
        draft.write_text(json.dumps({**own, **about}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def recorded(settings: GenerateSettings) -> dict[str, Any]:
    """The resolved settings, ready for JSON, with the name of the guidance, which its own settings do not hold."""
    values = settings.model_dump(mode="json")
    return values | {"guidance": {"name": type(settings.guidance).__name__, **values["guidance"]}}


def announcement(
    settings: GenerateSettings,
    orders: Sequence[Order],
    loras: Sequence[LoadedLora],
    model: WanBackbone,
    processes: int = 1,
) -> str:
    """One line before the first step."""
    used = ", ".join(map(str, loras)) or "no LoRA"
    until = settings.sample.lora_until
    used += f" (resting below noise {until:g})" if loras and until else ""
    spared = "" if settings.memory == "fast" else f" (memory {settings.memory})"
    spared += f", each shared by {processes} processes" if processes > 1 else ""
    return (
        f"{len(orders)} clip{'s' if len(orders) > 1 else ''} of {settings.frames} frames {settings.width}x"
        f"{settings.height}, {settings.sample.steps} steps, scale {settings.sample.scale:g}, by {model.name} with "
        f"{used} on {model.device}{spared}; they go to {settings.out}"
    )


def _walked(
    settings: GenerateSettings,
    guidance: Guidance,
    order: Order,
    model: WanBackbone,
    prompts: Mapping[str, Prompt],
    reference: Reference,
    watch: Stopwatch,
    progress: Progress,
) -> tuple[Latent, Effort]:
    """The latent of one clip and what it took, with its seconds of sampling."""
    with watch.timed("sample"):
        walk = walks.new_walk(
            model,
            prompts[order.caption],
            prompts[settings.negative],
            seed=order.seed,
            frames=settings.frames,
            height=settings.height,
            width=settings.width,
            sample=settings.sample,
            reference=reference.latent,
            kept=reference.kept,
        )
        return walked(walk, guidance, model.transformer, progress)
