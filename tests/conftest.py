"""What the tests share: a random twin of the tiny Wan, built once, and one thread (the sums of several differ)."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from motionlora.data.clip import Clip
    from motionlora.heads.wan import WanBackbone

# Read when the hub's library is imported: whatever a test loads, it made itself.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def twin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete random Wan in diffusers' format: 3 blocks of 4 heads of 12; not to be written to."""
    from motionlora.heads.tiny import random_twin

    return random_twin(tmp_path_factory.mktemp("twin") / "wan")


@pytest.fixture(scope="session")
def twin(twin_folder: Path) -> "WanBackbone":
    """The twin loaded in fp32 without a cache; tests leave it as they found it."""
    from motionlora.heads.wan import WanBackbone

    return WanBackbone.load(twin_folder)


@pytest.fixture(scope="session")
def random_clip() -> "Callable[..., Clip]":
    """A maker of clips of uniform noise: `random_clip(frames, height, width, seed=0)`."""
    from motionlora.data.clip import Clip

    def make(frames: int = 5, height: int = 16, width: int = 16, *, seed: int = 0) -> Clip:
        generator = np.random.default_rng(seed)
        return Clip(generator.integers(0, 256, (frames, height, width, 3), dtype=np.uint8), 12.0, "a red circle")

    return make
