"""A whole training run: clip -> heads -> spatial stage -> temporal stage -> files."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from motionlora.data.errors import InputError
from motionlora.data.looks import looks
from motionlora.data.say import silent
from motionlora.heads.head_map import HeadMap
from motionlora.heads.lora import MotionLoraHandle, attach, load_into, set_strengths, strengths, unload
from motionlora.heads.lora_file import load_lora, save_lora
from motionlora.train.bad_steps import BadSteps
from motionlora.train.checkpoint import Checkpoint, checkpoints, load_checkpoint, set_damaged_aside
from motionlora.train.deterministic import deterministic, machine
from motionlora.train.identity import identity, refuse_changes, versions
from motionlora.train.journal import start_trackers
from motionlora.train.launch import new_accelerator, together
from motionlora.train.lock import holding
from motionlora.train.loop import Run, fit
from motionlora.train.plan import announce
from motionlora.train.private import PATHS, shared
from motionlora.train.reference_heads import heads_of
from motionlora.train.refusals import refuse_early
from motionlora.train.settings import TrainSettings
from motionlora.train.stages import Stage, of_all, spatial_stage, temporal_stage
from motionlora.train.validation import validation
from motionlora.train.workshop import Workshop, opened


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What a run left behind: files by name (`reference`, `heads`, `spatial`, `temporal`), wall seconds by part."""

    paths: dict[str, Path]
    seconds: dict[str, float]
    head_map: HeadMap | None


def train(settings: TrainSettings, say: Callable[[str], None] = print) -> TrainResult:
    """Train what `settings.stages` names; files go to `settings.out`. Finished parts are not done again on resume.

    Raises:
        InputError: a setting or the clip is wrong, or the folder already holds a run or is in use by one.
        StorageError: something cannot be written, or no checkpoint is whole.
        NumbersError: loss or gradient were NaN or infinite in several steps in a row.
        Stopped: Ctrl-C or SIGTERM, after saving, or another process of the run is gone.
    """
    refuse_early(settings)
    accelerator = new_accelerator(settings)
    say = say if accelerator.is_main_process else silent
    lock = holding(settings.out, say) if accelerator.is_main_process else nullcontext()
    with (
        lock,
        deterministic(settings.deterministic),
        together(settings, accelerator),
        opened(settings, accelerator, say) as shop,
    ):
        return _trained(shop)


def _trained(shop: Workshop) -> TrainResult:
    settings, accelerator = shop.settings, shop.accelerator
    try:
        announce(shop)
        head_map = heads_of(shop)
        temporal_heads(shop, head_map)
        if settings.tracker != "none":
            start_trackers(accelerator, settings)
        train_spatial(shop, head_map)
        train_temporal(shop, head_map)
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
    paths = {"reference": shop.file("reference.mp4"), "heads": shop.file("heads.json")}
    paths |= {stage: shop.lora_file(stage) for stage in ("spatial", "temporal")}
    paths = {name: path for name, path in paths.items() if path.exists()}
    shop.say(f"Done: {', '.join(str(path) for name, path in paths.items() if name != 'reference')}")
    return TrainResult(paths=paths, seconds=shop.seconds, head_map=head_map)


def train_spatial(shop: Workshop, head_map: HeadMap | None) -> None:
    """The spatial stage, where it is wanted: not with all heads, not with 0 steps, not without spatial heads."""
    settings = shop.settings
    if "spatial" not in settings.stages or head_map is None or settings.spatial.steps == 0:
        return
    chosen = head_map.chosen("spatial", settings.heads.rule, settings.heads.ratio)
    if not chosen.any():
        shop.say("No head is spatial: there is no spatial stage.")
        return
    with shop.timed("encode"):
        stage = of_all(spatial_stage(shop.model, clip, chosen, settings) for clip in shop.clips)
    train_stage(shop, stage, head_map, under="")


def train_temporal(shop: Workshop, head_map: HeadMap | None) -> None:
    """The temporal stage, with the spatial LoRA of this run, if there is one, frozen under it at full strength."""
    settings, model = shop.settings, shop.model
    if "temporal" not in settings.stages:
        return
    with shop.timed("encode"):
        chosen = temporal_heads(shop, head_map)
        shown = [look for clip in shop.clips for look in looks(clip, settings.temporal.looks)]
        stage = of_all(temporal_stage(model, look, chosen, settings) for look in shown)
    spatial = shop.lora_file("spatial")
    if head_map is None or settings.spatial.steps == 0 or not spatial.exists():
        train_stage(shop, stage, head_map, under="")
        return
    lora = load_lora(spatial)
    load_into(model.transformer, lora, "spatial", 1.0)
    try:
        train_stage(shop, stage, head_map, under=_hash_of(lora.weights))
    finally:
        unload(model.transformer, "spatial")


def temporal_heads(shop: Workshop, head_map: HeadMap | None) -> np.ndarray:
    """What the temporal stage trains, bool "block head"; without a map every head.

    Raises:
        InputError: the temporal stage is wanted and no head is temporal.
    """
    heads = shop.settings.heads
    if head_map is None:
        return np.ones((shop.model.blocks, shop.model.heads), dtype=bool)
    chosen = head_map.chosen("temporal", heads.rule, heads.ratio)
    if "temporal" in shop.settings.stages and not chosen.any():
        lower = "lower" if heads.rule == "code" else "raise"
        raise InputError(
            f"No head is temporal by rule {heads.rule} with ratio {heads.ratio:g}: {lower} --heads.ratio, or train all "
            "with --heads.heads all."
        )
    return chosen


def train_stage(shop: Workshop, stage: Stage, head_map: HeadMap | None, *, under: str) -> None:
    """One stage from start, or from where it was stopped, to its file; nothing if the file is there already."""
    settings, model, name = shop.settings, shop.model, stage.name
    path = shop.lora_file(name)
    content = {"clip": shop.clip_hash, "caption": shop.caption, "model": model.fingerprint}
    content |= {"heads": sha256(stage.chosen.tobytes()).hexdigest(), "spatial_lora": under}
    content |= {"weights": shop.memory.weights} if shop.memory.weights else {}
    content |= machine(shop.accelerator.device) if settings.deterministic else {}
    made_of = identity(settings, name, **content) | {"processes": shop.accelerator.num_processes}
    if path.exists() and settings.resume:
        before: dict[str, Any] = load_lora(path).provenance.get("identity", {})
        if before == made_of:
            shop.say(f"The {name} stage is done already: {path}")
            return
        refuse_changes(before, made_of, stage=name, what=str(path))
    start = _start_of(shop, name)
    if start:
        refuse_changes(start.identity, made_of, stage=name, what=f"Checkpoint {start.name}")
        if start.step > stage.settings.steps:
            raise InputError(
                f"Checkpoint {start.name} has done {start.step} steps, and {stage.settings.steps} are asked for: set "
                f"--{name}.steps to {start.step} or more, or choose another --out."
            )
    layers = attach(
        model.transformer,
        name,
        stage.chosen,
        rank=settings.lora.rank,
        projections=settings.lora.projections,
        seed=settings.seed,
    )
    # Strengths that are put back after a validation come in the order of attaching, and so do the sums in a layer.
    set_strengths(model.transformer, dict.fromkeys(strengths(model.transformer), 1.0))
    try:
        _announce(shop, stage, layers, start, path)
        offset = settings.spatial.steps if under else 0
        bad = BadSteps(name, stage.settings.lr, settings.out / "checkpoints", shop.say)
        validate = validation(shop, stage, offset)
        run = Run(settings, shop.accelerator, made_of, shop.resume_command, validate, offset, bad)
        with shop.timed(name):
            weights = fit(stage, layers, model, run, start)
        bad.tell(stage.settings.steps)
        if shop.accelerator.is_main_process:
            save_lora(layers.lora(name, head_map=head_map, state=weights, **_provenance(shop, stage, made_of)), path)
        shop.accelerator.wait_for_everyone()
    finally:
        layers.remove()


def _announce(shop: Workshop, stage: Stage, layers: MotionLoraHandle, start: Checkpoint | None, path: Path) -> None:
    clip, grid = shop.clip, shop.model.grid(stage.latents[:1])
    numbers = layers.parameter_count()
    frames = (
        f"{clip.frames} single frames" if stage.name == "spatial" else f"{4 * grid.frames - 3} of {clip.frames} frames"
    )
    frames += f" of each of {len(shop.clips)} clips" if len(shop.clips) > 1 else ""
    frames += f" in {count} looks" if (count := (1 + len(stage.others)) // len(shop.clips)) > 1 else ""
    slow = "; blocks are compiled in the first step, which may take minutes" if shop.settings.compile else ""
    since = f"from step {start.step + 1}, " if start else ""
    shop.say(
        f"{stage.name} stage: {frames} of {clip.width}x{clip.height}, {grid.tokens} tokens "
        f"({grid.frames} x {grid.height} x {grid.width}), {int(stage.chosen.sum())} of {stage.chosen.size} heads, "
        f"{numbers:,} trainable parameters; {since}{stage.settings.steps} steps on {shop.accelerator.device}; "
        f"checkpoints, logs and {path.name} go to {shop.settings.out}{slow}"
    )


def _provenance(shop: Workshop, stage: Stage, made_of: dict[str, Any]) -> dict[str, Any]:
    """What the file's header tells beside the weights. No date and no path: equal runs write equal files."""
    clip, settings, grid = shop.clip, shop.settings, shop.model.grid(stage.latents[:1])
    expert, until = shop.model.experts.only, settings.temporal.until if stage.name == "temporal" else 0.0
    return {
        **({"expert": expert} if expert else {}),
        **({"until": until} if until else {}),
        "rule": settings.heads.rule,
        "ratio": settings.heads.ratio,
        "trained_grid": {"frames": grid.frames, "height": grid.height, "width": grid.width},
        "settings": shared(settings.model_dump(mode="json", exclude={*PATHS, "together"}), settings.private),
        "identity": made_of,
        "versions": versions(),
        "strength": settings.lora.strength,
        "steps": stage.settings.steps,
        "model": shop.model_name,
        "fingerprint": shop.model.fingerprint,
        "clip_hash": shop.clip_hash,
        "caption": shop.caption,
        "clip": {"frames": clip.frames, "height": clip.height, "width": clip.width, "fps": clip.fps},
    }


def _start_of(shop: Workshop, stage: str) -> Checkpoint | None:
    """Where to go on: the named checkpoint if it is of this stage, else the stage's last whole one, else None."""
    settings = shop.settings
    named, folder = Path(settings.resume), settings.out / "checkpoints"
    if not settings.resume:
        return None
    if named.name.startswith(f"{stage}-"):
        return load_checkpoint(named)
    if shop.accelerator.is_main_process:
        set_damaged_aside(folder, stage, shop.say)
    shop.accelerator.wait_for_everyone()
    found = checkpoints(folder, stage)
    if not found:
        shop.say(f"There is no checkpoint of the {stage} stage in {settings.out} yet: it begins with its first step.")
        return None
    return load_checkpoint(found[-1])


def _hash_of(weights: Mapping[str, Tensor]) -> str:
    digest = sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].float().contiguous().numpy().tobytes())
    return digest.hexdigest()
