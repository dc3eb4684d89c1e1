"""A model by the name that the user gives it: which backbone it is, its folder says."""

from pathlib import Path
from typing import Any

from motionlora.heads.cogvideox import CogVideoXBackbone
from motionlora.heads.wan import WanBackbone
from motionlora.heads.wan_folder import found_folder, is_cogvideox


def load_model(source: str | Path = "tiny", **how: Any) -> WanBackbone:
    """The model of a diffusers folder or hub id, or "tiny"; arguments and refusals are those of `WanBackbone.load`."""
    folder = found_folder(source, weights=False, cogvideox=True)
    return (CogVideoXBackbone if is_cogvideox(folder) else WanBackbone).load(source, **how)
