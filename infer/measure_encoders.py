"""Encoders with weights: CLIP B/32 and L/14, DINO B/16 and LAION's aesthetic head, each found or missing with a reason.

Weights are read as safetensors, from a folder or the hub. Pictures are prepared here with PIL and torch, since the
processors of transformers want torchvision. What is missing is told with the command that brings it; where the public
file is a pickle, that command opens it in a process of its own, which people start themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from motionlora.infer.measure_text import Fit, ImageEncoder, ImageTextEncoder, Pixels

SIDE, BATCH = 224, 16
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MODELS = {
    "b32": ("openai/clip-vit-base-patch32", "CLIPModel"),
    "l14": ("openai/clip-vit-large-patch14", "CLIPModel"),
    "dino": ("facebook/dino-vitb16", "ViTModel"),
}
HEAD = "sa_0_4_vit_l_14_linear"
HEAD_PAGE = "https://github.com/LAION-AI/aesthetic-predictor"


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
    """The encoders in the folder `source`, of the hub for "hub", none for ""; nothing is loaded before its use."""
    missing: dict[str, str] = {}
    kinds: dict[str, Any] = {"b32": ClipEncoder, "l14": ClipEncoder, "dino": DinoEncoder}
    found: dict[str, Any] = {}
    for name, (hub_id, cls) in MODELS.items():
        folder, reason = _folder(source, hub_id, cls)
        if folder is None:
            missing[name] = reason
        else:
            found[name] = kinds[name](folder, device)
    head = Path(source) / f"{HEAD}.safetensors"
    if source and head.is_file():
        found["aesthetic"] = _head(head)
    else:
        place = Path(source) if source not in ("", "hub") else Path("DIR")
        missing["aesthetic"] = (
            f'{HEAD}.safetensors is not there: get {HEAD}.pth from {HEAD_PAGE}, then python -c "import torch; from '
            f"safetensors.torch import save_file; save_file(torch.load('{HEAD}.pth', weights_only=True), "
            f"'{place / HEAD}.safetensors')\" and give --encoders {place}"
        )
    told = ", ".join(f"{name} {getattr(value, 'told', 'linear')}" for name, value in found.items())
    return Encoders(**found, missing=missing, told=told or "none")


class ClipEncoder:
    """CLIP by transformers; features of length 1, in fp32."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.told = _hash_of(folder)

    @cached_property
    def model(self) -> Any:
        from transformers import CLIPModel

        return _loaded(CLIPModel, self.folder, self.device)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @torch.no_grad()
    def images(self, pixels: Pixels, fit: Fit) -> Float[Tensor, "f d"]:
        def features(batch: Pixels) -> Tensor:
            squares = normalised(FITS[fit](batch), CLIP_MEAN, CLIP_STD)
            return self.model.get_image_features(pixel_values=squares.to(self.device)).pooler_output

        return _by_batches(features, pixels)

    @torch.no_grad()
    def text(self, caption: str) -> Float[Tensor, " d"]:
        """A caption beyond CLIP's 77 tokens is cut off, as everywhere."""
        words = self.tokenizer([caption], truncation=True, max_length=77, return_tensors="pt").to(self.device)
        return F.normalize(self.model.get_text_features(**words).pooler_output[0].float(), dim=-1).cpu()


class DinoEncoder:
    """DINO's class token by transformers, of whole frames whose shorter side is 224 pixels; length 1, fp32."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.told = _hash_of(folder)

    @cached_property
    def model(self) -> Any:
        from transformers import ViTModel

        return _loaded(ViTModel, self.folder, self.device, add_pooling_layer=False)

    @torch.no_grad()
    def images(self, pixels: Pixels) -> Float[Tensor, "f d"]:
        def features(batch: Pixels) -> Tensor:
            frames = normalised(resized(batch, "bilinear"), IMAGENET_MEAN, IMAGENET_STD).to(self.device)
            return self.model(pixel_values=frames, interpolate_pos_encoding=True).last_hidden_state[:, 0]

        return _by_batches(features, pixels)


def cropped(pixels: Pixels) -> Pixels:
    """Shorter side to 224 by PIL's bicubic, then the middle square: CLIP's own preparation."""
    height, width = _shorter_to(SIDE, pixels.shape[1:3])
    return _middle(_by_pil(pixels, height, width))


def letterboxed(pixels: Pixels) -> Pixels:
    """Longer side to 224, borders in CLIP's mean colour: nothing is cut off."""
    scale = SIDE / max(pixels.shape[1:3])
    height, width = (max(1, round(side * scale)) for side in pixels.shape[1:3])
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    square = np.empty((len(pixels), SIDE, SIDE, 3), np.uint8)
    square[:] = np.rint(255 * np.array(CLIP_MEAN))
    square[:, top : top + height, left : left + width] = _by_pil(pixels, height, width)
    return square


def plain(pixels: Pixels) -> Pixels:
    """Shorter side to 224 by bicubic without smoothing, then the middle square (VBench's background consistency)."""
    return _middle(resized(pixels, "bicubic"))


def resized(pixels: Pixels, mode: str) -> Pixels:
    """Shorter side to 224 without smoothing, nothing cut off."""
    size = _shorter_to(SIDE, pixels.shape[1:3])
    frames = torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, 1).float()
    made = F.interpolate(frames, size=size, mode=mode, align_corners=False, antialias=False)
    return made.round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()


def normalised(pixels: Pixels, mean: tuple[float, ...], std: tuple[float, ...]) -> Float[Tensor, "f 3 h w"]:
    """Colours in 0..1, less the mean, over the deviation."""
    colours = torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255
    return ((colours - torch.tensor(mean)) / torch.tensor(std)).movedim(-1, 1)


FITS: dict[Fit, Callable[[Pixels], Pixels]] = {"crop": cropped, "whole": letterboxed, "plain": plain}


def _shorter_to(side: int, size: tuple[int, ...]) -> tuple[int, int]:
    """Height and width with the shorter one made `side`; the longer one is rounded down, as torchvision does."""
    shorter = min(size)
    height, width = (side if length == shorter else side * length // shorter for length in size)
    return height, width


def _middle(pixels: Pixels) -> Pixels:
    top, left = (round((side - SIDE) / 2) for side in pixels.shape[1:3])
    return pixels[:, top : top + SIDE, left : left + SIDE]


def _by_pil(pixels: Pixels, height: int, width: int) -> Pixels:
    return np.stack([np.array(Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC)) for f in pixels])


def _by_batches(features: Callable[[Pixels], Tensor], pixels: Pixels) -> Float[Tensor, "f d"]:
    parts = [features(pixels[at : at + BATCH]).float().cpu() for at in range(0, len(pixels), BATCH)]
    return F.normalize(torch.cat(parts), dim=-1)


def _folder(source: str, hub_id: str, cls: str) -> tuple[Path | None, str]:
    """The folder of a model with whole safetensors in it, or the reason why there is none."""
    name = hub_id.split("/")[-1]
    target = Path(source if source not in ("", "hub") else "DIR") / name
    parts = [cls, "AutoTokenizer"] if cls == "CLIPModel" else [cls]
    saved = "; ".join(f"t.{part}.from_pretrained('{hub_id}').save_pretrained('{target}')" for part in parts)
    command = f'python -c "import transformers as t; {saved}" and give --encoders {target.parent}'
    if source == "":
        return None, f"no encoders were asked for: bring {name} with {command}"
    if source == "hub":
        return _from_hub(hub_id, command)
    places = (Path(source) / name, Path(source) / hub_id)
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        return None, f"{places[0]} is not there: {command}"
    return _checked(folder, command)


def _from_hub(hub_id: str, command: str) -> tuple[Path | None, str]:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(hub_id, allow_patterns=["*.safetensors", "*.json", "*.txt"])
    except (OSError, ValueError) as error:
        return None, f"{hub_id} could not be fetched ({str(error).splitlines()[0]}): {command}"
    return _checked(Path(folder), command)


def _checked(folder: Path, command: str) -> tuple[Path | None, str]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None, f"{folder.name} has no weights as safetensors (a pickle is not opened here): {command}"
    try:
        for file in files:
            with safe_open(file, framework="pt"):
                pass
    except (SafetensorError, OSError) as error:
        return None, f"{folder.name} is damaged ({error}): {command}"
    return folder, ""


def _loaded(cls: Any, folder: Path, device: torch.device, **more: Any) -> Any:
    return cls.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **more).to(device).eval()


def _head(path: Path) -> tuple[Tensor, float]:
    from safetensors.torch import load_file

    held = load_file(path)
    return held["weight"].float().reshape(-1), float(held["bias"])


def _hash_of(folder: Path) -> str:
    """The model's name and the first digits of its weights' hash."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"{folder.name} ({digest.hexdigest()[:12]})"
