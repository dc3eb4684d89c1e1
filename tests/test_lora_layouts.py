"""Laws of LoRA layouts: every file in circulation is read at the strength it was trained with, or refused; what is
written loads in stock diffusers and by ComfyUI's published key rules."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_rules import comfy_updates, flat
from safetensors.torch import load_file, save_file
from torch import Tensor

from motionlora.data.errors import InputError
from motionlora.heads.lora import strengths
from motionlora.heads.lora_file import DTYPES, load_lora, read_lora, save_lora
from motionlora.heads.lora_inspect import inspect_lora
from motionlora.heads.lora_layouts import IN_BLOCK, native_name
from motionlora.heads.lora_verify import verify_lora
from motionlora.heads.lora_write import padded, whole_shapes
from motionlora.heads.motion_lora import MotionLora
from motionlora.heads.wan import WanBackbone

RANK, ALPHA, WIDTH, INNER, BLOCKS = 4, 2.0, 48, 64, 3
CONFIG = {"num_attention_heads": 4, "attention_head_dim": 12, "ffn_dim": INNER, "num_layers": BLOCKS}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def partial() -> MotionLora:
    """As a motion LoRA: q and k of blocks 1 and 2 only, alpha half the rank."""
    weights = {}
    for seed, module in enumerate(f"blocks.{block}.attn1.{name}" for block in (1, 2) for name in ("to_q", "to_k")):
        weights[f"{module}.lora_A.weight"] = draw(RANK, WIDTH, seed=seed)
        weights[f"{module}.lora_B.weight"] = draw(WIDTH, RANK, seed=seed + 50)
    return MotionLora(weights, RANK, ALPHA)


def updates(lora: MotionLora) -> dict[str, Tensor]:
    return {module: lora.alpha / lora.rank * b @ a for module, (a, b) in lora.modules().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float = 1e-6) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[module], other[module], rtol=0, atol=tolerance * float(other[module].abs().max() + 1))
        for module in one
    )


STEMS = {
    "native": lambda module: f"diffusion_model.{native_name(module)}",
    "diffusers": lambda module: f"transformer.{module}",
    "kohya": lambda module: f"lora_unet_{flat(module)}",
    "videox-fun": lambda module: f"lora_unet__{flat(module)}",
    "peft": lambda module: f"base_model.model.{module}",
    "peft native": lambda module: f"base_model.model.{native_name(module)}",
    "peft bare": lambda module: module,
    "diffsynth": lambda module: native_name(module),
    "diffsynth pipe": lambda module: f"pipe.dit.{native_name(module)}",
    "simpletuner": lambda module: f"diffusion_model.{module}",
}
FACTORS = {
    "A/B": (".lora_A.weight", ".lora_B.weight"),
    "default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "down/up": (".lora_down.weight", ".lora_up.weight"),
    "bare": (".lora_A", ".lora_B"),
    "dotted": (".lora.down.weight", ".lora.up.weight"),
}


def strange(layout: str, factors: str, *, alpha: float | None) -> dict[str, Tensor]:
    """The partial LoRA as another trainer writes it."""
    tensors = {}
    for module, (a, b) in partial().modules().items():
        stem = STEMS[layout](module)
        tensors[stem + FACTORS[factors][0]], tensors[stem + FACTORS[factors][1]] = a, b
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def fields(alpha: float, prefix: str = "transformer.", **more) -> str:
    values = {"r": RANK, "lora_alpha": alpha, "target_modules": ["to_q", "to_k"], **more}
    return json.dumps({prefix + name: value for name, value in values.items()})


METADATA, CONFLICT = {"lora_adapter_metadata": fields(ALPHA)}, {"lora_adapter_metadata": fields(8.0)}


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("layout", STEMS)
def test_every_layout_is_named_and_read_at_its_strength(tmp_path: Path, layout: str, factors: str) -> None:
    path, expected = tmp_path / "strange.safetensors", updates(partial())
    for tensors, header, told in (
        (strange(layout, factors, alpha=ALPHA), None, ".alpha tensors"),
        (strange(layout, factors, alpha=None), METADATA, "lora_adapter_metadata"),
        (strange(layout, factors, alpha=None), {"lora_config": fields(ALPHA, "")}, "lora_config"),
        (strange(layout, factors, alpha=ALPHA), METADATA, "which agree"),
    ):
        save_file(tensors, path, metadata=header)
        assert same(updates(load_lora(path)), expected)
        file = read_lora(path)
        assert file.layout.name == layout.partition(" ")[0]
        assert told in file.strength.source


@pytest.mark.parametrize("layout", STEMS)
def test_an_unknown_strength_is_an_error_that_an_option_settles(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "strange.safetensors"
    half = {key: value for key, value in strange(layout, "A/B", alpha=ALPHA).items() if "2" not in key or "A" in key}
    half |= strange(layout, "A/B", alpha=None)
    folded_or_not = {"ss_network_dim": "4", "ss_network_alpha": "2"}
    stripped = {"motion.format": "motionlora.lora/1", **folded_or_not}  # ours in diffusers' layout, its metadata lost
    for tensors, header, words in (
        (strange(layout, "A/B", alpha=None), None, "does not say the alpha"),
        (strange(layout, "A/B", alpha=None), folded_or_not, "does not say the alpha"),
        (strange(layout, "A/B", alpha=None), stripped, "does not say the alpha"),
        (half, None, "does not say the alpha"),
        (strange(layout, "A/B", alpha=ALPHA), CONFLICT, "alpha is 2 by its .alpha tensors and 8 by the header"),
    ):
        save_file(tensors, path, metadata=header)
        with pytest.raises(InputError, match=words) as refusal:
            load_lora(path)
        assert f"motionlora lora convert {path} --out NEW --alpha" in str(refusal.value)
        assert "alpha unknown" in inspect_lora(path)
        assert same(updates(load_lora(path, ALPHA)), updates(partial()))
        assert same(updates(load_lora(path, "rank")), updates(replace(partial(), alpha=float(RANK))))
    with pytest.raises(InputError, match="above 0"):
        load_lora(path, -1.0)


def test_what_stands_beside_the_file_or_equals_the_rank_is_no_guess(tmp_path: Path) -> None:
    path, beside = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(strange("peft", "A/B", alpha=None), path)
    beside.write_text(fields(ALPHA, ""))
    assert same(updates(load_lora(path)), updates(partial()))
    beside.write_text(fields(ALPHA, "", alpha_pattern={"blocks.1.self_attn.q": 8}))
    expected = updates(partial())
    expected["blocks.1.attn1.to_q"] *= 4
    assert same(updates(load_lora(path)), expected)
    beside.write_text(fields(ALPHA, "", use_rslora=True))
    assert same(updates(load_lora(path)), {module: 2 * update for module, update in updates(partial()).items()})
    for other in (fields(ALPHA, "").replace('"r": 4', '"r": 8'), "{", "[]"):
        beside.write_text(other)
        with pytest.raises(InputError, match="does not say"):
            load_lora(path)
    beside.unlink()
    save_file(strange("native", "A/B", alpha=None), path, metadata={"ss_network_alpha": "4"})
    assert same(updates(load_lora(path)), updates(replace(partial(), alpha=4.0)))


def test_two_spellings_in_one_file_are_refused(tmp_path: Path) -> None:
    path, native = tmp_path / "mixed.safetensors", strange("native", "A/B", alpha=ALPHA)
    for other in ("diffusers", "kohya", "diffsynth", "simpletuner"):
        save_file({**native, **strange(other, "A/B", alpha=ALPHA)}, path)
        with pytest.raises(InputError, match=r"mixes layouts|same weight"):
            load_lora(path)


def test_a_header_that_claims_ten_gigabytes_is_refused_by_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    path.write_bytes((10 * 2**30).to_bytes(8, "little") + b"{" * 64)
    with pytest.raises(InputError, match=r"claims a header of 10,240 MB, and the format allows 95") as refusal:
        load_lora(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("pattern", ["((.*)*)*!", "([a-z_]+[.]?)+!", "x" * 300, "["])
def test_a_pattern_that_could_take_for_ever_is_refused(tmp_path: Path, pattern: str) -> None:
    path, told = tmp_path / "slow.safetensors", json.loads(fields(ALPHA)) | {"transformer.alpha_pattern": {pattern: 1}}
    save_file(strange("native", "A/B", alpha=None), path, metadata={"lora_adapter_metadata": json.dumps(told)})
    with pytest.raises(InputError, match="damaged lora_adapter_metadata"):
        load_lora(path)


COMFY = {
    ("native", True): 1.0,
    ("native", False): 2.0,  # without alpha it is taken as it is: twice as strong as trained
    ("diffusers", True): None,
    ("kohya", True): 1.0,
    ("videox-fun", True): None,
    ("peft", True): None,
    ("diffsynth", True): None,
    ("simpletuner", True): None,
}


@pytest.mark.parametrize(("layout", "alpha"), COMFY)
def test_the_rules_of_comfyui_give_the_known_table(layout: str, alpha: bool) -> None:
    found = comfy_updates(strange(layout, "down/up", alpha=ALPHA if alpha else None), whole_shapes(CONFIG))
    factor = COMFY[layout, alpha]
    expected = {} if factor is None else {module: factor * update for module, update in updates(partial()).items()}
    assert same(found, expected)


STOCK = {
    ("native", True): 1.0,
    ("diffusers", True): 0.0,  # it knows no .alpha there
    ("diffusers", False): 2.0,  # without alpha it is taken for the rank
    ("kohya", True): 0.0,  # some modules of some blocks only
    ("videox-fun", True): 0.0,
    ("peft", True): 0.0,
    ("peft bare", True): 0.0,
    ("peft bare", False): 0.0,  # no error either: it finds no key and goes on
    ("diffsynth", True): 0.0,
    ("simpletuner", True): 0.0,
}


@pytest.mark.parametrize(("layout", "alpha"), STOCK)
def test_verify_finds_how_strongly_stock_diffusers_applies_it(
    twin: WanBackbone, tmp_path: Path, layout: str, alpha: bool
) -> None:
    path, factor = tmp_path / "strange.safetensors", STOCK[layout, alpha]
    save_file(strange(layout, "A/B", alpha=ALPHA if alpha else None), path)
    verdict = verify_lora(path, twin, alpha=ALPHA)
    assert verdict.factor == pytest.approx(factor, abs=1e-3)
    assert verdict.agrees == (factor == 1)
    assert bool(verdict.refusal) == (factor == 0)
    if factor != 1:
        with pytest.raises(InputError, match="applies it at 2 times its strength" if factor else "does not load it"):
            verdict.refuse_disagreement(path)
    assert not strengths(twin.transformer)
    if not alpha:
        with pytest.raises(InputError, match="does not say the alpha"):
            verify_lora(path, twin)


@pytest.mark.parametrize(("precision", "within"), [("fp32", 1e-6), ("bf16", 2e-2), ("fp16", 2e-3)])
@pytest.mark.parametrize("layout", ["native", "kohya", "diffusers"])
def test_what_we_write_is_read_as_it_was_but_for_rounding(
    tmp_path: Path, layout: Any, precision: Any, within: float
) -> None:
    path, lora = tmp_path / "ours.safetensors", padded(partial(), CONFIG) if layout == "kohya" else partial()
    save_lora(lora, path, layout, precision)
    assert {value.dtype for value in load_file(path).values() if value.ndim} == {DTYPES[precision]}
    assert same(updates(load_lora(path)), updates(lora), within)


def test_alphas_that_differ_are_folded_in(tmp_path: Path) -> None:
    path, tensors, expected = tmp_path / "strange.safetensors", {}, {}
    for alpha, (key, value) in enumerate(strange("native", "A/B", alpha=ALPHA).items()):
        tensors[key] = torch.tensor(float(alpha)) if key.endswith("alpha") else value.bfloat16()
    for name, module in ((native_name(module), module) for module in partial().modules()):
        a, b = (tensors[f"diffusion_model.{name}.lora_{factor}.weight"].float() for factor in "AB")
        expected[module] = tensors[f"diffusion_model.{name}.alpha"] / RANK * b @ a
    save_file(tensors, path)
    lora = load_lora(path)
    assert lora.alpha == lora.rank == RANK
    assert same(updates(lora), expected)


def test_kohya_is_filled_with_zeros_or_refused_with_the_reason(tmp_path: Path) -> None:
    whole = padded(partial(), CONFIG)
    assert len(whole.modules()) == BLOCKS * 10
    assert {module for module, update in updates(whole).items() if update.any()} == set(updates(partial()))
    with pytest.raises(InputError, match=r"blocks\.0\.self_attn\.q is missing here: name its model with --model"):
        save_lora(partial(), tmp_path / "x.safetensors", "kohya")
    image = f"blocks.1.{IN_BLOCK['cross_attn.k_img']}"
    more = {f"{image}.lora_A.weight": draw(RANK, WIDTH, seed=1), f"{image}.lora_B.weight": draw(WIDTH, RANK, seed=2)}
    with pytest.raises(InputError, match="save as native"):
        padded(MotionLora({**partial().weights, **more}, RANK, ALPHA), CONFIG)
    with pytest.raises(InputError, match="width 48, and this model has width 24"):
        padded(partial(), {**CONFIG, "num_attention_heads": 2})
    with pytest.raises(InputError, match="none of that name"):
        padded(partial(), {**CONFIG, "num_layers": 2})
