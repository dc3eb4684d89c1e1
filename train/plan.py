"""What a training run will take, told before its first step: tokens, FLOPs, bytes and time, part by part."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from motionlora.data.errors import InputError
from motionlora.heads.memory import NOTHING_SPARED, Memory
from motionlora.heads.schedule import preserves_variance
from motionlora.heads.wan_outline import WanOutline
from motionlora.train.cards import GIB, SHARE, Card, published
from motionlora.train.rehearsal import Cost, Rehearsal

if TYPE_CHECKING:
    from motionlora.heads.token_grid import TokenGrid
    from motionlora.heads.wan import WanBackbone
    from motionlora.train.cards import PlanSettings
    from motionlora.train.settings import TrainSettings
    from motionlora.train.workshop import Workshop

WORTH_PLANNING = 20
"""Optimiser steps of a run below which no plan is announced."""


@dataclass(frozen=True)
class Part:
    """One part of a run, done `times` times: once, a forward, or an optimiser step each. `cost` is of one time.

    `grid` is of the clip that it works on; `fp32` says that it computes in fp32 whatever the model's dtype; `alone`,
    that it is done before the transformer is loaded.
    """

    name: str
    times: int
    cost: Cost
    grid: TokenGrid | None = None
    fp32: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run takes. `frozen_bytes` are the transformer's weights that stay on the device."""

    model: str
    frozen_bytes: int
    parts: tuple[Part, ...]

    @property
    def flops(self) -> int:
        """Of the whole run."""
        return sum(part.times * part.cost.flops for part in self.parts)

    @property
    def peak_bytes(self) -> int:
        """On the device."""
        return max(map(self.bytes_in, self.parts), default=self.frozen_bytes)

    def bytes_in(self, part: Part) -> int:
        """On the device while a part runs."""
        return part.cost.nbytes + (0 if part.alone else self.frozen_bytes)

    def seconds(self, card: Card) -> float:
        """Of the whole run on a card."""
        return sum(seconds_of(part, card) for part in self.parts)


def seconds_of(part: Part, card: Card) -> float:
    """Of all times of a part on a card."""
    return part.times * part.cost.flops / (card.fp32_rate if part.fp32 else card.rate)


def plan_of(
    settings: TrainSettings,
    outline: WanOutline,
    dtype: torch.dtype,
    memory: Memory = NOTHING_SPARED,
    *,
    prepares: bool = True,
) -> Plan:
    """The plan of a run; `prepares` False leaves out text encoder and VAE, whose results may be in the cache.

    Autocast is not in it: a run with `mixed_precision: bf16` on an fp32 model takes less than is said.

    Raises:
        InputError: height or width is not set or not one that the model can divide, or an expert that it has not got.
    """
    if settings.expert != "high" and outline.experts == 1:
        raise InputError(f"expert is {settings.expert}, and {outline.name} is one network: leave it at high.")
    run, experts = Rehearsal(settings, outline, dtype, memory), 2 if settings.expert == "both" else 1
    stages, split = settings.stages, settings.heads.heads == "split"
    parts = [Part("embed", 1, run.text_encoder(), alone=True), Part("encode", 1, run.vae(), fp32=True, alone=True)]
    parts = parts if prepares else []
    if "heads" in stages and (split or stages == ("heads",)):
        parts.append(Part("heads", len(settings.heads.times), run.forward(scored=True), run.whole_grid))
    if "spatial" in stages and split and settings.spatial.steps:
        parts.append(Part("spatial", experts * settings.spatial.steps, run.step("spatial"), run.grid("spatial")))
    if "temporal" in stages:
        parts.append(Part("temporal", experts * settings.temporal.steps, run.step("temporal"), run.grid("temporal")))
        if forwards := _validation_forwards(settings):
            parts.append(Part("validation", forwards, run.forward(), run.whole_grid))
    return Plan(outline.name, run.frozen_bytes, tuple(parts))


def _validation_forwards(settings: TrainSettings) -> int:
    check = settings.validation
    walks = settings.temporal.steps // check.every * max(len(check.captions), 1) if check.every else 0
    return walks * check.sample.steps * (2 if check.sample.scale > 1 else 1)


def chosen_card(settings: PlanSettings, dtype: torch.dtype) -> Card:
    """The named card, or this machine with the matrix rate that is measured now."""
    return this_machine(dtype, settings.share) if settings.card == "here" else published(settings.card, settings.share)


def this_machine(dtype: torch.dtype, share: float, device: torch.device | None = None) -> Card:
    """The device (a GPU where there is one): its memory, and a share of the matrix rate that is measured now."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = share * matmul_rate(device, dtype)
    fp32_rate = rate if dtype == torch.float32 else share * matmul_rate(device, torch.float32)
    return replace(unmeasured(device), rate=rate, fp32_rate=fp32_rate)


def unmeasured(device: torch.device) -> Card:
    """A device by its name and its memory."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return Card(about.name, about.total_memory, 1.0, 1.0)
    return Card("this CPU", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 1.0, 1.0, gpu=False)


def matmul_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.3) -> float:
    """FLOPs a second of large matrix products: the best of those that fit into `seconds`."""
    side = 8192 if device.type == "cuda" else 512
    a = torch.ones(side, side, device=device, dtype=dtype)
    ended, best = time.perf_counter() + seconds, 0.0
    while time.perf_counter() < ended or not best:
        began = time.perf_counter()
        torch.mm(a, a).sum().item()  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best


def in_short(plan: Plan, card: Card) -> str:
    """One line: how much, how long, whether it fits."""
    parts = ", ".join(f"{part.name} {duration(seconds_of(part, card))}" for part in plan.parts)
    fits = "fits" if card.holds(plan.peak_bytes) else "DOES NOT FIT"
    return (
        f"Plan for {card.name}: {plan.flops / 1e12:,.4g} TFLOP, about {duration(plan.seconds(card))} ({parts}) at "
        f"{card.rate / 1e12:.3g} TFLOP/s; peak {size(plan.peak_bytes)} of {size(card.nbytes)}, {fits}"
    )


def table(plan: Plan, card: Card) -> str:
    """The plan part by part, and below it what it rests on."""
    lines = [f"{'part':<11}{'times':>6}{'tokens':>8}{'TFLOP each':>12}{'attention':>11}{'time':>10}{'peak':>11}"]
    for part in plan.parts:
        cost, tokens = part.cost, part.grid.tokens if part.grid else ""
        lines.append(
            f"{part.name:<11}{part.times:>6}{tokens:>8}{cost.flops / 1e12:>12.4g}"
            f"{100 * cost.attention_flops / cost.flops:>9.0f} %{duration(seconds_of(part, card)):>10}"
            f"{size(plan.bytes_in(part)):>11}"
        )
    trained = max((part.cost.parameters for part in plan.parts), default=0)
    nbytes = max((part.cost.trained_bytes for part in plan.parts), default=0)
    lines += [
        f"{plan.model}: {size(plan.frozen_bytes)} of frozen weights on the device, {trained:,} trained numbers in the "
        f"larger stage (half of the heads where they are split), whose layers take {size(nbytes)} with gradients and "
        "moments.",
        in_short(plan, card) + ".",
    ]
    return "\n".join(lines)


def announce(shop: Workshop) -> None:
    """Says the plan of a run in one line, at the size of its clip; a short run is over before it could be planned."""
    clip, model, settings = shop.clip, shop.model, shop.settings
    if settings.spatial.steps + settings.temporal.steps < WORTH_PLANNING or not shop.accelerator.is_main_process:
        return
    if preserves_variance(model.scheduler_config):
        shop.say("Plans are made for Wan alone: what this run will take is not told.")
        return
    sized = settings.model_copy(update={"height": clip.height, "width": clip.width})
    plan = plan_of(sized, outlined(model), model.dtype, shop.memory, prepares=False)
    shop.say(in_short(plan, this_machine(model.dtype, SHARE, device=model.device)))


def outlined(model: WanBackbone) -> WanOutline:
    """The outline of a Wan that is there."""
    config = {name: value for name, value in dict(model.config).items() if not name.startswith("_")}
    return WanOutline(model.name, config, model.parts.vae_config, experts=2 if model.experts.boundary else 1)


def size(nbytes: float) -> str:
    """Bytes in the unit that suits them: MiB or GiB."""
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
