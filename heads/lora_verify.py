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
from motionlora.heads.lora_layers import adapter_layers, adapters, drop
from motionlora.heads.lora_strength import Alpha
from motionlora.heads.motion_lora import Factors, inner_product
from motionlora.heads.wan_folder import first_line

if TYPE_CHECKING:
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
        agrees: the stock pipeline does with this file what we do.
    """

    layout: str
    source: str
    changed: float
    refusal: str
    factor: float
    differs: float
    agrees: bool

    def lines(self) -> list[str]:
        """For people."""
        told = f"layout   {self.layout}, strength by {self.source}"
        ours = f"ours     changes the velocity by {self.changed:.3%} of its norm"
        if self.refusal:
            return [told, ours, f"stock    does not load it: {self.refusal}"]
        stock = f"stock    applies it at {self.factor:.4g} times the strength that it was trained with"
        verdict = f"agree    {'yes' if self.agrees else 'no'}: outputs differ by {self.differs:.2g} of the change"
        return [told, ours, stock, verdict]

    def refuse_disagreement(self, path: Path) -> None:
        """InputError where the file would not do elsewhere what it does here."""
        if not self.changed:
            raise InputError(f"{path} changes nothing: its update is zero; train it again or fetch the file again.")
        if not self.agrees:
            what = "does not load it" if self.refusal else f"applies it at {self.factor:.4g} times its strength"
            raise InputError(
                f"Stock diffusers {what}: write {path} anew with `motionlora lora convert {path} --out NEW`, whose "
                "layout it loads."
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
        differs = float((_velocity(model, seed) - ours).abs().max() / change.abs().max()) if changed else 0.0
    refusal = refusal or ("" if updates else "it finds no key that it knows")
    within = TOLERANCE.get(model.dtype, max(TOLERANCE.values()))
    factor, agrees = _factor(updates, lora.folded(), strength), not refusal and changed > 0 and differs <= within
    return Verdict(file.layout.name, file.strength.source, changed, refusal, factor, differs, agrees)


@torch.no_grad()
def _velocity(model: WanBackbone, seed: int) -> Tensor:
    """What the model says about a small noisy latent "1 c f h w" and eight made-up text tokens "1 l d"."""
    generator = torch.Generator().manual_seed(seed)
    side = 2 * model.config.patch_size[1]
    latent = torch.randn(1, model.channels, 3, side, side, generator=generator)
    text = torch.randn(1, 8, model.config.text_dim, generator=generator)
    time = torch.tensor([sum(model.experts.times) / 2])
    return model.velocity(latent.to(model.device), time, Prompt(text.to(model.device)))


@contextmanager
def _stock(model: WanBackbone, path: Path, strength: float) -> Iterator[tuple[str, dict[str, Factors]]]:
    """Inside, the stock pipeline's adapter acts; why it refused the file, and module -> (a, b) as it applies them."""
    from diffusers import WanPipeline

    absent: Any = None
    transformer: Any = unwrapped(model.transformer)
    pipeline: Any = WanPipeline(absent, absent, vae=absent, scheduler=absent, transformer=transformer)
    refusal = ""
    with _quiet():
        try:
            pipeline.load_lora_weights(str(path), adapter_name="stock", use_safetensors=True)  # never a pickle
            if "stock" in adapters(transformer):
                pipeline.set_adapters(["stock"], [strength])
        except Exception as error:  # whatever it stumbles over is the answer
            refusal = f"{type(error).__name__}: {first_line(error)}"
    updates = {}
    for module, layer in adapter_layers(transformer, "stock").items():
        a, b = (factor["stock"].weight.detach().float().cpu() for factor in (layer.lora_A, layer.lora_B))
        updates[module] = a, b * layer.scaling["stock"]
    try:
        yield refusal, updates
    finally:
        if "stock" in adapters(transformer):
            drop(transformer, "stock")


def _factor(updates: Mapping[str, Factors], ours: Mapping[str, Factors], strength: float) -> float:
    """The multiple of our update that is nearest to the stock one: <stock, ours> / <ours, ours>."""
    own = sum(inner_product(pair, pair) for pair in ours.values()) * strength
    both = sum(inner_product(updates[module], pair) for module, pair in ours.items() if module in updates)
    return both / own if own else 0.0


@contextmanager
def _quiet() -> Iterator[None]:
    """What the stock pipeline would print about a file is told by the verdict."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
