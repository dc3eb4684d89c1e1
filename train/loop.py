"""The loop, shared by both stages: draw a point on the path, predict, step, write down, save."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from motionlora.data.errors import Stopped as Stopped
from motionlora.heads.compiled import compiled, plain
from motionlora.heads.short_text import folding
from motionlora.train import fsdp, zero
from motionlora.train.bad_steps import BadSteps
from motionlora.train.checkpoint import Checkpoint, moments_of, restore_moments, restore_random, save_checkpoint
from motionlora.train.journal import Journal, journal
from motionlora.train.noise import keyed_generator
from motionlora.train.optimizer import new_optimizer
from motionlora.train.settings import SpatialSettings, TemporalSettings, TrainSettings
from motionlora.train.stages import Stage

if TYPE_CHECKING:
    from accelerate import Accelerator

    from motionlora.heads.lora import MotionLoraHandle
    from motionlora.heads.wan import WanBackbone


@dataclass(frozen=True, eq=False)
class Run:
    """What a stage's loop needs beside the stage. `offset` is the number of steps before it, for trackers."""

    settings: TrainSettings
    accelerator: "Accelerator"
    identity: dict[str, Any]
    resume_command: str
    validate: Callable[[int], None]
    offset: int
    bad: BadSteps


def fit(
    stage: Stage, layers: "MotionLoraHandle", model: "WanBackbone", run: Run, start: Checkpoint | None
) -> dict[str, Tensor]:
    """Train `layers` until the stage's last step, from the first one or from `start`; returns their final weights.

    Raises:
        NumbersError: loss or gradient was not finite in several steps in a row; checkpoints stay as they were.
        Stopped: Ctrl-C or SIGTERM came; the step was finished and saved.
        StorageError: a checkpoint or the log cannot be written.
    """
    settings, first = run.settings, start.step if start else 0
    if start:
        layers.load(start.lora)
    book = journal(settings, stage.name, run.accelerator, first=first, offset=run.offset)
    with (
        folding(model.transformer),
        compiled(model.transformer, settings.compile),
        prepared(model, stage, layers, run) as (trained, stepper),
        progress_bar(stage, first, run.accelerator) as bar,
        stopping() as stop,
    ):
        if start:
            resume_moments(layers, stepper, start.moments, run.accelerator)
            restore_random(start.random)
        for step in range(first, stage.settings.steps):
            done = step + 1
            report = training_step(stage, trained, stepper, step, run, book)
            book.write(done, **report)
            bar.set_postfix(loss=f"{report['loss']:.4f}", refresh=False)
            bar.update()
            code = stop.agreed(run.accelerator)
            if code or done % settings.checkpoint_every == 0 or done == stage.settings.steps:
                saved = save(stage, layers, stepper, done, run)
                if code:
                    raise Stopped(
                        f"Stopped after step {done} of {stage.settings.steps} of the {stage.name} stage and saved "
                        f"{saved}; continue with: {run.resume_command}",
                        code,
                    )
            if settings.validation.every and done % settings.validation.every == 0:
                with plain():
                    run.validate(done)
        return whole_state(layers, run.accelerator)


def training_step(
    stage: Stage, model: "WanBackbone", optimizer: Any, step: int, run: Run, book: Journal
) -> dict[str, float]:
    """One optimiser step over `gradient_accumulation` batches of every process.

    Noise is keyed by seed, stage, step and the batch's number in the step, so that N processes do what one does with N
    times as many accumulated. Which of several clips a batch is of has a key of its own: for one clip given twice the
    noise is that of the clip given once.
    """
    settings, accelerator, began = run.settings, run.accelerator, time.perf_counter()
    rate = optimizer.param_groups[0]["lr"] = learning_rate(settings, stage.settings, step)
    sums, norm, good = {"loss": 0.0, "denoise": 0.0, "motion": 0.0}, torch.zeros(()), True
    for micro in range(settings.gradient_accumulation):
        sample = micro * accelerator.num_processes + accelerator.process_index
        key = (settings.seed, stage.name, step, 0, sample)
        with accelerator.accumulate(model.transformer), model.positioned(stage.positions):
            drawn, generator = stage.drawn(keyed_generator(*key, "clip")), keyed_generator(*key)
            point = drawn.point(generator)
            parts = drawn.loss(model, point, drawn.told(generator))
            accelerator.backward(parts.total)
            if accelerator.sync_gradients:
                # DeepSpeed clips by itself and may not tell.
                weights = optimizer.param_groups[0]["params"]
                norm = fsdp.gathered(accelerator.clip_grad_norm_(weights, settings.max_grad_norm)) or norm
                if good := run.bad.good(step, parts.total, norm, accelerator):
                    optimizer.step()
            optimizer.zero_grad()
        if parts.denoise.isfinite().all():
            book.by_time.add(point.time, parts.denoise)
        for name, value in (("loss", parts.total), ("denoise", parts.denoise), ("motion", parts.motion)):
            sums[name] += value.mean().item() / settings.gradient_accumulation
    if accelerator.num_processes > 1:
        means: Any = accelerator.reduce(torch.tensor([*sums.values()], device=accelerator.device), "mean")
        sums = dict(zip(sums, means.tolist(), strict=True))
    seconds = round(time.perf_counter() - began, 4)
    return {**sums, "lr": rate, "grad_norm": float(norm), "skipped": float(not good), "seconds": seconds}


def learning_rate(settings: TrainSettings, stage: SpatialSettings | TemporalSettings, step: int) -> float:
    """Linear rise over `warmup` steps, then level or half a cosine down to 0 after the last step."""
    warm = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    left = stage.steps - settings.warmup
    share = min(1.0, max(0.0, (step - settings.warmup) / left)) if left > 0 else 0.0
    level = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * share)) / 2}[settings.schedule]
    return stage.lr * warm * level


def save(stage: Stage, layers: "MotionLoraHandle", stepper: Any, step: int, run: Run) -> Path:
    """Write a checkpoint (main process only) and return its folder; `stepper` is AdamW as accelerate wraps it."""
    lora = whole_state(layers, run.accelerator)
    splits = splitter(run.accelerator)
    moments = splits.whole_moments(layers.named(), stepper) if splits else moments_of(stepper.optimizer, list(lora))
    checkpoint = Checkpoint(stage.name, step, lora, moments, run.identity)
    folder = run.settings.out / "checkpoints"
    if run.accelerator.is_main_process:
        save_checkpoint(checkpoint, folder, run.settings.keep_checkpoints)
    run.accelerator.wait_for_everyone()
    return folder / checkpoint.name


def resume_moments(
    layers: "MotionLoraHandle", stepper: Any, moments: dict[str, Tensor], accelerator: "Accelerator"
) -> None:
    """Gives the optimiser the moments of a checkpoint, whichever launcher made it."""
    if splits := splitter(accelerator):
        splits.put_back(layers.named(), stepper, moments)
    else:
        restore_moments(stepper.optimizer, list(layers.named()), moments)


def whole_state(layers: "MotionLoraHandle", accelerator: "Accelerator") -> dict[str, Tensor]:
    """The LoRA's tensors, gathered where they are split over processes."""
    splits = splitter(accelerator)
    return splits.whole_weights(layers.named()) if splits else layers.state()


def splitter(accelerator: "Accelerator") -> Any:
    """What knows how weights and moments are split over processes, DeepSpeed's or FSDP2's; None where all are whole."""
    return zero if zero.is_split(accelerator) else fsdp if fsdp.is_sharded(accelerator) else None


@contextmanager
def prepared(
    model: "WanBackbone", stage: Stage, layers: "MotionLoraHandle", run: Run
) -> Iterator[tuple["WanBackbone", Any]]:
    """Model and optimiser as accelerate wraps them (autocast, DDP, DeepSpeed); the model is unwrapped at the end.

    What FSDP2 splits stays split.
    """
    network, accelerator = model.transformer, run.accelerator
    for name, module in network.named_modules():
        if name.endswith((".lora_A", ".lora_B")):
            module.to(accelerator.device)  # peft makes them where the layer's own weights wait
    sharded = fsdp.is_sharded(accelerator)
    if sharded:
        fsdp.shard(network, accelerator)
    elif accelerator.num_processes > 1:
        # Every process has read the same frozen weights: DDP shall neither send them round nor ask where they wait.
        frozen = [name for name, weight in network.named_parameters() if not weight.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, frozen)
    how = {"lr": stage.settings.lr, "weight_decay": stage.settings.weight_decay}
    optimizer = new_optimizer(run.settings.optimizer, layers.parameters(), **how)
    if sharded:
        transformer, stepper = accelerator.prepare_model(network, evaluation_mode=True), accelerator.prepare(optimizer)
    else:
        transformer, stepper = accelerator.prepare(network, optimizer)
    try:
        yield replace(model, transformer=transformer), stepper
    finally:
        accelerator.unwrap_model(transformer, keep_fp32_wrapper=False)
        # A model that still bears accelerate's mark would pass through the next stage's `prepare` without autocast.
        vars(model.transformer).pop("_is_accelerate_prepared", None)
        accelerator.free_memory()


def progress_bar(stage: Stage, first: int, accelerator: "Accelerator") -> tqdm:
    """Loss, steps a second and the time that is left; on the main process."""
    return tqdm(
        total=stage.settings.steps,
        initial=first,
        desc=stage.name,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5,
        disable=not accelerator.is_local_main_process,
    )


@dataclass
class StopRequest:
    """Whether to stop, as an exit code: 130 for Ctrl-C, 143 for SIGTERM, 0 for going on."""

    code: int = 0
    before: dict[int, Any] = field(default_factory=dict)

    def agreed(self, accelerator: "Accelerator") -> int:
        """The code that all processes act on: one that stopped alone would leave the others waiting."""
        if accelerator.num_processes == 1:
            return self.code
        codes: Any = accelerator.gather(torch.tensor([self.code], device=accelerator.device))
        return int(codes.max())


@contextmanager
def stopping() -> Iterator[StopRequest]:
    """Ctrl-C and SIGTERM ask for a stop after the step; a second one acts at once. Only the main thread hears them."""
    request = StopRequest()

    def note(number: int, _frame: object) -> None:
        request.code = 128 + number
        signal.signal(number, request.before[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            request.before[number] = signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in request.before.items():
            signal.signal(number, handler)
