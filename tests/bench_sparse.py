"""Sparse against all frames in the temporal stage, on the embedded tiny Wan: seconds, counted FLOPs, and what moves.

    python tests/bench_sparse.py                   about ten minutes on two cores; writes results/sparse.*

Both are trained by the same recipe (`configs/tiny.yaml`) for the same number of steps, one after the other in one run.
"""

import argparse
import json
import os
import platform
import sys
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from motionlora.data.benchmark import cases
from motionlora.heads.wan import WanBackbone
from motionlora.train.command import settings_of
from motionlora.train.demo import judged, learn, shown
from motionlora.train.noise import keyed_generator
from motionlora.train.run import TrainResult
from motionlora.train.settings import TrainSettings
from motionlora.train.stages import temporal_stage


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("runs/sparse"))
    parser.add_argument("--results", type=Path, default=Path("results/sparse"))
    parser.add_argument("--motion", default="zigzag")
    parser.add_argument("overrides", nargs="*", help="training settings, as of motionlora train, after --")
    chosen = parser.parse_args()
    part = [case for case in cases("objects") if case.reference.name == chosen.motion]
    rows = {}
    for name, stride in (("sparse, every 2nd frame", 2), ("all frames", 1)):
        options = ("--temporal.stride", str(stride), *chosen.overrides)
        result = learn(part[0].reference, chosen.work / f"stride{stride}", *options)
        clips = shown(WanBackbone.load("tiny"), part, result.paths["temporal"], name)
        smf = median(judged(clip, case).smf for clip, case in zip(clips, part, strict=True))
        rows[name] = {"seconds": step_seconds(result), "gflop_a_step": step_gflop(result, stride), "smf": smf}
    sparse, whole = rows.values()
    ratios = {key: round(whole[key] / sparse[key], 2) for key in ("seconds", "gflop_a_step")}
    lines = ["# Sparse against all frames in the temporal stage (tiny Wan)", ""]
    lines += ["| clip | seconds a step (median) | GFLOP a step | median SMF |", "| --- | --- | --- | --- |"]
    lines += [f"| {n} | {r['seconds']:.2f} | {r['gflop_a_step']:.1f} | {r['smf']:.2f} |" for n, r in rows.items()]
    lines += [
        "",
        f"All frames cost {ratios['seconds']} times the seconds and {ratios['gflop_a_step']} times the FLOPs.",
    ]
    command = " ".join(["python tests/bench_sparse.py", *sys.argv[1:]])
    about = f"{platform.machine()}, {os.cpu_count()} cores, {date.today()}, `{command}`"
    chosen.results.with_suffix(".md").write_text("\n".join([*lines, "", f"Motion: {chosen.motion}. {about}", ""]))
    chosen.results.with_suffix(".json").write_text(
        json.dumps({"rows": rows, "ratios": ratios, "about": about}, indent=2)
    )
    print("\n".join(lines))


def step_seconds(result: TrainResult) -> float:
    """Of the run's own log, also of steps before it was stopped and resumed."""
    rows = [json.loads(line) for line in (result.paths["temporal"].parent / "log-temporal.jsonl").open()]
    return round(median(row["seconds"] for row in rows), 3)


def step_gflop(result: TrainResult, stride: int) -> float:
    """Counted FLOPs of one temporal step, forward and backward, in 10^9."""
    from motionlora.data.clip import read_clip
    from motionlora.heads.lora import attach

    model = WanBackbone.load("tiny")
    clip = read_clip(
        result.paths["reference"], frames=49, fps=12, height=64, width=64, multiple=8, say=lambda line: None
    )
    settings: TrainSettings = settings_of("train", ["--config", "tiny", "--temporal.stride", str(stride)])
    chosen = np.ones((model.blocks, model.heads), bool)  # as configs/tiny.yaml has it
    stage = temporal_stage(model, clip, chosen, settings)
    layers = attach(model.transformer, "temporal", chosen, rank=32, seed=0)
    generator = keyed_generator(0)
    with FlopCounterMode(display=False) as counter, torch.enable_grad(), model.positioned(stage.positions):
        stage.loss(model, stage.point(generator), stage.told(generator)).total.backward()
    layers.remove()
    return counter.get_total_flops() / 1e9


if __name__ == "__main__":
    main()
