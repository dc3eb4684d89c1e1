"""Encoders with weights: CLIP B/32 and L/14, DINO B/16 and LAION's aesthetic head, each found or missing with a reason.

Weights are read as safetensors, from a folder or the hub. What is missing is told with the command that brings it;
where the public file is a pickle, that command opens it in a process of its own, which people start themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from motionlora.data.errors import InputError
from motionlora.infer.measure_pictures import CLIP_MEAN, CLIP_STD, FITS, normalised, resized
from motionlora.infer.measure_text import Fit, ImageEncoder, ImageTextEncoder, Pixels

BATCH, MOST_TOKENS = 16, 77
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEAD = "sa_0_4_vit_l_14_linear"
HEAD_PAGE = "https://github.com/LAION-AI/aesthetic-predictor"


class Missing(Exception):
    """Why an encoder is not there."""


@dataclass(frozen=True, eq=False)
class Encoders:
    """What there is; `missing` has the reason of every name that is not there (b32, l14, dino, aesthetic).

    Attributes:
        aesthetic: weight "d" and bias of the linear head on L/14.
        told: which weights these are, for tables and for the key of what was measured.
    """

    b32: ImageTextEncoder | None = None
    l14: ImageTextEncoder | None = None
    dino: ImageEncoder | None = None
    aesthetic: tuple[Tensor, float] | None = None
    missing: dict[str, str] = field(default_factory=dict)
    told: str = "none"


def found_encoders(source: str, device: torch.device) -> Encoders:
    """The encoders in the folder `source`, of the hub for "hub", none for "".

    They are loaded here, so that one whose weights are not whole is missing before anything is measured.
    """
    place = Path(source if source not in ("", "hub") else "DIR")
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    told = []
    for name, (hub_id, encoder) in MODELS.items():
        try:
            folder = _folder(source, hub_id)
            found[name] = encoder(folder, device)
            told.append(f"{name} {_hash_of(folder)}")
        except Missing as reason:
            target = place / hub_id.split("/")[-1]
            saved = [f"t.{cls}.from_pretrained('{hub_id}').save_pretrained('{target}')" for cls in encoder.classes]
            command = f'python -c "import transformers as t; {"; ".join(saved)}" and give --encoders {place}'
            missing[name] = f"{reason}: bring it with {command}"
    try:
        found["aesthetic"] = _head(source, found["l14"].model.config.projection_dim if "l14" in found else None)
        told.append("aesthetic linear")
    except Missing as reason:
        missing["aesthetic"] = (
            f'{reason}: get {HEAD}.pth from {HEAD_PAGE}, then python -c "import torch; from '
            f"safetensors.torch import save_file; save_file(torch.load('{HEAD}.pth', weights_only=True), "
            f"'{place / HEAD}.safetensors')\" and give --encoders {place}"
        )
    return Encoders(**found, missing=missing, told=", ".join(told) or "none")


class ClipEncoder:
    """CLIP by transformers; features of length 1, in fp32."""

    classes = ("CLIPModel", "AutoTokenizer")

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.device, self.model = device, _loaded(CLIPModel, folder, device)
        self.tokenizer: Any = _readable(folder, lambda: AutoTokenizer.from_pretrained(folder))
        words = self.model.config.text_config.vocab_size
        # Where its files are not there, transformers makes up a tokenizer of three words.
        if len(self.tokenizer) != words:
            raise Missing(f"{folder.name} lacks its tokenizer ({len(self.tokenizer)} words, {words} are wanted)")

    @torch.no_grad()
    def images(self, pixels: Pixels, fit: Fit) -> Float[Tensor, "f d"]:
        def features(batch: Pixels) -> Tensor:
            squares = normalised(FITS[fit](batch), CLIP_MEAN, CLIP_STD)
            return self.model.get_image_features(pixel_values=squares.to(self.device)).pooler_output

        return _by_batches(features, pixels)

    @torch.no_grad()
    def text(self, caption: str) -> Float[Tensor, " d"]:
        words = self.tokenizer([caption], return_tensors="pt").to(self.device)
        if (count := words["input_ids"].shape[1]) > MOST_TOKENS:
            raise InputError(
                f"the caption has {count} tokens, and CLIP reads {MOST_TOKENS}: a score would be of a part"
            )
        return F.normalize(self.model.get_text_features(**words).pooler_output[0].float(), dim=-1).cpu()


class DinoEncoder:
    """DINO's class token by transformers, of whole frames whose shorter side is 224 pixels; length 1, fp32."""

    classes = ("ViTModel",)

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import ViTModel

        self.device, self.model = device, _loaded(ViTModel, folder, device, add_pooling_layer=False)

    @torch.no_grad()
    def images(self, pixels: Pixels) -> Float[Tensor, "f d"]:
        def features(batch: Pixels) -> Tensor:
            frames = normalised(resized(batch, "bilinear"), IMAGENET_MEAN, IMAGENET_STD).to(self.device)
            return self.model(pixel_values=frames, interpolate_pos_encoding=True).last_hidden_state[:, 0]

        return _by_batches(features, pixels)


MODELS: dict[str, tuple[str, Any]] = {
    "b32": ("openai/clip-vit-base-patch32", ClipEncoder),
    "l14": ("openai/clip-vit-large-patch14", ClipEncoder),
    "dino": ("facebook/dino-vitb16", DinoEncoder),
}


def _by_batches(features: Callable[[Pixels], Tensor], pixels: Pixels) -> Float[Tensor, "f d"]:
    parts = [features(pixels[at : at + BATCH]).float().cpu() for at in range(0, len(pixels), BATCH)]
    return F.normalize(torch.cat(parts), dim=-1)


def _folder(source: str, hub_id: str) -> Path:
    """The folder of a model with safetensors in it."""
    name = hub_id.split("/")[-1]
    if source == "":
        raise Missing("no encoders were asked for")
    if source == "hub":
        folder = _from_hub(hub_id)
    else:
        places = (Path(source) / name, Path(source) / hub_id)
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            raise Missing(f"{places[0]} is not there")
    if not any(folder.glob("*.safetensors")):
        raise Missing(f"{name} has no weights as safetensors (a pickle is not opened here)")
    return folder


def _from_hub(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.safetensors", "*.json", "*.txt"]))
    except (OSError, ValueError) as error:
        raise Missing(f"{hub_id} could not be fetched ({_brief(error)})") from None


def _loaded(cls: Any, folder: Path, device: torch.device, **more: Any) -> Any:
    """A model in fp32 with every weight from the folder: transformers draws those that it does not find at random."""
    more |= {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    model, told = _readable(folder, lambda: cls.from_pretrained(folder, **more))
    if absent := sorted(told["missing_keys"]):
        raise Missing(f"{folder.name} lacks {len(absent)} of its weights, {absent[0]} first")
    return model.to(device).eval()


def _readable(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except MemoryError:
        raise
    except Exception as error:  # libraries raise what they like on a damaged file
        raise Missing(f"{path.name} is damaged ({_brief(error)})") from None


def _head(source: str, width: int | None) -> tuple[Tensor, float]:
    """Weight and bias of the linear head on features of that width, if it is known."""
    from safetensors.torch import load

    path = Path(source) / f"{HEAD}.safetensors"
    if not source or not path.is_file():
        raise Missing(f"{path.name} is not there")
    held = _readable(path, lambda: load(path.read_bytes()))
    sizes = {name: tensor.numel() for name, tensor in held.items()}
    if sizes != {"weight": width or sizes.get("weight"), "bias": 1}:
        raise Missing(f"{path.name} is no linear head on L/14 (it holds {sizes})")
    return held["weight"].float().reshape(-1), float(held["bias"])


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _hash_of(folder: Path) -> str:
    """The model's name and the first digits of its weights' hash."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"{folder.name} ({digest.hexdigest()[:12]})"
