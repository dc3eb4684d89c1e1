"""LoRA on chosen attention heads: exact masks on full-width layers of stock peft; attach, train, load, remove.

Head-wise LoRA of rank r is full-width LoRA of the same rank whose b (q, k, v: rows) or a (o: columns) is zero outside
the chosen heads (Follow-Your-Motion, arXiv 2506.05207, with nothing split). Forward hooks keep the zeros: a gradient
hook would be lost without a word where a trainer shards the parameters. The norms of q and k run over all heads at
once, so a LoRA on one head still rescales its neighbours: that is the paper's method, not a leak of the mask.

Letters: r rank, i inputs, o outputs of a projection; a "r i" and b "o r" are the two factors of W + alpha / r * b a.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import repeat
from torch import Tensor, nn

from motionlora.heads.capture import blocks_name, unwrapped
from motionlora.heads.lora_layers import (
    PROJECTIONS,
    activate,
    active,
    adapter_layers,
    adapters,
    check_fit,
    check_free,
    check_known,
    check_request,
    check_state,
    check_strengths,
    drop,
    initialise,
    inject,
    is_output,
)
from motionlora.heads.motion_lora import MotionLora

if TYPE_CHECKING:
    from motionlora.heads.head_map import HeadMap
    from motionlora.heads.settings import Projection


class MotionLoraHandle:
    """A LoRA on chosen heads of a model in training. Made by `attach`."""

    def __init__(self, transformer: nn.Module, name: str, chosen: np.ndarray, rank: int) -> None:
        self.transformer, self.name, self.chosen, self.rank = transformer, name, chosen, rank
        self._layers = adapter_layers(transformer, name)
        self._hooks = [self._masked(module) for module in self._layers]

    def state(self) -> dict[str, Tensor]:
        """All tensors, full width, copied to the CPU: "blocks.N.attn1.to_q.lora_A.weight" -> "r i" and so on."""
        return {name: value.detach().cpu().clone() for name, value in self.named().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Sets all tensors, bit for bit, from what `state` returned.

        Raises:
            InputError: other keys or shapes, a NaN, or weight on heads that are not chosen; nothing is changed then.
        """
        own = self.named()
        check_state(state, {key: self._free(key) for key in own})
        with torch.no_grad():
            for key, weight in own.items():
                weight.copy_(state[key])

    def parameters(self) -> list[nn.Parameter]:
        """The fp32 tensors, in a fixed order. Masked entries stay exactly zero under SGD, Adam and AdamW, any decay."""
        return list(self.named().values())

    def parameter_count(self) -> int:
        """How many numbers can move: the size of compact head-wise LoRA, r (i + o) with only the chosen rows."""
        return sum(int(self._free(key).sum()) for key in self.named())

    def trainable(self, flag: bool) -> None:
        """Lets gradients reach the parameters, or freezes them; the LoRA keeps acting on the output."""
        for weight in self.parameters():
            weight.requires_grad_(flag)

    def remove(self) -> None:
        """Takes adapter and hooks away: modules and outputs are bit for bit those of before. Twice does no harm."""
        for hook in self._hooks:
            hook.remove()
        if self._layers:
            drop(self.transformer, self.name)
        self._hooks, self._layers = [], {}

    def lora(
        self,
        stage: str,
        *,
        head_map: HeadMap | None = None,
        state: Mapping[str, Tensor] | None = None,
        **provenance: Any,
    ) -> MotionLora:
        """The LoRA as it is now, or with the weights of `state` (an average, say); its heads go into the provenance."""
        heads = {str(block): np.flatnonzero(row).tolist() for block, row in enumerate(self.chosen) if row.any()}
        provenance = {"heads": {"per_block": self.chosen.shape[1], "chosen": heads}, **provenance}
        return MotionLora(dict(state or self.state()), self.rank, float(self.rank), head_map, stage, provenance)

    def named(self) -> dict[str, nn.Parameter]:
        """The parameters by the names that they have in `state`; a trainer may keep but a part of each (ZeRO)."""
        found = {}
        for module, layer in self._layers.items():
            found[f"{module}.lora_A.weight"] = layer.lora_A[self.name].weight
            found[f"{module}.lora_B.weight"] = layer.lora_B[self.name].weight
        return found

    def _free(self, key: str) -> Tensor:
        """Where a tensor may be other than zero; bool, of its shape."""
        module, factor, _ = key.rsplit(".", 2)
        layer = self._layers[module]
        width = {"lora_A": layer.in_features, "lora_B": layer.out_features}[factor]
        masked = factor == ("lora_A" if is_output(module) else "lora_B")
        side = self._kept(module) if masked else torch.ones(width, dtype=torch.bool)
        return repeat(side, "n -> r n" if factor == "lora_A" else "n -> n r", r=self.rank)

    def _kept(self, module: str) -> Tensor:
        """The channels of the chosen heads: columns of a in an output projection, rows of b in others."""
        layer, heads = self._layers[module], torch.from_numpy(self.chosen[int(module.split(".")[1])])
        return heads.repeat_interleave((layer.in_features if is_output(module) else layer.out_features) // len(heads))

    def _masked(self, module: str) -> torch.utils.hooks.RemovableHandle:
        """Hooks one projection. The mask is a buffer, so that it follows the model to its device; it is never saved."""
        factor = getattr(self._layers[module], "lora_A" if is_output(module) else "lora_B")[self.name]
        factor.register_buffer("head_mask", self._kept(module).to(factor.weight), persistent=False)
        if is_output(module):
            return factor.register_forward_pre_hook(lambda m, args: (args[0] * m.head_mask.to(args[0].dtype),))
        return factor.register_forward_hook(lambda m, _, out: out * m.head_mask.to(out.dtype))


def attach(
    transformer: nn.Module,
    name: str,
    chosen: np.ndarray,
    *,
    rank: int,
    projections: Sequence[Projection] = ("q", "k", "v", "o"),
    seed: int,
) -> MotionLoraHandle:
    """Adds trainable LoRA layers to the chosen heads of the self-attentions; the model's output does not change yet.

    Stock peft layers in fp32, also on a bf16 model, alpha = rank. Blocks without a chosen head get none. Other adapters
    keep acting and keep their gradients on or off; the base weights are frozen. The global random state is left alone.

    Args:
        transformer: one of Wan or CogVideoX, or a wrapper that holds one.
        name: of the adapter; letters, digits, "_" and "-".
        chosen: bool "block head".
        rank: r, 1 or more.
        projections: one or more of "q", "k", "v", "o".
        seed: of the initial a; equal seed and heads give equal bits.

    Raises:
        InputError: no head chosen, a map of another shape, an impossible rank, a taken name, fused projections.

    Source: Follow-Your-Motion (arXiv 2506.05207), as one masked layer in place of two split ones (ours).
    """
    model = unwrapped(transformer)
    chosen = np.asarray(chosen)
    check_free(model, name)
    check_request(model, chosen, rank)
    modules = [
        f"{blocks_name(model)}.{block}.attn1.{module}"
        for block in np.flatnonzero(chosen.any(axis=1))
        for short, module in PROJECTIONS.items()
        if short in projections
    ]
    inject(model, name, dict.fromkeys(modules, rank))
    handle = MotionLoraHandle(model, name, chosen, rank)
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        initialise(handle._layers[module].lora_A[name].weight, handle._free(f"{module}.lora_A.weight"), generator)
    return handle


def load_into(transformer: nn.Module, lora: MotionLora, name: str, strength: float = 1.0) -> None:
    """Adds a finished LoRA to a model, frozen, beside the adapters that are there: W + strength * alpha / rank * b a.

    Any linear module of the model may be in it (feed-forward, cross-attention), with any rank, made at any frames and
    size, but at this width. No masks are needed: the zeros carry them. All its tensors are used, or nothing is changed.

    Args:
        strength: 1 as trained, 0 off; Follow-Your-Motion's temporal LoRA is used at 0.5.

    Raises:
        InputError: a tensor that does not belong to this model or is not finite, a taken name, fused projections.
    """
    model = unwrapped(transformer)
    check_free(model, name)
    check_strengths({name: strength})
    modules = lora.folded()
    check_fit(model, modules)
    inject(model, name, {module: a.shape[0] for module, (a, _) in modules.items()})
    layers = adapter_layers(model, name)
    with torch.no_grad():
        for module, (a, b) in modules.items():
            layers[module].lora_A[name].weight.copy_(a).requires_grad_(False)
            layers[module].lora_B[name].weight.copy_(b).requires_grad_(False)
    set_strengths(model, {**strengths(model), name: strength})


def unload(transformer: nn.Module, name: str) -> None:
    """Takes an adapter away; the others keep acting. With the last one, every module is the stock one again.

    Raises:
        InputError: there is no such adapter.
    """
    model = unwrapped(transformer)
    check_known(model, [name])
    drop(model, name)


def set_strengths(transformer: nn.Module, wanted: Mapping[str, float]) -> None:
    """Says how strongly each adapter acts: 1 as trained, 0 off, and off too where it is not named.

    With all of them off the output is the base model's, bit for bit. Gradients stay on or off as they are.

    Raises:
        InputError: an unknown adapter or a strength that is not a finite number.
    """
    model = unwrapped(transformer)
    check_known(model, wanted)
    check_strengths(wanted)
    for name, strength in wanted.items():
        for layer in adapter_layers(model, name).values():
            layer.set_scale(name, float(strength))
    activate(model, [name for name, strength in wanted.items() if strength != 0])


def strengths(transformer: nn.Module) -> dict[str, float]:
    """The adapters of a model and how strongly each acts now; what `set_strengths` takes."""
    model = unwrapped(transformer)
    acting, found = active(model), {}
    for name in adapters(model):
        layer = next(iter(adapter_layers(model, name).values()))
        found[name] = layer.scaling[name] * layer.r[name] / layer.lora_alpha[name] if name in acting else 0.0
    return found
