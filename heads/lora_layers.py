"""What we ask of peft: layers on named modules, which of them act, and none left behind; refusals before it is asked.

Letters: r rank, i inputs, o outputs; a "r i" and b "o r".
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from motionlora.data.settings import InputError
from motionlora.heads.capture import chosen_blocks, layers_of
from motionlora.heads.lora_layouts import BLOCK

PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
"""The four projections of a self-attention, short name -> module."""
WIDTHS = {1536: "Wan 2.1 1.3B", 5120: "Wan 2.1 14B"}
"""What is known by its width."""


def adapters(model: nn.Module) -> list[str]:
    """The names of all adapters of a model."""
    return list(getattr(model, "peft_config", {}))


def adapter_layers(model: nn.Module, name: str) -> dict[str, Any]:
    """Module name -> peft's LoRA layer, of those that have the adapter."""
    return {module: layer for module, layer in _tuned(model).items() if name in layer.lora_A}


def _tuned(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {module: layer for module, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def active(model: nn.Module) -> list[str]:
    return next((list(layer.active_adapters) for layer in _tuned(model).values()), [])


@contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """peft turns the gradients of what acts on and all others off: here they are afterwards as they were before."""
    before = {weight: weight.requires_grad for layer in _tuned(model).values() for weight in layer.parameters()}
    yield
    for weight, flag in before.items():
        weight.requires_grad_(flag)


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Lets just these adapters act."""
    with _gradients_kept(model):
        for layer in _tuned(model).values():
            layer.enable_adapters(True)
            layer.set_adapter(list(names))


def inject(model: Any, name: str, ranks: Mapping[str, int]) -> None:
    """Adds fp32 layers, alpha = rank and b = 0, to the modules named in `ranks`, beside those that act already."""
    from peft import LoraConfig

    acting = active(model)
    rank = Counter(ranks.values()).most_common(1)[0][0]
    other = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != rank}
    modules = "|".join(map(re.escape, ranks))
    config = LoraConfig(r=rank, lora_alpha=rank, rank_pattern=other, alpha_pattern=other, target_modules=modules)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _gradients_kept(model):
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what we want
        model.add_adapter(config, adapter_name=name)
    for layer in adapter_layers(model, name).values():
        layer.lora_A[name].float()
        layer.lora_B[name].float()
    activate(model, [*acting, name])


def drop(model: Any, name: str) -> None:
    activate(model, [other for other in active(model) if other != name])  # else peft wakes up a sleeping adapter
    model.delete_adapters(name)
    for module, layer in _tuned(model).items():
        if not layer.lora_A:
            model.set_submodule(module, layer.get_base_layer())


def initialise(a: nn.Parameter, free: Tensor, generator: torch.Generator) -> None:
    """Uniform within 1 / sqrt(inputs), as peft has it; inputs outside of `free` "r i" are zero and do not count."""
    start = torch.zeros(a.shape)
    start[free] = (2 * torch.rand(int(free.sum()), generator=generator) - 1) * int(free[0].sum()) ** -0.5
    with torch.no_grad():
        a.copy_(start)


def is_output(module: str) -> bool:
    """Of the output projection the heads are columns, of the others they are rows."""
    return module.endswith(PROJECTIONS["o"])


def check_request(model: nn.Module, chosen: np.ndarray, rank: int) -> None:
    layers = layers_of(model)
    shape = (len(layers), layers[0].attn1.heads)
    if chosen.dtype != bool or chosen.shape != shape:
        raise InputError(
            f"Heads are chosen by a bool map of {shape[0]} blocks x {shape[1]} heads, got {chosen.dtype} "
            f"{chosen.shape}: score the heads of this model."
        )
    if not chosen.any():
        raise InputError("No head is chosen, so there is nothing to train: change the head rule or its ratio.")
    if rank < 1:
        raise InputError(f"The rank of a LoRA must be 1 or more, got {rank}: 32 is the usual one.")


def check_known(model: nn.Module, names: Iterable[str]) -> None:
    have = adapters(model)
    for name in names:
        if name not in have:
            raise InputError(f"The model has no adapter {name!r}; it has {', '.join(have) or 'none'}: load it first.")


def check_free(model: nn.Module, name: str) -> None:
    """No adapter has the name, and the projections are not fused, which would hide q, k and v."""
    if name in adapters(model):
        raise InputError(f"The model already has an adapter {name!r}: choose another name or unload it first.")
    chosen_blocks(model, range(len(layers_of(model))))


def check_strengths(wanted: Mapping[str, float]) -> None:
    for name, strength in wanted.items():
        if not math.isfinite(strength):
            raise InputError(f"The strength of {name!r} must be a finite number, got {strength}: 1 is as trained.")


def check_finite(key: str, value: Tensor) -> None:
    if not torch.isfinite(value).all():
        raise InputError(f"{key} of the LoRA has NaN or infinite numbers: train it again or fetch the file again.")


def check_width(width: int, modules: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """InputError naming both widths where a LoRA was made for a model of another one.

    Frames, height and width of the clip do not matter: no weight of Wan depends on the number of tokens.
    """
    for module, (a, b) in modules.items():
        match = BLOCK.fullmatch(module)
        if match and re.fullmatch(r"attn[12]\.to_(q|k|v|out\.0)", match[2]) and a.shape[1] == b.shape[0] != width:
            made, have = (f"{wide}{f' ({WIDTHS[wide]})' if wide in WIDTHS else ''}" for wide in (a.shape[1], width))
            raise InputError(
                f"The LoRA was made for a model of width {made}, and this model has width {have}: a LoRA fits no other "
                "width, so choose that model, or train one on this."
            )


def check_fit(model: nn.Module, modules: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Every module of a LoRA belongs to this model and is finite; of another width, both widths are named."""
    layers, cure = layers_of(model), "choose the model that it was trained on."
    check_width(layers[0].attn1.to_q.in_features, modules)
    for module, (a, b) in modules.items():
        came = f"The LoRA has weights {tuple(a.shape)} and {tuple(b.shape)} for {module}"
        try:
            layer: Any = model.get_submodule(module)
        except AttributeError:
            raise InputError(f"{came}, which this model of {len(layers)} blocks does not have: {cure}") from None
        layer = getattr(layer, "base_layer", layer)
        has = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else type(layer).__name__
        if has != (b.shape[0], a.shape[1]):
            raise InputError(f"{came}, which is {has} in this model: {cure}")
        check_finite(f"{module}.lora_A.weight", a)
        check_finite(f"{module}.lora_B.weight", b)


def check_state(state: Mapping[str, Tensor], free: Mapping[str, Tensor]) -> None:
    """A state for tensors that are zero where `free` is False."""
    odd = sorted(free.keys() ^ state.keys()) or [key for key in free if state[key].shape != free[key].shape]
    if odd:
        raise InputError(
            f"The LoRA state is another in {odd[0]}: give a state of the same heads, projections and rank."
        )
    for key, where in free.items():
        check_finite(key, state[key])
        if state[key].cpu()[~where].any():
            raise InputError(f"{key} of the LoRA state has weight on heads not chosen: give a state of these heads.")
