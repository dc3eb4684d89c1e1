"""Laws of LoRA files: every loader sees the same LoRA, nothing is lost, damage is refused in one sentence."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from motionlora.data.settings import InputError, NumbersError, StorageError
from motionlora.heads.backbone import TokenGrid
from motionlora.heads.head_map import HeadMap
from motionlora.heads.lora import MotionLora, attach, load_into, set_strengths, unload
from motionlora.heads.lora_file import load_lora, save_lora
from motionlora.heads.lora_inspect import inspect_lora, touched_heads

LAYOUTS = ["native", "diffusers"]
CHOSEN = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=bool)
SIZES = {"attn1.to_q": (48, 48), "attn1.to_k": (48, 48), "attn1.to_v": (48, 48), "attn1.to_out.0": (48, 48)}
SIZES |= {name.replace("attn1", "attn2"): size for name, size in SIZES.items()}
SIZES |= {"ffn.net.0.proj": (64, 48), "ffn.net.2": (48, 64)}


@pytest.fixture(scope="module")
def pipe(twin_folder: Path) -> WanPipeline:
    return WanPipeline.from_pretrained(twin_folder)


@pytest.fixture
def model(twin_folder: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(twin_folder, subfolder="transformer")  # pyright: ignore


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def output(model: WanTransformer3DModel) -> Tensor:
    text = draw(1, 7, model.config["text_dim"], seed=2)
    with torch.no_grad():
        return model(draw(1, 16, 3, 4, 4, seed=1), torch.tensor([500.0]), text, return_dict=False)[0]


def head_map() -> HeadMap:
    scores = np.random.default_rng(0).uniform(0, 0.5, (3, 4, 2))
    return HeadMap("twin", TokenGrid(5, 2, 2), (0.9998,), scores, 1, "abc", "a red circle")


def motion_lora(model: WanTransformer3DModel, alpha: float = 4.0) -> MotionLora:
    """As after a training on some heads of some blocks."""
    handle = attach(model, "draft", CHOSEN, rank=4, seed=0)
    state = {
        key: value + handle._free(key) * 0.2 * draw(*value.shape, seed=seed)
        for seed, (key, value) in enumerate(handle.state().items())
    }
    facts = {"rule": "code", "ratio": 1.3, "strength": 0.5, "settings": {"lr": 1e-4}, "note": "1.0", "text": "grün"}
    lora = handle.lora("temporal", head_map=head_map(), state=state, **facts)
    handle.remove()
    return MotionLora(lora.weights, 4, alpha, lora.head_map, lora.stage, lora.provenance)


def whole_lora(rank: int = 2, alpha: float = 1.0, blocks: int = 3) -> MotionLora:
    """Every linear module of every block, as trained elsewhere."""
    weights = {}
    for block in range(blocks):
        for seed, (name, (rows, columns)) in enumerate(SIZES.items()):
            stem = f"blocks.{block}.{name}"
            weights[f"{stem}.lora_A.weight"] = draw(rank, columns, seed=100 * block + seed)
            weights[f"{stem}.lora_B.weight"] = 0.2 * draw(rows, rank, seed=100 * block + seed + 50)
    return MotionLora(weights, rank, alpha)


def ours(model: WanTransformer3DModel, lora: MotionLora, strength: float) -> Tensor:
    load_into(model, lora, "ours", strength)
    result = output(model)
    unload(model, "ours")
    return result


@contextmanager
def listening() -> Iterator[list[str]]:
    """Every record of diffusers and peft from WARNING upward."""
    heard: list[str] = []
    ear = logging.Handler(logging.WARNING)
    ear.emit = lambda record: heard.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft")]
    for logger in loggers:
        logger.addHandler(ear)
    try:
        yield heard
    finally:
        for logger in loggers:
            logger.removeHandler(ear)


def stock(pipe: WanPipeline, path: Path, strength: float) -> Tensor:
    with listening() as heard:
        pipe.load_lora_weights(str(path), adapter_name="motion")
        pipe.set_adapters(["motion"], [strength])
    assert heard == []
    result = output(pipe.transformer)  # pyright: ignore
    pipe.unload_lora_weights()
    return result


def test_the_ear_hears_a_loader_that_finds_nothing(pipe: WanPipeline) -> None:
    with listening() as heard:
        pipe.load_lora_weights({"blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 48)})
    assert heard


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("alpha", [4.0, 2.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_stock_pipeline_gives_our_output(
    pipe: WanPipeline, model: WanTransformer3DModel, tmp_path: Path, layout: str, alpha: float, strength: float
) -> None:
    lora, path = motion_lora(model, alpha), tmp_path / "motion.safetensors"
    save_lora(lora, path, layout)  # pyright: ignore[reportArgumentType]
    plain, expected = output(model), ours(model, lora, strength)
    assert (expected - plain).abs().max() > 1e-3
    assert torch.equal(output(model), plain)
    torch.testing.assert_close(stock(pipe, path, strength), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(model, load_lora(path), strength), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", [*LAYOUTS, "kohya"])
def test_a_whole_lora_goes_through_every_layout(
    pipe: WanPipeline, model: WanTransformer3DModel, tmp_path: Path, layout: str
) -> None:
    lora, path = whole_lora(), tmp_path / "whole.safetensors"
    save_lora(lora, path, layout)  # pyright: ignore[reportArgumentType]
    expected = ours(model, lora, 0.7)
    torch.testing.assert_close(stock(pipe, path, 0.7), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(model, load_lora(path), 0.7), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_may_differ_from_module_to_module(
    pipe: WanPipeline, model: WanTransformer3DModel, tmp_path: Path, layout: str
) -> None:
    weights = dict(whole_lora(rank=2, blocks=3).weights)
    for key, value in whole_lora(rank=3).weights.items():
        if key.startswith("blocks.1.attn1"):
            weights[key] = value
    lora, path = MotionLora(weights, 2, 1.0), tmp_path / "mixed.safetensors"
    save_lora(lora, path, layout)  # pyright: ignore[reportArgumentType]
    expected = ours(model, lora, 1.0)
    torch.testing.assert_close(stock(pipe, path, 1.0), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(model, load_lora(path), 1.0), expected, rtol=0, atol=1e-5)


def test_two_files_with_strengths_as_stock(pipe: WanPipeline, model: WanTransformer3DModel, tmp_path: Path) -> None:
    for name, lora in (("spatial", motion_lora(model)), ("temporal", whole_lora())):
        save_lora(lora, tmp_path / f"{name}.safetensors")
        pipe.load_lora_weights(str(tmp_path / f"{name}.safetensors"), adapter_name=name)
        load_into(model, load_lora(tmp_path / f"{name}.safetensors"), name)
    for wanted in ({"spatial": 1.0, "temporal": 0.5}, {"spatial": 0.0, "temporal": 0.5}):
        pipe.set_adapters(list(wanted), list(wanted.values()))
        set_strengths(model, wanted)
        torch.testing.assert_close(output(pipe.transformer), output(model), rtol=0, atol=1e-5)  # pyright: ignore
    pipe.unload_lora_weights()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_save_and_load_is_the_identity(model: WanTransformer3DModel, tmp_path: Path, layout: str) -> None:
    lora, path = motion_lora(model), tmp_path / "deep" / "motion.safetensors"
    save_lora(lora, path, layout)  # pyright: ignore[reportArgumentType]
    back = load_lora(path)
    assert list(back.weights) == list(lora.weights)
    assert all(torch.equal(value, lora.weights[key]) for key, value in back.weights.items())
    assert (back.rank, back.alpha, back.stage) == (lora.rank, lora.alpha, lora.stage)
    assert back.provenance.items() >= lora.provenance.items()
    assert back.head_map is not None
    assert np.array_equal(back.head_map.scores, head_map().scores)
    assert back.provenance["caption"] == "a red circle"
    assert [found.name for found in path.parent.iterdir()] == ["motion.safetensors"]
    save_lora(back, tmp_path / "again" / "motion.safetensors", layout)  # pyright: ignore[reportArgumentType]
    assert (tmp_path / "again" / "motion.safetensors").read_bytes() == path.read_bytes()


def test_the_native_file_has_plain_keys_and_a_flat_header(model: WanTransformer3DModel, tmp_path: Path) -> None:
    path = tmp_path / "motion.safetensors"
    save_lora(motion_lora(model, alpha=2.0), path)
    expected = {
        f"diffusion_model.blocks.{block}.self_attn.{name}.lora_{factor}.weight"
        for block in (0, 2)
        for name in "qkvo"
        for factor in "AB"
    }
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == expected
        header = file.metadata()
    assert header["format"] == "pt"
    assert header["motion.stage"] == "temporal"
    assert header["ss_network_dim"] == header["ss_network_alpha"] == "4"
    assert "lora_adapter_metadata" not in header
    assert json.loads(header["motion.head_map"])["clip_hash"] == "abc"
    assert json.loads(header["motion.settings"]) == {"lr": 1e-4}


def test_the_diffusers_file_has_the_five_fields(model: WanTransformer3DModel, tmp_path: Path) -> None:
    path = tmp_path / "motion.safetensors"
    save_lora(motion_lora(model, alpha=2.0), path, "diffusers")
    with safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
    names = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
    assert set(fields) == {f"transformer.{name}" for name in names}
    assert (fields["transformer.r"], fields["transformer.lora_alpha"]) == (4, 2)


def test_what_diffusers_itself_saved_is_read(pipe: WanPipeline, model: WanTransformer3DModel, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model_state_dict

    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], alpha_pattern={"blocks.1.attn1.to_q": 8})
    model.add_adapter(config, "draft")
    state = get_peft_model_state_dict(model, adapter_name="draft")  # pyright: ignore
    state = {key: draw(*value.shape, seed=seed) * 0.1 for seed, (key, value) in enumerate(state.items())}
    fields = {f"transformer.{key}": value for key, value in config.to_dict().items() if not isinstance(value, set)}
    fields["transformer.target_modules"] = ["to_q"]
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(fields)}
    path = tmp_path / "stock.safetensors"
    save_file({f"transformer.{key}": value for key, value in state.items()}, path, metadata=header)
    unload(model, "draft")
    expected = stock(pipe, path, 1.0)
    lora = load_lora(path)
    assert lora.stage == "unknown"
    torch.testing.assert_close(ours(model, lora, 1.0), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
def test_alphas_of_strangers_count_once(
    pipe: WanPipeline, model: WanTransformer3DModel, tmp_path: Path, names: tuple[str, str]
) -> None:
    """`.alpha` tensors that differ, bf16 weights, both names of the factors: as diffusers reads them."""
    path, tensors = tmp_path / "strange.safetensors", {}
    for block, alpha in ((0, 1.0), (2, 8.0)):
        stem = f"diffusion_model.blocks.{block}.self_attn.q"
        tensors[f"{stem}.{names[0]}.weight"] = draw(4, 48, seed=block).bfloat16()
        tensors[f"{stem}.{names[1]}.weight"] = 0.2 * draw(48, 4, seed=block + 9).bfloat16()
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    expected = output(model)
    merged = dict(model.named_modules())
    for block, alpha in ((0, 1.0), (2, 8.0)):
        stem = f"diffusion_model.blocks.{block}.self_attn.q"
        a, b = (tensors[f"{stem}.{name}.weight"].float() for name in names)
        merged[f"blocks.{block}.attn1.to_q"].weight.data += alpha / 4 * b @ a  # pyright: ignore
    by_hand = output(model)
    for block, alpha in ((0, 1.0), (2, 8.0)):
        stem = f"diffusion_model.blocks.{block}.self_attn.q"
        a, b = (tensors[f"{stem}.{name}.weight"].float() for name in names)
        merged[f"blocks.{block}.attn1.to_q"].weight.data -= alpha / 4 * b @ a  # pyright: ignore
    assert (by_hand - expected).abs().max() > 1e-3
    lora = load_lora(path)
    assert lora.alpha == lora.rank == 4
    torch.testing.assert_close(ours(model, lora, 1.0), by_hand, rtol=0, atol=1e-4)


def test_kohya_is_refused_with_the_reason_where_it_would_not_load(model: WanTransformer3DModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"blocks\.0\.cross_attn\.q is missing.*native"):
        save_lora(motion_lora(model), tmp_path / "x.safetensors", "kohya")
    with pytest.raises(InputError, match="did you mean 'native'"):
        save_lora(motion_lora(model), tmp_path / "x.safetensors", "nativ")  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []


def test_inspect_tells_heads_and_norms(model: WanTransformer3DModel, tmp_path: Path) -> None:
    lora, path = motion_lora(model), tmp_path / "motion.safetensors"
    save_lora(lora, path)
    said = inspect_lora(path)
    assert touched_heads(load_lora(path), 4) == {0: [0, 3], 2: [1, 2, 3]}
    known = ("layout   native", "stage    temporal", "rank     4, alpha 4", "by motionlora's header")
    for words in (*known, "motion.clip_hash = abc", "2 x attn1"):
        assert words in said
    total = sum((b @ a).square().sum() for module, (a, b) in lora.modules().items() if module.startswith("blocks.2."))
    assert f"    2  {float(total) ** 0.5:18.4g}  1 2 3" in said
    save_lora(whole_lora(), path, "kohya")
    assert "layout   kohya" in inspect_lora(path)


def test_damage_is_refused_wherever_it_strikes(model: WanTransformer3DModel, tmp_path: Path) -> None:
    path, cut = tmp_path / "motion.safetensors", tmp_path / "cut.safetensors"
    save_lora(motion_lora(model), path)
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
        ("transformer.transformer_blocks.0.attn1.to_q", "lora_A.weight", "no plain LoRA weight of a Wan"),
        ("transformer.blocks.0.attn1.to_q", "lora_B.bias", "no plain LoRA weight"),
        ("transformer.blocks.0.attn1.to_qkv", "lora_A.weight", "no plain LoRA weight"),
        ("diffusion_model.blocks.0.self_attn.q", "diff_b", "no plain LoRA weight"),
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


def test_bad_numbers_and_bad_places_leave_no_file(model: WanTransformer3DModel, tmp_path: Path) -> None:
    lora = motion_lora(model)
    first = next(iter(lora.weights))
    sick = MotionLora({**lora.weights, first: lora.weights[first] * float("nan")}, 4, 4.0)
    with pytest.raises(NumbersError):
        save_lora(sick, tmp_path / "sick.safetensors")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="Cannot write"):
        save_lora(lora, tmp_path / "file" / "motion.safetensors")
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_file(
    model: WanTransformer3DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "motion.safetensors"
    save_lora(motion_lora(model), path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        save_lora(whole_lora(), path)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["motion.safetensors"]


def test_stock_reading_of_the_file_shows_the_zeros(model: WanTransformer3DModel, tmp_path: Path) -> None:
    path = tmp_path / "motion.safetensors"
    save_lora(motion_lora(model), path)
    tensors = load_file(path)
    rows = tensors["diffusion_model.blocks.0.self_attn.v.lora_B.weight"].reshape(4, -1).any(dim=1)
    columns = tensors["diffusion_model.blocks.0.self_attn.o.lora_A.weight"].reshape(4, 4, -1).any(dim=(0, 2))
    assert rows.tolist() == columns.tolist() == CHOSEN[0].tolist()
