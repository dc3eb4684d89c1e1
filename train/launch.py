"""How a run is launched: in one process or several, by DDP, FSDP2 or DeepSpeed; what cannot work is refused, not tried.

Several processes are started by `accelerate launch --multi_gpu --num_processes N` or `torchrun`, on a CPU too, where
they talk over gloo (`accelerate launch --cpu --num_processes 2` starts one process without a word). Under DDP and
ZeRO-2 every process has the whole base. DDP, ZeRO-2, ZeRO-3 and FSDP2 are tested on a CPU, none of them on GPUs.
"""

import os
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from motionlora.data.errors import InputError, Stopped
from motionlora.train.checkpoint import checkpoints
from motionlora.train.fsdp import OURS, flag, is_sharded, take_over
from motionlora.train.private import needed_again
from motionlora.train.settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

PATIENCE = timedelta(hours=6)
"""How long processes wait for each other: validation and head scores are the main process's work (else 10 minutes)."""
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""By which accelerate knows that it was launched as one of several."""
BROKEN = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe", "failed to recv")
"""What a process says whose partner is gone."""


def new_accelerator(settings: TrainSettings) -> "Accelerator":
    """accelerate as the settings want it; on a CPU with several processes it talks over gloo.

    Raises:
        InputError: the launcher asks for what is not installed, not supported, or not what the settings say.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    _refuse_launcher()
    take_over()
    cpu = settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available())
    deepspeed = flag("ACCELERATE_USE_DEEPSPEED")
    accelerator = Accelerator(
        # accelerate takes `cpu` for an order to leave DeepSpeed out.
        cpu=cpu and not deepspeed,
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation,
        log_with=None if settings.tracker == "none" else settings.tracker,
        project_dir=settings.out / "tracker",
        # DeepSpeed on a CPU is not told by accelerate what to talk over.
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo" if cpu and deepspeed else None, timeout=PATIENCE)],
    )
    if settings.device == "cpu" and accelerator.device.type != "cpu":
        raise InputError("DeepSpeed takes the GPU where there is one, and device is cpu: set it to auto.")
    refuse_other_numbers(accelerator, settings)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        # Without a DataLoader accelerate cannot find the batch size by itself.
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = settings.temporal.batch
        # By this transformers knows of ZeRO-3: it would split what one process loads alone, and wait for ever.
        plugin.dschf = None
    return accelerator


def resume_command(settings: TrainSettings, processes: int, plugin: Any = None) -> str:
    """The command line that continues a run, with as many processes; `plugin` is accelerate's of DeepSpeed."""
    launcher = "motionlora train"
    if processes > 1 or plugin is not None:
        how = "--use_fsdp --fsdp_version 2" if flag(OURS) else "--multi_gpu"
        if plugin is not None:
            how = f"--use_deepspeed --zero_stage {plugin.zero_stage} --gradient_clipping {settings.max_grad_norm:g}"
            how += f" --gradient_accumulation_steps {settings.gradient_accumulation}"
        launcher = f"accelerate launch {how} --num_processes {processes} -m motionlora.train"
    words = ["--config", str(settings.out / "settings.yaml"), *needed_again(settings), "--resume", "latest"]
    return f"{launcher} {shlex.join(words)}"


def together(settings: TrainSettings, accelerator: "Accelerator") -> AbstractContextManager[None]:
    """`ending_together` of a training run; checkpoints are as they were."""
    own, all_of_them = accelerator.process_index, accelerator.num_processes
    return ending_together(own, all_of_them, lambda: _farewell(settings, accelerator))


@contextmanager
def ending_together(index: int, processes: int, how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Inside, a process whose partner dies says so and how to go on, in place of a traceback or of nothing.

    Launchers send SIGTERM to what is left, in the loop for the second time: that, too, is answered by the sentence.

    Raises:
        Stopped: another process is gone (exit code 1), or this one shall go (143).
    """
    if processes == 1:
        yield
        return

    def farewell(reason: str = "") -> str:
        return (
            f"Process {index} of {processes} had to end: it was told to, or lost another one, which was killed (out of "
            f"memory?) or said why itself{reason}; {how_to_go_on()}"
        )

    def told(number: int, _frame: object) -> None:
        raise Stopped(farewell(), 128 + number)

    after = signal.signal(signal.SIGTERM, told)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, Stopped) and not any(word in str(error).lower() for word in BROKEN):
            raise
        after = signal.SIG_IGN  # the launcher would end it before it has said why
        if isinstance(error, Stopped):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise Stopped(farewell(f" ({reason})"), 1) from error
    finally:
        signal.signal(signal.SIGTERM, after)


def leave_group() -> None:
    """Ends the talk between the processes that accelerate made one run of, after the last of its trainings."""
    if torch.distributed.is_initialized() and set(LAUNCHED) & os.environ.keys():
        torch.distributed.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, accelerate takes this process for the only one, whichever launcher started it: no DDP, no waiting."""
    before = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _farewell(settings: TrainSettings, accelerator: "Accelerator") -> str:
    found = checkpoints(settings.out / "checkpoints")
    last = f"the last checkpoint is {found[-1]}, go on with" if found else "there is no checkpoint yet, begin with"
    return f"{last}: {resume_command(settings, accelerator.num_processes, accelerator.state.deepspeed_plugin)}"


def refuse_deepspeed(why: str) -> None:
    """InputError where `accelerate launch` asks for DeepSpeed, which divides one run over its processes."""
    if flag("ACCELERATE_USE_DEEPSPEED"):
        raise InputError(f"DeepSpeed divides one run, and {why}: launch with --multi_gpu.")


def _refuse_launcher() -> None:
    """InputError for what `accelerate launch` asks for by its variables and this run cannot do."""
    if flag("ACCELERATE_USE_MEGATRON_LM"):
        raise InputError(
            "Megatron splits the LoRA in a way that is not saved here: launch with configs/accelerate_fsdp2.yaml."
        )
    if flag("ACCELERATE_USE_DEEPSPEED") and find_spec("deepspeed") is None:
        raise InputError(
            "The launcher asks for DeepSpeed, which is not installed: pip install 'motionlora[deepspeed]', or launch "
            "with configs/accelerate_multi_gpu.yaml."
        )


def refuse_other_numbers(accelerator: "Accelerator", settings: TrainSettings) -> None:
    """InputError where the launcher's file overrules the settings, or DeepSpeed cannot do what they ask for."""
    plugin: Any = accelerator.state.deepspeed_plugin
    pairs: list[tuple[str, float, float]] = [
        ("gradient_accumulation", accelerator.gradient_accumulation_steps, settings.gradient_accumulation)
    ]
    if plugin is not None:
        if plugin.zero_stage == 0:
            raise InputError("ZeRO stage 0 splits nothing: launch with --multi_gpu, or with --zero_stage 2 or 3.")
        if settings.mixed_precision != "no":
            raise InputError(
                f"DeepSpeed puts the LoRA itself into {settings.mixed_precision} for mixed_precision: set "
                "--mixed-precision no, and --dtype bf16 for a base in bf16 under a LoRA in fp32."
            )
        clipping = 1.0 if plugin.gradient_clipping in ("auto", None) else float(plugin.gradient_clipping)
        pairs.append(("max_grad_norm", clipping, settings.max_grad_norm))
    if (plugin is not None or is_sharded(accelerator)) and (settings.compile or settings.optimizer != "adamw"):
        raise InputError(
            "DeepSpeed and FSDP2 were tried with plain blocks and torch's AdamW alone: leave --compile and --optimizer "
            "out."
        )
    for name, launched, wanted in pairs:
        if launched != wanted:
            raise InputError(
                f"The launcher sets {launched:g} where {name} is {wanted:g}: make the two equal, in accelerate's file "
                f"or by --{name.replace('_', '-')}."
            )
    if not is_sharded(accelerator) and (plugin is None or plugin.zero_stage < 3):
        return
    split = settings.heads.heads == "split" and settings.spatial.steps > 0
    if settings.validation.every or (split and {"spatial", "temporal"} <= set(settings.stages)):
        raise InputError(
            "ZeRO-3 and FSDP2 leave every process a part of the base, so that no validation can be made on the way and "
            "a second stage needs a start of its own: set --validation.every 0, and train --stages heads spatial "
            "first, then --stages temporal in the same --out."
        )
