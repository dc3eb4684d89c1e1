"""Known answers of S2V2V: points and boxes from files and clips, their cells, correlation maps, and both updates."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from motionlora.data.clip import Clip
from motionlora.data.errors import InputError
from motionlora.data.sprites import Scene, Sprite, render
from motionlora.heads.backbone import Prompt, TokenGrid
from motionlora.heads.forwards import counting
from motionlora.heads.schedule import euler_times
from motionlora.heads.wan import WanBackbone
from motionlora.infer.guidance import Kept, Walk
from motionlora.infer.guide_s2v2v import S2V2V, correlation_maps, counted_pairs
from motionlora.infer.measure_boxes import box_scores, overlap
from motionlora.infer.points import box_clip, by_latent_frame, read_boxes, read_marks, salient_tracks, tracks_of
from motionlora.infer.sample import sample
from motionlora.infer.spots import TRACKER, spots_near
from motionlora.infer.track_points import Tracks
from motionlora.train.command import main

SIZE = (9, 16, 32)
FOOT = [{"frame": 0, "x": 4, "y": 4, "point": "foot"}, {"frame": 8, "x": 29, "y": 12, "point": "foot"}]
HAND = [{"frame": 0, "x": 20, "y": 4, "point": "hand"}, {"frame": 8, "x": 12, "y": 4, "point": "hand"}]
BOX = [{"frame": 0, "x": 2, "y": 2, "w": 8, "h": 8}, {"frame": 8, "x": 20, "y": 6, "w": 10, "h": 8}]

Write = Callable[[Any], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes JSON into a file of its own."""
    numbers = iter(range(100))

    def written(content: Any) -> Path:
        path = tmp_path / f"places{next(numbers)}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return written


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def walk_on(model: Any, *, steps: int = 10, reference: Tensor | None = None) -> Walk:
    embeds, noise, times = drawn(5, 2, 512, 32), drawn(1, 1, 16, 3, 4, 8), euler_times({}, steps, 3.0)
    reference = drawn(99, 1, 16, 3, 4, 8) if reference is None else reference
    return Walk(model, Prompt(embeds[:1]), Prompt(embeds[1:]), 3.0, times, noise, reference, torch.Generator())


def moving_sprite(frames: int = 13, shape: str = "star") -> tuple[Clip, np.ndarray]:
    """A red sprite that moves straight over a dark background, and its way."""
    way = np.linspace([24.0, 18.0], [40.0, 46.0], frames)
    ones = np.ones(frames)
    return render(Scene((Sprite(shape, "red", 12.0, way, 0 * ones, ones),), "dark", np.zeros((frames, 2)), 5)), way


# --- files and tracks ---


def test_named_points_go_straight_from_mark_to_mark_and_can_be_hidden(write: Write) -> None:
    hidden = [*FOOT, {"frame": 4, "x": 16.5, "y": 8, "point": "foot", "visible": False}]
    late = [{"frame": 2, "x": 1, "y": 2, "point": "late"}, {"frame": 5, "x": 4, "y": 2, "point": "late"}]
    tracks = tracks_of(write([*hidden, *late]), Clip(np.zeros((*SIZE, 3), np.uint8), 1.0, ""), TRACKER)
    assert np.allclose(tracks.positions[0], np.linspace([4, 4], [12, 29], 9))
    assert tracks.visible[0].tolist() == [True] * 4 + [False] * 4 + [True]
    assert np.allclose(tracks.positions[1, 2:6, 1], [1, 2, 3, 4])
    assert tracks.visible[1].tolist() == [2 <= frame <= 5 for frame in range(9)]


def test_a_click_is_followed_to_both_ends(write: Write) -> None:
    clip, way = moving_sprite()
    clicks = [{"frame": frame, "x": way[frame, 1], "y": way[frame, 0]} for frame in (0, 6, 12)]
    tracks = tracks_of(write(clicks), clip, TRACKER)
    assert tracks.positions.shape == (3, 13, 2)
    assert tracks.visible.all()
    assert np.abs(tracks.positions - way).max() < 1


def test_found_points_lie_on_what_moves_and_apart(write: Write) -> None:
    clip, way = moving_sprite()
    tracks = salient_tracks(clip, 6, 8.0, TRACKER)
    assert 3 <= len(tracks.positions) <= 6
    starts = tracks.positions[:, 0]
    assert (np.linalg.norm(starts - way[0], axis=1) < 12 + 8).all()  # the star's radius and the tracker's window
    assert np.abs(tracks.positions[:, -1] - starts - (way[-1] - way[0])).mean() < 1
    gaps = np.linalg.norm(starts[:, None] - starts[None], axis=-1)
    assert gaps[~np.eye(len(starts), dtype=bool)].min() >= 8
    assert len(salient_tracks(clip, 1, 8.0, TRACKER).positions) == 1
    flat = Clip(np.full((5, 16, 32, 3), 90, np.uint8), 1.0, "")
    assert salient_tracks(flat, 4, 8.0, TRACKER).positions.shape == (0, 5, 2)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ([{"frame": 0, "x": 32, "y": 4}], ["entry 1", "x 32, y 4 in frame 0", "outside", "9 frames of 32 x 16"]),
        ([*FOOT, {"frame": 0, "x": 4, "y": -1}], ["entry 3", "x 4, y -1"]),
        ([{"frame": 0, "x": 4, "y": 16}], ["entry 1", "x 4, y 16"]),
        ([{"frame": 9, "x": 4, "y": 4}], ["entry 1", "frame 9"]),
        ([{"frame": -1, "x": 4, "y": 4}], ["entry 1", "frame,"]),
        ([{"frame": 0, "x": 4}], ["entry 1", "y, Field required", "entries like"]),
        ([{"frame": 0, "x": "left", "y": 4}], ["entry 1", "x,"]),
        ('[{"frame": 0, "x": NaN, "y": 4}]', ["entry 1", "x,", "finite"]),
        ([{"frame": 0, "x": 4, "y": 4, "colour": 3}], ["entry 1", "colour"]),
        ([3], ["entry 1", "an object"]),
        ([], ["no list of places"]),
        ({"points": FOOT}, ["no list of places"]),
        ("[{", ["is no JSON"]),
        pytest.param("[" * 5000, ["is no JSON", "recursion"], id="nested"),
        ([*FOOT, FOOT[0]], ["'foot' twice in frame 0"]),
    ],
    ids=str,
)
def test_a_file_of_points_that_does_not_fit_is_refused(write: Write, content: Any, parts: list[str]) -> None:
    path = write(content)
    with pytest.raises(InputError) as refused:
        read_marks(path, SIZE)
    said = str(refused.value)
    assert [part for part in [path.name, *parts] if part not in said] == [], said
    assert "\n" not in said
    with pytest.raises(InputError, match="cannot be read"):
        read_marks(path.with_name("nowhere.json"), SIZE)


def test_what_is_hidden_may_be_outside(write: Write) -> None:
    read_marks(write([*FOOT, {"frame": 4, "x": -5, "y": 4, "point": "foot", "visible": False}]), SIZE)


def test_boxes_move_and_grow_straight_and_one_may_leave_the_frame_in_part(write: Write) -> None:
    cat = [{**box, "object": "cat"} for box in BOX[:1]]
    boxes = read_boxes(write([*BOX, *cat]), SIZE)
    assert np.allclose(boxes.tracks.positions[0], np.linspace([5.5, 5.5], [9.5, 24.5], 9))
    assert np.allclose(boxes.sizes[0], np.linspace([8, 8], [8, 10], 9))
    assert boxes.tracks.visible.tolist() == [[True] * 9, [True] + [False] * 8]
    for wrong in ({**BOX[0], "w": 0}, {**BOX[0], "x": -8}, {**BOX[0], "frame": 9}, {"frame": 0, "x": 1, "y": 1}):
        with pytest.raises(InputError, match="entry 2"):
            read_boxes(write([BOX[0], wrong]), SIZE)
    read_boxes(write([{**BOX[0], "x": -3}]), SIZE)


def test_latent_frames_stand_in_the_middle_of_their_frames() -> None:
    times = np.arange(13.0)
    way = np.stack([times, 2 * times], -1)[None]
    seen = np.ones((1, 13), bool)
    assert np.allclose(by_latent_frame(Tracks(way, seen), 4).positions[0, :, 0], [0, 2.5, 6.5, 10.5])
    seen[0, [1, 2, 4, 5, 6, 7, 8]] = False
    lost = np.where(seen[..., None], way, 77.0)
    found = by_latent_frame(Tracks(lost, seen), 4)
    assert found.visible.tolist() == [[True, True, False, True]]
    assert np.allclose(found.positions[0, :, 0], [0, 2.5, 6.5, 10.5])
    assert by_latent_frame(Tracks(way[:, :1], seen[:, :1]), 4).positions.shape == (1, 1, 2)


def test_boxes_are_drawn_where_they_are(write: Write) -> None:
    clip = box_clip(read_boxes(write(BOX), SIZE), SIZE, 12.0)
    assert clip.pixels.shape == (*SIZE, 3)
    assert (clip.pixels[0, 2:10, 2:10] == 0).all()
    dark = 1 - clip.pixels[..., 0] / 255
    assert dark[0].sum() == 64
    assert np.allclose(dark.sum((1, 2)), np.linspace(64, 80, 9), atol=1)
    rows, columns = np.indices((16, 32))
    centres = [[(dark[f] * side).sum() / dark[f].sum() for side in (rows, columns)] for f in range(9)]
    assert np.allclose(centres, np.linspace([5.5, 5.5], [9.5, 24.5], 9), atol=0.02)


# --- cells and maps ---


def disc(radius: float, grid: TokenGrid, *points: tuple[float, float]) -> Any:
    """Spots of points that stay, in every frame."""
    rows, columns = np.indices((grid.height, grid.width))
    near = np.stack([(rows - round(y)) ** 2 + (columns - round(x)) ** 2 <= radius**2 for y, x in points])
    places, near = (np.repeat(value[:, None], grid.frames, 1) for value in (np.array(points), near))
    return spots_near(places, near, np.ones(places.shape[:2], bool), grid)


def as_tensors(spots: Any) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in vars(spots).items()}


def test_a_disc_of_three_tokens_has_29_cells_the_points_own_first() -> None:
    grid = TokenGrid(2, 30, 52)
    spots = disc(3, grid, (10.3, 20.4))
    assert spots.cells.shape == (1, 2, 29)
    assert spots.inside.all()
    assert (spots.cells[..., 0] == 10 * 52 + 20).all()
    corner = disc(3, grid, (0.0, 0.0))
    assert corner.inside.sum() == 2 * 11
    assert len(set(spots.cells[0, 0].tolist())) == 29


def test_points_of_a_file_fall_into_the_cells_they_are_in(write: Write, twin: WanBackbone) -> None:
    guidance = S2V2V(points=write([*FOOT, *HAND]), radius=1)
    places = guidance.places(walk_on(twin))
    assert places["cells"][..., 0].tolist() == [[0, 1, 7], [2, 2, 1]]  # 2 x 4 cells of 8 x 8 pixels
    assert places["visible"].all()
    assert places["inside"].sum(-1).tolist() == [[3, 4, 3], [4, 4, 4]]
    default = S2V2V(points=write(FOOT)).places(walk_on(twin))
    assert default["inside"].sum(-1).tolist() == [[4, 6, 4]]  # a radius of at least 1.5


def test_boxes_are_the_masks_of_their_centres(write: Write, twin: WanBackbone) -> None:
    path = write([{"frame": frame, "x": 8, "y": 0, "w": 16, "h": 16} for frame in (0, 8)])
    places = S2V2V(boxes=path).places(walk_on(twin))
    for frame in range(3):
        inside = places["cells"][0, frame][places["inside"][0, frame]]
        assert sorted(inside.tolist()) == [1, 2, 5, 6]


def test_maps_are_the_softmax_of_the_frame_kept_near_the_track_and_brought_to_sum_one() -> None:
    grid = TokenGrid(3, 5, 6)
    tokens, places = drawn(0, 2, grid.tokens, 7), as_tensors(disc(2, grid, (0.0, 0.0), (2.0, 3.0)))
    maps = correlation_maps(tokens, grid, places, 10.0)
    assert torch.allclose(maps.sum(-1), torch.ones(2, 2, 3, 3), atol=1e-6)
    assert places["inside"][:, 0].sum(-1).tolist() == [6, 13]
    assert (maps[:, 0, :, :, 6:] == 0).all()
    frames = tokens.reshape(2, 3, 30, 7)
    for point, cell in ((0, 0), (1, 15)):
        for f, g in ((0, 1), (0, 2), (1, 2)):
            own = frames[:, f, cell]
            dense = (10 * torch.cosine_similarity(own.unsqueeze(1), frames[:, g], dim=-1)).softmax(-1)
            kept = dense[:, places["cells"][point, g]] * places["inside"][point, g]
            assert torch.allclose(maps[:, point, f, g], kept / kept.sum(-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("shift", [(0, 0), (1, -2), (-2, 1)])
def test_a_pure_shift_of_features_is_recovered(shift: tuple[int, int]) -> None:
    grid = TokenGrid(3, 9, 9)
    field = drawn(0, 9, 9, 40)
    tokens = torch.stack([field.roll((shift[0] * f, shift[1] * f), (0, 1)) for f in range(3)]).reshape(1, -1, 40)
    places = as_tensors(disc(4.5, grid, (4.0, 4.0)))
    maps = correlation_maps(tokens, grid, places, 100.0)
    for f, g in ((0, 1), (1, 2), (0, 2)):
        cell = int(places["cells"][0, g, maps[0, 0, f, g].argmax()])
        assert (cell // 9 - 4, cell % 9 - 4) == (shift[0] * (g - f), shift[1] * (g - f))
    at = np.array([[[4 + shift[0] * (f - 1), 4 + shift[1] * (f - 1)] for f in range(3)]], float)
    followed = spots_near(at, np.ones((1, 3, 9, 9), bool), np.ones((1, 3), bool), grid)
    followed_maps = correlation_maps(tokens, grid, as_tensors(followed), 100.0)
    assert (followed_maps[0, 0].argmax(-1) == 0).all()  # a point finds itself along its own track
    assert followed_maps[0, 0, :, :, 0].min() > 0.99


def test_pairs_are_of_frames_where_the_point_is_seen_the_later_one_within_range() -> None:
    visible = torch.tensor([[True, True, False, True], [True, True, True, True]])
    pairs = counted_pairs(visible, None)
    assert pairs[0].nonzero().tolist() == [[0, 1], [0, 3], [1, 3]]
    assert pairs[1].sum() == 6
    assert counted_pairs(visible, 1).nonzero().tolist() == [[0, 0, 1], [1, 0, 1], [1, 1, 2], [1, 2, 3]]


# --- the guidance ---


def loss_at(guidance: S2V2V, walk: Walk, latent: Tensor, target: Any, time: Tensor) -> tuple[float, Tensor]:
    leaf = latent.clone().requires_grad_()
    loss = guidance.loss(guidance.features(walk, leaf, time, walk.blank()), target).sum()
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad


def test_the_reference_itself_has_no_loss_and_no_gradient(write: Write, twin: WanBackbone) -> None:
    walk, guidance = walk_on(twin), S2V2V(points=write([*FOOT, *HAND]), block=2)
    assert walk.reference is not None
    with torch.no_grad():
        target = guidance.target(guidance.features(walk, walk.reference, walk.times[-1], walk.blank()))
    assert target["maps"].shape == (1, 2, 2, 3, 3, 6)
    loss, gradient = loss_at(guidance, walk, walk.reference, target, walk.times[-1])
    other_loss, other = loss_at(guidance, walk, walk.noise, target, walk.times[-1])
    assert loss < 1e-8
    assert other_loss > 1e-2
    assert gradient.abs().max() < 1e-3 * other.abs().max()


def test_hidden_frames_do_not_count(write: Write, twin: WanBackbone) -> None:
    """A point that is hidden in the middle latent frame: what its cells are like there does not matter."""
    hidden = [{"frame": frame, "x": 16, "y": 8, "point": "foot", "visible": frame != 1} for frame in (0, 1, 5, 8)]
    guidance = S2V2V(points=write([{**hidden[0]}, {**hidden[1]}, {**hidden[2], "visible": True}, hidden[3]]))
    places = guidance.places(walk_on(twin))
    assert places["visible"].tolist() == [[True, False, True]]
    pairs, grid = counted_pairs(places["visible"], None).unsqueeze(-1), TokenGrid(3, 2, 4)
    ours, theirs = drawn(0, 1, 24, 5), drawn(1, 1, 24, 5)

    def loss(tokens: Tensor) -> Tensor:
        maps = [(correlation_maps(x, grid, places, 10.0) * pairs).unsqueeze(1) for x in (tokens, theirs)]
        return guidance.loss(maps[0], {"maps": maps[1]})

    changed = ours.clone()
    changed[:, 8:16] += 1
    assert torch.equal(loss(ours), loss(changed))
    leaf = ours.clone().requires_grad_()
    loss(leaf).sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad[:, 8:16] == 0).all()
    assert (leaf.grad[:, :8] != 0).any()
    assert (leaf.grad[:, 16:] != 0).any()


def test_a_truncated_forward_shows_what_a_full_one_shows(write: Write, twin: WanBackbone) -> None:
    walk, guidance = walk_on(twin), S2V2V(points=write([*FOOT, *HAND]), block=2, taps=2)
    now = walk.times[2]
    with torch.no_grad():
        with twin.capturing([0, 2], "block") as seen:
            assert twin.velocity(walk.noise, now.expand(1), walk.prompt) is not None
        found, places = guidance.features(walk, walk.noise, now, walk.prompt), guidance.places(walk)
        pairs = counted_pairs(places["visible"], None).unsqueeze(-1)
        for index, block in enumerate((0, 2)):
            maps = correlation_maps(seen[block], twin.grid(walk.noise), places, 10.0)
            assert torch.equal(found[:, index], maps * pairs)


def test_maps_keep_their_share_of_the_frame_for_boxes_alone(write: Write, twin: WanBackbone) -> None:
    walk, files = walk_on(twin), {"boxes": write(BOX), "points": write(FOOT)}
    for kind, chosen, other in (("boxes", "frame", "near"), ("points", "near", "frame")):
        by_default, as_chosen, otherwise = (
            S2V2V.model_validate({kind: files[kind], **maps}).features(walk, walk.noise, walk.times[2], walk.prompt)
            for maps in ({}, {"maps": chosen}, {"maps": other})
        )
        assert torch.equal(by_default, as_chosen), kind
        assert not torch.equal(by_default, otherwise), kind


def test_the_blocks_are_every_second_one_below_half_depth() -> None:
    assert S2V2V().compared(30) == [8, 10, 12, 14]
    assert S2V2V().compared(40) == [13, 15, 17, 19]
    assert S2V2V().compared(6) == [0, 2]
    assert S2V2V(block=29, taps=15).compared(30) == list(range(1, 30, 2))
    assert S2V2V(taps=1).compared(2) == [0]


@pytest.mark.parametrize("update", ["latent", "velocity"])
def test_the_loss_falls_in_a_guided_step(write: Write, twin: WanBackbone, update: Any) -> None:
    walk, path = walk_on(twin), write([*FOOT, *HAND])
    guidance = S2V2V(points=path, update=update, block=1, eta=0.1, lr=0.01)
    now = walk.times[1]
    with guidance.steering(walk) as steer, torch.no_grad():
        moved = steer(walk.noise, now)
        assert walk.reference is not None
        target = guidance.target(guidance.features(walk, walk.reference, walk.times[-1], walk.blank()))
        before, after = (
            guidance.loss(guidance.features(walk, latent, now, walk.prompt), target).item()
            for latent in (walk.noise, moved)
        )
    assert after < before
    if update == "velocity":
        step = float(now - walk.times[2])
        assert (moved - walk.noise).square().mean().sqrt().item() == pytest.approx(0.1 * step, rel=1e-3)
        still = S2V2V(points=path, update=update, eta=0)
        with still.steering(walk) as steer:
            assert torch.equal(steer(walk.noise, now), walk.noise)


@pytest.mark.parametrize(
    ("values", "count"), [({}, 5), ({"update": "velocity"}, 1), ({"update": "velocity", "iterations": 0}, 0)]
)
def test_either_update_costs_what_it_says(write: Write, twin: WanBackbone, values: Any, count: int) -> None:
    guidance = S2V2V(points=write(FOOT), block=1, **values)
    with counting(twin.transformer) as tally:
        sample(walk_on(twin, steps=5), guidance)
    assert tally.forwards == pytest.approx(guidance.forwards(5, 2, 3))
    assert tally.gradients == pytest.approx(guidance.gradients(5, 3))
    assert guidance.gradients(5, 3) == pytest.approx(count * 2 / 3)  # one guided step, through two of three blocks


def test_places_are_found_once_and_follow_the_content_of_the_file(write: Write, twin: WanBackbone) -> None:
    path = write(FOOT)
    guidance, walk = S2V2V(points=path), walk_on(twin)
    first, before = guidance.places(walk), guidance.identity(3)
    path.write_text(json.dumps(HAND))
    assert guidance.places(walk) is first
    assert guidance.identity(3) != before
    other = Walk(**{**vars(walk), "kept": Kept()})
    assert not torch.equal(guidance.places(other)["cells"], first["cells"])


class Flat:
    """A model that shows grey whatever it is given."""

    device, multiple, frame_multiple, spatial_factor, blocks = torch.device("cpu"), 8, 4, 4, 4

    def grid(self, latent: Tensor) -> TokenGrid:
        return TokenGrid(3, 2, 4)

    def decode(self, latent: Tensor, fps: float) -> Clip:
        return Clip(np.full((9, 16, 32, 3), 90, np.uint8), fps, "")


def test_points_that_nobody_sees_twice_are_refused(write: Write, twin: WanBackbone) -> None:
    with pytest.raises(InputError, match="Of 0 points none is seen in two"):
        S2V2V().places(walk_on(Flat()))
    with pytest.raises(InputError, match="Of 1 points none is seen in two"):
        S2V2V(points=write([{"frame": 3, "x": 4, "y": 4}])).places(walk_on(Flat()))
    once = [{**mark, "frame": frame} for mark, frame in zip(FOOT, (5, 8), strict=True)]
    with pytest.raises(InputError, match="Of 1 points none is seen in two"):
        S2V2V(points=write(once)).places(walk_on(twin))
    with pytest.raises(InputError, match="one reference for all clips of a batch"):
        S2V2V(points=write(FOOT)).places(
            Walk(**{**vars(walk_on(twin, reference=drawn(3, 2, 16, 3, 4, 8))), "noise": drawn(4, 2, 16, 3, 4, 8)})
        )


@pytest.fixture
def words(twin_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    size = [
        word
        for name, value in zip(("frames", "height", "width"), SIZE, strict=True)
        for word in (f"--{name}", str(value))
    ]
    about = [
        "--model",
        str(twin_folder),
        "--caption",
        "a red circle",
        "--out",
        "out",
        "--suffix",
        "webp",
        "--device",
        "cpu",
    ]
    return ["generate", *about, *size, "--sample.steps", "2", "--guidance", "s2v2v", "--guidance.share", "1"]


def test_boxes_need_no_reference(write: Write, words: list[str]) -> None:
    assert main([*words, "--guidance.boxes", str(write(BOX))]) == 0
    story = json.loads((Path("out") / "a-red-circle-seed0.json").read_text())
    assert story["reference"]["file"] is None
    assert story["effort"]["dose_max"] > 0


@pytest.mark.parametrize(
    ("content", "options", "parts"),
    [
        ([{"frame": 0, "x": 40, "y": 4}], ["points"], ["entry 1", "outside of the clip"]),
        ([{**BOX[0], "x": 40}], ["boxes"], ["entry 1", "outside of the clip"]),
        (FOOT, ["points"], ["--reference"]),
        (FOOT, ["points", "boxes"], ["--guidance.boxes", "left out"]),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    write: Write,
    words: list[str],
    content: Any,
    options: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(write(content))
    assert main([*words, *(word for option in options for word in (f"--guidance.{option}", path))]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert [part for part in parts if part not in said] == [], said
    assert not Path("out").exists()


# --- how boxes are kept to ---


def test_overlap_of_the_same_box_is_one_apart_zero_and_by_half_a_third() -> None:
    box = np.array([2.0, 2.0, 6.0, 10.0])
    others = np.array([box, box + 20, box + np.array([0, 4, 0, 4]), [2, 2, 4, 10]])
    assert overlap(others, box).tolist() == pytest.approx([1, 0, 1 / 3, 1 / 2])


def test_a_sprite_in_its_own_box_has_a_high_score_and_one_that_is_away_none(write: Write) -> None:
    clip, way = moving_sprite(shape="circle")
    size = clip.pixels.shape[:3]

    def asked(shift: float, frames: int = 13) -> Any:
        rows = [
            {"frame": f, "x": way[f, 1] - 11.5 + shift, "y": way[f, 0] - 11.5, "w": 24, "h": 24} for f in range(frames)
        ]
        return read_boxes(write(rows), size)

    own, shifted = box_scores(clip.pixels, asked(0)), box_scores(clip.pixels, asked(12))
    assert own.miou > 0.85
    assert own.coverage == own.ap50 == 1
    assert own.distance < 0.03
    assert shifted.miou < 0.45
    assert shifted.distance == pytest.approx(12 / np.hypot(64, 64), abs=0.03)
    assert box_scores(clip.pixels, asked(0, frames=6)).miou == pytest.approx(own.miou, abs=0.03)
    empty = clip.pixels.copy()
    empty[6:] = empty[0, 0, 0]
    lost = box_scores(empty, asked(0))
    assert lost.coverage == pytest.approx(6 / 13)
    assert np.isnan([lost.miou, lost.ap50, lost.distance]).all()
    empty[6] = clip.pixels[6]
    assert box_scores(empty, asked(0)).miou == pytest.approx(own.miou * 7 / 13, abs=0.02)
