"""What the tests share: random twins of the tiny Wan and of TI2V-5B, and one thread (sums of several differ)."""

import json
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
def strong_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file for the twin that changes much; not to be written to."""
    import torch

    from motionlora.heads.lora_file import save_lora
    from motionlora.heads.motion_lora import MotionLora

    draws, weights = torch.Generator().manual_seed(1), {}
    for module in ("blocks.0.attn1.to_q", "blocks.1.ffn.net.2", "blocks.2.attn1.to_out.0"):
        inputs = 64 if "ffn" in module else 48
        weights[f"{module}.lora_A.weight"] = torch.randn(4, inputs, generator=draws)
        weights[f"{module}.lora_B.weight"] = torch.randn(48, 4, generator=draws)
    path = tmp_path_factory.mktemp("lora") / "temporal.safetensors"
    save_lora(MotionLora(weights, 4, 4.0, stage="temporal"), path)
    return path


@pytest.fixture(scope="session")
def experts_folder(twin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Wan 2.2 T2V-A14B: the twin with a second network for noise below 0.875; not to be written to."""
    from motionlora.heads.tiny import random_twin

    place = tmp_path_factory.mktemp("experts")
    two, other = Path(shutil.copytree(twin_folder, place / "two")), random_twin(place / "other", seed=1)
    shutil.move(other / "transformer", two / "transformer_2")
    index = json.loads((two / "model_index.json").read_text())
    index |= {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
    (two / "model_index.json").write_text(json.dumps(index))
    return two


@pytest.fixture(scope="session")
def twin_5b_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random TI2V-5B: 48 channels, residual VAE of 16x16x4, a time for every token; not to be written to."""
    import torch
    from diffusers import AutoencoderKLWan

    from motionlora.heads import tiny

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        tokenizer = tiny.make_tokenizer(tiny.TWIN_WORDS)
        parts: Any = {
            "tokenizer": tokenizer,
            "text_encoder": tiny.tiny_text_encoder(len(tokenizer), dim=32),
            "transformer": tiny.tiny_transformer(
                blocks=3, heads=4, head_dim=12, ffn_dim=64, text_dim=32, freq_dim=32, channels=48
            ),
            "vae": AutoencoderKLWan(
                base_dim=8, z_dim=48, num_res_blocks=1, in_channels=12, out_channels=12, patch_size=2,
                is_residual=True, scale_factor_spatial=16, latents_mean=torch.linspace(-0.5, 0.5, 48).tolist(),
                latents_std=torch.linspace(0.5, 1.5, 48).tolist(),
            ).eval(),
        }  # fmt: skip
    folder = tiny.write_pipeline(tmp_path_factory.mktemp("twin_5b") / "wan", **parts)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"expand_timesteps": True}))
    return folder


@pytest.fixture(scope="session")
def twin_5b(twin_5b_folder: Path) -> "WanBackbone":
    """The random TI2V-5B loaded in fp32 without a cache; tests leave it as they found it."""
    from motionlora.heads.wan import WanBackbone

    return WanBackbone.load(twin_5b_folder)


@pytest.fixture(scope="session")
def cogvideox_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random twins of CogVideoX by kind: 3 blocks of 4 heads of 16; not to be written to."""
    from motionlora.heads.tiny import random_cogvideox

    root = tmp_path_factory.mktemp("cogvideox")
    return {kind: random_cogvideox(root / kind, rotary=kind == "5B") for kind in ("2B", "5B")}


@pytest.fixture(scope="session")
def random_clip() -> "Callable[..., Clip]":
    """A maker of clips of uniform noise: `random_clip(frames, height, width, seed=0)`."""
    from motionlora.data.clip import Clip

    def make(frames: int = 5, height: int = 16, width: int = 16, *, seed: int = 0) -> Clip:
        generator = np.random.default_rng(seed)
        return Clip(generator.integers(0, 256, (frames, height, width, 3), dtype=np.uint8), 12.0, "a red circle")

    return make


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What makes layers wait on a disk, since a CPU has no other place; what is left in memory of them is NaN."""
    import math

    import diffusers.hooks
    import safetensors.torch
    import torch

    load_file = safetensors.torch.load_file
    stock, empty_like, count = diffusers.hooks.apply_group_offloading, torch.empty_like, iter(range(1000))

    def each_in_its_folder(layer: Any, **how: Any) -> None:
        stock(layer, **{**how, "offload_to_disk_path": str(tmp_path / str(next(count)))})

    def gone(tensor: Any, **how: Any) -> Any:
        return empty_like(tensor, **how).fill_(math.nan) if "device" in how else empty_like(tensor, **how)

    monkeypatch.setattr(diffusers.hooks, "apply_group_offloading", each_in_its_folder)

    def aligned(*where: Any, **how: Any) -> dict[str, Any]:
        """A file's tensors begin anywhere, which moves the last bits of their products."""
        return {name: tensor.clone() for name, tensor in load_file(*where, **how).items()}

    monkeypatch.setattr(safetensors.torch, "load_file", aligned)
    monkeypatch.setattr(torch, "empty_like", gone)
    return {"offload_to_disk_path": ""}


@pytest.fixture
def loadings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Parts of a model as they are loaded, each with those that are in memory then; none stays for being small."""
    from motionlora.heads import wan_experts, wan_parts

    monkeypatch.setattr(wan_parts, "SMALL_BYTES", 0)  # as a text encoder of 11 GB
    stock, alive, order = wan_parts.loaded, {}, []

    def loaded(cls: Any, folder: Path, dtype: Any) -> Any:
        order.append((folder.name, sorted(name for name, model in alive.items() if model() is not None)))
        model = stock(cls, folder, dtype)
        alive[folder.name] = weakref.ref(model)
        return model

    monkeypatch.setattr(wan_parts, "loaded", loaded)
    monkeypatch.setattr(wan_experts, "loaded", loaded)
    return order


@pytest.fixture(scope="session")
def moving_square() -> Callable[[Path, int], Path]:
    """Fills a folder with so many numbered pictures of 16 x 16 pixels, of a red square that goes to the right."""
    from PIL import Image

    def filled(folder: Path, frames: int) -> Path:
        folder.mkdir(exist_ok=True)
        for index in range(frames):
            pixels = np.full((16, 16, 3), 40, np.uint8)
            pixels[4:8, index : index + 4, 0] = 220
            Image.fromarray(pixels).save(folder / f"{index:04d}.png")
        return folder

    return filled
