"""Laws of the head map: rules on saved scores, files, the picture, and independence from torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from motionlora.data.settings import InputError, StorageError
from motionlora.heads.backbone import TokenGrid
from motionlora.heads.head_map import FORMAT, HeadMap
from motionlora.heads.head_map_picture import draw_head_map
from motionlora.heads.settings import Rule

RULES: tuple[Rule, ...] = ("code", "paper")


def head_map(scores: Any = None, blocks: int = 6, heads: int = 4) -> HeadMap:
    if scores is None:
        scores = np.random.default_rng(0).uniform(0.01, 0.9, size=(blocks, heads, 2))
    scores = np.asarray(scores, dtype=np.float64)
    return HeadMap("tiny", TokenGrid(13, 8, 8), (0.9998, 0.5), scores, 5, "0123abcd", "a red disc on a grey floor")


def test_the_rules_are_those_of_release_and_paper() -> None:
    # temporal mass over spatial mass:    0.5          0.8          1.0          1.2          1.3          2
    ratios = head_map([[[0.4, 0.2], [0.5, 0.4], [0.3, 0.3], [0.5, 0.6], [0.1, 0.13], [0.2, 0.4]]])
    assert ratios.temporal("code", 1.3).tolist() == [[False, False, False, False, True, True]]
    assert ratios.temporal("paper", 1.3).tolist() == [[False, True, True, True, True, True]]
    assert ratios.temporal().tolist() == ratios.temporal("code", 1.3).tolist()


@pytest.mark.parametrize("rule", RULES)
def test_kinds_split_the_heads(rule: Rule) -> None:
    heads = head_map()
    spatial, temporal = heads.chosen("spatial", rule), heads.chosen("temporal", rule)
    assert (spatial ^ temporal).all()
    assert heads.chosen("all", rule).all()
    assert (heads.counts(rule) == np.stack((spatial.sum(1), temporal.sum(1)), axis=1)).all()
    assert spatial.dtype == bool


@pytest.mark.parametrize("ratio", [1.0, 1.3, 2.0])
def test_the_paper_leans_to_temporal_heads_the_code_to_spatial_ones(ratio: float) -> None:
    heads = head_map()
    assert (heads.temporal("paper", ratio) | ~heads.temporal("code", ratio)).all()
    assert (heads.temporal("code", 1 / ratio) | ~heads.temporal("code", ratio)).all()


def test_a_block_may_have_one_kind_only() -> None:
    heads = head_map([[[0.1, 0.9], [0.1, 0.8]], [[0.9, 0.1], [0.8, 0.1]]])
    assert heads.counts().tolist() == [[0, 2], [2, 0]]
    assert not heads.chosen("spatial")[0].any()


def test_wrong_choices_are_one_sentence() -> None:
    heads: Any = head_map()
    with pytest.raises(InputError, match="did you mean 'paper'"):
        heads.temporal("papper")
    with pytest.raises(InputError, match="did you mean 'temporal'"):
        heads.chosen("temporel")
    for ratio in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="ratio"):
            heads.temporal("code", ratio)


@pytest.mark.parametrize(
    "scores", [[[0.1, 0.2]], [[[0.1, 0.2, 0.3]]], [[[np.nan, 0.2]]], [[[-0.1, 0.2]]], [[[0.1, 7]]]]
)
def test_impossible_scores_are_refused(scores: Any) -> None:
    with pytest.raises(InputError, match="scores"):
        head_map(scores)


def test_a_saved_map_comes_back_whole(tmp_path: Path) -> None:
    heads = head_map()
    heads.save(tmp_path / "new" / "heads.json", "paper", 1.5)
    loaded = HeadMap.load(tmp_path / "new" / "heads.json")
    assert (loaded.scores == heads.scores).all()
    for field in ("backbone", "grid", "times", "mask_block", "clip_hash", "caption"):
        assert getattr(loaded, field) == getattr(heads, field)
    content = json.loads((tmp_path / "new" / "heads.json").read_text())
    assert (content["format"], content["rule"], content["ratio"]) == (FORMAT, "paper", 1.5)
    assert content["temporal"] == heads.temporal("paper", 1.5).astype(int).tolist()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["heads.json"]


@pytest.mark.parametrize("field", ["backbone", "grid", "times", "scores", "mask_block", "clip_hash", "caption"])
def test_a_map_without_a_field_or_with_a_wrong_one_is_refused(field: str) -> None:
    content = json.loads(json.dumps(head_map().as_json()))
    with pytest.raises(InputError, match=f"'{field}'"):
        HeadMap.from_json({name: value for name, value in content.items() if name != field}, "heads.json")
    with pytest.raises(InputError, match=r"heads\.json is .*damaged"):
        HeadMap.from_json({**content, field: None}, "heads.json")


def test_files_that_are_no_head_maps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        HeadMap.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="Is a directory"):
        HeadMap.load(tmp_path)
    for text in ("", "not json", "[]", "{}", '{"format": "motionlora.head_map/2"}', '"x"'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(InputError, match="no head map"):
            HeadMap.load(tmp_path / "other.json")
    (tmp_path / "other.json").write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(InputError, match="no head map"):
        HeadMap.load(tmp_path / "other.json")


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        head_map().save(tmp_path / "file" / "heads.json")


@pytest.mark.parametrize("size", [(1, 1), (6, 4), (30, 12), (40, 40)])
@pytest.mark.parametrize("rule", RULES)
def test_the_picture_has_both_colours_and_fits(tmp_path: Path, size: tuple[int, int], rule: Rule) -> None:
    heads = head_map(blocks=size[0], heads=size[1])
    draw_head_map(heads, tmp_path / "map.png", rule)
    picture = np.asarray(Image.open(tmp_path / "map.png").convert("RGB"))
    assert picture.shape[0] < 1400
    assert picture.shape[1] < 1400
    for colour in ((0, 114, 178), (213, 94, 0)):  # at least in the scale of colours
        assert (picture == colour).all(axis=-1).any()
    border = np.concatenate([picture[:8].reshape(-1, 3), picture[:, -8:].reshape(-1, 3), picture[-8:].reshape(-1, 3)])
    assert (border == 255).all()


def test_a_head_of_mass_zero_is_drawn(tmp_path: Path) -> None:
    draw_head_map(head_map([[[0.0, 0.0], [0.0, 0.5], [0.5, 0.0]]]), tmp_path / "map.png")


def test_neither_torch_nor_the_model_is_needed_to_apply_a_rule(tmp_path: Path) -> None:
    head_map().save(tmp_path / "heads.json")
    program = """
import sys
from motionlora.heads.head_map import HeadMap
from motionlora.heads.head_map_picture import draw_head_map
heads = HeadMap.load(sys.argv[1])
draw_head_map(heads, sys.argv[2], "paper")
print(heads.counts().sum(), "torch" in sys.modules)
"""
    answer = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "heads.json", tmp_path / "map.png"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert answer.stdout.split() == ["24", "False"]
