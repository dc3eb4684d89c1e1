"""Laws of scoring: shares are the dense ones, masks mean what they say, the forward is left alone."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from einops import rearrange
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend

from motionlora.data.settings import InputError
from motionlora.heads import score
from motionlora.heads.backbone import Prompt, TokenGrid
from motionlora.heads.capture import capturing, layers_of
from motionlora.heads.head_map import HeadMap
from motionlora.heads.score import FusedCall, FusedKernels, attention_shares, head_scores, mask_block, scoring
from motionlora.train.count import counting

# whole and broken last blocks, windows that fit and windows that do not, one frame, one token
GRIDS = [
    *(TokenGrid(13, 8, 8), TokenGrid(5, 3, 4), TokenGrid(3, 1, 2), TokenGrid(1, 4, 4), TokenGrid(1, 1, 1)),
    *(TokenGrid(4, 7, 9), TokenGrid(2, 9, 17), TokenGrid(3, 5, 7)),
]


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


def random_qk(grid: TokenGrid, scale: float = 2.0, clips: int = 1, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = scale * torch.randn(2, clips, grid.tokens, 4, width, generator=generator)
    return q, k


def shares_of(q: Tensor, k: Tensor, grid: TokenGrid, text: int = 0) -> Tensor:
    with FusedKernels() as kernels:
        kernels.watch()
        query, key = (rearrange(x, "b s h d -> b h s d") for x in (q, k))
        functional.scaled_dot_product_attention(query, key, key)
        return attention_shares(kernels.watched(), grid, text)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("width", "dtype"), [(6, torch.float32), (32, torch.float32), (128, torch.float32), (64, torch.bfloat16)]
)
def test_shares_are_the_dense_ones(grid: TokenGrid, width: int, dtype: torch.dtype) -> None:
    """In bf16 those of the rounded queries and keys: sums are kept in fp32."""
    q, k = (x.to(dtype) for x in random_qk(grid, clips=2, width=width))
    shares = shares_of(q, k, grid)
    assert shares.dtype == torch.float64
    assert torch.allclose(shares, dense_shares(q, k, grid), atol=1e-6 if dtype == torch.float32 else 1e-5, rtol=0)


@pytest.mark.parametrize(("share", "scale"), [(0.1, 0.5), (0.9, 0.5), (0.9, 2.0), (0.999, 2.0), (1.0, 2.0)])
def test_what_goes_to_the_text_is_left_out(share: float, scale: float) -> None:
    """Also where nearly all goes there, and a difference of sums would have no digits left."""
    grid = GRIDS[0]
    q, k = random_qk(grid, scale, clips=2)
    video = (rearrange(q, "b s h d -> b h s d") @ rearrange(k, "b s h d -> b h d s") / 6**0.5).logsumexp(-1).mean()
    # 7 words that every query meets with the same logit, in a lane of their own
    logit = float(video) + math.log(share / max(1 - share, 1e-9) / 7)
    words = torch.zeros(2, 7, 4, 1)
    q = torch.cat([torch.cat([words, torch.ones(2, grid.tokens, 4, 1)], 1), functional.pad(q, (0, 0, 0, 0, 7, 0))], -1)
    k = torch.cat(
        [
            torch.cat([words + logit * 7**0.5, torch.zeros(2, grid.tokens, 4, 1)], 1),
            functional.pad(k, (0, 0, 0, 0, 7, 0)),
        ],
        -1,
    )
    shares, dense = shares_of(q, k, grid, text=7), dense_shares(q[:, 7:], k[:, 7:], grid)
    assert torch.allclose(shares, dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [*GRIDS, TokenGrid(2, 40, 40)], ids=str)
def test_both_masks_have_the_same_area_and_the_diagonal(grid: TokenGrid) -> None:
    spatial, temporal = dense_masks(grid)
    assert int(spatial.sum()) == int(temporal.sum())
    assert spatial.diagonal().all()
    assert temporal.diagonal().all()


def test_masks_at_the_sizes_of_the_paper_have_the_published_area() -> None:
    """480 x 832, 81 frames: 8.8 %, of which 54 % and 4.8 % lie in the own frame; a quarter of the size has the same."""
    grid = TokenGrid(21, 15, 26)
    assert (mask_block(1560), mask_block(1024), mask_block(64), mask_block(12), mask_block(1)) == (128, 85, 5, 1, 1)
    frame = 60**0.5 * functional.one_hot(torch.arange(grid.tokens) // 390).float()[None, None] * 21**0.25
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    def masses(q: Tensor, logit: float) -> Tensor:
        """Of a head that knows its own frame alone, and gives it this logit; the sum is that of s such keys."""
        sums = torch.full((1, 1, grid.tokens), logit + math.log(grid.tokens))
        return attention_shares(FusedCall(kernel, (q, q, q), {}, sums), grid)[0]

    even, own = masses(torch.zeros_like(frame), 0.0), masses(frame, 60.0)
    assert even.tolist() == pytest.approx([0.088, 0.088], abs=0.001)
    assert (own / even).tolist() == pytest.approx([0.54, 0.048], abs=0.01)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_head_that_attends_evenly_scores_the_area(grid: TokenGrid) -> None:
    q = torch.zeros(1, grid.tokens, 1, 4)
    areas = torch.stack([mask.double().mean() for mask in dense_masks(grid)])
    assert torch.allclose(shares_of(q, q, grid)[0], areas, atol=1e-7, rtol=0)


def one_hot(of_token: Tensor, kinds: int) -> Tensor:
    return 30.0 * functional.one_hot(of_token, kinds).float()


def test_heads_built_for_a_role_get_that_role() -> None:
    grid = TokenGrid(13, 8, 8)
    token = torch.arange(grid.tokens)
    own_frame = one_hot(token // 64, 64)  # attends evenly to its own frame
    own_place = one_hot(token % 64, 64)  # attends evenly to its own place in all frames
    q = torch.stack((own_frame, own_place), dim=1)[None]
    shares = shares_of(q, q, grid)
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
    spatial_temporal = shares_of(q, k, grid)
    temporal_spatial = shares_of(q[:, exchange], k[:, exchange], grid)
    assert torch.allclose(spatial_temporal, temporal_spatial.flip(1), atol=1e-6, rtol=0)


def test_scores_do_not_depend_on_the_order_of_heads() -> None:
    grid = GRIDS[1]
    q, k = random_qk(grid)
    order = torch.tensor([2, 0, 3, 1])
    shares = shares_of(q, k, grid)
    assert torch.allclose(shares_of(q[:, :, order], k[:, :, order], grid), shares[order], atol=1e-7, rtol=0)
    rounded = shares_of(q.bfloat16(), k.bfloat16(), grid)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # attention rounds its inputs then, scores no more than that
        assert torch.equal(shares_of(q, k, grid), rounded)


@pytest.mark.parametrize("step", [1, 8])
def test_extreme_logits_stay_finite(step: int) -> None:
    """Up to some 5 000 and 300 000. Whole numbers, so that every machine's fp32 has the very logits."""
    grid = GRIDS[1]
    generator = torch.Generator().manual_seed(0)
    q, k = step * torch.randint(-60, 61, (2, 1, grid.tokens, 4, 4), generator=generator).float()
    assert float((rearrange(q, "b s h d -> b h s d") @ rearrange(k, "b s h d -> b h d s") / 2).max()) > 4e3 * step**2
    shares = shares_of(q, k, grid)
    assert torch.allclose(shares, dense_shares(q, k, grid), atol=1e-5, rtol=0)
    assert 0 <= float(shares.min()) <= float(shares.max()) <= 1


def test_a_wrong_grid_is_one_sentence() -> None:
    q, k = random_qk(TokenGrid(5, 3, 4))
    with pytest.raises(InputError, match="60 tokens"):
        shares_of(q, k, TokenGrid(5, 4, 4))


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


def test_another_attention_backend_is_used_again_afterwards(small: WanTransformer3DModel) -> None:
    plain = scores_of(small, [0.75])
    processors: list[Any] = [layer.attn1.processor for layer in layers_of(small)]
    for processor in processors:
        processor._attention_backend = "_native_math"
    try:
        assert scores_of(small, [0.75]) == pytest.approx(plain, abs=1e-7)
        assert all(processor._attention_backend == "_native_math" for processor in processors)
    finally:
        small.reset_attention_backend()


def test_attention_without_a_fused_kernel_is_one_sentence(
    small: WanTransformer3DModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "ALLOWED", [SDPBackend.MATH])
    with pytest.raises(InputError, match="fused attention, which has no kernel"):
        scores_of(small, [0.75])


def test_memory_is_that_of_a_copy_of_queries_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """No window is copied and no logit kept: on tensors without data, of 21 frames of 480 x 832, 12 heads of 128."""
    grid = TokenGrid(21, 30, 52)
    q = torch.empty(1, grid.tokens, 12, 128, dtype=torch.bfloat16, device="meta")
    with counting() as count:
        shares_of(q, q, grid)
    # the attention's own output, queries and keys in the other order, outputs for the windows, sums
    assert count.peak_bytes < 4.2 * q.nbytes
    pairs = sum(int(number) for number in band_sizes(21 * 1560, 128, 12))
    assert count.flops == 4 * 12 * 128 * (grid.tokens**2 + 2 * pairs)


def band_sizes(tokens: int, block: int, half_width: int) -> Iterator[int]:
    """Pairs of a query and a key in each row of blocks."""
    for start in range(0, tokens, block):
        keys = range(max(0, start - (half_width - 1) * block), min(tokens, start + half_width * block))
        yield (min(tokens, start + block) - start) * len(keys)


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
