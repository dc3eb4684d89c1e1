"""What we ask of peft: layers on named modules, which of them act, and none left behind; refusals before it is asked.

Letters: r rank, i inputs, o outputs; a "r i" and b "o r".
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from motionlora.data.settings import InputError

PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
"""The four projections of a self-attention, short name -> module."""


def adapter_layers(model: nn.Module, name: str) -> dict[str, Any]:
    """Module name -> peft's LoRA layer, of those that have the adapter."""
    return {module: layer for module, layer in _tuned(model).items() if name in layer.lora_A}


def _tuned(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {module: layer for module, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def active(model: nn.Module) -> list[str]:
    return next((list(layer.active_adapters) for layer in _tuned(model).values()), [])


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Lets just these adapters act. peft would also turn their gradients on and all others off: undone here."""
    for layer in _tuned(model).values():
        gradients = {weight: weight.requires_grad for weight in layer.parameters()}
        layer.enable_adapters(True)
        layer.set_adapter(list(names))
        for weight, flag in gradients.items():
            weight.requires_grad_(flag)


def inject(model: Any, name: str, ranks: Mapping[str, int], scale: float) -> None:
    """Adds fp32 layers with arbitrary weights to the modules named in `ranks`, acting beside those that act already."""
    from peft import LoraConfig

    acting = active(model)
    gradients = {weight: weight.requires_grad for layer in _tuned(model).values() for weight in layer.parameters()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    other = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank * scale,  # pyright: ignore[reportArgumentType]
        rank_pattern=other,
        alpha_pattern={module: r * scale for module, r in other.items()},
        target_modules="|".join(map(re.escape, ranks)),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what we want
        model.add_adapter(config, adapter_name=name)
    for layer in adapter_layers(model, name).values():
        layer.lora_A[name].float()
        layer.lora_B[name].float()
    for weight, flag in gradients.items():
        weight.requires_grad_(flag)
    activate(model, [*acting, name])


def drop(model: Any, name: str) -> None:
    activate(model, [other for other in active(model) if other != name])  # else peft wakes up a sleeping adapter
    model.delete_adapters(name)
    for module, layer in _tuned(model).items():
        if not layer.lora_A:
            model.set_submodule(module, layer.get_base_layer())


def initialise(a: nn.Parameter, b: nn.Parameter, kept: Tensor, generator: torch.Generator) -> None:
    """b = 0 and a uniform within 1 / sqrt(inputs), as peft has it; inputs outside `kept` are zero and do not count."""
    columns = kept.nonzero()[:, 0]
    bound = len(columns) ** -0.5
    full = torch.zeros(a.shape)
    full[:, columns] = (2 * torch.rand(len(a), len(columns), generator=generator) - 1) * bound
    with torch.no_grad():
        a.copy_(full)
        b.zero_()


def check_name(model: nn.Module, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise InputError(f"{name!r} cannot name an adapter: use letters, digits, '_' and '-'.")
    if name in getattr(model, "peft_config", {}):
        raise InputError(f"The model already has an adapter {name!r}: choose another name or unload it first.")


def check_known(model: nn.Module, names: Iterable[str]) -> None:
    have = list(getattr(model, "peft_config", {}))
    for name in names:
        if name not in have:
            raise InputError(f"The model has no adapter {name!r}; it has {', '.join(have) or 'none'}: load it first.")


WIDTHS = {1536: "Wan 2.1 1.3B", 5120: "Wan 2.1 14B"}
"""What is known by its width."""


def check_width(width: int, modules: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """InputError naming both widths where a LoRA was made for a model of another one.

    Frames, height and width of the clip do not matter: no weight of Wan depends on the number of tokens.
    """
    for module, (a, b) in modules.items():
        if not re.fullmatch(r"blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)", module):
            continue
        if a.shape[1] == b.shape[0] != width:
            made, have = (f"{wide}{f' ({WIDTHS[wide]})' if wide in WIDTHS else ''}" for wide in (a.shape[1], width))
            raise InputError(
                f"The LoRA was made for a model of width {made}, and this model has width {have}: a LoRA fits no other "
                "width, so choose that model, or train one on this."
            )


def check_all_fit(model: nn.Module, modules: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Every module of a LoRA belongs to this model and is finite; of another width, both widths are named."""
    layers: Any = model.get_submodule("blocks")
    check_width(layers[0].attn1.to_q.in_features, modules)
    for module, (a, b) in modules.items():
        check_fit(model, module, a, b)


def check_fit(model: nn.Module, module: str, a: Tensor, b: Tensor) -> None:
    """The factors of one module belong to this model and are finite."""
    blocks = len(model.get_submodule("blocks"))  # pyright: ignore[reportArgumentType]
    try:
        layer: Any = model.get_submodule(module)
    except AttributeError:
        raise InputError(
            f"The LoRA has weights {tuple(a.shape)} and {tuple(b.shape)} for {module}, which this model of {blocks} "
            "blocks does not have: choose the model that it was trained on."
        ) from None
    layer = getattr(layer, "base_layer", layer)
    if not isinstance(layer, nn.Linear) or (layer.in_features, layer.out_features) != (a.shape[1], b.shape[0]):
        has = f"({layer.out_features}, {layer.in_features})" if isinstance(layer, nn.Linear) else type(layer).__name__
        raise InputError(
            f"The LoRA has weights {tuple(a.shape)} and {tuple(b.shape)} for {module}, which is {has} in this model: "
            "choose the model that it was trained on."
        )
    for factor, value in (("A", a), ("B", b)):
        check_finite(f"{module}.lora_{factor}.weight", value)


def check_finite(key: str, value: Tensor) -> None:
    if not torch.isfinite(value).all():
        raise InputError(f"{key} of the LoRA has NaN or infinite numbers: train it again or fetch the file again.")


def is_output(module: str) -> bool:
    """Of the output projection the heads are columns, of the others they are rows."""
    return module.endswith(PROJECTIONS["o"])


def fitting(module: str, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    if a is None or b is None:
        missing = "lora_A" if a is None else "lora_B"
        raise InputError(
            f"The LoRA has no {module}.{missing}.weight though it has its partner: the file is incomplete."
        )
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise InputError(
            f"The factors of {module} have shapes {tuple(a.shape)} and {tuple(b.shape)}; (rank, inputs) and "
            "(outputs, rank) are allowed: only linear layers can be loaded."
        )
    return a, b


def check_request(model: nn.Module, name: str, chosen: np.ndarray, rank: int, projections: Sequence[str]) -> None:
    check_name(model, name)
    layers: Any = model.get_submodule("blocks")
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
    wrong = [short for short in projections if short not in PROJECTIONS]
    if wrong or not projections:
        came = f"{wrong[0]!r}" if wrong else "none"
        raise InputError(f"Projections are some of {', '.join(PROJECTIONS)}, got {came}: name one or more of these.")
    check_unfused(model)


def check_unfused(model: nn.Module) -> None:
    layers: Any = model.get_submodule("blocks")
    if any(getattr(layer.attn1, "fused_projections", False) for layer in layers):
        raise InputError(
            "The projections of the model are fused, which hides q, k and v: call unfuse_qkv_projections()."
        )


def check_strengths(wanted: Mapping[str, float]) -> None:
    for name, strength in wanted.items():
        if not math.isfinite(strength):
            raise InputError(f"The strength of {name!r} must be a finite number, got {strength}: 1 is as trained.")


def check_state(state: Mapping[str, Tensor], free: Mapping[str, Tensor]) -> None:
    """A state for tensors that are zero where `free` is False."""
    for key in sorted(free.keys() ^ state.keys()):
        lacks = "lacks" if key in free else "has"
        raise InputError(f"The LoRA state {lacks} {key}: give a state of the same heads, projections and rank.")
    for key, where in free.items():
        came, fits = tuple(state[key].shape), tuple(where.shape)
        if came != fits:
            raise InputError(f"{key} of the LoRA state is {came}, not {fits}: give a state of the same rank and model.")
        check_finite(key, state[key])
        if state[key].cpu()[~where].any():
            raise InputError(f"{key} of the LoRA state has weight on heads not chosen: give a state of these heads.")
