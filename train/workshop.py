"""What every part of a run needs, made once: accelerate, the model, the clip, the run's folder."""

import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from motionlora.data.cache import replacing
from motionlora.data.clip import Clip, read_clip, write_clip
from motionlora.data.errors import StorageError
from motionlora.data.settings import as_yaml
from motionlora.heads.wan import WanBackbone
from motionlora.train.checkpoint import drop_newer
from motionlora.train.private import model_name, needed_again, shared, told_caption
from motionlora.train.settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, eq=False)
class Workshop:
    """What every part of a run needs."""

    settings: TrainSettings
    accelerator: "Accelerator"
    model: WanBackbone
    clip: Clip
    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        return self.settings.out / name

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
        launcher = "motionlora train"
        if self.accelerator.num_processes > 1:
            launcher = "accelerate launch -m motionlora.train"
        words = ["--config", str(self.file("settings.yaml")), *needed_again(self.settings), "--resume", "latest"]
        return f"{launcher} {shlex.join(words)}"

    @property
    def caption(self) -> str:
        """What files say of the clip's caption."""
        return told_caption(self.clip, self.settings.private)

    @property
    def model_name(self) -> str:
        """What files call the model."""
        return model_name(self.model.name, self.settings.model, self.settings.private)


def new_accelerator(settings: TrainSettings) -> "Accelerator":
    """accelerate as the settings want it; on a CPU with several processes it talks over gloo."""
    from accelerate import Accelerator

    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true")
    cpu = settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available() and not deepspeed)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation,
        log_with=None if settings.tracker == "none" else settings.tracker,
        project_dir=settings.out / "tracker",
    )
    if accelerator.state.deepspeed_plugin is not None:
        # Without a DataLoader accelerate cannot find the batch size by itself.
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = settings.temporal.batch
    return accelerator


def opened(settings: TrainSettings, accelerator: "Accelerator", say: Callable[[str], None]) -> Workshop:
    """The model and the clip, read; the run's folder, with the settings and the reference as it is trained on."""
    began = time.perf_counter()
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    kinds["auto"] = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    model = WanBackbone.load(
        settings.model, device=accelerator.device, dtype=kinds[settings.dtype], cache=settings.cache
    )
    if settings.gradient_checkpointing:
        transformer: Any = model.transformer
        transformer.enable_gradient_checkpointing()
    assert settings.clip is not None
    clip = read_clip(
        settings.clip,
        frames=settings.frames,
        fps=settings.fps,
        height=settings.height,
        width=settings.width,
        multiple=model.multiple,
        caption=settings.caption,
        say=say,
    )
    shop = Workshop(settings, accelerator, model, clip, say)
    if accelerator.is_main_process:
        _start_folder(shop)
    accelerator.wait_for_everyone()
    shop.seconds["load"] = round(time.perf_counter() - began, 2)
    return shop


def _start_folder(shop: Workshop) -> None:
    settings = shop.settings
    anew = settings.model_copy(update={"resume": ""})
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        with replacing(shop.file("settings.yaml")) as draft:
            draft.write_text(_settings_file(anew), encoding="utf-8")
        write_clip(shop.clip, shop.file("reference.mp4"), comment=shop.caption)
    except OSError as error:
        raise StorageError(f"Cannot write to {settings.out} ({error}): choose another --out or free space.") from error
    if settings.resume not in ("", "latest"):
        for path in drop_newer(Path(settings.resume)):
            shop.say(f"Going back to {settings.resume}: removed the newer {path}")


def _settings_file(settings: TrainSettings) -> str:
    """YAML that can be given back; a private run's lacks what `needed_again` names."""
    text = as_yaml(settings, "train")
    if not settings.private:
        return text
    tree = shared(yaml.safe_load(text)["train"], private=True)
    return yaml.safe_dump({"train": tree}, sort_keys=False, allow_unicode=True, width=100)
