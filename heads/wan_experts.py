"""Two experts in one network (Wan 2.2 T2V-A14B): each has its noise levels, and the network holds one's weights.

Both are of one architecture, so that hooks, positions and LoRA layers stay where they are when the weights change.
Those that are not held wait in main memory: the device needs room for one expert, and a walk changes them twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from jaxtyping import Float
from torch import Tensor, nn

from motionlora.data.settings import InputError
from motionlora.heads.lora import set_strengths, strengths
from motionlora.heads.settings import Expert
from motionlora.heads.wan_folder import NETWORKS, boundary_of
from motionlora.heads.wan_parts import loaded, weights_fingerprint


@dataclass(eq=False)
class Experts:
    """Which expert answers for a noise level, whose weights the network holds, and which LoRA acts on which.

    Attributes:
        boundary: the noise level from which on the high-noise expert answers; 0 where one network has all levels.
        held: whose weights the network holds.
        weights: the network's own parameters, without those of LoRA layers.
        waiting: the weights of both experts in main memory, in the same order; empty where one alone was loaded.
    """

    boundary: float = 0.0
    held: Expert = "high"
    network: nn.Module = field(default_factory=nn.Identity)
    weights: Sequence[nn.Parameter] = ()
    waiting: Mapping[Expert, Sequence[Tensor]] = field(default_factory=dict)
    placed: dict[str, tuple[Expert, float]] = field(default_factory=dict)

    @property
    def only(self) -> Expert | None:
        """The one expert of two that was loaded; None where both were, and for a model of one network."""
        return self.held if self.boundary and not self.waiting else None

    @property
    def times(self) -> tuple[float, float]:
        """The lowest and the highest noise level that the model answers for."""
        below = float(np.nextafter(np.float32(self.boundary), np.float32(0)))
        return {"high": (self.boundary, 1.0), "low": (0.0, below), None: (0.0, 1.0)}[self.only]

    def at(self, time: Float[Tensor, " b"]) -> Expert:
        """Whose noise levels these are, compared in thousandths as `WanPipeline` does.

        Raises:
            InputError: levels of both.
        """
        high = 1000 * time.float() >= 1000 * self.boundary
        if not high.any():
            return "low"
        if not high.all():
            raise InputError(
                f"One forward got noise levels on both sides of {self.boundary:g}, where the experts change: give it "
                "levels of one."
            )
        return "high"

    def hold_for(self, time: Float[Tensor, " b"]) -> None:
        """Gives the network the weights of the expert whose noise levels these are.

        Raises:
            InputError: that expert was not loaded, or levels of both.
        """
        if not self.boundary or (wanted := self.at(time)) == self.held:
            return
        if not self.waiting:
            raise InputError(
                f"Noise level {float(time.min()):.4g} is the {wanted}-noise expert's, and the {self.held}-noise one is "
                f"loaded alone: stay {'below' if self.held == 'low' else 'at or above'} {self.boundary:g}."
            )
        for weight, stored in zip(self.weights, self.waiting[wanted], strict=True):
            weight.data = stored.to(weight.device)
        # A backward pass through a forward of the other expert shall fail, not use these weights.
        torch.autograd.graph.increment_version(list(self.weights))
        self.held = wanted
        self._let_act()

    def place(self, name: str, expert: Expert, strength: float) -> None:
        """From here on the adapter acts at this strength on that expert alone; one not placed acts on both."""
        self.placed[name] = (expert, strength)
        self._let_act()

    def _let_act(self) -> None:
        acting = strengths(self.network)
        for name in acting.keys() & self.placed.keys():
            expert, strength = self.placed[name]
            acting[name] = strength if expert == self.held else 0.0
        set_strengths(self.network, acting)


def loaded_experts(
    folder: Path, device: torch.device, dtype: torch.dtype, only: Expert | None
) -> tuple[nn.Module, Experts, str]:
    """The frozen network of a checked folder on its device, what it holds, and which weights were loaded (a hash).

    Raises:
        InputError: weights that do not fit the class, or are missing.
    """
    boundary = boundary_of(folder)
    wanted: tuple[Expert, ...] = ("high", "low") if boundary and only is None else (only or "high",)
    networks = [loaded(WanTransformer3DModel, folder / NETWORKS[name], dtype) for name in wanted]
    prints = [weights_fingerprint(network) for network in networks]
    fingerprint = prints[0] if len(prints) == 1 else sha256("".join(prints).encode()).hexdigest()[:16]
    waiting: dict[Expert, Sequence[Tensor]] = {}
    if len(networks) == 2:
        waiting = {name: [weight.data for weight in networks[index].parameters()] for index, name in enumerate(wanted)}
    network = networks[0].to(device)
    return network, Experts(boundary, wanted[0], network, list(network.parameters()), waiting), fingerprint
