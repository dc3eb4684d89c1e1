"""No guidance holds a tensor that grows with the square of all tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from largest import Largest

from motionlora.heads.backbone import Prompt
from motionlora.heads.schedule import euler_times
from motionlora.heads.wan import WanBackbone
from motionlora.infer import attention_flow
from motionlora.infer.guidance import BLANK, GuidanceSettings, Kept, Walk
from motionlora.infer.guidance_list import guidance_class, guidance_names
from motionlora.infer.guide_ditflow import DiTFlow

FRAMES, SIDE = 13, 8
SQUARE = (FRAMES * SIDE**2) ** 2
"""Of all tokens: 692 224."""
LINEAR = SQUARE // 8
"""More than anything linear in the tokens has here; the widest is the feed-forward, 64 numbers a token."""
ACTING: dict[str, Any] = {"share": 1.0, "iterations": 1, "start": 0.9, "channels": 0.25}
BOXES = [{"frame": 0, "x": 4, "y": 4, "w": 20, "h": 20}, {"frame": 48, "x": 36, "y": 30, "w": 20, "h": 20}]


def largest(model: Any, guidance: GuidanceSettings) -> int:
    """In one guided step, with what is computed of the reference."""
    draws = torch.Generator().manual_seed(4)
    shape = (1, 16, FRAMES, 2 * SIDE, 2 * SIDE)
    noise, reference, embeds = (torch.randn(s, generator=draws) for s in (shape, shape, (2, 512, 32)))
    times, kept = euler_times({}, 2, 3.0), Kept()
    kept.tensors[BLANK] = {BLANK: embeds[:1]}  # the text encoder's attention is none of the guidance's
    walk = Walk(model, Prompt(embeds[:1]), Prompt(embeds[1:]), 1.0, times, noise, reference, draws, kept)
    with Largest() as seen, guidance.steering(walk) as steer, torch.no_grad():
        walk.velocity(steer(noise, walk.times[0]), walk.times[0])
    return seen.numbers


@pytest.mark.parametrize("name", guidance_names())
def test_the_largest_tensor_is_linear_in_tokens(
    twin: WanBackbone, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a few pairs of frames at once: by default a chunk has 268 MB, which is the whole of so short a clip
    monkeypatch.setattr(attention_flow, "CHUNK_BYTES", 8 * 4 * SIDE**4)
    (tmp_path / "boxes.json").write_text(json.dumps(BOXES))
    cls = guidance_class(name)
    wanted = ACTING | {"boxes": tmp_path / "boxes.json"}  # tracked points would decode the clip
    guidance = cls(**{key: value for key, value in wanted.items() if key in cls.model_fields})
    assert largest(twin, guidance) < LINEAR


def test_what_is_not_chunked_would_be_seen(twin: WanBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_flow, "CHUNK_BYTES", 2**40)
    assert largest(twin, DiTFlow(share=1.0, iterations=1)) >= SQUARE
