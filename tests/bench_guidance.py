"""What guidance costs: by counted forwards, by FLOPs of Wan 2.1 1.3B at 480x832, by seconds on the tiny Wan.

    OMP_NUM_THREADS=1 python tests/bench_guidance.py     a minute on a quiet core; writes results/guidance_cost.*

FLOPs and memory are of tensors that have shapes and no data (`train/count.py`). Seconds are those of the process on one
thread, so that other work on the machine counts little.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench_wan_full_size import FRAMES, RESULTS, TEXT, WANS, new_latent
from torch import Tensor

from motionlora.heads.backbone import Prompt
from motionlora.heads.schedule import euler_times
from motionlora.heads.tiny import random_twin
from motionlora.heads.wan import WanBackbone
from motionlora.heads.wan_outline import META
from motionlora.infer.effort import walked
from motionlora.infer.features import FeatureGuidance, Target
from motionlora.infer.found import Reuse, load_found
from motionlora.infer.guidance import BLANK, Guidance, Kept, Walk, reference_of
from motionlora.infer.guide_ditflow import DiTFlow
from motionlora.infer.guide_fastvmt import FastVMT
from motionlora.infer.guide_flowmotion import FlowMotion
from motionlora.infer.guide_none import NoGuidance
from motionlora.infer.machine import machine
from motionlora.infer.sample import sample
from motionlora.train.count import Count, counting

WAN = "Wan2.1 1.3B"
REPEATS = 3


@dataclass(frozen=True)
class Figure:
    """One measured figure beside its bar: `limit` is `at most` or `at least`, empty where there is no bar."""

    what: str
    value: float
    unit: str
    limit: str = ""
    bar: float | None = None

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.value <= self.bar if self.limit == "at most" else self.value >= self.bar


class WholeForwards(WanBackbone):
    """Every forward runs to its end."""

    def capturing(self, blocks: Any, what: Any, *, stop: bool = False) -> Any:
        del stop
        return super().capturing(blocks, what, stop=False)


def main() -> None:
    figures = [*forwards(), *flops(), *memory(), *seconds()]
    record = {
        "what": f"Cost of guidance: {WAN} at 480x832x{FRAMES} on tensors without data, the embedded tiny in seconds",
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", "tests/bench_guidance.py", *sys.argv[1:]]),
        "figures": [vars(figure) | {"met": figure.met} for figure in figures],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "guidance_cost.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "guidance_cost.md").write_text(table(record, figures))
    print(table(record, figures))


def forwards() -> list[Figure]:
    """FlowMotion's forwards over plain sampling's, counted in walks of 50 steps by a random twin."""
    with TemporaryDirectory() as folder:
        model = WanBackbone.load(random_twin(Path(folder) / "wan", blocks=1))
        found = []
        for what, guidance, bar in (
            ("exact", FlowMotion(), 1.7),
            ("velocity reused", FlowMotion(reuse_velocity=True), 1.3),
        ):
            walk = walk_on(model, torch.zeros(1, 16, 2, 2, 2), 50)
            first, second = (walked(walk, guidance, model.transformer)[1].forwards / 100 for _ in range(2))
            found.append(Figure(f"FlowMotion, {what}", first, "x plain forwards", "at most", bar))
            at_most: dict[str, Any] = {"limit": "at most", "bar": 1.6} if what == "exact" else {}
            found.append(Figure(f"FlowMotion, {what}, second caption of a call", second, "x plain forwards", **at_most))
    return found


def flops() -> list[Figure]:
    """Of guided steps at full size."""
    model = WANS[WAN].without_weights(torch.bfloat16)
    whole = WholeForwards(**{field.name: getattr(model, field.name) for field in fields(model)})
    walk = walk_on(model, new_latent(FRAMES, META), 50)
    plain = counted(lambda: walk.velocity(walk.noise, walk.times[0])).flops
    quick, dense = FastVMT(), FastVMT(tile=(30, 52), window=52)

    def parts(on: Walk, guidance: FastVMT) -> tuple[float, float]:
        return counted(gradient_of(on, guidance)).flops, counted(lambda: target_of(on, guidance)).flops

    def step(gradients: int, a_gradient: float, a_target: float) -> float:
        return plain + a_target + gradients * a_gradient

    without = parts(replace(walk, model=whole), dense)
    slow, reused = (step(gradients, *without) for gradients in (quick.iterations, quick.asked))
    ended, fast = (step(quick.asked, *parts(walk, guidance)) for guidance in (dense, quick))
    turned = counted(lambda: turned_step(walk)).flops
    return [
        Figure("FastVMT, guided step, its three devices against none", slow / fast, "x by FLOPs", "at least", 2.0),
        Figure("of these, gradients used three times", slow / reused, "x by FLOPs"),
        Figure("of these, forwards that end before the attention", reused / ended, "x by FLOPs"),
        Figure("of these, windows", ended / fast, "x by FLOPs"),
        Figure("FastVMT, guided step", fast / plain, "x a plain step's FLOPs"),
        Figure("DiTFlow, a step with saved positions", turned / plain, "x a plain step's FLOPs", "at most", 1.05),
    ]


def memory() -> list[Figure]:
    """Peaks at full size, with the weights."""
    model = WANS[WAN].without_weights(torch.bfloat16)
    walk = walk_on(model, new_latent(FRAMES, META), 50)
    weights = sum(weight.nbytes for weight in model.transformer.parameters())
    plain = counted(lambda: walk.velocity(walk.noise, walk.times[1])).peak_bytes
    guided = counted(lambda: guided_step(walk, FlowMotion(iterations=2), step=1)).peak_bytes
    bar = ("at most", 10.0)
    found = [
        Figure("plain sampling, peak", (weights + plain) / 2**30, "GiB"),
        Figure("FlowMotion, peak above plain sampling's, weights left out", 100 * (guided / plain - 1), "%"),
        Figure("FlowMotion, peak above plain sampling's", 100 * (guided - plain) / (weights + plain), "%", *bar),
    ]
    for recompute in (False, True):
        guidance = DiTFlow(iterations=1, recompute=recompute)
        most = weights + counted(gradient_of(walk, guidance)).peak_bytes
        found.append(Figure(f"DiTFlow, a gradient{', blocks recomputed' * recompute}, peak", most / 2**30, "GiB"))
    return found


def seconds() -> list[Figure]:
    """On the embedded tiny: guided steps of FastVMT, walks of DiTFlow from saved positions."""
    model = WanBackbone.load("tiny")
    whole = WholeForwards(**{field.name: getattr(model, field.name) for field in fields(model)})
    noise = torch.randn(1, model.channels, 13, 16, 16, generator=torch.Generator().manual_seed(0))
    walk = walk_on(model, noise, 5)
    dense = FastVMT(tile=(8, 8), window=8, interval=1)
    slow, fast = timed(lambda: guided_step(replace(walk, model=whole), dense), lambda: guided_step(walk, FastVMT()))
    with TemporaryDirectory() as folder:
        file = Path(folder) / "positions.safetensors"
        sample(walk, DiTFlow(optimise="positions", iterations=1, save=file))
        reuse = Reuse(file, load_found(file, "positions"))
        plain, turned = timed(lambda: sample(walk, NoGuidance()), lambda: sample(walk, reuse))
    return [
        Figure("FastVMT, guided step, its three devices against none, on the tiny", slow / fast, "x by seconds"),
        Figure("DiTFlow from saved positions, a walk on the tiny", turned / plain, "x plain seconds", "at most", 1.05),
    ]


def walk_on(model: WanBackbone, noise: Tensor, steps: int) -> Walk:
    """From a clip that is its own reference; captions are random, or without data as the noise is."""
    draws = torch.Generator().manual_seed(1)
    shape = (1, TEXT[0], model.config.text_dim)
    embeds = torch.randn(shape, generator=draws).to(noise.device)
    kept = Kept()
    kept.tensors[BLANK] = {BLANK: embeds}
    prompt, times = Prompt(embeds), euler_times({}, steps, 3.0)
    return Walk(model, prompt, prompt, 5.0, times, noise, noise.flip(2), draws, kept)


@torch.no_grad()
def guided_step(walk: Walk, guidance: Guidance, step: int = 0) -> Tensor:
    """A step of a walk, counted from zero, from where the walk starts."""
    now, then = walk.times[step], walk.times[step + 1]
    with guidance.steering(walk) as steer:
        latent = steer(walk.noise, now)
        return latent + (then - now) * walk.velocity(latent, now)


@torch.no_grad()
def turned_step(walk: Walk) -> Tensor:
    """A plain step whose queries and keys are turned by saved tables, which here are the stock ones."""
    with walk.model.turning() as turned:
        turned.put(turned.stock(walk.noise))
        return walk.velocity(walk.noise, walk.times[0])


def target_of(walk: Walk, guidance: FeatureGuidance) -> Target:
    """What the method reads of the reference."""
    return guidance._target_at(walk, reference_of(walk), walk.times[0])


def gradient_of(walk: Walk, guidance: FeatureGuidance) -> Callable[[], Tensor]:
    """The work of one gradient; what is read of the reference is there already."""
    target = target_of(walk, guidance)
    return lambda: guidance._gradient(walk, walk.noise, walk.times[0], target)


def counted(work: Callable[[], object]) -> Count:
    """FLOPs and the peak of live bytes, which leaves out what was there before."""
    with counting() as count:
        work()
    return count


def timed(*works: Callable[[], object]) -> list[float]:
    """Seconds of the process for each, median of a few; they take turns, once before it counts."""
    spent: list[list[float]] = [[] for _ in works]
    for _ in range(REPEATS + 1):
        for work, times in zip(works, spent, strict=True):
            began = time.process_time()
            work()
            times.append(time.process_time() - began)
    return [median(times[1:]) for times in spent]


def table(record: dict[str, Any], figures: list[Figure]) -> str:
    """The figures as Markdown, each with its bar."""
    rows = [
        f"| {f.what} | {f.value:.2f} | {f.unit} | {'' if f.bar is None else f'{f.limit} {f.bar:g}'} | "
        f"{'' if f.met is None else ('met' if f.met else 'MISSED')} |"
        for f in figures
    ]
    return "\n".join(
        [
            "# What guidance costs",
            "",
            f"{record['what']}; {record['machine']}; `{record['command']}`.",
            "",
            "| what | value | unit | bar | |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            "FLOPs are 2 a multiply-add in matrix products and convolutions. Memory adds up the tensors that are alive",
            "at once, on tensors without data, with an attention that keeps what flash attention keeps. The devices of",
            "FastVMT are windows, forwards that end early and gradients that serve three times.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
