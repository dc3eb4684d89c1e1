"""A model before its network is loaded: it encodes clips and embeds captions while the device has room for that."""

from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel

from motionlora.heads.cogvideox import CogVideoXBackbone, CogVideoXParts
from motionlora.heads.settings import Expert
from motionlora.heads.wan import WanBackbone
from motionlora.heads.wan_folder import found_folder, is_cogvideox
from motionlora.heads.wan_outline import META
from motionlora.heads.wan_parts import WanParts


def load_encoders(
    source: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    cache: Path | None,
    expert: Expert | None = None,
) -> WanBackbone:
    """What `load_model` returns, with a network that has shapes and no weights, and no fingerprint.

    VAE and text encoder are loaded when they are first used, and are gone with the model.

    Raises:
        InputError: as `load_model`.
    """
    folder = found_folder(source, expert=expert, cogvideox=True)
    kind: Any = (WanBackbone, WanParts, WanTransformer3DModel)
    if is_cogvideox(folder):
        kind = (CogVideoXBackbone, CogVideoXParts, CogVideoXTransformer3DModel)
    backbone, parts, network = kind
    with torch.random.fork_rng(devices=[]), META:
        transformer = network.from_config(network.load_config(folder / "transformer")).eval().requires_grad_(False)
    return backbone(transformer, parts(folder, torch.device(device), dtype), source, "", cache)
