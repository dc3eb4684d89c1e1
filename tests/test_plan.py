"""Laws of `motionlora plan`: counts follow from arithmetic, the whole from two models, bytes are those that live."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from motionlora.data.errors import InputError
from motionlora.heads.memory import NOTHING_SPARED, Memory
from motionlora.heads.wan import WanBackbone
from motionlora.heads.wan_outline import META, PUBLISHED, WanOutline, outline_of
from motionlora.train.cards import GIB, PUBLISHED_CARDS, Card, PlanSettings, published
from motionlora.train.command import main
from motionlora.train.count import counting
from motionlora.train.deterministic import deterministic
from motionlora.train.plan import Part, Plan, announce, duration, in_short, plan_of, seconds_of
from motionlora.train.rehearsal import TEXT_LENGTH, Cost, Rehearsal, bytes_of

SMALL: dict[str, Any] = {"frames": 17, "height": 32, "width": 32, "heads": {"heads": "split"}}
SMALL |= {"temporal": {"stride": 1, "batch": 2}, "spatial": {"batch": 3}, "lora": {"rank": 4}}


@pytest.fixture(scope="module")
def outline(twin_folder) -> WanOutline:
    return outline_of(twin_folder)


def rehearsal(outline: WanOutline, *, blocks: int = 5, memory: Memory = NOTHING_SPARED, **changes: Any) -> Rehearsal:
    deeper = replace(outline, transformer={**outline.transformer, "num_layers": blocks})
    return Rehearsal(PlanSettings(**{**SMALL, **changes}), deeper, torch.float32, memory)


def test_products_count_two_a_multiply_add_and_attention_four_and_ten_a_pair() -> None:
    s, heads, d, rows, inputs, outputs = 7, 2, 8, 5, 6, 3
    weight = torch.empty(outputs, inputs, device=META)
    with counting() as count:
        nn.functional.linear(torch.empty(rows, inputs, device=META), weight)
    assert (count.flops, count.attention_flops) == (2 * rows * inputs * outputs, 0)
    q, k, v = (torch.empty(1, heads, s, d, device=META, requires_grad=True) for _ in range(3))
    with counting() as count:
        nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    assert count.flops == count.attention_flops == (2 + 5) * 2 * heads * s * s * d


def test_the_peak_is_what_lived_at_once() -> None:
    kilo = torch.empty(256, device=META)  # there before, so not counted
    with counting() as count:
        one = kilo + 1
        two = one + 1
        del one
        three = two + 1
        del two, three
        kilo.view(16, 16).add_(1)  # makes nothing
    assert count.peak_bytes == 2 * 1024


def test_counting_leaves_torch_as_it_was() -> None:
    stock = nn.functional.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), counting():
        _ = 1 / 0
    assert nn.functional.scaled_dot_product_attention is stock


@pytest.mark.parametrize(("every", "stage"), [(0, "spatial"), (0, "temporal"), (1, "temporal"), (2, "temporal")])
def test_a_step_of_all_blocks_follows_from_those_of_two_models(outline: WanOutline, stage: str, every: int) -> None:
    run = rehearsal(outline, blocks=8 if every == 2 else 5, memory=Memory(recompute_every=every))
    assert run.step(stage) == run._step(stage, run.model)


def test_moments_in_8_bits_take_2_bytes_of_a_weight_in_place_of_8(outline: WanOutline) -> None:
    run, spared = rehearsal(outline), rehearsal(outline, optimizer="adamw_8bit")
    layers = 4 * run.model.blocks  # q, k, v and o
    width = run.model.heads * run.model.head_dim
    weights = layers * run.settings.lora.rank * 2 * width
    cost, less = run.step("temporal"), spared.step("temporal")
    assert (cost.trained_bytes, less.trained_bytes) == (16 * weights, 10 * weights)
    assert cost.nbytes - less.nbytes == 6 * weights


def test_dropped_captions_cost_what_captions_cost(outline: WanOutline) -> None:
    dropped = rehearsal(outline, temporal={**SMALL["temporal"], "caption_dropout": 0.5}).step("temporal")
    assert dropped.flops == rehearsal(outline).step("temporal").flops


def test_a_step_is_forward_twice_that_back_and_checkpointing_one_forward_more(outline: WanOutline) -> None:
    plain, again, half = (
        rehearsal(outline, blocks=6, memory=Memory(recompute_every=every)).step("temporal") for every in (0, 1, 2)
    )
    forward = rehearsal(outline, blocks=6).forward().flops * SMALL["temporal"]["batch"]
    # LoRA adds a little, the frozen weights get no gradient, attention counts 5 products back for 2 there
    assert 2.0 < plain.flops / forward < 3.0
    assert again.flops - plain.flops == pytest.approx(forward, rel=0.1)
    assert half.flops - plain.flops == pytest.approx((again.flops - plain.flops) / 2, rel=0.01)
    assert again.nbytes < half.nbytes < plain.nbytes


def test_a_forward_takes_what_arithmetic_says(outline: WanOutline) -> None:
    run = rehearsal(outline)
    s, width, ffn, text = run.whole_grid.tokens, 48, 64, TEXT_LENGTH
    assert s == 5 * 4 * 4
    block = 4 * 2 * s * width**2 + 4 * s * s * width
    block += 2 * 2 * (s + text) * width**2 + 4 * s * text * width + 4 * s * width * ffn
    ends = 2 * s * 2 * (16 * 4) * width + 2 * text * (32 + width) * width + 2 * (32 + width + 6 * width) * width
    assert run.forward().flops == 5 * block + ends
    # attention within either mask: with 16 tokens a frame a band of 15 to either side
    pairs = sum(abs(query - key) < 16 for query in range(s) for key in range(s))
    assert run.forward(scored=True).flops == 5 * (block + 2 * 4 * pairs * width) + ends


def test_an_outline_is_the_loaded_model_without_its_data(outline: WanOutline, twin: WanBackbone, twin_folder) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        loaded = WanBackbone.load(twin_folder, dtype=dtype)
        drawn = outline.without_weights(dtype)
        kinds = {name: (weight.shape, weight.dtype) for name, weight in loaded.transformer.named_parameters()}
        assert {name: (w.shape, w.dtype) for name, w in drawn.transformer.named_parameters()} == kinds
        assert Rehearsal(PlanSettings(**SMALL), outline, dtype).frozen_bytes == bytes_of(loaded.transformer)
    with twin.parts.vae() as vae:
        assert bytes_of(outline.vae_without_weights()) == bytes_of(vae)


def test_published_models_have_their_published_sizes() -> None:
    numbers = {
        name: sum(w.numel() for w in outline.without_weights(torch.bfloat16).transformer.parameters()) / 1e9
        for name, outline in PUBLISHED.items()
    }
    assert [round(count, 1) for count in numbers.values()] == [1.4, 14.3, 14.3, 5.0]
    encoder = PUBLISHED["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"].text_encoder_without_weights(torch.bfloat16)
    assert sum(w.numel() for w in encoder.parameters()) / 1e9 == pytest.approx(5.68, abs=0.01)


def test_random_state_is_left_alone(outline: WanOutline) -> None:
    before = torch.random.get_rng_state()
    plan_of(PlanSettings(**SMALL), outline, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_parts_are_those_of_the_settings(outline: WanOutline) -> None:
    def names(**changes: Any) -> dict[str, int]:
        parts = plan_of(PlanSettings(**{**SMALL, **changes}), outline, torch.float32, prepares=False).parts
        return {part.name: part.times for part in parts}

    assert names() == {"heads": 1, "spatial": 1000, "temporal": 1000}
    assert names(heads={"heads": "all"}) == {"temporal": 1000}
    assert names(stages=("spatial",), heads={"heads": "all"}) == {}
    assert names(stages=("heads",), heads={"times": (0.5, 0.9)}) == {"heads": 2}
    checked = names(stages=("temporal",), validation={"every": 300, "sample": {"steps": 7, "scale": 1.0}})
    assert checked == {"temporal": 1000, "validation": 3 * 7}


def test_time_and_fit_follow_from_the_card() -> None:
    card = Card("A", 10 * GIB, rate=2e12, fp32_rate=1e12)
    parts = (Part("a", 3, Cost(4 * 10**12, 2 * GIB)), Part("b", 1, Cost(10**12, GIB), fp32=True))
    plan = Plan("m", 5 * GIB, parts)
    assert [seconds_of(part, card) for part in parts] == [6.0, 1.0]
    assert (plan.flops, plan.peak_bytes, plan.seconds(card)) == (13 * 10**12, 7 * GIB, 7.0)
    assert Plan("m", 5 * GIB, ()).peak_bytes == 5 * GIB
    assert "fits" in in_short(plan, card)
    assert "DOES NOT FIT" in in_short(replace(plan, frozen_bytes=7 * GIB), card)  # 9 of 10, and 1.5 are in reserve
    assert [duration(value) for value in (0.25, 99, 600, 9000)] == ["0.2 s", "99 s", "10 min", "2.5 h"]
    assert all(published(name).rate == 0.5 * PUBLISHED_CARDS[name][2] for name in PUBLISHED_CARDS)


@pytest.mark.parametrize(("steps", "says"), [(30, True), (4, False)])
def test_a_run_worth_planning_says_its_plan_at_the_size_of_its_clip(
    twin: WanBackbone, random_clip: Any, steps: int, says: bool
) -> None:
    said: list[str] = []
    settings = PlanSettings(
        **{**SMALL, "height": None, "spatial": {"steps": 2}, "temporal": {"steps": steps, "stride": 2}}
    )
    shop: Any = SimpleNamespace(clip=random_clip(17, 32, 32), model=twin, settings=settings, say=said.append)
    shop.memory = NOTHING_SPARED
    shop.accelerator = SimpleNamespace(is_main_process=True)
    with deterministic(True):
        announce(shop)
    assert len(said) == says
    assert all("Plan for this CPU" in line and "temporal" in line and "embed" not in line for line in said)


def test_the_command_prints_parts_and_one_line(twin_folder, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--height", "32", "--width", "32", "--frames", "17", "--temporal.stride", "1"]
    assert main(["plan", "--model", str(twin_folder), *size, "--card", "a100"]) == 0
    said = capsys.readouterr().out
    assert "temporal" in said
    assert "Plan for A100 80 GB" in said


@pytest.mark.parametrize("size", [(None, 32), (33, 32)])
def test_a_size_that_cannot_be_planned_is_refused(outline: WanOutline, size: tuple[int | None, int]) -> None:
    with pytest.raises(InputError, match="multiples of 8"):
        plan_of(PlanSettings(**{**SMALL, "height": size[0], "width": size[1]}), outline, torch.float32)
