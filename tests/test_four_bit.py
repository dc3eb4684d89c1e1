"""Laws of the 4-bit base: it is the network with its weights rounded, LoRA layers alone learn over it, and the file
says so. Where the extra is not installed only refusals are tested.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from motionlora.data.errors import InputError
from motionlora.heads import four_bit, memory
from motionlora.heads.backbone import Prompt
from motionlora.heads.four_bit import FourBitLinear, installed, pack
from motionlora.heads.load import load_model
from motionlora.heads.lora import attach
from motionlora.heads.lora_file import load_lora
from motionlora.heads.memory import NOTHING_SPARED, Memory, linear_layers
from motionlora.heads.wan import WanBackbone
from motionlora.infer.generate import generate
from motionlora.infer.settings import GenerateSettings, SampleSettings
from motionlora.train.rehearsal import bytes_of
from motionlora.train.run import train
from motionlora.train.settings import TrainSettings

CPU = torch.device("cpu")
NF4 = Memory(1, "nf4")
LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
"""NormalFloat of 4 bits: QLoRA (arXiv 2305.14314), appendix E."""
CHOSEN = np.arange(12).reshape(3, 4) % 2 == 0
needs_package = pytest.mark.skipif(not installed(), reason="the extra motionlora[4bit] is not installed")


def rounded(weight: Tensor) -> Tensor:
    """Of each 64 numbers the nearest levels times their largest absolute value, worked out in fp32."""
    parts = weight.float().flatten().split(64)
    scaled = [(part / part.abs().max(), part.abs().max()) for part in parts]
    nearest = [LEVELS[(part[:, None] - LEVELS).abs().argmin(1)] * scale for part, scale in scaled]
    return torch.cat(nearest).reshape(weight.shape).to(weight.dtype)


def with_rounded_base(model: WanBackbone) -> WanBackbone:
    for layer in linear_layers(model.transformer):
        layer.weight.data = rounded(layer.weight.data)
    return model


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run_of(layer: nn.Module, dtype: torch.dtype, inputs: int, autocast: bool) -> tuple[Tensor, Tensor]:
    """Output and gradient by the input, after a forward without gradients."""
    x = drawn(2, 5, inputs).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            first = layer(x)
        y = layer(x)
    assert torch.equal(first, y)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
    return y, gradient


@needs_package
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(48, 64, True), (64, 48, False), (14, 13, True)])
def test_a_layer_is_the_one_with_rounded_weights(
    dtype: torch.dtype, autocast: bool, inputs: int, outputs: int, bias: bool
) -> None:
    whole = nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)
    whole.weight.data, layer = drawn(outputs, inputs).to(dtype), nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    layer.load_state_dict(whole.state_dict())
    pack(layer.requires_grad_(False), CPU)
    assert (type(layer), layer.weight.dtype) == (FourBitLinear, torch.uint8)
    numbers = inputs * outputs
    assert layer.weight.nbytes == 4 * -(-numbers // 64) + -(-numbers // 2)
    whole.weight.data = rounded(whole.weight.data)
    ours, theirs = (run_of(each, dtype, inputs, autocast) for each in (layer, whole))
    assert [each.dtype for each in ours] == [each.dtype for each in theirs]
    close = 1e-5 if dtype == torch.float32 and not autocast else 1 / 128  # a unit in the last place of bf16
    for mine, exact in zip(ours, theirs, strict=True):
        assert (mine - exact).norm() <= close * exact.norm()


@needs_package
def test_under_autocast_it_computes_in_that_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, stock = [], four_bit.unpacked
    monkeypatch.setattr(
        four_bit, "unpacked", lambda weight, size, dtype: asked.append(dtype) or stock(weight, size, dtype)
    )
    layer = nn.Linear(64, 64)
    pack(layer.requires_grad_(False), CPU)
    with torch.autocast("cpu", torch.bfloat16):
        layer(drawn(1, 64))
    layer(drawn(1, 64))
    assert asked == [torch.bfloat16, torch.float32]


@needs_package
def test_numbers_that_are_levels_are_kept_and_no_change_of_dtype_touches_them() -> None:
    layer = nn.Linear(16, 4, bias=False).requires_grad_(False)
    layer.weight.data = 0.75 * LEVELS.repeat(4, 1)
    pack(layer, CPU)
    packed = layer.weight.clone()
    layer.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(layer.weight, packed)
    assert torch.equal(layer(torch.eye(16)).T, 0.75 * LEVELS.repeat(4, 1))


def trained(model: WanBackbone, spares: Memory) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and LoRA of two steps over a frozen one; nothing else may have moved."""
    spares.casting(model.transformer, model.dtype)
    spares.recomputing(model.transformer)
    base = {name: weight.detach().clone() for name, weight in model.transformer.state_dict().items()}
    layers = attach(model.transformer, "temporal", CHOSEN, rank=2, seed=0)
    before, optimizer, losses = layers.state(), torch.optim.AdamW(layers.parameters(), lr=1e-2), []
    for _ in range(2):
        velocity = model.velocity(drawn(1, 16, 3, 4, 4), torch.tensor([0.5]), Prompt(drawn(1, 512, 32)))
        velocity.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(velocity.square().mean().item())
    after = layers.state()
    assert not any(torch.equal(before[name], weight) for name, weight in after.items())
    layers.load(after)  # which weight on heads that are not chosen would forbid
    layers.remove()
    assert all(torch.equal(weight, base[name]) for name, weight in model.transformer.state_dict().items())
    return losses, after


@needs_package
def test_training_over_it_is_training_over_the_rounded_base(twin_folder: Path) -> None:
    losses, lora = trained(with_rounded_base(WanBackbone.load(twin_folder)), NOTHING_SPARED)
    packed_losses, packed_lora = trained(WanBackbone.load(twin_folder), NF4)
    exact, _ = trained(WanBackbone.load(twin_folder), NOTHING_SPARED)
    assert packed_losses == pytest.approx(losses, rel=1e-5)
    assert packed_losses != pytest.approx(exact, rel=1e-4)
    for name, weight in packed_lora.items():
        torch.testing.assert_close(weight, lora[name], rtol=1e-3, atol=1e-4)


@needs_package
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_linear_layers_of_blocks_are_packed_and_take_what_the_plan_says(
    twin_folder: Path, dtype: torch.dtype
) -> None:
    whole, packed = load_model(twin_folder, dtype=dtype), load_model(twin_folder, dtype=dtype, memory=NF4)
    numbers = 3 * (8 * 48 * 48 + 2 * 48 * 64)
    assert bytes_of(whole.transformer) - bytes_of(packed.transformer) == numbers * (dtype.itemsize - 9 / 16)
    layers = {id(layer.weight) for layer in linear_layers(packed.transformer)}
    assert len(layers) == 30
    theirs = dict(whole.transformer.named_parameters())
    for name, weight in packed.transformer.named_parameters():
        if id(weight) not in layers:
            assert weight.dtype == theirs[name].dtype
            assert torch.equal(weight, theirs[name])
    assert packed.fingerprint == whole.fingerprint


@needs_package
@pytest.mark.parametrize("kind", ["5B", "two experts"])
def test_other_backbones_and_both_experts_are_packed(
    experts_folder: Path, cogvideox_folders: dict[str, Path], kind: str
) -> None:
    folder, length, latents = cogvideox_folders["5B"], 226, 2
    if kind == "two experts":
        folder, length, latents = experts_folder, 512, 3
    packed, whole = load_model(folder, memory=NF4), load_model(folder)
    for weights in whole.experts.waiting.values():
        for weight, kept in zip(weights, packed.experts.weights, strict=True):
            if kept.dtype == torch.uint8:
                weight.data = rounded(weight)
    whole = with_rounded_base(whole)
    for time in (0.9, 0.5, 0.9, 0.2):
        asked = drawn(1, 16, latents, 8, 8), torch.tensor([time]), Prompt(drawn(1, length, 32))
        torch.testing.assert_close(packed.velocity(*asked), whole.velocity(*asked), rtol=1e-4, atol=1e-5)
    kept = {weight.dtype for weights in packed.experts.waiting.values() for weight in weights}
    assert kept == ({torch.uint8, torch.float32} if kind == "two experts" else set())


@pytest.fixture
def settings(twin_folder: Path, tmp_path: Path, moving_square: Callable[[Path, int], Path]) -> TrainSettings:
    """Both stages over a 4-bit base, a validation on the way."""
    values = {
        "model": str(twin_folder), "clip": moving_square(tmp_path / "clip", 9), "caption": "a red square",
        "out": tmp_path / "run", "frames": 9, "fps": None, "device": "cpu", "cache": None, "lora": {"rank": 2},
        "heads": {"ratio": 1.0}, "spatial": {"steps": 1, "lr": 1e-2}, "checkpoint_every": 1, "memory": "4bit",
        "temporal": {"steps": 3, "lr": 1e-2, "stride": 2},
        "validation": {"every": 2, "captions": ("a blue star",), "sample": {"steps": 1}},
    }  # fmt: skip
    return TrainSettings.model_validate(values)


def quiet(line: str) -> None:
    del line


@needs_package
def test_a_run_says_so_goes_on_to_the_same_bits_and_not_in_another_mode(settings: TrainSettings) -> None:
    train(settings, quiet)
    whole = load_lora(settings.out / "temporal.safetensors")
    assert whole.provenance["identity"]["weights"] == "nf4"
    short = settings.temporal.model_copy(update={"steps": 2})
    parts = settings.model_copy(update={"out": settings.out.with_name("parts"), "temporal": short})
    train(parts, quiet)
    for mode in ("low", "lowest"):
        with pytest.raises(InputError, match=r"weights = nf4, now it is (None|fp8)"):
            train(parts.model_copy(update={"memory": mode, "resume": "latest"}), quiet)
    (parts.out / "temporal.safetensors").unlink()
    train(parts.model_copy(update={"temporal": settings.temporal, "resume": "latest"}), quiet)
    resumed = load_lora(parts.out / "temporal.safetensors")
    assert resumed.weights.keys() == whole.weights.keys()
    assert all(torch.equal(weight, whole.weights[name]) for name, weight in resumed.weights.items())


@needs_package
def test_generate_walks_over_it_with_a_lora(settings: TrainSettings, tmp_path: Path, twin_folder: Path) -> None:
    everywhere = settings.heads.model_copy(update={"heads": "all"})
    train(settings.model_copy(update={"stages": ("temporal",), "heads": everywhere}), quiet)
    (clip,) = generate(
        GenerateSettings(
            model=str(twin_folder), caption=("a red circle",), out=tmp_path / "clips", device="cpu", cache=None, fps=12,
            lora=(str(settings.out / "temporal.safetensors"),), memory="4bit", frames=9, height=32, width=32,
            sample=SampleSettings(steps=2, scale=1.0),
        ), quiet,
    )  # fmt: skip
    assert json.loads(clip.with_suffix(".json").read_text())["settings"]["memory"] == "4bit"


def test_without_the_package_it_is_refused_before_anything_is_done(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "installed", lambda: False)
    told = r"needs bitsandbytes.*pip install 'motionlora\[4bit\]'.*low or lowest"
    with pytest.raises(InputError, match=told):
        train(settings, quiet)
    clips = GenerateSettings(model=settings.model, caption=("a",), out=tmp_path / "clips", memory="4bit")
    with pytest.raises(InputError, match=told):
        generate(clips, quiet)
    with pytest.raises(InputError, match=told):
        load_model(settings.model, memory=NF4)
    assert not settings.out.exists()
    assert not clips.out.exists()
