"""Laws of `generate --memory`: `low` changes no bit, `lowest` only rounds the base, under every guidance; `auto` obeys
the plan; no encoder is beside the network.
"""

import gc
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from motionlora.data.clip import read_clip, write_clip
from motionlora.data.errors import InputError
from motionlora.heads.backbone import Prompt
from motionlora.heads.load import load_model
from motionlora.heads.lora import strengths
from motionlora.heads.memory import FP8, Memory, Mode, linear_layers, sampling_memory
from motionlora.heads.wan import WanBackbone
from motionlora.infer import generate as room
from motionlora.infer.generate import generate
from motionlora.infer.guidance import BLANK, GuidanceSettings, Kept
from motionlora.infer.guidance_list import guidance_class, guidance_names
from motionlora.infer.guide_ditflow import DiTFlow
from motionlora.infer.guide_flowmotion import FlowMotion
from motionlora.infer.guide_none import NoGuidance
from motionlora.infer.order import loaded_lora
from motionlora.infer.reference import encoded
from motionlora.infer.sample import new_walk, sample
from motionlora.infer.settings import GenerateSettings, SampleSettings
from motionlora.train import sampling_plan
from motionlora.train.cards import RESERVE_BYTES, RESERVE_SHARE, Card
from motionlora.train.rehearsal import counted
from motionlora.train.sampling_plan import fitting_mode, rehearsal_of

CPU = torch.device("cpu")
SIZE: dict[str, Any] = {"frames": 9, "height": 32, "width": 32}
EAGER: dict[str, Any] = {"share": 1.0, "start": 0.95, "channels": 0.25, "iterations": 1}
BOXES = [{"frame": 0, "x": 4, "y": 4, "w": 12, "h": 12}, {"frame": 8, "x": 16, "y": 12, "w": 12, "h": 12}]
LINEAR = 8 * (48 + 1) * 48 + (48 + 1) * 64 + (64 + 1) * 48
"""Numbers in the linear layers of a block of the twin: two attentions of width 48, a feed-forward of 64."""
WEIGHTS = 8 * 48 * 48 + 2 * 48 * 64
"""Of them those that are no biases."""
UNTIL = 0.7
"""Between the second and the third step of three."""


@pytest.fixture
def waiting(on_disk: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers wait as they would for a GPU, on a disk."""
    stock = Memory.offloading

    def offloading(self: Memory, transformer: Any, device: torch.device) -> None:
        stock(self, transformer, device, **on_disk)

    monkeypatch.setattr(Memory, "offloading", offloading)


@pytest.fixture
def settings(twin_folder: Path, tmp_path: Path, strong_lora: Path) -> GenerateSettings:
    return GenerateSettings(
        model=str(twin_folder), caption=("a red circle",), out=tmp_path / "out", device="cpu", cache=None, fps=12,
        lora=(str(strong_lora),), sample=SampleSettings(steps=2, scale=3.0, lora_until=0.95), **SIZE,
    )  # fmt: skip


def quiet(line: str) -> None:
    del line


def walked(model: WanBackbone, guidance: GuidanceSettings, lora: Path) -> torch.Tensor:
    """Where three steps lead, of which the LoRA rests in the last."""
    loaded_lora(f"{lora}:0.25", 0.0).load_onto(model, "lora0")
    draws = torch.Generator().manual_seed(4)
    reference, embeds = torch.randn(1, 16, 3, 8, 8, generator=draws), torch.randn(2, 512, 32, generator=draws)
    kept = Kept()
    kept.tensors[BLANK] = {BLANK: embeds[:1]}
    how = SampleSettings(steps=3, scale=3.0, lora_until=UNTIL)
    walk = new_walk(
        model, Prompt(embeds[:1]), Prompt(embeds[1:]), seed=3, sample=how, reference=reference, kept=kept, **SIZE
    )
    assert float(walk.times[1]) > UNTIL > float(walk.times[2])
    latent = sample(walk, guidance)
    assert strengths(model.transformer) == {"lora0": 0.25}
    return latent


def rounded(model: WanBackbone) -> WanBackbone:
    """The blocks' linear layers with the numbers that fp8 has."""
    for layer in linear_layers(model.transformer):
        for weight in layer.parameters():
            weight.data = weight.data.to(FP8).float()
    return model


@pytest.mark.parametrize(
    ("name", "recompute"), [*((name, False) for name in guidance_names()), ("ditflow", True), ("smm", True)]
)
def test_low_changes_no_bit_and_lowest_only_rounds_the_base(
    twin_folder: Path, strong_lora: Path, waiting: None, tmp_path: Path, name: str, recompute: bool
) -> None:
    (tmp_path / "boxes.json").write_text(json.dumps(BOXES))
    cls = guidance_class(name)
    wanted = {**EAGER, "recompute": recompute, "boxes": tmp_path / "boxes.json"}
    guidance = cls(**{key: value for key, value in wanted.items() if key in cls.model_fields})
    fast = walked(load_model(twin_folder), guidance, strong_lora)
    lowest = walked(load_model(twin_folder, memory=sampling_memory("lowest", gpu=False)), guidance, strong_lora)
    model = load_model(twin_folder, memory=sampling_memory("low", gpu=True))
    assert torch.equal(walked(model, guidance, strong_lora), fast)
    away = [weights_away(layer) for layer in linear_layers(model.transformer) if hasattr(layer, "_diffusers_hook")]
    assert (len(away), all(away)) == (30, True)
    assert torch.equal(lowest, walked(rounded(load_model(twin_folder)), guidance, strong_lora))
    missed = (lowest - fast).square().mean() / fast.square().mean()
    assert 0 < missed.sqrt() < 1 / 16  # half a unit in the last place of e4m3


def weights_away(layer: Any) -> bool:
    return bool(layer.weight.float().isnan().all())


def test_cogvideox_waits_as_well(cogvideox_folders: dict[str, Path], waiting: None) -> None:
    latents = []
    for mode in ("fast", "low"):
        model = load_model(cogvideox_folders["5B"], memory=sampling_memory(mode, gpu=True))
        prompt = Prompt(torch.randn(1, 226, 32, generator=torch.Generator().manual_seed(0)))
        how = SampleSettings(steps=2, scale=1.0, shift=1.0)
        latents.append(sample(new_walk(model, prompt, prompt, seed=3, sample=how, **SIZE), NoGuidance()))
    assert torch.equal(*latents)


def test_fp8_holds_for_both_experts_whichever_comes_first(experts_folder: Path) -> None:
    both = load_model(experts_folder, memory=Memory(weights="fp8"))
    load = WanBackbone.load
    alone: dict[Any, WanBackbone] = {name: rounded(load(experts_folder, expert=name)) for name in ("high", "low")}
    draws = torch.Generator().manual_seed(0)
    latent, prompt = torch.randn(1, 16, 3, 8, 8, generator=draws), Prompt(torch.randn(1, 512, 32, generator=draws))
    for name, time in (("high", 0.9), ("low", 0.5), ("high", 0.9), ("low", 0.2)):
        asked = latent, torch.tensor([time]), prompt
        assert torch.equal(both.velocity(*asked), alone[name].velocity(*asked))
    kept = {weight.dtype for weights in both.experts.waiting.values() for weight in weights}
    assert kept == {FP8, torch.float32}


def test_loras_are_where_the_network_computes_not_where_its_layers_wait(twin_folder: Path, strong_lora: Path) -> None:
    model = load_model(twin_folder)
    model = replace(model, parts=replace(model.parts, device=torch.device("meta")))
    loaded_lora(str(strong_lora), 0.5).load_onto(model, "lora0")
    weights = {name: weight for name, weight in model.transformer.named_parameters() if ".lora_" in name}
    assert len(weights) == 6
    assert all(weight.is_meta for weight in weights.values())
    assert not model.transformer.get_submodule("blocks.0.attn1.to_q").get_parameter("base_layer.weight").is_meta


def test_what_a_guidance_keeps_is_not_shared_with_a_rounded_base(
    twin: WanBackbone, settings: GenerateSettings, random_clip: Any
) -> None:
    blank, latent = Prompt(torch.zeros(1, 512, 32)), torch.zeros(1, 16, 3, 8, 8)
    identity = {}
    for mode in get_args(Mode):
        how = settings.model_copy(update={"memory": mode})
        identity[mode] = encoded(random_clip(9, 32, 32), twin, how, [], blank=blank, latent=latent).kept.identity
    assert identity["fast"] == identity["low"]
    assert len(set(identity.values())) == 3


def test_generate_gives_the_same_clip_in_low_and_tells_its_mode(
    settings: GenerateSettings, waiting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "sampling_memory", lambda mode, gpu: sampling_memory(mode, gpu=True))
    pixels, said = {}, []
    for mode in ("fast", "low", "lowest"):
        (path,) = generate(settings.model_copy(update={"memory": mode}), said.append)
        assert json.loads(path.with_suffix(".json").read_text())["settings"]["memory"] == mode
        pixels[mode] = read_clip(path, multiple=1, caption="", say=quiet).content_hash()
    assert pixels["fast"] == pixels["low"] != pixels["lowest"]
    assert [f"(memory {mode})" in said[at] for at, mode in ((0, "fast"), (2, "low"), (4, "lowest"))] == [0, 1, 1]


def test_encoders_are_gone_before_the_network_comes_and_the_vae_returns_to_decode(
    settings: GenerateSettings, random_clip: Any, tmp_path: Path, loadings: list[tuple[str, list[str]]]
) -> None:
    write_clip(random_clip(9, 32, 32), tmp_path / "reference.webp")
    gc.collect()
    how = {"reference": tmp_path / "reference.webp", "guidance": FlowMotion(share=1.0), "caption": ("a", "b")}
    generate(settings.model_copy(update=how), quiet)
    assert [name for name, _ in loadings] == ["text_encoder", "vae", "transformer", "vae"]
    assert dict(loadings[:3])["transformer"] == []


def test_the_plan_knows_what_waits_what_is_learned_and_where_gradients_go(
    settings: GenerateSettings, strong_lora: Path
) -> None:
    lora = loaded_lora(str(strong_lora), 0.5)
    run = rehearsal_of(settings, [lora], CPU)
    low = replace(run, memory=sampling_memory("low", gpu=True))
    assert run.frozen_bytes - low.frozen_bytes == 3 * LINEAR * 4
    packed = replace(run, memory=sampling_memory("4bit", gpu=True))
    assert run.frozen_bytes - packed.frozen_bytes == 3 * WEIGHTS * (4 - 9 / 16)
    numbers = sum(weight.numel() for weight in lora.lora.weights.values())
    assert run.frozen_bytes - rehearsal_of(settings, [], CPU).frozen_bytes == 4 * numbers
    decoded, guides = run.decoded(), {}
    assert [part.name for part in run.plan(settings, decoded).parts] == ["forward", "decode"]
    for name, walk, guidance in (
        ("fast", run, DiTFlow(block=2)), ("early", run, DiTFlow(block=0)),
        ("own", run, DiTFlow(block=2, recompute=True)), ("low", low, DiTFlow(block=2)),
    ):  # fmt: skip
        plan = walk.plan(settings.model_copy(update={"guidance": guidance}), decoded)
        guides[name] = {part.name: part.cost.nbytes for part in plan.parts}["guide"]
    assert guides["fast"] > guides["early"] > guides["own"]
    assert guides["low"] == guides["own"] + LINEAR * 4  # and the layers of one block at once
    flowmotion = settings.model_copy(update={"guidance": FlowMotion(share=1.0)})
    assert len(run.plan(flowmotion, decoded).parts) == 2


def test_the_plan_of_decoding_is_that_of_every_length(settings: GenerateSettings) -> None:
    run = replace(rehearsal_of(settings, [], CPU), frames=17)
    vae = run.outline.vae_without_weights()
    with torch.no_grad():
        count = counted(lambda: vae.decode(torch.empty(1, 16, 5, 8, 8, device="meta")))
    assert run.decoded().flops == count.flops
    weights = sum(weight.nbytes for weight in vae.parameters())
    assert run.decoded().nbytes == pytest.approx(weights + count.peak_bytes, rel=0.02)


def test_auto_takes_the_first_that_is_predicted_to_fit_and_says_so(
    settings: GenerateSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, auto = rehearsal_of(settings, [], CPU), settings.model_copy(update={"memory": "auto"})
    decoded, peaks = run.decoded(), {}
    monkeypatch.setattr(sampling_plan.WalkRehearsal, "decoded", lambda run: decoded)  # once is enough
    for mode in ("fast", "low"):
        peaks[mode] = replace(run, memory=sampling_memory(mode, gpu=True)).plan(auto, decoded).peak_bytes
    assert peaks["fast"] > peaks["low"]
    for room_, takes in ((peaks["fast"], "fast"), (peaks["fast"] - 99, "low"), (peaks["low"], "low")):
        card, said = Card("A", math.ceil((room_ + RESERVE_BYTES) / (1 - RESERVE_SHARE)), 1.0, 1.0), []
        monkeypatch.setattr(sampling_plan, "unmeasured", lambda device, card=card: card)
        assert fitting_mode(auto, [], CPU, said.append) == takes
        assert f"auto takes {takes} (predicted: fast " in said[0]
    card = Card("A", math.ceil((peaks["low"] - 99 + RESERVE_BYTES) / (1 - RESERVE_SHARE)), 1.0, 1.0)
    monkeypatch.setattr(sampling_plan, "unmeasured", lambda device: card)
    with pytest.raises(InputError, match=r"fits on A in no mode.*fast.*low.*lowest.*fewer frames"):
        fitting_mode(auto, [], CPU, quiet)
    assert fitting_mode(settings, [], CPU, quiet) == "fast"


def test_auto_is_refused_where_there_is_no_plan(settings: GenerateSettings, cogvideox_folders: dict[str, Path]) -> None:
    auto = settings.model_copy(update={"memory": "auto"})
    with pytest.raises(InputError, match="set fast, low, 4bit or lowest"):
        generate(auto, quiet)
    other = auto.model_copy(update={"model": str(cogvideox_folders["2B"])})
    with pytest.raises(InputError, match=r"Plans are made for Wan alone.*--memory fast"):
        fitting_mode(other, [], CPU, quiet)
    assert not settings.out.exists()
