"""Known answers of text, quality and box measures, on stub encoders; what has no weights is missing with a reason."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from motionlora.data.benchmark import references
from motionlora.data.clip import Clip
from motionlora.data.sprites import render
from motionlora.infer.measure_encoders import HEAD, ClipEncoder, DinoEncoder, Encoders, found_encoders
from motionlora.infer.measure_frames import B32, L14, FrameJudge, boxes_of_sprites
from motionlora.infer.measure_names import BY_BOXES, BY_QUALITY, BY_TEXT, names
from motionlora.infer.measure_pictures import CLIP_MEAN, cropped, letterboxed, plain, resized
from motionlora.infer.measure_quality import aesthetic, consistency, diversity, smoothness_linear
from motionlora.infer.measure_text import (
    Fit,
    Pixels,
    adjacent_similarity,
    all_pairs_similarity,
    paired_similarity,
    text_similarity,
)

A, B = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
CPU = torch.device("cpu")


def test_cosines_of_frames_and_text() -> None:
    half = torch.tensor([0.6, 0.8])
    assert text_similarity(torch.stack([A, A]), A) == 1
    assert text_similarity(torch.stack([A, B]), A) == 0.5
    assert text_similarity(torch.stack([half]), A) == pytest.approx(0.6)
    frames = torch.stack([A, A, B, B])
    assert adjacent_similarity(frames) == pytest.approx(2 / 3)
    assert all_pairs_similarity(frames) == pytest.approx(1 / 3)
    assert all_pairs_similarity(torch.stack([A, A, A])) == pytest.approx(1)
    assert paired_similarity(frames, torch.stack([A, B])) == 0.5
    assert math.isnan(all_pairs_similarity(A[None]))
    assert math.isnan(adjacent_similarity(A[None]))


def test_vbench_by_its_formulas() -> None:
    assert consistency(torch.stack([A, A, A])) == 1
    assert consistency(torch.stack([A, B, A, B])) == pytest.approx((0 + 0.5 + 0) / 3), (
        "neighbours 0, the first at times"
    )
    assert consistency(torch.stack([A, -A])) == 0, "cut off below 0"
    assert aesthetic(torch.stack([A, B]), torch.zeros(2), 5.0) == 0.5
    assert aesthetic(torch.stack([A, B]), torch.tensor([2.0, 4.0]), 1.0) == pytest.approx(0.4)


def test_smoothness_by_linear_interpolation() -> None:
    ramp = np.broadcast_to((20 * np.arange(5))[:, None, None, None], (5, 4, 4, 3)).astype(np.uint8)
    assert smoothness_linear(ramp) == 1
    assert smoothness_linear(np.full((4, 4, 4, 3), 9, np.uint8)) == 1
    flicker = ramp.copy()
    flicker[1] = 20 + 51  # one of two middle frames is off by a fifth
    assert smoothness_linear(flicker) == pytest.approx(1 - 0.2 / 2)
    assert math.isnan(smoothness_linear(ramp[:2]))


def test_diversity_is_a_variance() -> None:
    black, white = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 255, np.uint8)
    assert diversity([black, white]) == 0.25
    assert diversity([black, black, black]) == 0
    assert math.isnan(diversity([black]))


def test_pictures_are_prepared_as_they_are_named() -> None:
    wide = np.zeros((2, 100, 300, 3), np.uint8)
    wide[:, :, 100:200] = 200
    assert cropped(wide).shape == plain(wide).shape == letterboxed(wide).shape == (2, 224, 224, 3)
    assert (cropped(wide)[:, 10:-10, 10:-10] == 200).all(), "the sides are cut off"
    box = letterboxed(wide)
    assert np.abs(box[0, 0, 0] - 255 * np.array(CLIP_MEAN)).max() <= 0.5
    assert (box[0, 112, 112] == 200).all()
    assert (box[0, 112, 5] == 0).all(), "the sides are kept"
    assert resized(wide, "bilinear").shape == (2, 224, 672, 3)
    assert resized(np.zeros((1, 480, 832, 3), np.uint8), "bilinear").shape == (1, 224, 388, 3), "rounded down"


class Stub:
    """Pictures by their mean colour, captions as grey."""

    def __init__(self) -> None:
        self.asked: list[tuple[Fit, tuple[int, ...]]] = []

    def images(self, pixels: Pixels, fit: Fit = "crop") -> Tensor:
        self.asked.append((fit, pixels.shape))
        means = torch.tensor(pixels.reshape(len(pixels), -1, 3).mean(1) + 1e-3)
        return torch.nn.functional.normalize(means.float(), dim=-1)

    def text(self, caption: str) -> Tensor:
        del caption
        return torch.full((3,), 3**-0.5)


def test_every_measure_is_there_or_missing_with_its_reason() -> None:
    clip, other = (render(references()[number].scene) for number in (0, 1))
    boxes = boxes_of_sprites(clip.pixels, 1)
    wanted = {*names(BY_TEXT), *names(BY_QUALITY), *names(BY_BOXES)} - {"diversity"}
    assert {*B32, *L14} < wanted
    stub = Stub()
    whole = Encoders(stub, Stub(), Stub(), (torch.zeros(3), 5.0))
    some = Encoders(b32=stub, missing={"l14": "x", "dino": "y", "aesthetic": "z"})
    for encoders in (whole, found_encoders("", CPU), some):
        for reference, box in ((clip, boxes), (other, None)):
            values, missing = FrameJudge(encoders).measured(clip, "a fox", reference, box)
            assert {*values} | {*missing} == wanted
            assert not {*values} & {*missing}
            assert all(math.isfinite(value) for value in values.values())
            assert {"fml", "smoothness", "lpips"} <= {*missing}
    values, _ = FrameJudge(whole).measured(clip, "a fox", clip, boxes)
    assert values["miou"] > 0.9, "a clip keeps to its own boxes"
    assert values["to_reference"] == pytest.approx(1)
    assert values["aesthetic"] == pytest.approx(0.5)
    assert {fit for fit, _ in stub.asked} == {"crop", "whole", "plain"}
    empty = Clip(np.zeros_like(clip.pixels), 12.0, "")
    values, missing = FrameJudge(whole).measured(empty, "a fox", clip, boxes)
    assert "fewer than half" in missing["miou"]
    assert "miou" not in values
    assert boxes_of_sprites(empty.pixels, 1) is None


def test_what_is_missing_says_which_command_brings_it(tmp_path: Path) -> None:
    none = found_encoders("", CPU)
    assert {*none.missing} == {"b32", "l14", "dino", "aesthetic"}
    for folder, word in ((tmp_path / "nowhere", "is not there"), (tmp_path, "no weights as safetensors")):
        if folder == tmp_path:
            (tmp_path / "clip-vit-base-patch32").mkdir()
            (tmp_path / "clip-vit-base-patch32" / "pytorch_model.bin").write_bytes(b"never opened")
        found = found_encoders(str(folder), CPU)
        assert found.b32 is None
        assert word in found.missing["b32"]
        command = (
            f"from_pretrained('openai/clip-vit-base-patch32').save_pretrained('{folder / 'clip-vit-base-patch32'}')"
        )
        assert command in found.missing["b32"]
    (tmp_path / "clip-vit-base-patch32" / "model.safetensors").write_bytes(b"short")
    assert "is damaged" in found_encoders(str(tmp_path), CPU).missing["b32"]
    assert "aesthetic-predictor" in none.missing["aesthetic"]


def test_a_lack_of_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(_: bytes) -> None:
        raise MemoryError

    (tmp_path / f"{HEAD}.safetensors").write_bytes(b"whole")
    monkeypatch.setattr("safetensors.torch.load", lacking)
    with pytest.raises(MemoryError):
        found_encoders(str(tmp_path), CPU)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Small random CLIP and ViT, written as safetensors under their names, and a head on 8 features."""
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "fox</w>": 3, "f": 4, "o": 5, "x</w>": 6}
    tokenizer = CLIPTokenizer(words, [])
    small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small["num_attention_heads"] = 2
    torch.manual_seed(0)
    told = small | {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1}
    config: Any = CLIPConfig(text_config=told, vision_config=small | {"image_size": 224, "patch_size": 56})
    config.projection_dim = 8
    for name in ("clip-vit-base-patch32", "clip-vit-large-patch14"):
        CLIPModel(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    vit: Any = ViTModel(ViTConfig(**small, image_size=224, patch_size=56), add_pooling_layer=False)
    vit.save_pretrained(tmp_path / "dino-vitb16")
    save_file({"weight": torch.ones(1, 8), "bias": torch.ones(1)}, tmp_path / f"{HEAD}.safetensors")
    return tmp_path


def test_encoders_are_what_transformers_compute(weights: Path) -> None:
    from transformers import CLIPModel

    found = found_encoders(str(weights), CPU)
    assert found.missing == {}
    assert isinstance(found.b32, ClipEncoder)
    assert isinstance(found.dino, DinoEncoder)
    assert found.told.count("clip-vit") == 2
    clip: Any = CLIPModel.from_pretrained(weights / "clip-vit-base-patch32").eval()
    pixels = np.random.default_rng(0).integers(0, 256, (18, 60, 90, 3), dtype=np.uint8)
    features = found.b32.images(pixels, "plain")
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    colours = (torch.from_numpy(plain(pixels[17:])).float() / 255 - torch.tensor(CLIP_MEAN)) / deviation
    with torch.no_grad():
        wanted = clip.get_image_features(pixel_values=colours.movedim(-1, 1)).pooler_output
        told = clip.get_text_features(torch.tensor([[0, 2, 4, 5, 6, 1]])).pooler_output[0]
    assert features.shape == (18, 8)
    assert torch.allclose(features[17:], wanted / wanted.norm(dim=-1, keepdim=True), atol=1e-5)
    assert torch.allclose(features.norm(dim=-1), torch.ones(18))
    assert found.dino.images(pixels).shape == (18, 16)
    assert torch.allclose(found.b32.text("a fox"), told / told.norm(), atol=1e-5)


def test_a_caption_that_clip_would_cut_has_no_score(weights: Path) -> None:
    clip = Clip(np.zeros((3, 32, 32, 3), np.uint8), 12.0, "")
    judge = FrameJudge(found_encoders(str(weights), CPU))
    text = set(names(BY_TEXT))
    values, missing = judge.measured(clip, " ".join(["a"] * 75), clip, None)
    assert text <= {*values}
    values, missing = judge.measured(clip, " ".join(["a"] * 76), clip, None)
    assert not text & {*values}
    assert all("78 tokens, and CLIP reads 77" in missing[name] for name in text)
    assert {"tc_adjacent", "tc_pairs", "aesthetic"} <= {*values}


@pytest.mark.parametrize(
    ("name", "file", "damage", "reason"),
    [
        (
            "b32",
            "clip-vit-base-patch32/model.safetensors",
            lambda held: held.pop("text_projection.weight"),
            "lacks 1 of",
        ),
        ("dino", "dino-vitb16/model.safetensors", lambda held: held.pop("layernorm.bias"), "lacks 1 of"),
        ("l14", "clip-vit-large-patch14/tokenizer.json", None, "lacks its tokenizer"),
        ("dino", "dino-vitb16/config.json", None, "is damaged"),
        ("aesthetic", f"{HEAD}.safetensors", None, "is damaged"),
        ("aesthetic", f"{HEAD}.safetensors", lambda held: held.pop("bias"), "no linear head"),
        ("aesthetic", f"{HEAD}.safetensors", lambda held: held.update(weight=torch.ones(7)), "no linear head"),
    ],
)
def test_weights_that_are_not_whole_are_missing_and_never_made_up(
    weights: Path, name: str, file: str, damage: Any, reason: str
) -> None:
    from safetensors.torch import load_file, save_file

    path = weights / file
    if damage:
        held = load_file(path)
        damage(held)
        save_file(held, path, {"format": "pt"})
    elif path.name == "tokenizer.json":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:20])
    found = found_encoders(str(weights), CPU)
    assert {*found.missing} == {name}
    assert reason in found.missing[name]
    assert getattr(found, name) is None
