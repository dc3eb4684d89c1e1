"""Pictures as encoders want them, by PIL and torch: the processors of transformers want torchvision."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from motionlora.infer.measure_text import Fit, Pixels

SIDE = 224
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def cropped(pixels: Pixels) -> Pixels:
    """Shorter side to 224 by PIL's bicubic, then the middle square: CLIP's own preparation."""
    return _middle(_by_pil(pixels, *_shorter_to_side(pixels)))


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
    frames = torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, 1).float()
    made = F.interpolate(frames, size=_shorter_to_side(pixels), mode=mode, align_corners=False, antialias=False)
    return made.round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()


def normalised(pixels: Pixels, mean: tuple[float, ...], std: tuple[float, ...]) -> Float[Tensor, "f 3 h w"]:
    """Colours in 0..1, less the mean, over the deviation."""
    colours = torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255
    return ((colours - torch.tensor(mean)) / torch.tensor(std)).movedim(-1, 1)


FITS: dict[Fit, Callable[[Pixels], Pixels]] = {"crop": cropped, "whole": letterboxed, "plain": plain}


def _shorter_to_side(pixels: Pixels) -> tuple[int, int]:
    """Height and width with the shorter one made 224; the longer one is rounded down, as torchvision does."""
    height, width = pixels.shape[1:3]
    shorter = min(height, width)
    return SIDE * height // shorter, SIDE * width // shorter


def _middle(pixels: Pixels) -> Pixels:
    top, left = (round((side - SIDE) / 2) for side in pixels.shape[1:3])
    return pixels[:, top : top + SIDE, left : left + SIDE]


def _by_pil(pixels: Pixels, height: int, width: int) -> Pixels:
    return np.stack([np.array(Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC)) for f in pixels])
