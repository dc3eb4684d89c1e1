"""What `motionlora plan` says of three models on five cards, and how right it is on the tiny Wan. Run by hand.

    python tests/bench_plan.py                     minutes; writes results/plan.md and .json

The plans are counted; nothing of that size is run. On the tiny, seconds and the allocator's peak of
temporal steps are measured, and compared with the plan.
"""

import itertools
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from motionlora.data.clip import Clip
from motionlora.heads.lora import attach
from motionlora.heads.wan import WanBackbone
from motionlora.heads.wan_outline import outline_of
from motionlora.train.cards import GIB, PUBLISHED_CARDS, SHARE, PlanSettings, published
from motionlora.train.command import settings_of
from motionlora.train.memory import memory_of
from motionlora.train.plan import Plan, duration, matmul_rate, plan_of
from motionlora.train.rehearsal import Rehearsal
from motionlora.train.stages import temporal_stage

RESULTS = Path(__file__).resolve().parent.parent / "results" / "plan"
MODELS = {
    "Wan2.1 1.3B": ("wan2.1_1.3b", ()),
    "Wan2.1 14B (also one expert of Wan2.2 A14B)": ("wan2.1_14b", ()),
    "Wan2.2 TI2V-5B": ("wan2.2_5b", ()),
}
STEPS = 3


@dataclass(frozen=True)
class Trial:
    """One temporal step of the tiny, as planned and as measured; bytes are beside the frozen weights."""

    what: str
    planned_mib: float
    measured_mib: float
    gflop: float
    seconds: float
    matmul_gflop_s: float

    @property
    def share(self) -> float:
        """Of the matrix rate measured in the same process."""
        return self.gflop / self.seconds / self.matmul_gflop_s


def main() -> None:
    """Both tables, printed and written."""
    if sys.argv[1:2] == ["--trial"]:
        print(json.dumps(asdict(tried(int(sys.argv[2]), checkpointing=sys.argv[3] == "True"))))
        return
    trials = [trial_of(stride, checkpointing=on) for stride, on in ((3, False), (1, True))]
    plans = {name: planned(config, *more) for name, (config, more) in MODELS.items()}
    text = report(plans, trials)
    print(text)
    RESULTS.with_suffix(".md").write_text(text)
    record = {
        "plans": {name: asdict(plan) for name, plan in plans.items()},
        "tiny": [asdict(trial) for trial in trials],
    }
    RESULTS.with_suffix(".json").write_text(json.dumps(record | {"about": about()}, indent=1) + "\n")


def planned(config: str, *more: str) -> Plan:
    """The plan of a shipped file in bf16."""
    settings = settings_of("plan", ["--config", config, *more])
    return plan_of(settings, outline_of(settings.model), torch.bfloat16, memory_of("low"))


def trial_of(stride: int, *, checkpointing: bool) -> Trial:
    """`tried` in a fresh process, whose memory has no past."""
    words = [sys.executable, __file__, "--trial", str(stride), str(checkpointing)]
    ended = subprocess.run(words, capture_output=True, text=True, check=True)
    return Trial(**json.loads(ended.stdout.splitlines()[-1]))


def tried(stride: int, *, checkpointing: bool) -> Trial:
    """Some temporal steps of the tiny on all heads, 49 frames of 64x64, batch 4."""
    torch.set_num_threads(1)
    settings: PlanSettings = settings_of("plan", ["--config", "tiny", "--temporal.stride", str(stride)])
    memory = memory_of("low" if checkpointing else "fast")
    cost = Rehearsal(settings, outline_of("tiny"), torch.float32, memory).step("temporal")
    model = WanBackbone.load("tiny")
    transformer: Any = model.transformer
    memory.recomputing(transformer)
    pixels = np.random.default_rng(0).integers(0, 256, (49, 64, 64, 3), dtype=np.uint8)
    chosen = np.ones((model.blocks, model.heads), dtype=bool)
    stage = temporal_stage(model, Clip(pixels, 12.0, "a red circle"), chosen, settings)
    rate = matmul_rate(torch.device("cpu"), torch.float32)

    def work() -> list[float]:
        layers = attach(transformer, "temporal", chosen, rank=settings.lora.rank, seed=0)
        optimizer = torch.optim.AdamW(layers.parameters())
        seconds = []
        for step in range(STEPS):
            began, generator = time.process_time(), torch.Generator().manual_seed(step)
            with model.positioned(stage.positions):
                stage.loss(model, stage.point(generator), stage.told(generator)).total.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.process_time() - began)  # of the processor: others may be at work on it
        layers.remove()
        return seconds

    seconds = median(work())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    rate = max(rate, matmul_rate(torch.device("cpu"), torch.float32))
    what = f"{stage.latents.shape[2]} latent frames{', checkpointed' if checkpointing else ''}"
    return Trial(what, cost.nbytes / 2**20, peak_of(profiled) / 2**20, cost.flops / 1e9, seconds, rate / 1e9)


def peak_of(profiled: Any) -> int:
    """Bytes that lived at once, by what torch's own allocator told the profiler, kernels' own buffers included."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


def report(plans: dict[str, Plan], trials: list[Trial]) -> str:
    """The plans by card, and the tiny's prediction beside its measurement."""
    lines = ["# What a run takes, said before step 1", "", about(), "", "## Counted, not run", ""]
    lines += [
        "81 frames of 480x832 (TI2V-5B: 121 of 704x1280), bf16, checkpointed, rank 32, 1000 + 1000 steps, empty cache."
    ]
    lines += [f"Time at {SHARE:g} of the card's published dense bf16 rate, the VAE's fp32 at an eighth of that."]
    lines += ["", "| model | part | TFLOP a step | peak GiB |", "| --- | --- | --- | --- |"]
    for name, plan in plans.items():
        lines += [
            f"| {name} | {part.name} | {part.cost.flops / 1e12:.4g} | {plan.bytes_in(part) / GIB:.1f} |"
            for part in plan.parts
        ]
    cards = [published(name) for name in PUBLISHED_CARDS]
    lines += ["", "| model | " + " | ".join(card.name for card in cards) + " |", "| --- " * (len(cards) + 1) + "|"]
    for name, plan in plans.items():
        cells = (f"{duration(plan.seconds(c))}{'' if c.holds(plan.peak_bytes) else ', does not fit'}" for c in cards)
        lines.append(f"| {name}, peak {plan.peak_bytes / GIB:.1f} GiB | " + " | ".join(cells) + " |")
    lines += ["", "## Planned and measured: a temporal step of the tiny Wan, batch 4, fp32, one thread", ""]
    lines += [
        "| clip | planned MiB | measured MiB | GFLOP | processor seconds | GFLOP/s of a matrix product | share of it |"
    ]
    lines += ["| --- " * 7 + "|"]
    lines += [
        f"| {t.what} | {t.planned_mib:.0f} | {t.measured_mib:.0f} | {t.gflop:.1f} | {t.seconds:.2f} | "
        f"{t.matmul_gflop_s:.1f} | {t.share:.2f} |"
        for t in trials
    ]
    lines += ["", "Bytes are beside the frozen weights: LoRA, moments, gradients, activations. Measured is what"]
    lines += ["torch's allocator handed out at once in a run of its own, as its profiler saw it.", ""]
    return "\n".join(lines)


def about() -> str:
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {date.today()}, "
        f"`python tests/bench_plan.py`."
    )


if __name__ == "__main__":
    main()
