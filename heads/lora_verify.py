"""Does a LoRA file do elsewhere what it does here? Loaded in the stock pipeline and by us, in the same model.

Letters: b batch, c latent channel, f latent frame, h height, w width, l text token, d width of the text.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from motionlora.data.settings import InputError
from motionlora.heads.backbone import Prompt
from motionlora.heads.capture import unwrapped
from motionlora.heads.lora import load_into, unload
from motionlora.heads.lora_file import as_lora, read_lora
from motionlora.heads.lora_layers import adapter_layers, drop
from motionlora.heads.lora_strength import Alpha
from motionlora.heads.lora_write import folded
from motionlora.heads.wan_folder import first_line

if TYPE_CHECKING:
    from motionlora.heads.lora import MotionLora
    from motionlora.heads.wan import WanBackbone

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""How far the outputs may differ, as a share of what the LoRA changes: rounding of the model's own dtype."""


@dataclass(frozen=True)
class Verdict:
    """What became of a file in the two loaders.

    Attributes:
        layout: of the file.
        source: where its strength stands.
        changed: by how much the LoRA changes the velocity, as a share of the velocity's norm.
        refusal: why the stock pipeline did not take the file; "" where it did.
        factor: how strongly the stock pipeline applies it, as a multiple of how it was trained; 1 is right.
        differs: largest difference between the two outputs, as a share of the largest change.
        tolerance: of `differs`.
    """

    layout: str
    source: str
    changed: float
    refusal: str
    factor: float
    differs: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """The stock pipeline does with this file what we do."""
        return not self.refusal and self.changed > 0 and self.differs <= self.tolerance

    def lines(self) -> list[str]:
        """For people."""
        told = [f"layout   {self.layout}, strength by {self.source}"]
        told += [f"ours     changes the velocity by {self.changed:.3%} of its norm"]
        if self.refusal:
            return [*told, f"stock    does not load it: {self.refusal}"]
        told += [f"stock    applies it at {self.factor:.4g} times the strength that it was trained with"]
        return [*told, f"agree    {'yes' if self.agrees else 'no'}: outputs differ by {self.differs:.2g} of the change"]

    def refuse_disagreement(self, path: Path) -> None:
        """InputError where the file would not do elsewhere what it does here."""
        if self.agrees:
            return
        if not self.changed:
            raise InputError(f"{path} changes nothing: its update is zero; train it again or fetch the file again.")
        what = "does not load it" if self.refusal else f"applies it at {self.factor:.4g} times its strength"
        raise InputError(
            f"Stock diffusers {what}: write {path} anew with `motionlora lora convert {path} --out NEW`, whose layout "
            "it loads."
        )


def verify_lora(
    path: Path, model: WanBackbone, *, alpha: Alpha = None, strength: float = 1.0, seed: int = 0
) -> Verdict:
    """Loads a file by `WanPipeline.load_lora_weights` and `set_adapters`, and by us, and compares one forward of each.

    The input is noise and a made-up prompt: a few tokens are enough to see whether two models are the same. Nothing
    stays in the model.

    Args:
        alpha: as in `motionlora.heads.lora_file.load_lora`.
        strength: of both, other than 0.

    Raises:
        InputError: the file cannot be read, leaves its strength open, or does not fit the model.
    """
    file = read_lora(path, alpha)
    file.strength.refuse_doubt()
    lora = as_lora(file)
    plain = _velocity(model, seed)
    load_into(model.transformer, lora, "ours", strength)
    try:
        ours = _velocity(model, seed)
    finally:
        unload(model.transformer, "ours")
    change = ours - plain
    changed = float(change.norm() / plain.norm())
    with _stock(model, path, strength) as (refusal, updates):
        factor = _factor(updates, lora, strength)
        differs = float((_velocity(model, seed) - ours).abs().max() / change.abs().max()) if changed else 0.0
    return Verdict(
        layout=file.layout.name,
        source=file.strength.source,
        changed=changed,
        refusal=refusal or ("it finds no key that it knows" if not updates else ""),
        factor=factor,
        differs=differs,
        tolerance=TOLERANCE.get(model.dtype, max(TOLERANCE.values())),
    )


@torch.no_grad()
def _velocity(model: WanBackbone, seed: int) -> Tensor:
    """What the model says about a small noisy latent "1 c f h w" and eight made-up text tokens "1 l d"."""
    generator = torch.Generator().manual_seed(seed)
    side = 2 * model.config.patch_size[1]
    latent = torch.randn(1, model.channels, 3, side, side, generator=generator)
    text = torch.randn(1, 8, model.config.text_dim, generator=generator)
    return model.velocity(latent.to(model.device), torch.tensor([0.5]), Prompt(text.to(model.device)))


@contextmanager
def _stock(
    model: WanBackbone, path: Path, strength: float
) -> Iterator[tuple[str, Mapping[str, tuple[Tensor, Tensor]]]]:
    """Inside, the stock pipeline's adapter acts; why it refused the file, and module -> (a, b) as it applies them."""
    from diffusers import WanPipeline

    absent: Any = None
    transformer: Any = unwrapped(model.transformer)
    pipeline: Any = WanPipeline(absent, absent, vae=absent, scheduler=absent, transformer=transformer)
    refusal = ""
    with _quiet():
        try:
            pipeline.load_lora_weights(str(path), adapter_name="stock", use_safetensors=True)  # never a pickle
            if "stock" in getattr(transformer, "peft_config", {}):
                pipeline.set_adapters(["stock"], [strength])
        except Exception as error:  # whatever it stumbles over is the answer
            refusal = f"{type(error).__name__}: {first_line(error)}"
    layers = adapter_layers(transformer, "stock")
    try:
        yield refusal, {module: _factors(layer) for module, layer in layers.items()}
    finally:
        if "stock" in getattr(transformer, "peft_config", {}):
            drop(transformer, "stock")


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    a, b = layer.lora_A["stock"].weight.detach(), layer.lora_B["stock"].weight.detach()
    return a.float().cpu(), b.float().cpu() * layer.scaling["stock"]


def _factor(updates: Mapping[str, tuple[Tensor, Tensor]], lora: MotionLora, strength: float) -> float:
    """The multiple of our update that is nearest to the stock one: <stock, ours> / <ours, ours>."""
    ours = folded(lora)
    own = sum(_product(pair, pair) for pair in ours.values()) * strength
    both = sum(_product(updates[module], pair) for module, pair in ours.items() if module in updates)
    return both / own if own else 0.0


def _product(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """The inner product of two updates b a, from r x r matrices: tr(b1' b2 a2 a1')."""
    (a1, b1), (a2, b2) = one, other
    return float(((b1.double().T @ b2.double()) * (a1.double() @ a2.double().T)).sum())


@contextmanager
def _quiet() -> Iterator[None]:
    """What the stock pipeline would print about a file is told by the verdict."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
