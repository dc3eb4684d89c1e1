"""Laws of `--memory`: sparing changes no number but by fp8's rounding and takes the bytes of the plan; no encoder
is left when the network is loaded.
"""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from motionlora.data.errors import InputError
from motionlora.heads.encoders import load_encoders
from motionlora.heads.load import load_model
from motionlora.heads.lora import attach
from motionlora.heads.lora_file import load_lora
from motionlora.heads.memory import FP8, NOTHING_SPARED, Memory, Mode, linear_layers
from motionlora.heads.wan import WanBackbone
from motionlora.heads.wan_outline import outline_of
from motionlora.train import memory
from motionlora.train.cards import GIB, RESERVE_SHARE, Card, PlanSettings
from motionlora.train.memory import fitting, memory_for, memory_of
from motionlora.train.plan import Part, Plan, plan_of
from motionlora.train.rehearsal import Cost, Rehearsal, bytes_of
from motionlora.train.run import train
from motionlora.train.settings import TrainSettings

CPU = torch.device("cpu")
CHOSEN = np.arange(12).reshape(3, 4) % 2 == 0
SMALL: dict[str, Any] = {"frames": 17, "height": 32, "width": 32, "temporal": {"stride": 1}, "lora": {"rank": 4}}


def trained(model: WanBackbone, spares: Memory, **more: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and LoRA of two steps; `more` goes to offloading."""
    spares.casting(model.transformer, model.dtype)
    spares.offloading(model.transformer, CPU, **more)
    spares.recomputing(model.transformer)
    layers = attach(model.transformer, "temporal", CHOSEN, rank=2, seed=0)
    optimizer, losses = torch.optim.AdamW(layers.parameters(), lr=1e-2), []
    latent = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        loss = model.velocity(latent, torch.tensor([0.5]), model.embed(["a red circle"])).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, layers.state()


@pytest.mark.parametrize("spares", [Memory(1), Memory(2), Memory(0, offload=True), Memory(1, offload=True)])
def test_recomputing_and_waiting_change_no_bit(twin_folder: Path, on_disk: dict[str, str], spares: Memory) -> None:
    losses, lora = trained(WanBackbone.load(twin_folder), NOTHING_SPARED)
    model = WanBackbone.load(twin_folder)
    spared = trained(model, spares, **(on_disk if spares.offload else {}))
    assert spared[0] == losses
    assert all(torch.equal(spared[1][name], weight) for name, weight in lora.items())
    absent = [
        layer.weight.isnan().all() for layer in linear_layers(model.transformer) if hasattr(layer, "_diffusers_hook")
    ]
    assert (len(absent), all(absent)) == (30 if spares.offload else 0, True)


def test_fp8_is_the_base_rounded_and_its_loss_stays_within_a_hundredth(
    twin_folder: Path, on_disk: dict[str, str]
) -> None:
    exact, _ = trained(WanBackbone.load(twin_folder), NOTHING_SPARED)
    rounded = WanBackbone.load(twin_folder)
    for layer in linear_layers(rounded.transformer):
        for weight in layer.parameters():
            weight.data = weight.data.to(FP8).float()
    losses, lora = trained(rounded, NOTHING_SPARED)
    for spares, more in ((Memory(1, "fp8"), {}), (Memory(1, "fp8", offload=True), on_disk)):
        spared = trained(WanBackbone.load(twin_folder), spares, **more)
        assert spared[0] == losses
        assert all(torch.equal(spared[1][name], weight) for name, weight in lora.items())
    assert losses != exact
    assert losses == pytest.approx(exact, rel=0.01)


def test_the_plan_knows_the_bytes_of_each_mode(twin_folder: Path) -> None:
    outline, dtype = outline_of(twin_folder), torch.bfloat16
    for spares in (memory_of("fast"), memory_of("low"), memory_of("lowest", gpu=False), memory_of("lowest")):
        run = Rehearsal(PlanSettings(**SMALL), outline, dtype, spares)
        model = WanBackbone.load(twin_folder, dtype=dtype)
        spares.casting(model.transformer, dtype)
        waiting = sum(map(bytes_of, linear_layers(model.transformer))) if spares.offload else 0
        assert run.frozen_bytes == bytes_of(model.transformer) - waiting
        width, ffn = 48, 64
        block = 8 * (width + 1) * width + (width + 1) * ffn + (ffn + 1) * width
        assert run.passing_bytes == (block * dtype.itemsize if spares.waits else 0)
    temporal, modes = PlanSettings(**SMALL, stages=("temporal",)), get_args(Mode)
    peaks = [plan_of(temporal, outline, dtype, memory_of(mode), prepares=False).peak_bytes for mode in modes]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks) == 4


def test_the_plan_of_4bit_takes_nine_sixteenths_of_a_byte_a_number_and_one_layer_as_it_is_used(
    twin_folder: Path,
) -> None:
    outline, dtype = outline_of(twin_folder), torch.bfloat16
    whole, packed = (Rehearsal(PlanSettings(**SMALL), outline, dtype, memory_of(mode)) for mode in ("low", "4bit"))
    block = 8 * 48 * 48 + 2 * 48 * 64
    assert whole.frozen_bytes - packed.frozen_bytes == 3 * block * (2 - 9 / 16)
    assert packed.passing_bytes == 48 * 64 * dtype.itemsize


def test_encoders_are_gone_before_the_network_comes() -> None:
    parts = (Part("embed", 1, Cost(1, 30), alone=True), Part("step", 1, Cost(1, 5)))
    assert Plan("m", 20, parts).peak_bytes == max(30, 20 + 5)
    assert Plan("m", 28, parts).peak_bytes == max(30, 28 + 5)


@pytest.mark.parametrize(
    ("room", "takes"), [(40, "fast"), (39, "low"), (25, "low"), (24, "lowest"), (10, "lowest"), (9, None)]
)
def test_auto_takes_the_first_that_fits_and_says_so(
    monkeypatch: pytest.MonkeyPatch, room: int, takes: str | None
) -> None:
    peaks = {memory_of("fast"): 40, memory_of("low", 2): 25, memory_of("lowest"): 10}  # never 4bit
    monkeypatch.setattr(memory, "plan_of", lambda *words, prepares: Plan("m", peaks[words[-1]] * GIB, ()))
    settings, said = TrainSettings(memory="auto", recompute_every=2), []
    card = Card("A", math.ceil((room + 1) * GIB / (1 - RESERVE_SHARE)), 1.0, 1.0)
    asked: Any = (settings, None, torch.bfloat16, card, said.append)
    if takes:
        assert fitting(*asked) == takes
        assert f"auto takes {takes} (predicted: fast 40.0 GiB" in said[-1]
        return
    with pytest.raises(InputError, match=r"fits on A in no mode.*lowest 10\.0 GiB of.*fewer frames"):
        fitting(*asked)


@pytest.mark.parametrize(
    ("mode", "plugin", "scheduler", "told"),
    [
        ("auto", SimpleNamespace(zero_stage=3), {}, Memory(1)),
        ("lowest", SimpleNamespace(zero_stage=2), {}, "DeepSpeed.*lowest: set --memory low"),
        ("4bit", SimpleNamespace(zero_stage=2), {}, "DeepSpeed.*4bit: set --memory low"),
        ("4bit", None, {}, Memory(1, "nf4")),
        ("auto", None, {"_class_name": "CogVideoXDDIMScheduler"}, "Plans are made for Wan alone.*--memory fast"),
        ("lowest", None, {}, Memory(1, "fp8")),
    ],
)
def test_what_a_mode_cannot_do_is_refused(mode: Any, plugin: Any, scheduler: Any, told: Any) -> None:
    accelerator: Any = SimpleNamespace(device=CPU, state=SimpleNamespace(deepspeed_plugin=plugin))
    model: Any = SimpleNamespace(scheduler_config=scheduler)
    clip: Any = SimpleNamespace(height=32, width=32)
    asked = TrainSettings(memory=mode), model, clip, accelerator, print
    if isinstance(told, Memory):
        assert memory_for(*asked) == told
        return
    with pytest.raises(InputError, match=told):
        memory_for(*asked)


@pytest.mark.parametrize("kind", ["wan", "5B"])
def test_encoders_give_what_the_whole_model_gives(
    twin_folder: Path, cogvideox_folders: dict[str, Path], random_clip: Any, kind: str
) -> None:
    folder = {**cogvideox_folders, "wan": twin_folder}[kind]
    early, whole = load_encoders(folder, device="cpu", dtype=torch.float32, cache=None), load_model(folder)
    clip = random_clip(5, 2 * whole.multiple, whole.multiple)
    assert (early.blocks, early.heads, early.multiple) == (whole.blocks, whole.heads, whole.multiple)
    assert torch.equal(early.encode(clip), whole.encode(clip))
    assert torch.equal(early.embed(["a red circle"]).embeds, whole.embed(["a red circle"]).embeds)
    assert all(weight.is_meta for weight in early.transformer.parameters())


@pytest.fixture
def settings(twin_folder: Path, tmp_path: Path, moving_square: Callable[[Path, int], Path]) -> TrainSettings:
    """Both stages on 5 frames, one step each, no cache."""
    values = {
        "model": str(twin_folder), "clip": moving_square(tmp_path / "clip", 5), "caption": "a red square",
        "out": tmp_path / "run", "frames": 5, "fps": None, "device": "cpu", "cache": None, "lora": {"rank": 2},
        "heads": {"ratio": 1.0}, "spatial": {"steps": 1}, "temporal": {"steps": 1, "stride": 1, "caption_dropout": 0.5},
        "validation": {"every": 1, "captions": ("a blue star",), "sample": {"steps": 1}},
    }  # fmt: skip
    return TrainSettings.model_validate(values)


def test_a_run_loads_its_network_when_the_encoders_are_gone_and_never_again_what_embeds(
    settings: TrainSettings, loadings: list[tuple[str, list[str]]]
) -> None:
    """The VAE comes once more, to decode what validation makes."""
    train(settings, say=lambda line: None)
    names = [name for name, _ in loadings]
    assert names == [*names[:-2], "transformer", "vae"]
    assert set(names[:-2]) == {"text_encoder", "vae"}
    assert dict(loadings[:-1])["transformer"] == []


def test_a_run_in_lowest_says_so_in_its_file_and_does_not_go_on_in_another(settings: TrainSettings) -> None:
    run = settings.model_copy(update={"memory": "lowest"})
    train(run, say=lambda line: None)
    assert load_lora(run.out / "temporal.safetensors").provenance["identity"]["weights"] == "fp8"
    with pytest.raises(InputError, match="weights = fp8, now it is None"):
        train(settings.model_copy(update={"memory": "low", "resume": "latest"}), say=lambda line: None)
