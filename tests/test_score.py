"""Laws of scoring: streamed shares are the dense ones, masks mean what they say, the forward is left alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from einops import rearrange
from torch import Tensor

from motionlora.data.settings import InputError
from motionlora.heads.backbone import Prompt, TokenGrid
from motionlora.heads.capture import capturing
from motionlora.heads.head_map import HeadMap
from motionlora.heads.score import attention_shares, head_scores, mask_block, mask_rows, scoring

GRIDS = [TokenGrid(13, 8, 8), TokenGrid(5, 3, 4), TokenGrid(3, 1, 2), TokenGrid(1, 4, 4), TokenGrid(4, 7, 9)]


def dense_masks(grid: TokenGrid) -> tuple[Tensor, Tensor]:
    """Both s x s masks by another road: the band once, and the band carried from (h w f) to (f h w) order."""
    per_frame = grid.height * grid.width
    block = max(1, min(128, per_frame // 12))
    number = torch.arange(grid.frames * per_frame) // block
    band = (number[:, None] - number[None]).abs() < max(1, per_frame // block)
    sizes = {"f": grid.frames, "p": per_frame, "g": grid.frames, "o": per_frame}
    return band, rearrange(band, "(p f) (o g) -> (f p) (g o)", **sizes)


def dense_shares(q: Tensor, k: Tensor, grid: TokenGrid) -> Tensor:
    q, k = (rearrange(x.double(), "b s h d -> b h s d") for x in (q, k))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
    return torch.stack([(weights * mask).sum(dim=(0, 2, 3)) for mask in dense_masks(grid)], dim=1) / (
        q.shape[0] * grid.tokens
    )


def random_qk(grid: TokenGrid, scale: float = 2.0, clips: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = scale * torch.randn(2, clips, grid.tokens, 4, 6, generator=generator)
    return q, k


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("rows", [None, 1, 7, 10_000])
def test_streamed_equals_dense(grid: TokenGrid, rows: int | None) -> None:
    if rows == 1 and grid.tokens > 300:
        rows = 29
    q, k = random_qk(grid, clips=2)
    shares = attention_shares(q, k, grid, rows=rows)
    assert shares.dtype == torch.float64
    assert torch.allclose(shares, dense_shares(q, k, grid), atol=1e-6, rtol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rows_of_the_masks_are_those_of_the_dense_masks(grid: TokenGrid) -> None:
    rows = torch.randperm(grid.tokens, generator=torch.Generator().manual_seed(0))[:11]
    spatial, temporal = dense_masks(grid)
    assert torch.equal(mask_rows(grid, rows), torch.stack((spatial[rows], temporal[rows]), dim=1).float())


@pytest.mark.parametrize("grid", [*GRIDS, TokenGrid(2, 40, 40)], ids=str)
def test_both_masks_have_the_same_area_and_the_diagonal(grid: TokenGrid) -> None:
    rows = torch.arange(grid.tokens)
    spatial, temporal = mask_rows(grid, rows).sum(dim=(0, 2), dtype=torch.float64) / grid.tokens**2
    assert float(spatial) == pytest.approx(float(temporal), rel=1e-12)
    assert mask_rows(grid, rows)[rows, :, rows].eq(1).all()


def test_masks_at_the_sizes_of_the_paper_have_the_published_area() -> None:
    grid = TokenGrid(21, 30, 52)  # 480 x 832, 81 frames: 8.8 %, of which 54 % and 4.8 % lie in the own frame
    rows = torch.arange(0, grid.tokens, 97)
    masks = mask_rows(grid, rows)
    own = (rows[:, None] // 1560) == (torch.arange(grid.tokens) // 1560)
    assert (mask_block(1560), mask_block(1024), mask_block(64), mask_block(12), mask_block(1)) == (128, 85, 5, 1, 1)
    assert masks.mean(dim=(0, 2)).tolist() == pytest.approx([0.088, 0.088], abs=0.001)
    inside = (masks * own[:, None]).sum(dim=(0, 2)) / masks.sum(dim=(0, 2))
    assert inside.tolist() == pytest.approx([0.54, 0.048], abs=0.01)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_head_that_attends_evenly_scores_the_area(grid: TokenGrid) -> None:
    q = torch.zeros(1, grid.tokens, 1, 4)
    areas = torch.stack([mask.double().mean() for mask in dense_masks(grid)])
    assert torch.allclose(attention_shares(q, q, grid)[0], areas, atol=1e-7, rtol=0)


def one_hot(of_token: Tensor, kinds: int) -> Tensor:
    return 30.0 * torch.nn.functional.one_hot(of_token, kinds).float()


def test_heads_built_for_a_role_get_that_role() -> None:
    grid = TokenGrid(13, 8, 8)
    token = torch.arange(grid.tokens)
    own_frame = one_hot(token // 64, 64)  # attends evenly to its own frame
    own_place = one_hot(token % 64, 64)  # attends evenly to its own place in all frames
    q = torch.stack((own_frame, own_place), dim=1)[None]
    shares = attention_shares(q, q, grid)
    # The band of the spatial mask ends at whole mask blocks, so that it reaches all of the own frame but a few pairs.
    assert shares[0, 0] > 0.95
    assert shares[0, 1] < 0.2
    assert shares[1, 1] == pytest.approx(1.0, abs=1e-6)
    assert shares[1, 0] < 0.25
    head_map = HeadMap("built", grid, (1.0,), shares.numpy()[None], mask_block(64), "", "")
    for rule in ("code", "paper"):
        assert head_map.temporal(rule).tolist() == [[False, True]]


def test_changing_the_token_order_exchanges_the_roles() -> None:
    """A head seen through the order (h w f), on a grid whose two orders are mirror images, swaps its two shares."""
    grid = TokenGrid(16, 4, 4)
    q, k = random_qk(grid)
    exchange = rearrange(torch.arange(grid.tokens), "(f p) -> (p f)", f=16)
    spatial_temporal = attention_shares(q, k, grid)
    temporal_spatial = attention_shares(q[:, exchange], k[:, exchange], grid)
    assert torch.allclose(spatial_temporal, temporal_spatial.flip(1), atol=1e-6, rtol=0)


def test_scores_do_not_depend_on_the_order_of_heads_and_are_exact_under_autocast() -> None:
    grid = GRIDS[1]
    q, k = random_qk(grid)
    order = torch.tensor([2, 0, 3, 1])
    shares = attention_shares(q, k, grid)
    assert torch.allclose(attention_shares(q[:, :, order], k[:, :, order], grid), shares[order], atol=1e-7, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_shares(q, k, grid), shares)


def test_extreme_logits_stay_finite() -> None:
    grid = GRIDS[1]
    q, k = random_qk(grid, scale=200.0)
    shares = attention_shares(q, k, grid)
    assert shares.isfinite().all()
    assert torch.allclose(shares, dense_shares(q, k, grid), atol=1e-4, rtol=0)
    assert float(shares.max()) <= 1 + 1e-6


def test_a_wrong_grid_is_one_sentence() -> None:
    q, k = random_qk(TokenGrid(5, 3, 4))
    with pytest.raises(InputError, match="60 tokens"):
        attention_shares(q, k, TokenGrid(5, 4, 4))


@pytest.fixture(scope="module")
def small() -> WanTransformer3DModel:
    torch.manual_seed(0)
    size: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 3}
    model = WanTransformer3DModel(**size, in_channels=4, out_channels=4, text_dim=8, freq_dim=16, rope_max_seq_len=32)
    return model.eval().requires_grad_(False)


class Small:
    """As much of a backbone as scoring needs."""

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        self.transformer = transformer

    def grid(self, latent: Tensor) -> TokenGrid:
        return TokenGrid(latent.shape[2], latent.shape[3] // 2, latent.shape[4] // 2)

    def velocity(self, latent: Tensor, time: Tensor, prompt: Prompt) -> Tensor:
        return self.transformer(latent, 1000 * time, prompt.embeds, return_dict=False)[0]


LATENT = torch.linspace(-1, 1, 4 * 5 * 6 * 8).reshape(1, 4, 5, 6, 8)
PROMPT: Any = SimpleNamespace(embeds=torch.ones(1, 7, 8))


def scores_of(small: WanTransformer3DModel, times: list[float], seed: int = 0, latent: Tensor = LATENT):
    backbone: Any = Small(small)
    return head_scores(backbone, latent, PROMPT, times, torch.Generator().manual_seed(seed))


def test_scores_of_a_model_are_those_of_its_captured_q_and_k(small: WanTransformer3DModel) -> None:
    scores = scores_of(small, [0.75])
    assert scores.shape == (3, 4, 2)
    assert scores.dtype == "float64"
    noise = torch.randn(LATENT.shape, generator=torch.Generator().manual_seed(0))
    backbone = Small(small)
    with torch.no_grad(), capturing(small, range(3), "qk") as seen:
        backbone.velocity(0.25 * LATENT + 0.75 * noise, torch.tensor([0.75]), PROMPT)
    for block in range(3):
        dense = dense_shares(*seen[block], grid=backbone.grid(LATENT))
        assert torch.allclose(torch.from_numpy(scores[block]), dense, atol=1e-6, rtol=0)


def test_several_levels_are_averaged_and_scores_repeat(small: WanTransformer3DModel) -> None:
    both, high, low = (scores_of(small, times) for times in ([0.9, 0.3], [0.9], [0.3]))
    assert both == pytest.approx((high + low) / 2, abs=1e-12)
    assert not (high == low).all()
    assert (scores_of(small, [0.9]) == high).all()
    assert not (scores_of(small, [0.9], seed=1) == high).all()


def test_pure_noise_hides_the_clip(small: WanTransformer3DModel) -> None:
    assert (scores_of(small, [1.0]) == scores_of(small, [1.0], latent=-LATENT)).all()


@pytest.mark.parametrize("times", [[], [0.0], [1.2], [0.5, -0.1]])
def test_impossible_levels_are_refused(small: WanTransformer3DModel, times: list[float]) -> None:
    with pytest.raises(InputError, match="noise levels"):
        scores_of(small, times)


def test_scoring_leaves_the_forward_alone(small: WanTransformer3DModel) -> None:
    backbone = Small(small)
    half = torch.tensor([0.5])
    with torch.no_grad():
        plain = backbone.velocity(LATENT, half, PROMPT)
        with scoring(small, backbone.grid(LATENT)) as shares:
            assert torch.equal(backbone.velocity(LATENT, half, PROMPT), plain)
            once = shares.clone()
            backbone.velocity(LATENT, half, PROMPT)
            assert torch.allclose(shares, 2 * once, atol=1e-12, rtol=0)
        with pytest.raises(InputError), scoring(small, TokenGrid(1, 1, 1)):
            backbone.velocity(LATENT, half, PROMPT)
        assert torch.equal(backbone.velocity(LATENT, half, PROMPT), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
