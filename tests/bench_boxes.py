"""Do sprites keep to boxes that were asked for? S2V2V's trajectory variant and its start, beside plain sampling.

    python tests/bench_boxes.py          resumes; writes results/guidance_boxes.md and .json

Each way moves one box; a caption and two seeds for each. `random` is moved as far as `near` was, in a random direction.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from statistics import fmean

from motionlora.data.cache import content_key, replacing
from motionlora.data.sprites import FPS, FRAMES, SIZE
from motionlora.heads.wan import WanBackbone
from motionlora.infer.effort import walked
from motionlora.infer.guidance import GuidanceSettings
from motionlora.infer.guide_none import NoGuidance
from motionlora.infer.guide_random import same_dose
from motionlora.infer.guide_s2v2v import S2V2V
from motionlora.infer.machine import machine
from motionlora.infer.measure_boxes import box_scores
from motionlora.infer.own_code import code_hash
from motionlora.infer.points import box_clip, read_boxes
from motionlora.infer.sample import new_walk
from motionlora.infer.settings import SampleSettings

SIDE = 22
WAYS = {
    "right": ((21, 2), (21, 40)),
    "down": ((2, 21), (40, 21)),
    "diagonal": ((2, 2), (40, 40)),
    "stays left": ((21, 4), (21, 4)),
}
"""(y, x) of the upper left corner in the first and in the last frame."""
CAPTIONS = ("a red circle on a dark background", "a blue star on a light background")
SEEDS = (0, 1)
HOW = SampleSettings(steps=20, scale=3.0, shift=2.0)
FIGURES = ("miou", "ap50", "distance", "coverage")


def main() -> None:
    parser = argparse.ArgumentParser(description="Do sprites keep to boxes?")
    parser.add_argument("--lr", type=float, nargs="+", default=(0.002, 0.02, 0.06))
    parser.add_argument("--ways", type=int, default=len(WAYS))
    parser.add_argument("--work", type=Path, default=Path("runs/boxes"))
    parser.add_argument("--results", type=Path, default=Path("results/guidance_boxes"))
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    model = WanBackbone.load("tiny")
    found: dict[str, list[dict]] = {}
    for number, (name, ends) in enumerate(list(WAYS.items())[: chosen.ways]):
        file = boxes_of(chosen.work / f"{name.replace(' ', '-')}.json", ends)
        for seed in SEEDS:
            walk = (file, CAPTIONS[number % len(CAPTIONS)], seed, chosen.work)
            row = {method: once(model, guidance, *walk) for method, guidance in methods(file, chosen.lr).items()}
            for lr in chosen.lr:
                near = row[f"near, lr {lr:g}"]
                row[f"random, as near, lr {lr:g}"] = once(model, same_dose(near["doses"], near["dose_rms"]), *walk)
            for method, cell in row.items():
                found.setdefault(method, []).append({"way": name, "seed": seed, **cell})
            write(found, chosen.results)


def methods(file: Path, rates: Sequence[float]) -> dict[str, GuidanceSettings]:
    """What is compared, besides random directions."""
    made: dict[str, GuidanceSettings] = {"none": NoGuidance()}
    for lr in rates:
        made[f"near, lr {lr:g}"] = S2V2V(boxes=file, lr=lr, maps="near")
        made[f"frame, lr {lr:g}"] = S2V2V(boxes=file, lr=lr, maps="frame")
    for cut in ((0.25, 0.1), (0.25, 0.5)):
        made[f"moving noise alone, cut {cut[1]:g}"] = S2V2V(boxes=file, iterations=0, noise="trajectory", noise_cut=cut)
    both = S2V2V(boxes=file, lr=rates[-1], maps="frame", noise="trajectory", noise_cut=(0.25, 0.5))
    return made | {f"frame, lr {rates[-1]:g}, moving noise, cut 0.5": both}


def boxes_of(path: Path, ends: tuple[tuple[int, int], tuple[int, int]]) -> Path:
    rows = [
        {"frame": frame, "x": x, "y": y, "w": SIDE, "h": SIDE}
        for frame, (y, x) in zip((0, FRAMES - 1), ends, strict=True)
    ]
    path.write_text(json.dumps(rows))
    return path


def once(model: WanBackbone, guidance: GuidanceSettings, file: Path, caption: str, seed: int, work: Path) -> dict:
    """The scores of one clip and what steering did, found again by all that they depend on."""
    code = code_hash("motionlora.infer.effort", "motionlora.infer.measure_boxes", type(guidance).__module__)
    asked = (file.read_text(), caption, str(seed), HOW.model_dump_json(), guidance.model_dump_json())
    path = work / f"{content_key('boxes', model.fingerprint, code, *asked)}.json"
    if not path.is_file():
        cell = made(model, guidance, file, caption, seed)
        with replacing(path) as draft:
            draft.write_text(json.dumps(cell))
        print(file.stem, seed, type(guidance).__name__, json.dumps(cell)[:160], flush=True)
    return json.loads(path.read_text())


def made(model: WanBackbone, guidance: GuidanceSettings, file: Path, caption: str, seed: int) -> dict:
    size = (FRAMES, SIZE, SIZE)
    boxes, prompts = read_boxes(file, size), model.embed([caption, ""])
    reference = model.encode(box_clip(boxes, size, FPS))
    walk = new_walk(
        model,
        prompts[0],
        prompts[1],
        seed=seed,
        frames=FRAMES,
        height=SIZE,
        width=SIZE,
        sample=HOW,
        reference=reference,
    )
    latent, effort = walked(walk, guidance, model.transformer)
    scores = asdict(box_scores(model.decode(latent, FPS).pixels, boxes))
    return {name: value if isfinite(value) else None for name, value in scores.items()} | asdict(effort)


def write(found: dict[str, list[dict]], results: Path) -> None:
    """The table so far; a clip whose sprite is seen in less than half of its frames counts 0 in mIoU and AP50."""
    command = " ".join(["python", "tests/bench_boxes.py", *sys.argv[1:]])
    lines = ["# Sprites in boxes that were asked for", "", f"{machine()}; `{command}`.", ""]
    lines += ["| method | clips | mIoU | over none | AP50 | distance | coverage | dose |", "|" + " --- |" * 8]
    plain = [cell["miou"] or 0.0 for cell in found["none"]]
    for method, cells in found.items():
        over = fmean((cell["miou"] or 0.0) - none for cell, none in zip(cells, plain, strict=True))
        mean = {name: fmean(cell[name] or 0.0 for cell in cells) for name in (*FIGURES, "dose_rms")}
        values = (mean["miou"], over, mean["ap50"], mean["distance"], mean["coverage"], mean["dose_rms"])
        lines.append(f"| {method} | {len(cells)} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    record = {"machine": machine(), "command": command, "cells": found}
    results.parent.mkdir(exist_ok=True)
    for suffix, text in ((".md", "\n".join([*lines, ""])), (".json", json.dumps(record, indent=1) + "\n")):
        with replacing(results.with_suffix(suffix)) as draft:
            draft.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
