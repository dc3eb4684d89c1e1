"""Clips generated during the temporal stage: into the run's folder, and as film strips to the tracker."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from motionlora.data.clip import Clip, write_clip
from motionlora.heads.lora import set_strengths, strengths
from motionlora.infer.generate import generate_clip, slug
from motionlora.infer.sample import Bar, refuse_size
from motionlora.infer.sheet import contact_sheet
from motionlora.train.stages import Stage

if TYPE_CHECKING:
    from motionlora.heads.backbone import Prompt
    from motionlora.train.workshop import Workshop

TRACKER_OPTIONS: dict[str, dict[str, Any]] = {"tensorboard": {"dataformats": "NHWC"}}
"""What a tracker must be told about a batch of pictures."""


def validation(shop: "Workshop", stage: Stage, offset: int) -> Callable[[int], None]:
    """What the loop calls every N steps: nothing in the spatial stage, whose LoRA moves nothing by itself.

    The temporal LoRA acts alone, at the strength that its file will recommend. Nothing of training changes: noise has
    its own generator, and the strengths are put back.
    """
    settings = shop.settings.validation
    if stage.name == "spatial" or not settings.every:
        return _nothing
    refuse_size(shop.model, shop.clip.frames, shop.clip.height, shop.clip.width)
    captions = settings.captions or (shop.clip.caption,)
    prompt, negative = shop.model.embed(captions), shop.model.embed([settings.negative])
    names = [f"caption {index}" for index in range(len(captions))] if shop.settings.private else captions

    def validate(step: int) -> None:
        if shop.accelerator.is_main_process:
            with shop.timed("validation"), acting_alone(shop, stage.name):
                clips = [_made(shop, prompt[index], negative, name) for index, name in enumerate(names)]
            show(shop, clips, step, offset)
        shop.accelerator.wait_for_everyone()

    return validate


def show(shop: "Workshop", clips: list[Clip], step: int, offset: int) -> None:
    """The clips of one validation as files, and their film strips in one picture, which also goes to the tracker."""
    folder = shop.file("validation") / f"step-{step:06d}"
    for clip in clips:
        write_clip(clip, folder / f"{slug(clip.caption)}.mp4", comment=clip.caption)
    contact_sheet([(clip.caption, clip) for clip in clips], folder / "sheet.png")
    sheet = np.asarray(Image.open(folder / "sheet.png").convert("RGB"))[None]
    for tracker in shop.accelerator.trackers:
        images: Any = tracker
        images.log_images({"validation": sheet}, step=offset + step, **TRACKER_OPTIONS.get(tracker.name, {}))


@contextmanager
def acting_alone(shop: "Workshop", name: str) -> Iterator[None]:
    """Inside, one adapter acts at its recommended strength and the others not at all."""
    transformer = shop.model.transformer
    before = strengths(transformer)
    set_strengths(transformer, {name: shop.settings.lora.strength})
    try:
        yield
    finally:
        set_strengths(transformer, before)


def _made(shop: "Workshop", prompt: "Prompt", negative: "Prompt", caption: str) -> Clip:
    settings, clip = shop.settings.validation, shop.clip
    asked, learned = settings.sample.lora_until, shop.settings.temporal.until
    return generate_clip(
        shop.model,
        prompt,
        negative,
        seed=settings.seed,
        frames=clip.frames,
        height=clip.height,
        width=clip.width,
        fps=clip.fps,
        sample=settings.sample.model_copy(update={"lora_until": asked if asked is not None else learned}),
        caption=caption,
        progress=Bar("validation"),
    )


def _nothing(step: int) -> None:
    del step
