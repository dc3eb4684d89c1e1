"""Laws of LoRA files in the stock pipeline, where `verify` looks, and of what is merged and made smaller.

What stock loaders make of all that we write is in `test_conformance.py`, by arithmetic.
"""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_conformance import motion_lora, of_two_ranks, summed, whole_lora
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from motionlora.data.errors import InputError
from motionlora.heads.lora import load_into, strengths, unload
from motionlora.heads.lora_combine import merged, resized
from motionlora.heads.lora_file import load_lora, save_lora
from motionlora.heads.lora_inspect import touched_heads
from motionlora.heads.lora_layers import adapter_layers, check_width
from motionlora.heads.lora_verify import verify_lora
from motionlora.heads.motion_lora import MotionLora
from motionlora.heads.wan import WanBackbone
from motionlora.train.command import main

QKV = ("to_q", "to_k", "to_v")


def parts() -> list[tuple[MotionLora, float]]:
    """Two that share q alone, at their strengths; the second has o."""
    return [(motion_lora(4, 2.0, QKV), 0.5), (motion_lora(3, 6.0, ("to_q", "to_out.0"), seed=77), -1.5)]


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_a_merged_lora_is_the_sum_of_its_parts() -> None:
    given = [
        (MotionLora(lora.weights, lora.rank, lora.alpha, provenance=facts | {"caption": name}), strength)
        for name, (lora, strength) in zip(("clip 0", "clip 1"), parts(), strict=True)
        for facts in ({"model": "twin", "fingerprint": name, "heads": {"per_block": 4}},)
    ]
    lora, one = merged(given), given[0][0]
    assert (lora.rank, lora.alpha, lora.stage) == (7, 7.0, "merged")
    assert {len(a) for a, _ in lora.modules().values()} == {7}, "one rank everywhere"
    assert close(summed([(lora, 1.0)]), summed(given))
    assert [part.pop("caption") for part in lora.provenance["merged"]] == ["clip 0", "clip 1"]
    assert {name: value for name, value in lora.provenance.items() if name != "merged"} == {
        "strength": 1.0, "model": "twin", "heads": {"per_block": 4},
    }, "only what both say"  # fmt: skip
    assert touched_heads(merged([(one, 1.0), (one, 1.0)]), 4) == {0: [0, 3], 2: [2]}, "heads that no part touches"
    narrow = {key: value[..., :24] if "_A" in key else value[:24] for key, value in one.weights.items()}
    with pytest.raises(InputError, match="48 inputs and 48 outputs in one, 24 and 24 in another"):
        merged([(one, 1.0), (MotionLora(narrow, 4, 4.0), 1.0)])
    with pytest.raises(InputError, match="two or more"):
        merged([])


def test_a_merged_lora_rests_where_all_its_parts_do_or_is_refused() -> None:
    lora = parts()[0][0]
    high, all_levels = (MotionLora(lora.weights, lora.rank, lora.alpha, provenance=p) for p in ({"until": 0.8}, {}))
    assert merged([(high, 1.0), (high, 0.5)]).provenance["until"] == 0.8
    assert "until" not in merged([(all_levels, 1.0), (all_levels, 0.5)]).provenance
    with pytest.raises(InputError, match=r"different noise levels \(0\.8, 0\) and rest"):
        merged([(high, 1.0), (all_levels, 1.0)])
    assert resized(high, 1)[0].provenance["until"] == 0.8


def test_a_smaller_rank_loses_just_what_it_says_and_keeps_the_heads() -> None:
    lora = motion_lora(6, 3.0, QKV)
    whole, before = summed([(lora, 1.0)]), 1.0
    for rank in (1, 3, 5):
        small, loss = resized(lora, rank)
        assert (small.rank, small.alpha) == (rank, rank)
        gone = {module: whole[module] - update for module, update in summed([(small, 1.0)]).items()}
        share = sum(value.square().sum() for value in gone.values()) / sum(v.square().sum() for v in whole.values())
        assert loss.whole == pytest.approx(float(share) ** 0.5, rel=1e-4)
        assert loss.worst == pytest.approx(float(gone[loss.module].norm() / whole[loss.module].norm()), rel=1e-4)
        assert loss.whole <= loss.worst < before
        before = loss.worst
        for module, (_, b) in small.modules().items():
            assert torch.equal(b.any(dim=1), lora.modules()[module][1].any(dim=1)), "other heads are touched"
        for module, update in whole.items():  # Eckart and Young: no other matrix of this rank is nearer
            sizes = torch.linalg.svdvals(update)
            assert float(gone[module].norm()) == pytest.approx(float(sizes[rank:].norm()), rel=1e-3)
    again, loss = resized(merged([(lora, 1.0), (lora, 1.0)]), 6)
    assert loss.whole < 1e-6, "a rank that is not needed costs nothing"
    assert close(summed([(again, 1.0)]), summed([(lora, 2.0)]))
    uneven, _ = resized(of_two_ranks(), 3)
    few = {name: update for name, update in summed([(of_two_ranks(), 1.0)]).items() if name.endswith("to_k")}
    assert close({name: summed([(uneven, 1.0)])[name] for name in few}, few), "of rank 2 nothing is taken"
    for rank in (0, 6, 7):
        with pytest.raises(InputError, match="choose 1 to 5"):
            resized(lora, rank)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layout", ["native", "diffusers", "kohya"])
def test_verify_agrees_with_what_we_write_and_stock_says_no_word(
    twin: WanBackbone, tmp_path: Path, layout: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path, plain, absent = tmp_path / "motion.safetensors", said(twin), None
    save_lora(whole_lora(rank=3, alpha=2.0), path, layout)
    verdict = verify_lora(path, twin, strength=0.5)
    assert verdict.agrees
    assert verdict.factor == pytest.approx(1.0, abs=1e-4)
    assert verdict.changed > 1e-3
    verdict.refuse_disagreement(path)
    assert torch.equal(said(twin), plain), "something stayed in the model"
    assert not strengths(twin.transformer)
    pipe: Any = WanPipeline(absent, absent, vae=absent, scheduler=absent, transformer=twin.transformer)  # pyright: ignore
    for name in ("diffusers", "peft"):
        logging.getLogger(name).addHandler(caplog.handler)
    try:
        pipe.load_lora_weights(str(path), adapter_name="stock")
        assert caplog.messages == []
        pipe.load_lora_weights({"blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 48)}, adapter_name="none")
        assert caplog.messages, "what is heard of a loader that finds nothing"
    finally:
        for name in ("diffusers", "peft"):
            logging.getLogger(name).removeHandler(caplog.handler)
        unload(twin.transformer, "stock")


@torch.no_grad()
def said(twin: WanBackbone) -> Tensor:
    latent, prompt = torch.ones(1, 16, 3, 4, 4), twin.embed(["a red circle"])
    return twin.velocity(latent, torch.tensor([0.5]), prompt)


def test_verify_agrees_with_what_stock_diffusers_saved(twin: WanBackbone, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model_state_dict

    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], alpha_pattern={"blocks.1.attn1.to_q": 8})
    transformer: Any = twin.transformer
    transformer.add_adapter(config, "draft")
    for layer in adapter_layers(transformer, "draft").values():
        torch.nn.init.normal_(layer.lora_B["draft"].weight)
    state: Any = get_peft_model_state_dict(transformer, adapter_name="draft")
    unload(transformer, "draft")
    WanPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=state, transformer_lora_adapter_metadata=config.to_dict()
    )
    [path] = tmp_path.iterdir()
    assert load_lora(path).stage == "unknown"
    assert verify_lora(path, twin).agrees


def test_verify_tells_a_file_without_effect(twin: WanBackbone, tmp_path: Path) -> None:
    path, lora = tmp_path / "idle.safetensors", motion_lora(4, 2.0, QKV)
    save_lora(replace(lora, weights={key: value * ("lora_A" in key) for key, value in lora.weights.items()}), path)
    with pytest.raises(InputError, match="changes nothing: its update is zero"):
        verify_lora(path, twin).refuse_disagreement(path)


def test_a_lora_of_another_width_is_refused_with_both(twin: WanBackbone) -> None:
    stem = "blocks.0.attn1.to_q"
    weights = {f"{stem}.lora_A.weight": torch.ones(2, 1536), f"{stem}.lora_B.weight": torch.ones(1536, 2)}
    small = MotionLora(weights, 2, 2.0)
    with pytest.raises(InputError, match=r"width 1536 \(Wan 2\.1 1\.3B\), and this model has width 48"):
        load_into(twin.transformer, small, "small")
    with pytest.raises(
        InputError, match=r"width 1536 \(Wan 2\.1 1\.3B\), and this model has width 5120 \(Wan 2\.1 14B\)"
    ):
        check_width(5120, small.modules())
    check_width(1536, small.modules())


def test_the_subcommands_do_the_same(tmp_path: Path, twin_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"{name}.safetensors" for name in ("one", "two", "kohya", "merged", "small", "open")}
    one, two = (replace(motion_lora(4, 2.0, QKV, seed), provenance={"strength": 0.5}) for seed in (0, 77))
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
    assert close(summed([(load_lora(files["merged"]), 1.0)]), summed([(one, 1.0), (two, 0.5)]))
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
        (["lora", "convert", str(files["one"]), "--out", f"{tmp_path}/../{tmp_path.name}/one.safetensors"], "another"),
    ):
        assert main(words) == 2, words
        assert part in capsys.readouterr().err
