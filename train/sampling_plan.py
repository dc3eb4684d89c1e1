"""`motionlora generate --memory auto`: which mode a walk is predicted to fit in, by the counting of `motionlora plan`.

fast    nothing is spared: the VAE decodes beside the network.
low     the blocks' linear layers wait in main memory and come to the GPU one by one, and a gradient of a guidance runs
        blocks once more: the same numbers, slower by what the way over PCIe takes. On a CPU they stay where they are.
4bit    nothing waits, the blocks' linear layers are in nf4 (4.5 bits a number, by bitsandbytes): other numbers.
lowest  as low, and they wait in fp8 (e4m3): other numbers, half the main memory and half the way, no less on the
        device.
auto    the first of these but 4bit that is predicted to fit, which is said; of a GPU lowest takes no less than low.

Text encoder and VAE are gone before the network comes, whatever the mode. Of a guidance only its forwards and gradients
are counted, not what it compares. Tried on a CPU, with layers that wait on a disk; not on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from motionlora.data.errors import InputError
from motionlora.heads.lora import attach
from motionlora.heads.memory import AUTO, Mode, sampling_memory
from motionlora.heads.wan_folder import found_folder, is_cogvideox
from motionlora.heads.wan_outline import META, outline_of
from motionlora.infer.features import FeatureGuidance
from motionlora.infer.order import as_set, chosen_dtype
from motionlora.train.memory import needed
from motionlora.train.plan import Part, Plan, unmeasured
from motionlora.train.rehearsal import Cost, Rehearsal, bytes_of, counted
from motionlora.train.settings import TrainSettings

if TYPE_CHECKING:
    from motionlora.heads.motion_lora import MotionLora
    from motionlora.heads.wan import WanBackbone
    from motionlora.infer.order import LoadedLora
    from motionlora.infer.settings import GenerateSettings


def fitting_mode(
    settings: GenerateSettings,
    loras: Sequence[LoadedLora],
    device: torch.device,
    say: Callable[[str], None] = print,
) -> Mode:
    """The mode that is set; for `auto` the first that is predicted to fit the device, which is said.

    Raises:
        InputError: none is, or the backbone has no plans.
    """
    if settings.memory != "auto":
        return as_set(settings, loras, device)
    if is_cogvideox(found_folder(settings.model, weights=False, cogvideox=True)):
        raise InputError(
            "Plans are made for Wan alone, so that auto cannot choose: set --memory fast, low, 4bit or lowest."
        )
    card, plans = unmeasured(device), {}
    run = rehearsal_of(settings, loras, device)
    decoded = run.decoded()
    for mode in AUTO:
        plans[mode] = replace(run, memory=sampling_memory(mode, gpu=card.gpu)).plan(settings, decoded)
        if card.holds(plans[mode].peak_bytes):
            say(f"Memory: auto takes {mode} (predicted: {needed(plans, card)}).")
            return mode
    raise InputError(
        f"The clip fits on {card.name} in no mode of memory (predicted: {needed(plans, card)}): take fewer frames or a "
        "smaller size, or try it with --memory lowest all the same."
    )


def rehearsal_of(settings: GenerateSettings, loras: Sequence[LoadedLora], device: torch.device) -> WalkRehearsal:
    """A walk of the settings that spares nothing."""
    return WalkRehearsal(
        TrainSettings(height=settings.height, width=settings.width),
        outline_of(settings.model),
        chosen_dtype(settings.dtype, device),
        frames=settings.frames,
        loras=tuple(lora.lora for lora in loras),
    )


@dataclass(frozen=True)
class WalkRehearsal(Rehearsal):
    """A walk on a model without data; of the settings only height and width count."""

    frames: int = 81
    loras: tuple[MotionLora, ...] = ()

    def plan(self, settings: GenerateSettings, decoded: Cost) -> Plan:
        """A step, a gradient of the guidance, the decoding: what is on the device when the network is there.

        A gradient comes from the guidance's deepest block; blocks are run once more for it where the guidance says so.
        """
        steps, blocks, guidance = settings.sample.steps, self.model.blocks, settings.guidance
        parts = [Part("forward", steps, self.walked(gradient=False)), Part("decode", 1, decoded, fp32=True)]
        if isinstance(guidance, FeatureGuidance) and guidance.gradients(steps, blocks):
            size = {**self.outline.transformer, "num_layers": guidance.depth(blocks) + 1}
            memory = replace(self.memory, recompute_every=1) if guidance.recompute else self.memory
            guided = replace(self, outline=replace(self.outline, transformer=size), memory=memory)
            parts.append(Part("guide", steps, guided.walked(gradient=True)))
        return Plan(self.outline.name, self.frozen_bytes, tuple(parts))

    @property
    def frozen_bytes(self) -> int:
        """With the LoRAs, which are in fp32 and do not wait."""
        return super().frozen_bytes + sum(4 * weight.numel() for lora in self.loras for weight in lora.weights.values())

    def walked(self, *, gradient: bool) -> Cost:
        """One forward, or one and its gradient by the latent, with the LoRAs on all self-attention."""

        def work(model: WanBackbone) -> Cost:
            self.memory.recomputing(model.transformer)
            everywhere = np.ones((model.blocks, model.heads), dtype=bool)
            for index, lora in enumerate(self.loras):
                attach(model.transformer, f"lora{index}", everywhere, rank=lora.rank, seed=0).trainable(False)
            model.transformer.to(META)  # peft leaves the weights of a second adapter where they were made
            latent = self._latent(self.frames).requires_grad_(gradient)

            def forward() -> None:
                with torch.set_grad_enabled(gradient):
                    velocity = model.velocity(latent, torch.ones(1), self._prompt())
                    if gradient:
                        velocity.sum().backward()

            count = counted(forward)
            return Cost(count.flops, count.peak_bytes, count.attention_flops)

        return self._of_all_blocks(work)

    def decoded(self) -> Cost:
        """The clip decoded. The VAE makes 1 frame, then 4 at a time, of which each costs the same and is kept."""
        vae = self.outline.vae_without_weights()

        def decoding(frames: int) -> Cost:
            latent = self._latent(frames)
            with torch.no_grad():
                count = counted(lambda: vae.decode(latent))
            return Cost(count.flops, bytes_of(vae) + count.peak_bytes)

        return decoding(9).toward(decoding(13), (self.frames - 9) / 4)
