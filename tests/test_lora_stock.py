"""Laws of LoRA files in the stock pipeline: what we write, merge, resize and verify does there what it does here."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from motionlora.data.settings import InputError
from motionlora.heads.lora import MotionLora, load_into, strengths, unload
from motionlora.heads.lora_combine import merged, resized
from motionlora.heads.lora_file import load_lora, save_lora
from motionlora.heads.lora_inspect import inspect_lora
from motionlora.heads.lora_layers import check_width
from motionlora.heads.lora_verify import verify_lora
from motionlora.heads.lora_write import padded
from motionlora.heads.wan import WanBackbone
from motionlora.train.command import main

LAYOUTS = ["native", "diffusers", "kohya"]
ROUNDING = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}


@pytest.fixture(scope="module")
def model(twin_folder: Path) -> WanBackbone:
    """Its adapters are gone after each test, so that one may serve all."""
    return WanBackbone.load(twin_folder)


@pytest.fixture(scope="module")
def pipe(twin_folder: Path) -> Any:
    return WanPipeline.from_pretrained(twin_folder)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def motion_lora(rank: int = 4, alpha: float = 2.0, seed: int = 0, names: Sequence[str] = ("q", "k", "v")) -> MotionLora:
    """On head 0 and 3 of block 0 and head 2 of block 2; no o, no block 1, alpha other than the rank."""
    weights = {}
    for block, heads in ((0, (0, 3)), (2, (2,))):
        rows = torch.zeros(48, 1)
        for head in heads:
            rows[12 * head : 12 * head + 12] = 1
        for index, name in enumerate(names):
            stem = f"blocks.{block}.attn1.to_{name}"
            weights[f"{stem}.lora_A.weight"] = draw(rank, 48, seed=seed + 10 * block + index)
            weights[f"{stem}.lora_B.weight"] = rows * draw(48, rank, seed=seed + 500 + 10 * block + index)
    facts = {"strength": 0.5, "heads": {"per_block": 4}, "model": "twin", "caption": f"clip {seed}"}
    return MotionLora(weights, rank, alpha, stage="temporal", provenance=facts)


def output(transformer: Any) -> Tensor:
    text = draw(1, 7, transformer.config["text_dim"], seed=2)
    with torch.no_grad():
        return transformer(draw(1, 16, 3, 4, 4, seed=1), torch.tensor([500.0]), text, return_dict=False)[0]


def ours(model: WanBackbone, *parts: tuple[MotionLora, float]) -> Tensor:
    for index, (lora, strength) in enumerate(parts):
        load_into(model.transformer, lora, f"part{index}", strength)
    result = output(model.transformer)
    for index in range(len(parts)):
        unload(model.transformer, f"part{index}")
    return result


def close(one: Tensor, other: Tensor, *, of: Tensor, within: float) -> bool:
    """Differs by less than a share of the largest change `of`."""
    return float((one - other).abs().max()) <= within * float(of.abs().max())


@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_files_at_half_strength_then_fused_and_unfused(
    pipe: Any, model: WanBackbone, tmp_path: Path, layout: Any, precision: Any
) -> None:
    loras = {"one": motion_lora(), "two": motion_lora(rank=3, alpha=6.0, seed=77, names=("q", "v"))}
    for name, lora in loras.items():
        whole = padded(lora, model.config) if layout == "kohya" else lora
        save_lora(whole, tmp_path / f"{name}.safetensors", layout, precision)
        pipe.load_lora_weights(str(tmp_path / f"{name}.safetensors"), adapter_name=name)
    pipe.set_adapters(["one", "two"], [0.5, 0.5])
    plain, expected = output(model.transformer), ours(model, *((lora, 0.5) for lora in loras.values()))
    change, within = expected - plain, ROUNDING[precision]
    assert change.abs().max() > 1e-3
    assert close(output(pipe.transformer), expected, of=change, within=within)
    pipe.fuse_lora(adapter_names=["one", "two"])
    assert close(output(pipe.transformer), expected, of=change, within=within)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert close(output(pipe.transformer), plain, of=change, within=1e-4)


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_a_merged_file_acts_as_its_parts_together(pipe: Any, model: WanBackbone, tmp_path: Path, layout: Any) -> None:
    parts = (motion_lora(), 0.5), (motion_lora(rank=3, alpha=6.0, seed=77, names=("q", "out.0")), -1.5)
    lora = merged(parts)
    assert (lora.rank, lora.alpha, lora.stage) == (7, 7.0, "merged")
    assert {len(a) for a, _ in lora.modules().values()} == {7}, "one rank everywhere"
    assert lora.provenance["strength"] == 1.0
    assert lora.provenance["model"] == "twin"
    assert [part["caption"] for part in lora.provenance["merged"]] == ["clip 0", "clip 77"]
    path = tmp_path / "merged.safetensors"
    save_lora(lora, path, layout)
    plain, expected = output(model.transformer), ours(model, *parts)
    assert close(ours(model, (load_lora(path), 1.0)), expected, of=expected - plain, within=1e-4)
    pipe.load_lora_weights(str(path), adapter_name="merged")
    assert close(output(pipe.transformer), expected, of=expected - plain, within=1e-4)
    pipe.unload_lora_weights()
    said = inspect_lora(path)
    assert re.search(r"\n +0 .* 0 1 2 3\n", said), "the second part has all columns of o"
    narrow = {key: value[..., :24] if "_A" in key else value[:24] for key, value in motion_lora().weights.items()}
    with pytest.raises(InputError, match="48 inputs and 48 outputs in one, 24 and 24 in another"):
        merged([(motion_lora(), 1.0), (MotionLora(narrow, 4, 4.0), 1.0)])
    with pytest.raises(InputError, match="two or more"):
        merged([])


def test_a_smaller_rank_loses_just_what_it_says_and_keeps_the_heads() -> None:
    lora = motion_lora(rank=6, alpha=3.0)
    whole = {module: 0.5 * b @ a for module, (a, b) in lora.modules().items()}
    before = 1.0
    for rank in (1, 3, 5):
        small, loss = resized(lora, rank)
        assert (small.rank, small.alpha) == (rank, rank)
        parts = small.modules()
        gone = {module: update - parts[module][1] @ parts[module][0] for module, update in whole.items()}
        share = sum(value.square().sum() for value in gone.values()) / sum(v.square().sum() for v in whole.values())
        assert loss.whole == pytest.approx(float(share) ** 0.5, rel=1e-4)
        assert loss.worst == pytest.approx(float(gone[loss.module].norm() / whole[loss.module].norm()), rel=1e-4)
        assert loss.whole <= loss.worst < before
        before = loss.worst
        for module, (_, b) in parts.items():
            assert torch.equal(b.any(dim=1), lora.modules()[module][1].any(dim=1)), "other heads are touched"
        for module, update in whole.items():  # Eckart and Young: no other matrix of this rank is nearer
            sizes = torch.linalg.svdvals(update)
            assert float(gone[module].norm()) == pytest.approx(float(sizes[rank:].norm()), rel=1e-3)
    doubled = merged([(lora, 1.0), (lora, 1.0)])
    again, loss = resized(doubled, 6)
    assert loss.whole < 1e-6, "a rank that is not needed costs nothing"
    assert all(torch.allclose(b @ a, 2 * whole[module], atol=1e-4) for module, (a, b) in again.modules().items())
    for rank in (0, 6, 7):
        with pytest.raises(InputError, match="choose 1 to 5"):
            resized(lora, rank)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verify_agrees_with_what_we_write(model: WanBackbone, tmp_path: Path, layout: Any) -> None:
    path, before = tmp_path / "motion.safetensors", output(model.transformer)
    save_lora(padded(motion_lora(), model.config) if layout == "kohya" else motion_lora(), path, layout)
    verdict = verify_lora(path, model, strength=0.5)
    assert verdict.agrees
    assert verdict.factor == pytest.approx(1.0, abs=1e-4)
    assert verdict.changed > 1e-3
    verdict.refuse_disagreement(path)
    assert torch.equal(output(model.transformer), before), "something stayed in the model"
    assert not strengths(model.transformer)


def test_verify_says_what_the_stock_pipeline_makes_of_others(model: WanBackbone, tmp_path: Path) -> None:
    save_lora(motion_lora(), tmp_path / "good.safetensors", "diffusers")
    good = load_file(tmp_path / "good.safetensors")
    bare = {key.removeprefix("transformer."): value for key, value in good.items()}
    kohya = {}
    for key, value in load_lora(tmp_path / "good.safetensors").weights.items():
        module, _, factor = key.removesuffix(".weight").rpartition(".lora_")
        stem = "lora_unet_" + re.sub(r"\.attn1\.to_", "_self_attn_", module).replace(".", "_")
        kohya[f"{stem}.lora_{'down' if factor == 'A' else 'up'}.weight"] = value
        kohya[f"{stem}.alpha"] = torch.tensor(2.0)
    native = {f"diffusion_model.{key}": value for key, value in bare.items()}
    videox = {key.replace("lora_unet_", "lora_unet__"): value for key, value in kohya.items()}
    synth = {re.sub(r"attn1\.to_(.)", r"self_attn.\1", key): value for key, value in bare.items()}
    synth = {key.replace(".weight", ".default.weight"): value for key, value in synth.items()}
    path = tmp_path / "strange.safetensors"
    for tensors, alpha, words, factor in (
        (videox, None, "does not load it", 0.0),
        (synth, 2.0, "does not load it", 0.0),
        (good, 2.0, "applies it at 2 times its strength", 2.0),  # without metadata it takes alpha for the rank
        (bare, 2.0, "does not load it", 0.0),
        ({f"base_model.model.{key}": value for key, value in bare.items()}, 2.0, "does not load it", 0.0),
        (kohya, None, "does not load it", 0.0),
        (native, 2.0, "does not load it", 0.0),
    ):
        save_file(tensors, path)
        verdict = verify_lora(path, model, alpha=alpha)
        assert not verdict.agrees
        assert verdict.factor == pytest.approx(factor, abs=1e-3)
        with pytest.raises(InputError, match=words):
            verdict.refuse_disagreement(path)
        assert not strengths(model.transformer)
    with pytest.raises(InputError, match="does not say the alpha"):
        verify_lora(path, model)


def test_a_lora_of_another_width_is_refused_with_both(model: WanBackbone) -> None:
    stem = "blocks.0.attn1.to_q"
    weights = {f"{stem}.lora_A.weight": torch.ones(2, 1536), f"{stem}.lora_B.weight": torch.ones(1536, 2)}
    small = MotionLora(weights, 2, 2.0)
    with pytest.raises(InputError, match=r"width 1536 \(Wan 2\.1 1\.3B\), and this model has width 48"):
        load_into(model.transformer, small, "small")
    with pytest.raises(
        InputError, match=r"width 1536 \(Wan 2\.1 1\.3B\), and this model has width 5120 \(Wan 2\.1 14B\)"
    ):
        check_width(5120, small.modules())
    check_width(1536, small.modules())


def test_the_subcommands_do_the_same(
    tmp_path: Path, twin_folder: Path, model: WanBackbone, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"{name}.safetensors" for name in ("one", "two", "kohya", "merged", "small", "open")}
    one, two = motion_lora(), motion_lora(seed=77)
    save_lora(one, files["one"])
    save_lora(two, files["two"], "diffusers")
    twin = ["--model", str(twin_folder)]
    convert = ["lora", "convert", str(files["one"]), "--layout", "kohya", "--out", str(files["kohya"])]
    assert main(convert) == 2
    assert "--model" in capsys.readouterr().err
    assert main([*convert, *twin]) == 0
    assert main(["lora", "merge", f"{files['one']}:1", str(files["two"]), "--out", str(files["merged"])]) == 0
    assert "one.safetensors at 1 + two.safetensors at 0.5, rank 8" in capsys.readouterr().out
    assert main(["lora", "resize", str(files["merged"]), "--rank", "2", "--out", str(files["small"])]) == 0
    assert re.search(r"rank 2; \d+\.\d+% of the update's norm is lost, at worst", capsys.readouterr().out)
    for name in ("one", "kohya", "merged", "small"):
        assert main(["lora", "verify", str(files[name]), *twin, "--strength", "0.5"]) == 0
        assert "agree    yes" in capsys.readouterr().out
    plain = output(model.transformer)
    expected = ours(model, (one, 1.0), (two, 0.5))
    assert close(ours(model, (load_lora(files["merged"]), 1.0)), expected, of=expected - plain, within=1e-4)
    save_file(load_file(files["two"]), files["open"])
    inspect = ["lora", "inspect", str(files["open"])]
    assert main(inspect) == main([*inspect, "--alpha", "2"]) == 0
    said = capsys.readouterr().out
    assert "alpha unknown" in said
    assert "alpha 2 (update = 0.5 * b a) by --alpha 2" in said
    for words, part in (
        (["lora", "verify", str(files["open"]), *twin], "--alpha"),
        (["lora", "verify", str(files["open"]), *twin, "--alpha", "2"], "applies it at 2 times"),
        (["lora", "verify", str(files["one"]), *twin, "--strength", "0"], "--strength"),
        ([*inspect, "--alpha", "much"], "above 0, or `rank`"),
        (["lora", "merge", str(files["one"]), "--out", str(files["open"])], "two or more"),
        (["lora", "resize", str(files["one"]), "--rank", "4", "--out", str(files["small"])], "choose 1 to 3"),
        (["lora", "convert", str(files["one"]), "--out", str(files["one"])], "another name"),
    ):
        assert main(words) == 2, words
        assert part in capsys.readouterr().err
