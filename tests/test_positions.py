"""Laws of sparse time positions (methods.md section 2.7 and check 7)."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from motionlora.data.settings import InputError
from motionlora.heads.backbone import Prompt
from motionlora.heads.positions import PositionKind, positioned, sparse_positions
from motionlora.heads.wan import WanBackbone

KINDS = get_args(PositionKind)
STOCK = torch.arange(5.0)


def said(model: WanBackbone) -> Tensor:
    """The velocity of one fixed latent of 5 latent frames, two clips with two captions."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 16, 5, 4, 6, generator=generator)
    prompt = Prompt(torch.randn(2, 512, 32, generator=generator))
    with torch.no_grad():
        return model.velocity(latent, torch.tensor([0.9, 0.3]), prompt)


def moved(model: WanBackbone, positions: Tensor) -> Tensor:
    with model.positioned(positions):
        return said(model)


def test_known_positions_of_17_from_81_frames() -> None:
    known = {
        "none": [0, 1, 2, 3, 4],
        "paper": [0, 4.2, 8.4, 12.6, 16.8],
        "paper_pixel": [i * 81 / 17 for i in range(5)],
        "linear": [0, 5, 10, 15, 20],
        "aligned": [0, 3.5, 8.5, 13.5, 18.5],
    }
    for kind in KINDS:
        expected = torch.tensor(known[kind], dtype=torch.float64)
        torch.testing.assert_close(sparse_positions(kind, frames=81, stride=5), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_kept_stands_at_its_own_place(kind: PositionKind) -> None:
    assert torch.equal(sparse_positions(kind, frames=81, stride=1), torch.arange(21, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("frames", "stride"), [(81, 5), (49, 3), (81, 20), (1, 1), (1, 7)])
def test_positions_start_at_zero_rise_and_stay_inside_the_clip(kind: PositionKind, frames: int, stride: int) -> None:
    positions = sparse_positions(kind, frames=frames, stride=stride)
    assert positions[0] == 0
    assert (positions.diff() > 0).all()
    assert positions[-1] <= (frames - 1) // 4
    assert positions.dtype == torch.float64


@pytest.mark.parametrize(("frames", "stride"), [(80, 5), (81, 3), (81, 0), (0, 1), (49, 5), (81, -1)])
def test_counts_that_the_vae_would_cut_are_refused(frames: int, stride: int) -> None:
    with pytest.raises(InputError, match=r"4k \+ 1"):
        sparse_positions("aligned", frames=frames, stride=stride)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match="aligned"):
        sparse_positions("centred", frames=81, stride=5)  # pyright: ignore[reportArgumentType]


def test_integer_positions_are_stock_bit_for_bit(twin: WanBackbone) -> None:
    assert torch.equal(moved(twin, STOCK), said(twin))
    assert torch.equal(moved(twin, STOCK.to(torch.int64)), said(twin))


def test_only_differences_of_positions_matter(twin: WanBackbone) -> None:
    aligned = sparse_positions("aligned", frames=81, stride=5)
    torch.testing.assert_close(moved(twin, aligned + 7.25), moved(twin, aligned), atol=5e-6, rtol=0)


def test_sparse_positions_change_the_output(twin: WanBackbone) -> None:
    assert (moved(twin, sparse_positions("aligned", frames=81, stride=5)) - said(twin)).abs().max() > 1e-4


def test_height_and_width_lanes_are_stock(twin: WanBackbone) -> None:
    rope: Any = twin.transformer.rope
    latent = torch.zeros(1, 16, 5, 4, 6)
    stock = rope(latent)
    with twin.positioned(STOCK * 3.3):
        patched = rope(latent)
    for before, after in zip(stock, patched, strict=True):
        assert torch.equal(before[..., rope.t_dim :], after[..., rope.t_dim :])
        assert before.dtype == after.dtype
        assert before.shape == after.shape


def test_inner_context_counts_and_the_outer_one_comes_back(twin: WanBackbone) -> None:
    with twin.positioned(STOCK * 2):
        outer = said(twin)
        assert torch.equal(moved(twin, STOCK * 3), moved(twin, STOCK * 3))
        assert not torch.equal(moved(twin, STOCK * 3), outer)
        assert torch.equal(said(twin), outer)


def test_positions_are_restored_also_after_an_exception(twin: WanBackbone) -> None:
    stock = said(twin)
    with pytest.raises(RuntimeError, match="halfway"), twin.positioned(STOCK * 2):
        raise RuntimeError("halfway")
    assert torch.equal(said(twin), stock)
    with pytest.raises(InputError, match="3 positions for 5"):
        moved(twin, STOCK[:3])
    assert torch.equal(said(twin), stock)
    rope: Any = twin.transformer.rope
    assert not rope._forward_hooks


def test_positions_that_are_not_numbers_are_refused(twin: WanBackbone) -> None:
    for wrong in (STOCK / 0, STOCK[None]):
        with pytest.raises(InputError, match="finite"), twin.positioned(wrong):
            pass


def test_a_wrapped_transformer_is_reached(twin: WanBackbone) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    expected = moved(twin, STOCK * 2)
    with positioned(Wrapper(twin.transformer), STOCK * 2):
        assert torch.equal(said(twin), expected)
