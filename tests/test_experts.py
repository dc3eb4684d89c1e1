"""Wan 2.2 T2V-A14B on a random twin of two experts: each has its noise levels, weights, LoRA and file."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from motionlora.data.clip import write_clip
from motionlora.data.errors import InputError
from motionlora.heads.backbone import Prompt
from motionlora.heads.head_map import HeadMap
from motionlora.heads.lora import unload
from motionlora.heads.lora_file import load_lora, save_lora
from motionlora.heads.motion_lora import MotionLora
from motionlora.heads.wan import WanBackbone
from motionlora.heads.wan_outline import WanOutline, outline_of
from motionlora.infer.generate import generate
from motionlora.infer.guidance_list import guidance_class, guidance_names
from motionlora.infer.guide_none import NoGuidance
from motionlora.infer.order import loaded_lora
from motionlora.infer.sample import new_walk, sample
from motionlora.infer.settings import GenerateSettings, LoraChoice, SampleSettings, lora_choice
from motionlora.train.command import main
from motionlora.train.experts import train_experts
from motionlora.train.noise import drawn_times, keyed_generator, shifted
from motionlora.train.plan import plan_of
from motionlora.train.run import train
from motionlora.train.settings import TrainSettings

BOUNDARY = 0.875
FOLDERS = {"high": "transformer", "low": "transformer_2"}
SIZE: dict[str, Any] = {"frames": 9, "height": 32, "width": 32}
STEERING = [name for name in guidance_names() if guidance_class(name).needs_reference and name != "s2v2v"]
EAGER: dict[str, Any] = {"share": 1.0, "start": 0.95, "channels": 0.25, "iterations": 1}


@pytest.fixture(scope="module")
def folder(experts_folder: Path) -> Path:
    return experts_folder


@pytest.fixture(scope="module")
def model(folder: Path) -> WanBackbone:
    """Both experts; tests leave it as they found it, but for whose weights it holds."""
    return WanBackbone.load(folder)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, WanBackbone]:
    return {"high": WanBackbone.load(folder, expert="high"), "low": WanBackbone.load(folder, expert="low")}


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> WanPipeline:
    stock = WanPipeline.from_pretrained(folder)
    stock.scheduler = FlowMatchEulerDiscreteScheduler.from_config(stock.scheduler.config, shift=3.0)
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.fixture(scope="module")
def runs(folder: Path, random_clip, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Both experts trained by one command, and every noise level that a network was fed in it, in its order."""
    place = tmp_path_factory.mktemp("runs")
    write_clip(random_clip(9, 32, 32), place / "clip.mp4")
    with fed_times() as times:
        train_experts(told(folder, place, expert="both", heads={"ratio": 1.0, "times": (0.9998, 0.8, 0.6)}), silent)
    return place / "out", times


def told(folder: Path, place: Path, **changes: Any) -> TrainSettings:
    small: dict[str, Any] = {"steps": 4, "lr": 1e-2, "batch": 4}
    values: dict[str, Any] = {
        "model": str(folder), "clip": place / "clip.mp4", "caption": "a star", "out": place / "out", "frames": 9,
        "fps": None, "cache": None, "device": "cpu", "lora": {"rank": 2, "strength": 1.0}, "heads": {"ratio": 1.0},
        "spatial": small, "temporal": {**small, "stride": 2},
    }  # fmt: skip
    return TrainSettings.model_validate(values | changes)


def edited(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def silent(line: str) -> None:
    del line


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def at(time: float) -> torch.Tensor:
    return torch.tensor([time])


@torch.no_grad()
def said(model: WanBackbone, *times: float) -> torch.Tensor:
    prompt = Prompt(drawn(1, 512, 32))
    return model.velocity(drawn(len(times), 16, 3, 4, 4), torch.tensor(times), prompt)


@contextmanager
def fed_times() -> Iterator[list[float]]:
    """Every noise level that a Wan is fed inside."""
    from diffusers import WanTransformer3DModel

    seen, stock = [], WanTransformer3DModel.forward

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend((kwargs["timestep"] / 1000).tolist())
        return stock(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanTransformer3DModel, "forward", noting)
        yield seen


def lora_at(path: Path, seed: int, **provenance: Any) -> Path:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for module in ("blocks.0.attn1.to_q", "blocks.1.attn1.to_v", "blocks.2.attn1.to_out.0"):
        weights[f"{module}.lora_A.weight"] = torch.randn(4, 48, generator=generator) / 4
        weights[f"{module}.lora_B.weight"] = torch.randn(48, 4, generator=generator) / 4
    save_lora(MotionLora(weights, 4, 4.0, stage="temporal", provenance=provenance), path)
    return path


def test_each_level_is_answered_by_its_expert_and_the_boundary_is_the_high_ones(model, alone) -> None:
    for time, expert in ((1.0, "high"), (0.5, "low"), (BOUNDARY, "high"), (0.874, "low"), (0.0, "low")):
        assert torch.equal(said(model, time), said(alone[expert], time)), time
        assert model.experts.held == expert
    assert not torch.equal(said(alone["high"], 0.9), said(model, 0.5))
    assert len({model.fingerprint, alone["high"].fingerprint, alone["low"].fingerprint}) == 3


def test_levels_of_the_other_expert_and_of_both_are_refused(model, alone) -> None:
    with pytest.raises(InputError, match=r"0.5 is the low-noise expert's.*stay at or above 0.875"):
        said(alone["high"], 0.5)
    with pytest.raises(InputError, match=r"0.875 is the high-noise expert's.*stay below 0.875"):
        said(alone["low"], BOUNDARY)
    with pytest.raises(InputError, match=r"both sides of 0.875"):
        said(model, 0.9, 0.5)
    for expert, ends in (("high", (BOUNDARY, 1.0)), ("low", (0.0, alone["low"].experts.times[1]))):
        assert alone[expert].experts.times == ends
        for end in ends:
            said(alone[expert], end)


@pytest.mark.parametrize("expert", ["high", "low"])
def test_one_expert_needs_nothing_of_the_other(folder: Path, tmp_path: Path, alone, expert) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    other = FOLDERS["low" if expert == "high" else "high"]
    (copy / other / "diffusion_pytorch_model.safetensors").unlink()
    found = WanBackbone.load(copy, expert=expert)
    assert found.fingerprint == alone[expert].fingerprint
    assert not found.experts.waiting
    with pytest.raises(InputError, match=f"{other} has no weights"):
        WanBackbone.load(copy)


def test_a_model_of_one_network_is_high_and_has_no_low(twin_folder: Path, twin: WanBackbone) -> None:
    assert twin.experts.only is None
    assert twin.experts.times == (0.0, 1.0)
    assert WanBackbone.load(twin_folder, expert="high").experts.only is None
    said(twin, 0.9, 0.5)
    with pytest.raises(InputError, match="has no low-noise expert"):
        WanBackbone.load(twin_folder, expert="low")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"boundary_ratio": None}, "boundary_ratio None.*0.875"),
        ("model_index.json", {"boundary_ratio": 875.0}, "boundary_ratio 875"),
        ("model_index.json", {"transformer_2": [None, None]}, "one transformer and boundary_ratio 0.875"),
        ("transformer_2/config.json", {"eps": 1e-5}, "differ in eps"),
    ],
)
def test_what_are_no_two_experts_is_refused(folder: Path, tmp_path: Path, file, changes, message) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    edited(copy, file, **changes)
    with pytest.raises(InputError, match=message):
        WanBackbone.load(copy)


def test_a_backward_pass_does_not_meet_the_other_experts_weights(model) -> None:
    latent = drawn(1, 16, 3, 4, 4).requires_grad_()
    velocity = model.velocity(latent, at(0.9), Prompt(drawn(1, 512, 32)))
    said(model, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        velocity.sum().backward()


@pytest.mark.parametrize("scale_low", [None, 2.0])
def test_a_walk_is_the_stock_pipelines(model: WanBackbone, pipeline: WanPipeline, scale_low: float | None) -> None:
    prompt, negative = model.embed(["a red circle"]), model.embed(["a star"])
    options: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 6}
    options |= {"guidance_scale": 5.0, "guidance_scale_2": scale_low, "output_type": "latent"}
    options |= {"prompt_embeds": prompt.embeds, "negative_prompt_embeds": negative.embeds}
    theirs: Any = pipeline(**options, generator=torch.Generator().manual_seed(3))
    walk = new_walk(
        model, prompt, negative, seed=3, sample=SampleSettings(steps=6, scale=5.0, scale_low=scale_low), **SIZE
    )
    assert {model.experts.at(time) for time in walk.times[:-1]} == {"high", "low"}
    assert torch.equal(sample(walk, NoGuidance()), theirs.frames)


def test_a_second_scale_needs_a_second_expert(twin: WanBackbone) -> None:
    prompt = twin.embed(["a star"])
    with pytest.raises(InputError, match=r"scale_low is 2, and .* has no low-noise expert"):
        new_walk(twin, prompt, prompt, seed=0, sample=SampleSettings(scale_low=2.0), **SIZE)


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("expert", ["high", "low"])
def test_levels_are_drawn_as_all_are_but_only_the_experts(alone, expert, shift) -> None:
    low, high = ends = alone[expert].experts.times
    own = drawn_times(20000, shift, keyed_generator(0), ends).double()
    every = drawn_times(200000, shift, keyed_generator(1)).double()
    rejected = every[(every >= low) & (every <= high)]
    assert low <= own.min()
    assert own.max() <= high
    assert (own >= BOUNDARY).all() if expert == "high" else (own < BOUNDARY).all()
    shares = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    found = torch.searchsorted(own.sort()[0], rejected.quantile(shares)) / len(own)
    torch.testing.assert_close(found.double(), shares, atol=0.02, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.3, 5.0])
def test_levels_of_a_model_of_one_network_are_what_they_were(shift: float) -> None:
    plain = shifted(1 - torch.rand(1000, generator=keyed_generator(0)), shift)
    assert torch.equal(drawn_times(1000, shift, keyed_generator(0)), plain)


@pytest.mark.parametrize("expert", ["high", "low"])
def test_training_leaves_files_that_name_their_expert(runs, alone, expert) -> None:
    out = runs[0] / expert
    assert {path.name for path in out.glob("*.safetensors")} == {
        f"spatial-{expert}.safetensors", f"temporal-{expert}.safetensors",
    }  # fmt: skip
    for stage in ("spatial", "temporal"):
        told = load_lora(out / f"{stage}-{expert}.safetensors").provenance
        assert told["expert"] == told["settings"]["expert"] == expert
        assert told["fingerprint"] == alone[expert].fingerprint
    assert HeadMap.load(out / "heads.json").times == ((0.9998,) if expert == "high" else (0.8, 0.6))


def test_training_feeds_each_expert_its_own_levels(runs) -> None:
    times = torch.tensor(runs[1])
    samples = 2 * 4 * 4  # stages, steps, batch
    assert len(times) == 2 * samples + 3, "one forward more for every level at which heads are scored"
    assert (times[: samples + 1] >= BOUNDARY).all()
    assert (times[samples + 1 :] < BOUNDARY).all()
    assert len(times.unique()) == len(times)


def test_a_finished_run_of_both_is_not_done_again(runs, folder: Path, tmp_path: Path) -> None:
    lines = []
    again = told(folder, runs[0].parent, expert="both", heads={"ratio": 1.0, "times": (0.9998, 0.8, 0.6)})
    train_experts(again.model_copy(update={"resume": "latest"}), lines.append)
    assert sum("stage is done already" in line for line in lines) == 4
    with pytest.raises(InputError, match="already holds a spatial stage"):
        train(told(folder, runs[0].parent, out=runs[0] / "high"), silent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert": "low"}, "heads.times has 0.9998.*low-noise.*0 to 0.875"),
        ({"heads": {"times": (0.9998, 0.5)}}, "heads.times has 0.5.*high-noise.*0.875 to 1"),
        ({"validation": {"every": 2}}, "validation.every is 2.*both experts"),
        ({"expert": "both"}, "no noise level of the low-noise expert, below 0.875"),
        ({"expert": "both", "resume": "x"}, "give --resume latest"),
    ],
)
def test_what_an_expert_cannot_do_is_refused(runs, folder: Path, tmp_path: Path, changes, message) -> None:
    shutil.copy(runs[0].parent / "clip.mp4", tmp_path)
    with pytest.raises(InputError, match=message):
        train_experts(told(folder, tmp_path, **changes), silent)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("expert", ["low", "both"])
def test_no_expert_is_trained_of_a_model_of_one_network(runs, twin_folder: Path, tmp_path: Path, expert) -> None:
    shutil.copy(runs[0].parent / "clip.mp4", tmp_path)
    with pytest.raises(InputError, match="leave it at high"):
        train_experts(told(twin_folder, tmp_path, expert=expert), silent)


def test_two_files_act_as_in_the_stock_pipeline_each_on_its_expert(runs, model, pipeline) -> None:
    plain = {time: said(model, time) for time in (0.9, 0.5)}
    files = {expert: runs[0] / expert / f"temporal-{expert}.safetensors" for expert in FOLDERS}
    prompt = model.embed(["a red circle"])
    walk = new_walk(model, prompt, prompt, seed=3, sample=SampleSettings(steps=6, scale=1.0), **SIZE)
    without = sample(walk, NoGuidance())
    try:
        loaded_lora(str(files["high"]), 1.0).load_onto(model, "high")
        assert not torch.equal(said(model, 0.9), plain[0.9])
        assert torch.equal(said(model, 0.5), plain[0.5])
        loaded_lora(str(files["low"]), 1.0).load_onto(model, "low")
        assert not torch.equal(said(model, 0.5), plain[0.5])
        ours = sample(walk, NoGuidance())
        for name, file in files.items():
            pipeline.load_lora_weights(str(file), adapter_name=name, load_into_transformer_2=name == "low")
        stock: Any = pipeline(
            height=32, width=32, num_frames=9, num_inference_steps=6, guidance_scale=1.0, prompt_embeds=prompt.embeds,
            generator=torch.Generator().manual_seed(3), output_type="latent",
        )  # fmt: skip
    finally:
        for name in FOLDERS:
            unload(model.transformer, name)
        pipeline.unload_lora_weights()
    torch.testing.assert_close(ours, stock.frames, atol=1e-5, rtol=0)
    assert (ours - without).abs().max() > 1e-3
    assert all(torch.equal(said(model, time), before) for time, before in plain.items())


def test_generate_tells_which_file_acts_on_which_expert(folder: Path, tmp_path: Path) -> None:
    lora_at(tmp_path / "a.safetensors", 1, expert="high")
    lora_at(tmp_path / "b.safetensors", 2)
    lines: list[str] = []
    how = GenerateSettings(
        model=str(folder), caption=("a star",), out=tmp_path / "out", device="cpu", cache=None, **SIZE,
        lora=(str(tmp_path / "a.safetensors"), f"{tmp_path / 'b.safetensors'}:0.25@low"),
        sample=SampleSettings(steps=4, scale=1.0),
    )  # fmt: skip
    (path,) = generate(how, lines.append)
    told = "a.safetensors at 0.5 on the high-noise expert, b.safetensors at 0.25 on the low-noise expert"
    assert told in lines[0]
    assert [lora["expert"] for lora in json.loads(path.with_suffix(".json").read_text())["loras"]] == ["high", "low"]


def test_a_lora_that_has_no_place_is_refused_before_the_model_is_loaded(
    folder: Path, twin_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("motionlora.infer.generate.loaded_model", lambda *_: pytest.fail("The model was loaded."))
    named, plain = lora_at(tmp_path / "a.safetensors", 1, expert="high"), lora_at(tmp_path / "b.safetensors", 2)
    odd = lora_at(tmp_path / "c.safetensors", 3, expert="middle")
    for place, file, message in (
        (folder, plain, "does not say on which of the two experts.*b.safetensors@high or .*b.safetensors@low"),
        (folder, f"{named}@low", "is of the high-noise expert by its header, and low was asked for"),
        (folder, odd, "names the expert 'middle'"),
        (twin_folder, named, "is for the high-noise expert of a model of two"),
        (twin_folder, f"{plain}@low", "is for the low-noise expert of a model of two"),
    ):
        how = GenerateSettings(model=str(place), lora=(str(file),), caption=("a",), out=tmp_path / "out", device="cpu")
        with pytest.raises(InputError, match=message):
            generate(how, silent)


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("a.safetensors@high", LoraChoice(Path("a.safetensors"), None, "high")),
        ("a.safetensors:0.5@low", LoraChoice(Path("a.safetensors"), 0.5, "low")),
        ("me@home/a.safetensors:2", LoraChoice(Path("me@home/a.safetensors"), 2.0)),
        ("me@home/a@high.safetensors", LoraChoice(Path("me@home/a@high.safetensors"), None)),
    ],
)
def test_an_expert_stands_behind_file_and_strength(text: str, choice: LoraChoice) -> None:
    assert lora_choice(text) == choice
    assert lora_choice(str(choice)) == choice


def test_a_file_whose_name_ends_like_an_expert_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a@high").touch()
    assert lora_choice(str(tmp_path / "a@high")) == LoraChoice(tmp_path / "a@high", None)
    for text in ("@high", "a.safetensors:9@high", "a.safetensors:x@low"):
        with pytest.raises(InputError):
            lora_choice(text)


def test_the_lora_commands_know_the_expert(runs, folder: Path, tmp_path: Path, capsys) -> None:
    high, low = (str(runs[0] / expert / f"temporal-{expert}.safetensors") for expert in FOLDERS)
    for file, expert in ((high, "high"), (low, "low")):
        assert main(["lora", "inspect", file]) == 0
        assert f"expert   {expert}-noise" in capsys.readouterr().out
        assert main(["lora", "verify", file, "--model", str(folder), "--device", "cpu"]) == 0
    assert main(["lora", "merge", "--files", high, low, "--out", str(tmp_path / "both.safetensors")]) == 2
    assert "different experts" in capsys.readouterr().err
    assert main(["lora", "merge", "--files", high, high, "--out", str(tmp_path / "two.safetensors")]) == 0
    assert load_lora(tmp_path / "two.safetensors").provenance["expert"] == "high"


@pytest.mark.parametrize("name", STEERING)
def test_every_guidance_steers_over_both_experts_and_leaves_no_trace(model: WanBackbone, name: str) -> None:
    cls = guidance_class(name)
    guidance: Any = cls(**{key: value for key, value in EAGER.items() if key in cls.model_fields})
    prompt = model.embed(["a red circle"])

    def walk(**reference: Any) -> Any:
        how = SampleSettings(steps=4, scale=1.0)
        return new_walk(model, prompt, prompt, seed=3, sample=how, **reference, **SIZE)

    plain = sample(walk(), NoGuidance())
    hooks = [len(module._forward_hooks) for module in model.transformer.modules()]
    steered = sample(walk(reference=drawn(1, 16, 3, 8, 8)), guidance)
    assert torch.isfinite(steered).all()
    assert not torch.equal(steered, plain)
    assert [len(module._forward_hooks) for module in model.transformer.modules()] == hooks
    assert torch.equal(sample(walk(), NoGuidance()), plain)


def test_what_is_captured_is_the_active_experts(model: WanBackbone, alone) -> None:
    with model.capturing([1], "qkv") as seen:
        for time, expert in ((0.9, "high"), (0.5, "low"), (0.9, "high")):
            said(model, time)
            found = seen[1]
            with alone[expert].capturing([1], "qkv") as own:
                said(alone[expert], time)
            assert all(torch.equal(a, b) for a, b in zip(found, own[1], strict=True))


def test_a_plan_of_both_has_twice_the_steps_and_one_experts_weights(folder: Path, twin_folder: Path) -> None:
    outline = outline_of(folder)
    assert outline.experts == 2
    how: dict[str, Any] = {"frames": 5, "height": 16, "width": 16, "temporal": {"stride": 1}, "spatial": {"steps": 7}}

    def plan(outline: WanOutline, expert: Any) -> Any:
        settings = TrainSettings.model_validate({"expert": expert, "stages": ("spatial", "temporal"), **how})
        return plan_of(settings, outline, torch.float32, prepares=False)

    one, both = plan(outline, "high"), plan(outline, "both")
    assert (both.frozen_bytes, both.peak_bytes) == (one.frozen_bytes, one.peak_bytes)
    steps = [{part.name: part.times for part in found.parts} for found in (one, both)]
    assert steps == [{"spatial": 7, "temporal": 1000}, {"spatial": 14, "temporal": 2000}]
    for expert in ("low", "both"):
        with pytest.raises(InputError, match="is one network"):
            plan(outline_of(twin_folder), expert)
