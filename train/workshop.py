"""What every part of a run needs, made once: accelerate, the model, the clip, the run's folder."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

from motionlora.data.cache import replacing
from motionlora.data.clip import Clip, read_clip, write_clip
from motionlora.data.errors import StorageError
from motionlora.data.settings import as_yaml
from motionlora.heads.encoders import load_encoders
from motionlora.heads.load import load_model
from motionlora.heads.memory import Memory
from motionlora.heads.wan import WanBackbone
from motionlora.infer.private import model_name
from motionlora.train.checkpoint import drop_newer
from motionlora.train.launch import resume_command
from motionlora.train.memory import memory_for
from motionlora.train.private import shared, told_caption
from motionlora.train.refusals import clip_paths, refuse_mute_clips, refuse_odd_clips
from motionlora.train.settings import TrainSettings
from motionlora.train.stages import check_expert, heads_are_scored, spatial_stage, temporal_stage

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, eq=False)
class Workshop:
    """What every part of a run needs. `clips` are of one size, length and rate."""

    settings: TrainSettings
    accelerator: "Accelerator"
    model: WanBackbone
    clips: tuple[Clip, ...]
    say: Callable[[str], None]
    memory: Memory
    seconds: dict[str, float]

    @property
    def clip(self) -> Clip:
        """The first, whose sizes are those of all."""
        return self.clips[0]

    def file(self, name: str) -> Path:
        return self.settings.out / name

    def lora_file(self, stage: str) -> Path:
        """Of a stage; for one expert of two its name says which."""
        expert = self.model.experts.only
        return self.file(f"{stage}-{expert}.safetensors" if expert else f"{stage}.safetensors")

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall seconds of the body to `seconds[name]`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 2)

    @property
    def resume_command(self) -> str:
        """The command line that continues this run."""
        return resume_command(self.settings, self.accelerator.num_processes, self.accelerator.state.deepspeed_plugin)

    @property
    def caption(self) -> str:
        """What files say of the clip's caption; of several, one a line."""
        return "\n".join(told_caption(clip, self.settings.private) for clip in self.clips)

    @property
    def clip_hash(self) -> str:
        """By which files name the clip; of several, all of them with a space between."""
        return " ".join(clip.content_hash() for clip in self.clips)

    @property
    def model_name(self) -> str:
        """What files call the model."""
        return model_name(self.model.name, self.settings.model, self.settings.private)


@contextmanager
def opened(settings: TrainSettings, accelerator: "Accelerator", say: Callable[[str], None]) -> Iterator[Workshop]:
    """The model and the clip, read; the run's folder, with the settings and the reference as it is trained on.

    Text encoder and VAE do their work first and are gone when the network is loaded, so that the peak is that of the
    larger, not of all. What they gave is found again in the cache; without one, in a folder that is gone at the end.
    """
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    kinds["auto"] = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    device, dtype, seconds = accelerator.device, kinds[settings.dtype], {}
    with ExitStack() as end:
        cache = settings.cache or Path(end.enter_context(TemporaryDirectory(prefix="motionlora-")))
        how: dict[str, Any] = {"dtype": dtype, "cache": cache}
        how["expert"] = None if settings.expert == "both" else settings.expert
        began = time.perf_counter()
        with accelerator.main_process_first():
            clips, memory = _prepared(settings, load_encoders(settings.model, device=device, **how), accelerator, say)
        gc.collect()  # encoders have cycles, and would wait for the collector beside the network
        seconds["encode"] = round(time.perf_counter() - began, 2)
        model = load_model(settings.model, device=device, memory=memory, **how)
        if settings.attention != "native":
            model.use_attention(settings.attention)
        check_expert(model, settings)
        shop = Workshop(settings, accelerator, model, clips, say, memory, seconds)
        if accelerator.is_main_process:
            _start_folder(shop)
        accelerator.wait_for_everyone()
        seconds["load"] = round(time.perf_counter() - began - seconds["encode"], 2)
        yield shop


def _prepared(
    settings: TrainSettings, model: WanBackbone, accelerator: "Accelerator", say: Callable[[str], None]
) -> tuple[tuple[Clip, ...], Memory]:
    """The clips, and what the network will spare; what the stages will ask of the encoders is in the cache then."""
    wanted: dict[str, Any] = {name: getattr(settings, name) for name in ("frames", "fps", "height", "width", "caption")}
    paths = clip_paths(settings)
    clips = tuple(read_clip(path, **wanted, multiple=model.multiple, say=say) for path in paths)
    refuse_odd_clips(paths, clips)
    refuse_mute_clips(settings, paths, clips)
    memory = memory_for(settings, model, clips[0], accelerator, say)
    nothing = np.zeros((model.blocks, model.heads), dtype=bool)
    checked = settings.validation
    for clip in clips:
        if heads_are_scored(settings):
            model.encode(clip)
        if "spatial" in settings.stages and settings.heads.heads == "split" and settings.spatial.steps:
            spatial_stage(model, clip, nothing, settings)
        if "temporal" in settings.stages:
            temporal_stage(model, clip, nothing, settings)
        model.embed([clip.caption, *((checked.negative, *checked.captions) if checked.every else ())])
    return clips, memory


def _start_folder(shop: Workshop) -> None:
    settings = shop.settings
    anew = settings.model_copy(update={"resume": ""})
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        with replacing(shop.file("settings.yaml")) as draft:
            draft.write_text(settings_file(anew), encoding="utf-8")
        for number, clip in enumerate(shop.clips, start=1):
            path = shop.file("reference.mp4" if number == 1 else f"reference-{number}.mp4")
            write_clip(clip, path, comment=told_caption(clip, settings.private))
    except OSError as error:
        raise StorageError(f"Cannot write to {settings.out} ({error}): choose another --out or free space.") from error
    if settings.resume not in ("", "latest"):
        for path in drop_newer(Path(settings.resume)):
            shop.say(f"Going back to {settings.resume}: removed the newer {path}")


def settings_file(settings: TrainSettings) -> str:
    """YAML that can be given back; a private run's lacks what `needed_again` names."""
    text = as_yaml(settings, "train")
    if not settings.private:
        return text
    tree = shared(yaml.safe_load(text)["train"], private=True)
    return yaml.safe_dump({"train": tree}, sort_keys=False, allow_unicode=True, width=100)
