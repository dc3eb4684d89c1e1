"""A temporal step of the tiny Wan with a caption's words alone, against 512 tokens of text.

    OMP_NUM_THREADS=1 python tests/bench_short_text.py     seconds; writes results/short_text.*

Seconds are the process's own on one thread, the two kinds of step by turns, so that other work on the machine counts
little.
"""

import json
import os
import platform
import sys
import time
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np
import torch

from motionlora.data.benchmark import references
from motionlora.data.sprites import render
from motionlora.heads.lora import attach
from motionlora.heads.short_text import folding
from motionlora.heads.wan import WanBackbone
from motionlora.train.command import settings_of
from motionlora.train.noise import keyed_generator
from motionlora.train.settings import TrainSettings
from motionlora.train.stages import temporal_stage

RESULTS, STEPS = Path("results/short_text"), 16


def main() -> None:
    model, settings = WanBackbone.load("tiny"), settings_of("train", ["--config", "tiny"])
    assert isinstance(settings, TrainSettings)
    chosen = np.ones((model.blocks, model.heads), bool)  # as configs/tiny.yaml has it
    stage = temporal_stage(model, render(references()[0].scene), chosen, settings)
    attach(model.transformer, "temporal", chosen, rank=settings.lora.rank, seed=0)
    found: dict[bool, list[float]] = {False: [], True: []}
    for step in range(STEPS):
        folded, generator = bool(step % 2), keyed_generator(step)
        with folding(model.transformer) if folded else nullcontext():
            began = time.process_time()
            with torch.enable_grad(), model.positioned(stage.positions):
                stage.loss(model, stage.point(generator), stage.told(generator)).total.backward()
            found[folded].append(time.process_time() - began)
    whole, short = (median(found[folded][1:]) for folded in (False, True))
    command = " ".join(["python tests/bench_short_text.py", *sys.argv[1:]])
    about = f"{platform.machine()}, {os.cpu_count()} cores, 1 thread, {date.today()}, `{command}`"
    lines = ["# A temporal step of the tiny Wan, captions with and without their zeros", ""]
    lines += ["| text | seconds a step (median) |", "| --- | --- |"]
    lines += [f"| 512 tokens | {whole:.2f} |", f"| words and one zero that stands for the rest | {short:.2f} |", ""]
    lines += [f"{whole / short:.2f} times as fast. {about}", ""]
    RESULTS.with_suffix(".md").write_text("\n".join(lines))
    values = {"whole": whole, "short": short, "ratio": whole / short, "about": about}
    RESULTS.with_suffix(".json").write_text(json.dumps(values, indent=2) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
