"""What of a run can be refused before a model is loaded: the clip, sizes, devices, a folder that is used."""

from importlib.util import find_spec
from pathlib import Path

import torch

from motionlora.data.errors import InputError
from motionlora.infer.private import refuse_secrets
from motionlora.train.checkpoint import checkpoints, load_checkpoint
from motionlora.train.settings import TrainSettings
from motionlora.train.stages import check_stride


def refuse_early(settings: TrainSettings) -> None:
    """InputError for what can be seen without a model: no clip, impossible frames or stride, a key, a used folder."""
    refuse_secrets(settings.model_dump(mode="json"))
    if settings.expert == "both":
        raise InputError("A run trains one expert of a model: set expert to high or low.")
    if settings.clip is None or not settings.clip.exists():
        came = "No clip was given" if settings.clip is None else f"There is no clip {settings.clip}"
        raise InputError(f"{came}: name a video file or a folder of images with --clip.")
    if settings.frames % 4 != 1:
        low = settings.frames - (settings.frames - 1) % 4
        raise InputError(f"frames must be 4k + 1, got {settings.frames}: set it to {max(low, 5)} or {low + 4}.")
    if "temporal" in settings.stages:
        check_stride(settings.frames, settings.temporal.stride)
    if settings.device not in ("auto", "cpu", "cuda"):
        raise InputError(
            f"device {settings.device} cannot be trained on: set auto, cpu or cuda (CUDA_VISIBLE_DEVICES)."
        )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for and torch sees no GPU: set it to auto or cpu.")
    if settings.tracker != "none" and find_spec(settings.tracker) is None:
        raise InputError(f"tracker {settings.tracker} is not installed: pip install 'motionlora[{settings.tracker}]'.")
    trained = [name for name in settings.stages if name != "heads"]
    used = [name for name in trained if _traces(settings.out, name)]
    if used and not settings.resume:
        raise InputError(
            f"{settings.out} already holds a {used[0]} stage: go on with --resume latest, or choose another --out."
        )
    if settings.resume not in ("", "latest"):
        load_checkpoint(Path(settings.resume))
        if Path(settings.resume).resolve().parent != (settings.out / "checkpoints").resolve():
            raise InputError(f"{settings.resume} does not belong to this run: its --out is not {settings.out}.")


def _traces(out: Path, stage: str) -> bool:
    files = (out / f"{stage}{expert}.safetensors" for expert in ("", "-high", "-low"))
    return any(map(Path.exists, files)) or bool(checkpoints(out / "checkpoints", stage))
