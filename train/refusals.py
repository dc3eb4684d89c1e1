"""What of a run can be refused before a model is loaded: the clip, sizes, devices, a folder that is used."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from motionlora.data.clip import Clip
from motionlora.data.errors import InputError
from motionlora.heads.memory import ROUNDED, refuse_absent
from motionlora.infer.pairs import clips_in
from motionlora.infer.private import refuse_secrets
from motionlora.train.checkpoint import checkpoints, load_checkpoint
from motionlora.train.optimizer import refuse_absent_optimizer
from motionlora.train.settings import TrainSettings
from motionlora.train.stages import check_stride


def refuse_early(settings: TrainSettings) -> None:
    """InputError for what can be seen without a model: no clip, impossible frames or stride, a key, a used folder."""
    refuse_secrets(settings.model_dump(mode="json"))
    if settings.expert == "both":
        raise InputError("A run trains one expert of a model: set expert to high or low.")
    if settings.clips is not None and not settings.together:
        raise InputError(f"A run makes one LoRA, and each clip of {settings.clips} is to get its own: set together.")
    clip_paths(settings)
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
    refuse_absent(settings.memory)
    refuse_absent_optimizer(settings.optimizer)
    if settings.compile and settings.memory in ROUNDED:
        raise InputError(
            f"--compile does not go with --memory {settings.memory}, whose weights change while a block runs: leave "
            "one of them out."
        )
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


def clip_paths(settings: TrainSettings) -> list[Path]:
    """The clips that the settings name: the one, or all of the folder, by name.

    Raises:
        InputError: there is none; or one and a folder, or one caption for a folder; or `out` is in that folder.
    """
    if settings.clips is None:
        if settings.together:
            raise InputError(
                "--together makes one LoRA of a folder of clips, and none was given: name it with --clips."
            )
        if settings.clip is None or not settings.clip.exists():
            came = "No clip was given" if settings.clip is None else f"There is no clip {settings.clip}"
            raise InputError(f"{came}: name a video file or a folder of images with --clip.")
        return [settings.clip]
    if settings.clip is not None:
        raise InputError("--clip and --clips were both given: --clip for one clip, --clips for a folder of them.")
    if settings.caption is not None:
        raise InputError(
            "--caption is of one clip, and --clips names a folder: write each one's into a .txt beside it."
        )
    if settings.clips.resolve() in (settings.out.resolve(), *settings.out.resolve().parents):
        raise InputError(
            f"--out {settings.out} lies in --clips, where results would be taken for clips: choose another."
        )
    found = clips_in(settings.clips)
    if not found:
        raise InputError(
            f"{settings.clips} holds no clips (videos, or folders of numbered images): name another folder with "
            "--clips; a folder that holds the images themselves is one clip, for --clip."
        )
    return found


def refuse_odd_clips(paths: Sequence[Path], clips: Sequence[Clip]) -> None:
    """InputError naming the first of several clips that is not of the size, length and rate of the one before it."""
    kinds = [f"{clip.frames} frames of {clip.width}x{clip.height} at {clip.fps:g} fps" for clip in clips]
    for at in range(1, len(clips)):
        if kinds[at] != kinds[at - 1]:
            raise InputError(
                f"{paths[at].name} has {kinds[at]}, and {paths[at - 1].name} has {kinds[at - 1]}: clips that are "
                "learned together are of one size and rate, set --height, --width and --fps."
            )


def refuse_mute_clips(settings: TrainSettings, paths: Sequence[Path], clips: Sequence[Clip]) -> None:
    """InputError naming a clip that is to be learned and of which nobody said what it shows."""
    mute = [path for path, clip in zip(paths, clips, strict=True) if not clip.caption.strip()]
    if mute and settings.caption is None and {*settings.stages} - {"heads"}:
        raise InputError(
            f"{mute[0]} has no caption: say what is seen with --caption or in {mute[0].with_suffix('.txt')}; "
            "--caption '' learns it without one."
        )


def _traces(out: Path, stage: str) -> bool:
    files = (out / f"{stage}{expert}.safetensors" for expert in ("", "-high", "-low"))
    return any(map(Path.exists, files)) or bool(checkpoints(out / "checkpoints", stage))
