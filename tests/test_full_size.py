"""The 1.3B architecture at its full width and length traces through our code; FLOPs follow from arithmetic."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BLOCKS, WIDTH, FEED_FORWARD, WORDS, RANK = 2, 1536, 8960, 512, 32
NAME = "Wan2.1 1.3B"


@pytest.fixture(scope="module")
def bench() -> Any:
    path = Path(__file__).with_name("bench_wan_full_size.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def block_flops(tokens: int) -> int:
    """Products of one block: projections, attention to itself, attention to the caption, feed-forward."""
    itself = 4 * 2 * tokens * WIDTH**2 + 4 * tokens**2 * WIDTH
    caption = 2 * 2 * (tokens + WORDS) * WIDTH**2 + 4 * tokens * WORDS * WIDTH
    return itself + caption + 4 * tokens * WIDTH * FEED_FORWARD


def test_a_forward_and_the_head_scores_take_what_arithmetic_says(bench: Any) -> None:
    plain = bench.forward(NAME, "", 81, BLOCKS)
    scored = bench.forward(NAME, "", 81, BLOCKS, scored=True)
    assert plain.tokens == scored.tokens == 21 * 30 * 52
    assert plain.tflops * 1e12 == pytest.approx(BLOCKS * block_flops(plain.tokens), rel=5e-3)
    # attention within either mask: rows of 128 queries, each with the 128s of keys that are less than 12 away
    rows, keys = (range(0, plain.tokens, 128), torch.arange(plain.tokens) // 128)
    pairs = sum(min(128, plain.tokens - row) * int(((keys - row // 128).abs() < 12).sum()) for row in rows)
    assert (scored.tflops - plain.tflops) * 1e12 == pytest.approx(BLOCKS * 2 * 4 * pairs * WIDTH, rel=1e-6)


def test_a_temporal_step_traces_and_trains_half_of_the_heads(bench: Any) -> None:
    step = bench.temporal_step(NAME, "", 5, BLOCKS)
    assert (step.latent_frames, step.tokens) == (5, 7800)
    assert step.trainable_parameters == BLOCKS * 4 * RANK * (WIDTH + WIDTH // 2)
    # forward, the same once more, gradients of activations; the first block needs none of its input
    assert 3 < step.tflops * 1e12 / (BLOCKS * block_flops(step.tokens)) < 4.2
