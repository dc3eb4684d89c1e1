"""Noise that moves with boxes, and maps that tell an object in its box from bare background."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from motionlora.heads.backbone import Prompt, TokenGrid
from motionlora.heads.schedule import euler_times
from motionlora.heads.wan import WanBackbone
from motionlora.infer.guidance import Walk
from motionlora.infer.guide_none import NoGuidance
from motionlora.infer.guide_s2v2v import S2V2V, correlation_maps
from motionlora.infer.points import Boxes, read_boxes
from motionlora.infer.sample import sample
from motionlora.infer.track_points import Tracks
from motionlora.infer.trajectory_noise import Window, low_pass, noise_along, windows_of

FACTOR, EVERY = 4, 4
LINE = [{"frame": 0, "x": 0, "y": 8, "w": 16, "h": 24}, {"frame": 48, "x": 47, "y": 20, "w": 16, "h": 24}]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "boxes.json").write_text(json.dumps(LINE))
    return tmp_path / "boxes.json"


@pytest.fixture
def boxes(file: Path) -> Boxes:
    return read_boxes(file, (49, 64, 64))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inside(noise: Tensor, window: Window, frame: int) -> Tensor:
    rows, columns = window.cells
    return noise[:, :, frame, rows, columns].flatten()


def likeness(noise: Tensor, windows: list[Any], first: int, second: int) -> float:
    pair = torch.stack([inside(noise, windows[frame], frame) for frame in (first, second)])
    return float(torch.corrcoef(pair)[0, 1])


def test_windows_are_the_boxes_in_latent_cells_and_stay_in_the_frame(boxes: Boxes) -> None:
    (windows,) = windows_of(boxes, (13, 16, 16), FACTOR, EVERY)
    assert windows[0] == Window(2, 0, 6, 4)
    # the last latent frame stands at frame 46.5: x 45.53, y 19.63
    assert windows[-1] == Window(5, 11, 6, 4)
    hidden = Boxes(Tracks(boxes.tracks.positions, boxes.tracks.visible & False), boxes.sizes)
    assert windows_of(hidden, (13, 16, 16), FACTOR, EVERY) == [[None] * 13]


def test_the_boxes_hold_the_same_noise_as_far_as_the_filter_lets_it(boxes: Boxes) -> None:
    noise = drawn(1, 16, 13, 16, 16)
    (windows,) = windows_of(boxes, (13, 16, 16), FACTOR, EVERY)
    full, coarse = (noise_along(noise, boxes, FACTOR, EVERY, cut) for cut in ((1.0, 1.0), (0.25, 0.25)))
    assert abs(likeness(noise, windows, 0, 12)) < 0.15
    assert likeness(full, windows, 0, 12) > 0.3
    assert 0.02 < (coarse - noise).std() < (full - noise).std()


@pytest.mark.parametrize("cut", [(0.25, 0.1), (0.25, 0.5), (1.0, 1.0)])
def test_the_deviation_stays_one_and_no_cut_changes_nothing(boxes: Boxes, cut: tuple[float, float]) -> None:
    noise = drawn(2, 16, 13, 16, 16)
    moved = noise_along(noise, boxes, FACTOR, EVERY, cut)
    assert moved.std() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(noise_along(noise, boxes, FACTOR, EVERY, (0.0, 0.1)), noise)


def test_the_filter_lets_pass_what_is_as_low_as_its_cut() -> None:
    low = low_pass((8, 16, 16), (0.25, 0.5))
    assert (low[0, 0, 0], low[0, 0, 2], low[0, 2, 0], low[2, 0, 0], low[0, -2, 0]) == (1, 1, 1, 1, 1)
    assert (low[0, 0, 3], low[0, 3, 0], low[3, 0, 0], low[0, 2, 2]) == (0, 0, 0, 0)


def test_a_walk_starts_there_and_its_seed_stays_a_seed(twin: WanBackbone, file: Path) -> None:
    embeds = drawn(2, 512, 32, seed=3)

    def walk_from(noise: Tensor) -> Walk:
        times, reference = euler_times({}, 3, 3.0), drawn(1, 16, 13, 16, 16, seed=9)
        return Walk(twin, Prompt(embeds[:1]), Prompt(embeds[1:]), 1.0, times, noise, reference, torch.Generator())

    noise = drawn(1, 16, 13, 16, 16)
    guidance = S2V2V(boxes=file, noise="trajectory", noise_cut=(0.5, 0.5), iterations=0)
    moved = noise_along(noise, read_boxes(file, (49, 64, 64)), FACTOR, EVERY, (0.5, 0.5))
    assert torch.equal(sample(walk_from(noise), guidance), sample(walk_from(moved), NoGuidance()))
    assert guidance.dose_bound(3) is None


def test_noise_follows_boxes_only() -> None:
    with pytest.raises(ValidationError, match="noise can follow boxes only"):
        S2V2V(noise="trajectory")


def test_only_shares_of_the_frame_tell_an_object_in_its_box_from_bare_background() -> None:
    grid, cells = TokenGrid(2, 4, 4), torch.tensor([[[5, 6, 9, 10]]]).expand(1, 2, 4)
    places = {"cells": cells, "inside": torch.ones(1, 2, 4, dtype=torch.bool)}
    there, elsewhere = drawn(2, 8, seed=4)
    bare = elsewhere.expand(1, grid.tokens, 8)
    shown = bare.clone()
    shown[:, [cell + 16 * frame for frame in (0, 1) for cell in (5, 6, 9, 10)]] = there
    of_shown, of_bare = (correlation_maps(tokens, grid, places, 10.0) for tokens in (shown, bare))
    assert torch.allclose(of_shown, of_bare, atol=1e-6)
    shares = [correlation_maps(tokens, grid, places, 10.0, "frame").sum(-1) for tokens in (shown, bare)]
    assert torch.allclose(shares[1], torch.full_like(shares[1], 4 / 16))
    assert shares[0].min() > 0.9
