"""Laws of LoRA files: nothing is lost or half-written, damage and foreign things are refused in one sentence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_conformance import motion_lora, whole_lora
from safetensors import safe_open
from safetensors.torch import save_file

from motionlora.data.errors import InputError, NumbersError, StorageError
from motionlora.heads.backbone import TokenGrid
from motionlora.heads.head_map import HeadMap
from motionlora.heads.lora_file import load_lora, save_lora
from motionlora.heads.lora_inspect import inspect_lora, touched_heads
from motionlora.heads.motion_lora import MotionLora

SCORES = np.random.default_rng(0).uniform(0, 0.5, (3, 4, 2))


def trained(alpha: float = 4.0) -> MotionLora:
    """With all that a run tells of it."""
    facts = {"rule": "code", "ratio": 1.3, "strength": 0.5, "settings": {"lr": 1e-4}, "note": "1.0", "text": "grün"}
    heads = HeadMap("twin", TokenGrid(5, 2, 2), (0.9998,), SCORES, 1, "abc", "a red circle")
    return replace(motion_lora(4, alpha, ("to_q", "to_k", "to_v", "to_out.0")), head_map=heads, provenance=facts)


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    ("layout", "lora"), [("native", trained()), ("diffusers", trained(2.0)), ("kohya", whole_lora())]
)
def test_save_and_load_is_the_identity(tmp_path: Path, layout: Any, lora: MotionLora) -> None:
    path, again = tmp_path / "deep" / "motion.safetensors", tmp_path / "again" / "motion.safetensors"
    save_lora(lora, path, layout)
    back = load_lora(path)
    assert list(back.weights) == list(lora.weights)
    assert all(torch.equal(value, lora.weights[key]) for key, value in back.weights.items())
    assert (back.rank, back.alpha, back.stage) == (lora.rank, lora.alpha, lora.stage)
    assert back.provenance.items() >= lora.provenance.items()
    if lora.head_map is not None:
        assert back.head_map is not None
        assert np.array_equal(back.head_map.scores, SCORES)
        assert back.provenance["caption"] == "a red circle"
    assert [found.name for found in path.parent.iterdir()] == ["motion.safetensors"]
    save_lora(back, again, layout)
    assert again.read_bytes() == path.read_bytes()


def test_the_native_file_has_plain_keys_and_a_flat_header(tmp_path: Path) -> None:
    path = tmp_path / "motion.safetensors"
    save_lora(trained(alpha=2.0), path)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {
            f"diffusion_model.blocks.{block}.self_attn.{name}.lora_{factor}.weight"
            for block in (0, 2)
            for name in "qkvo"
            for factor in "AB"
        }
    header = header_of(path)
    assert (header["format"], header["motion.stage"]) == ("pt", "temporal")
    assert header["ss_network_dim"] == header["ss_network_alpha"] == "4"
    assert "lora_adapter_metadata" not in header
    assert json.loads(header["motion.head_map"])["clip_hash"] == "abc"
    assert json.loads(header["motion.settings"]) == {"lr": 1e-4}


def test_the_diffusers_file_has_the_five_fields(tmp_path: Path) -> None:
    path = tmp_path / "motion.safetensors"
    save_lora(trained(alpha=2.0), path, "diffusers")
    fields = json.loads(header_of(path)["lora_adapter_metadata"])
    names = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
    assert set(fields) == {f"transformer.{name}" for name in names}
    assert (fields["transformer.r"], fields["transformer.lora_alpha"]) == (4, 2)


def test_inspect_tells_heads_and_norms(tmp_path: Path) -> None:
    lora, path = trained(alpha=2.0), tmp_path / "motion.safetensors"
    save_lora(lora, path)
    said = inspect_lora(path)
    assert touched_heads(load_lora(path), 4) == {0: [0, 3], 2: [2]}
    known = ("layout   native", "stage    temporal", "rank     4, alpha 4", "by motionlora's header")
    for words in (*known, "motion.clip_hash = abc", "2 x attn1"):
        assert words in said
    total = sum((b @ a / 2).square().sum() for name, (a, b) in lora.modules().items() if name.startswith("blocks.2."))
    assert f"    2  {float(total) ** 0.5:18.4g}  2" in said


def test_inspect_tells_what_a_lora_is_bound_to(tmp_path: Path) -> None:
    told = {"until": 0.85, "expert": "high", "identity": {"weights": "nf4"}}
    save_lora(replace(trained(), provenance=told), tmp_path / "bound.safetensors")
    save_lora(replace(trained(), provenance={"identity": {}}), tmp_path / "free.safetensors")
    lines = ("until    noise 0.85", "expert   high-noise", "base     rounded to nf4")
    bound, free = (inspect_lora(tmp_path / f"{name}.safetensors") for name in ("bound", "free"))
    assert [line in bound for line in lines] == [True] * 3
    assert [line in free for line in lines] == [False] * 3


def test_damage_is_refused_wherever_it_strikes(tmp_path: Path) -> None:
    path, cut = tmp_path / "motion.safetensors", tmp_path / "cut.safetensors"
    save_lora(trained(), path)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    places = {0, 1, 7, 8, 9, 50, header, header + 7, header + 8, header + 9, len(whole) // 2, len(whole) - 1}
    damaged = [whole[:place] for place in sorted(places)]
    damaged += [b"\x80\x02}q\x00.", b"GIF89a" * 99, whole + b"x", b"\xff" * 8 + whole[8:], b"\x00" * len(whole)]
    damaged += [whole[:8] + b"!" + whole[9:], whole[:40] + b"\xff\xfe" + whole[42:]]
    for content in damaged:
        cut.write_bytes(content)
        for read in (load_lora, inspect_lora):
            with pytest.raises(InputError, match=r"cut\.safetensors") as refusal:
                read(cut)
            assert "\n" not in str(refusal.value)
    for absent in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(InputError):
            load_lora(absent)


@pytest.mark.parametrize(
    ("prefix", "suffix", "words"),
    [
        ("model.diffusion_model.blocks.0.self_attn.q", "lora_A.weight", r"has the key model\.diff.* are accepted"),
        ("unet.blocks.0.attn1.to_q", "lora_A.weight", "has the key unet"),
        ("transformer.single_blocks.0.attn1.to_q", "lora_A.weight", "no plain LoRA weight of a Wan"),
        ("transformer.blocks.0.attn1.to_q", "lora_B.bias", "no plain LoRA weight"),
        ("transformer.blocks.0.attn1.to_qkv", "lora_A.weight", "no plain LoRA weight"),
        ("diffusion_model.blocks.0.self_attn.q", "diff_b", "no plain LoRA weight"),
        ("diffusion_model.blocks.#.self_attn.q", "lora_A.weight", "no plain LoRA weight"),
        ("transformer.blocks.0.attn1.to_q", "dora_scale", "no plain LoRA weight"),
        ("transformer.blocks.0.attn1.to_q", "lora_A.weight", r"no .*lora_B\.weight"),
        ("diffusion_model.blocks.0.self_attn.q", "alpha", "an alpha but no weight"),
    ],
)
def test_other_layouts_are_named(tmp_path: Path, prefix: str, suffix: str, words: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({f"{prefix}.{suffix}": torch.ones(1) if suffix == "alpha" else torch.ones(4, 48)}, path)
    with pytest.raises(InputError, match=words):
        load_lora(path)


def test_odd_contents_are_refused(tmp_path: Path) -> None:
    stem, path = "diffusion_model.blocks.0.self_attn.q", tmp_path / "odd.safetensors"
    good = {f"{stem}.lora_A.weight": torch.ones(4, 48), f"{stem}.lora_B.weight": torch.ones(48, 4)}
    ours = {"motion.format": "motionlora.lora/1", "motion.head_map": "{}"}
    native, scale = {"lora_adapter_metadata": "{"}, {"lora_adapter_metadata": '{"transformer.lora_alpha": 1e999}'}
    for tensors, header, words in (
        ({**good, f"{stem}.lora_A.weight": torch.full((4, 48), float("nan"))}, None, "NaN"),
        ({**good, f"{stem}.lora_A.weight": torch.ones(4, 48, dtype=torch.int32)}, None, "non-float"),
        ({**good, f"{stem}.lora_A.weight": torch.ones(3, 48)}, None, "factors"),
        ({**good, f"{stem}.lora_A.weight": torch.ones(())}, None, "factors"),
        ({**good, f"{stem}.lora_down.weight": torch.ones(4, 48)}, None, "two names"),
        ({**good, f"{stem}.alpha": torch.tensor(float("nan"))}, None, "alpha"),
        ({**good, f"{stem}.alpha": torch.ones(2)}, None, "alpha"),
        ({**good, "transformer.blocks.0.attn1.to_k.lora_A.weight": torch.ones(4, 48)}, None, "mixes layouts"),
        (good, native, "damaged lora_adapter_metadata"),
        (good, scale, "infinite alpha"),
        (good, {**ours, "ss_network_dim": "4", "ss_network_alpha": "4"}, "head map"),
        ({}, None, "no tensor"),
    ):
        save_file(tensors, path, metadata=header)
        with pytest.raises(InputError, match=words):
            load_lora(path)


def test_bad_numbers_unknown_layouts_and_bad_places_leave_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    lora, path = trained(), tmp_path / "x.safetensors"
    sick, big = ({key: value * factor for key, value in lora.weights.items()} for factor in (float("nan"), 1e5))
    odd: Any = "nativ"
    with pytest.raises(NumbersError, match="NaN or infinite"):
        save_lora(MotionLora(sick, 4, 4.0), path)
    with pytest.raises(NumbersError, match="beyond the range of fp16"):
        save_lora(MotionLora(big, 4, 4.0), path, precision="fp16")
    with pytest.raises(InputError, match="did you mean native"):
        save_lora(lora, path, odd)
    with pytest.raises(StorageError, match="could not be written"):
        save_lora(lora, tmp_path / "file" / "motion.safetensors")
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "motion.safetensors"
    save_lora(trained(), path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        save_lora(whole_lora(), path)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["motion.safetensors"]
