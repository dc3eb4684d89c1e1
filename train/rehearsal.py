"""The parts of a training run, gone through on the outline of a model: FLOPs, bytes and parameters, no numbers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from motionlora.data.errors import InputError
from motionlora.heads.backbone import Prompt
from motionlora.heads.lora import attach
from motionlora.heads.memory import NOTHING_SPARED, Memory, linear_layers
from motionlora.heads.positions import sparse_positions
from motionlora.heads.score import scoring
from motionlora.heads.wan_outline import META, WanOutline
from motionlora.train.count import Count, counting
from motionlora.train.optimizer import MOMENT_BYTES
from motionlora.train.stages import Stage

if TYPE_CHECKING:
    from motionlora.heads.backbone import TokenGrid
    from motionlora.heads.wan import WanBackbone
    from motionlora.train.settings import TrainSettings

TEXT_LENGTH = 512
TRACED = (2, 3)
"""Blocks of the models that are traced. Every block but the first takes the same (the first needs no gradient of its
input), so that two counts tell those of any number of blocks."""


@dataclass(frozen=True)
class Cost:
    """FLOPs, of which in attention; bytes on the device beside the base's weights, at the peak; numbers trained; bytes
    of their layers with gradients and moments."""

    flops: int
    nbytes: int
    attention_flops: int = 0
    parameters: int = 0
    trained_bytes: int = 0

    def toward(self, more: Cost, share: float) -> Cost:
        """The point on the line from this cost to `more`: 0 is here, 1 is there."""
        pairs = zip(vars(self).values(), vars(more).values(), strict=True)
        return Cost(*(round(here + share * (there - here)) for here, there in pairs))


@dataclass(frozen=True)
class Rehearsal:
    """A run on a model without data. The settings name height and width; masks do not change what a layer costs."""

    settings: TrainSettings
    outline: WanOutline
    dtype: torch.dtype
    memory: Memory = NOTHING_SPARED

    @cached_property
    def model(self) -> WanBackbone:
        """The model with all its blocks."""
        return self.outline.without_weights(self.dtype)

    @property
    def frozen_bytes(self) -> int:
        """Of the transformer, on the device between two of its blocks' layers."""
        transformer = self.outline.without_weights(self.dtype).transformer
        self.memory.casting(transformer, self.dtype)
        waiting = linear_layers(transformer) if self.memory.offload else ()
        return bytes_of(transformer) - sum(map(bytes_of, waiting))

    @property
    def passing_bytes(self) -> int:
        """Of the layers that are cast or fetched: those of a block are there at once while it is run backwards; of
        those in nf4, whose numbers autograd does not keep, one.
        """
        layers = linear_layers(self.outline.without_weights(self.dtype, blocks=1).transformer)
        if self.memory.weights == "nf4":
            return max(layer.weight.nbytes for layer in layers)
        return sum(map(bytes_of, layers)) if self.memory.waits else 0

    def text_encoder(self) -> Cost:
        """A caption embedded. FLOPs are two a weight and token; of the bytes, only the weights."""
        encoder = self.outline.text_encoder_without_weights(self.dtype)
        weights = sum(weight.numel() for name, weight in encoder.named_parameters() if "shared" not in name)
        return Cost(2 * TEXT_LENGTH * weights, bytes_of(encoder))

    def vae(self) -> Cost:
        """The whole clip encoded. The VAE takes 1 frame, then 4 at a time, which from the second on cost the same."""
        vae, (height, width) = self.outline.vae_without_weights(), self.size
        with torch.no_grad():
            few, more = (
                counted(lambda frames=frames: vae.encode(torch.empty(1, 3, frames, height, width, device=META)))
                for frames in (5, 9)
            )
        fours = (self.settings.frames - 1) // 4
        pixels = 3 * 4 * self.settings.frames * height * width
        return Cost(few.flops + (fours - 1) * (more.flops - few.flops), bytes_of(vae) + pixels + more.peak_bytes)

    def forward(self, frames: int | None = None, *, scored: bool = False) -> Cost:
        """One forward of a clip of `frames` pixel frames (the whole one's) without gradients; or with heads scored."""
        frames = frames or self.settings.frames

        def work(model: WanBackbone) -> Cost:
            latent = self._latent(frames)
            scores = scoring(model.transformer, model.grid(latent)) if scored else nullcontext()
            with torch.no_grad(), scores:
                count = counted(lambda: model.velocity(latent, torch.ones(1), self._prompt()))
            return Cost(count.flops, count.peak_bytes, count.attention_flops)

        return self._of_all_blocks(work)

    @property
    def whole_grid(self) -> TokenGrid:
        """Of the whole clip."""
        return self.model.grid(self._latent(self.settings.frames))

    def grid(self, name: Any) -> TokenGrid:
        """Of what a stage is trained on."""
        return self.model.grid(self.stage(name).latents[:1])

    def step(self, name: Any) -> Cost:
        """An optimiser step of a stage: forward, loss, backward; AdamW by its two moments, its sums are no products."""
        return self._of_all_blocks(lambda model: self._step(name, model))

    def stage(self, name: Any) -> Stage:
        """A stage on latents without data, for half of the heads: which half, is not known before."""
        settings, single, model = self.settings, name == "spatial", self.model
        stride = settings.temporal.stride
        frames = 1 if single else (settings.frames - 1) // stride + 1
        half = np.arange(model.blocks * model.heads).reshape(model.blocks, model.heads) % 2 == (not single)
        return Stage(
            name=name,
            latents=self._latent(frames, clips=settings.frames if single else 1),
            prompt=self._prompt(),
            chosen=np.ones_like(half) if settings.heads.heads == "all" else half,
            positions=torch.zeros(1) if single else sparse_positions("aligned", frames=settings.frames, stride=stride),
            motion="none" if single else settings.temporal.motion,
            motion_weight=settings.temporal.motion_weight,
            noise=settings.noise,
            settings=settings.spatial if single else settings.temporal,
        )

    def _step(self, name: str, model: WanBackbone) -> Cost:
        settings, stage, lora = self.settings, self.stage(name), self.settings.lora
        transformer: Any = model.transformer
        base, chosen = bytes_of(transformer), np.resize(stage.chosen, (model.blocks, model.heads))
        self.memory.recomputing(transformer)
        how: dict[str, Any] = {"rank": lora.rank, "projections": lora.projections, "seed": 0}
        if name == "temporal" and settings.heads.heads == "split" and settings.spatial.steps:
            attach(transformer, "spatial", ~chosen, **how).trainable(False)
        layers = attach(transformer, name, chosen, **how)
        transformer.to(META)  # peft leaves the weights of a second adapter where they were made

        def gradients() -> None:
            for _ in range(settings.gradient_accumulation):
                generator = torch.Generator()
                with model.positioned(stage.positions):
                    stage.loss(model, stage.point(generator), stage.told(generator)).total.backward()

        count = counted(gradients)
        weights = sum(weight.numel() for weight in layers.parameters())
        moments = MOMENT_BYTES[settings.optimizer] * weights
        resting = bytes_of(transformer) - base + moments + stage.latents.nbytes
        numbers = layers.parameter_count(), 8 * weights + moments
        return Cost(count.flops, resting + count.peak_bytes, count.attention_flops, *numbers)

    def _of_all_blocks(self, work: Callable[[WanBackbone], Cost]) -> Cost:
        low, high = (count * max(self.memory.recompute_every, 1) for count in TRACED)
        few, more = (work(self.outline.without_weights(self.dtype, blocks=blocks)) for blocks in (low, high))
        cost = few.toward(more, (self.model.blocks - low) / (high - low))
        return replace(cost, nbytes=cost.nbytes + self.passing_bytes)

    def _latent(self, frames: int, *, clips: int = 1) -> torch.Tensor:
        model, sides = self.model, [side // self.model.spatial_factor for side in self.size]
        return torch.empty(clips, model.channels, (frames - 1) // model.frame_multiple + 1, *sides, device=META)

    def _prompt(self) -> Prompt:
        return Prompt(torch.empty(1, TEXT_LENGTH, self.model.config.text_dim, device=META))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels.

        Raises:
            InputError: none was set, or one that the model cannot divide.
        """
        height, width, multiple = self.settings.height, self.settings.width, self.model.multiple
        if height is None or width is None or height % multiple or width % multiple:
            raise InputError(
                f"A plan needs height and width, multiples of {multiple}, got {height} x {width}: set --height and "
                "--width."
            )
        return height, width


def counted(work: Callable[[], object]) -> Count:
    """What one piece of work takes."""
    with counting() as count:
        work()
    return count


def bytes_of(module: torch.nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
