"""Laws of head-wise LoRA: masks are exact, no trace is left, strengths mean what they say."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from motionlora.data.settings import InputError
from motionlora.heads.lora import MotionLoraHandle, attach, load_into, set_strengths, strengths, unload
from motionlora.heads.lora_layers import PROJECTIONS
from motionlora.heads.motion_lora import MotionLora

BLOCKS, HEADS, HEAD_DIM, RANK = 3, 4, 12, 4
CHOSEN = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=bool)
EVERY = np.ones_like(CHOSEN)


def small_wan(seed: int = 0) -> WanTransformer3DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            text_dim=32,
            freq_dim=32,
            ffn_dim=64,
            num_layers=BLOCKS,
            rope_max_seq_len=64,
        ).eval()


@pytest.fixture
def model() -> WanTransformer3DModel:
    return small_wan()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def output(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    latent, text = noise(1, 16, 3, 4, 4).to(dtype), noise(1, 7, 32, seed=2).to(dtype)
    return model(latent, torch.tensor([500.0]), text, return_dict=False)[0]


def shake(handle: MotionLoraHandle) -> None:
    """Random weights on the chosen heads, as after a training."""
    state = handle.state().items()
    handle.load({key: value + handle._free(key) * 0.1 * noise(*value.shape, seed=3) for key, value in state})


def add(model: nn.Module, lora: MotionLora, strength: float) -> None:
    """The definition of a LoRA: W + strength * alpha / r * b a."""
    for module, (a, b) in lora.modules().items():
        model.get_submodule(module).weight.data += strength * lora.alpha / lora.rank * b @ a  # pyright: ignore


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def bare(model: nn.Module) -> bool:
    return not any("lora" in name for name, _ in model.named_modules())


def train(model: nn.Module, handle: MotionLoraHandle, steps: int) -> None:
    optimiser = torch.optim.AdamW(handle.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(steps):
        optimiser.zero_grad()
        output(model).square().mean().backward()
        optimiser.step()


def outside(handle: MotionLoraHandle) -> Tensor:
    """Every entry of every tensor that belongs to a head not chosen, found from the map alone."""
    rest = []
    for key, value in handle.state().items():
        block, name = int(key.split(".")[1]), key.split(".attn1.")[1]
        row = torch.from_numpy(~handle.chosen[block]).repeat_interleave(HEAD_DIM)
        if name == "to_out.0.lora_A.weight":
            rest.append(value[:, row].flatten())
        elif name.endswith("lora_B.weight") and not name.startswith("to_out"):
            rest.append(value[row].flatten())
    return torch.cat(rest)


def test_heads_not_chosen_stay_exactly_zero_in_training(model: WanTransformer3DModel) -> None:
    handle = attach(model, "motion", CHOSEN, rank=RANK, seed=0)
    before = handle.state()
    train(model, handle, steps=10)
    after = handle.state()
    assert outside(handle).numel() > 0
    assert torch.count_nonzero(outside(handle)) == 0
    assert all(not torch.equal(before[key], after[key]) for key in before)
    assert all(torch.count_nonzero(after[key]) == handle._free(key).sum() for key in after)


def test_heads_not_chosen_stay_zero_under_checkpointing_too(model: WanTransformer3DModel) -> None:
    handle = attach(model, "motion", CHOSEN, rank=RANK, seed=0)
    twin = small_wan()
    other = attach(twin, "motion", CHOSEN, rank=RANK, seed=0)
    twin.enable_gradient_checkpointing()
    train(model, handle, steps=3)
    train(twin, other, steps=3)
    assert same(handle.state(), other.state())


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("short", PROJECTIONS)
def test_full_width_equals_compact_lora(short: Any, scale: float) -> None:
    """Compact: factors that know the chosen channels only, written into the weight by hand; methods.md 2.4."""
    model, edited = small_wan().double(), small_wan().double()
    handle = attach(model, "motion", CHOSEN, rank=RANK, projections=[short], seed=0)
    for weight in handle.parameters():
        weight.data = weight.data.double()
    shake(handle)
    set_strengths(model, {"motion": scale})
    for block in (0, 2):
        kept = torch.from_numpy(CHOSEN[block]).repeat_interleave(HEAD_DIM)
        stem = f"blocks.{block}.attn1.{PROJECTIONS[short]}"
        a, b = (handle.state()[f"{stem}.lora_{factor}.weight"] for factor in "AB")
        weight = edited.get_submodule(stem).weight.data  # pyright: ignore
        if short == "o":
            weight[:, kept] += scale * b @ a[:, kept]  # pyright: ignore
        else:
            weight[kept] += scale * b[kept] @ a  # pyright: ignore
    with torch.no_grad():
        torch.testing.assert_close(output(model, torch.float64), output(edited, torch.float64), rtol=0, atol=1e-10)


def test_masks_hold_even_where_the_weights_do_not(model: WanTransformer3DModel) -> None:
    """The forward hooks alone keep other heads out: rows of v outside the chosen heads do not move."""
    handle = attach(model, "motion", CHOSEN, rank=RANK, projections=["v"], seed=0)
    values = model.get_submodule("blocks.0.attn1.to_v")
    x = noise(1, 5, HEADS * HEAD_DIM)
    plain = values(x)
    for weight in handle.parameters():
        weight.data.fill_(0.1)
    moved = (values(x) != plain).reshape(5, HEADS, HEAD_DIM).any(dim=(0, 2))
    assert moved.tolist() == CHOSEN[0].tolist()


def test_a_fresh_lora_changes_nothing_and_removal_leaves_no_trace(model: WanTransformer3DModel) -> None:
    plain, modules = output(model), dict(model.named_modules())
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    handle = attach(model, "motion", CHOSEN, rank=RANK, seed=0)
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.equal(output(model), plain)
    train(model, handle, steps=3)
    assert not torch.equal(output(model), plain)
    handle.remove()
    handle.remove()
    assert torch.equal(output(model), plain)
    assert dict(model.named_modules()) == modules
    assert same(model.state_dict(), weights)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    attach(model, "motion", CHOSEN, rank=RANK, seed=0)


def test_seed_decides_every_bit_of_the_start(model: WanTransformer3DModel) -> None:
    first, second, third = (attach(small_wan(), "motion", CHOSEN, rank=RANK, seed=seed).state() for seed in (5, 5, 6))
    assert same(first, second)
    assert not any(torch.equal(first[key], third[key]) for key in first if "lora_A" in key)


def test_start_has_the_bound_of_compact_lora() -> None:
    """Uniform within 1 / sqrt(inputs that count); with some hundred draws the largest comes near the bound."""
    handle = attach(small_wan(), "motion", CHOSEN, rank=16, seed=0)
    for key, value in handle.state().items():
        block = int(key.split(".")[1])
        inputs = HEAD_DIM * int(CHOSEN[block].sum()) if "to_out" in key else HEAD_DIM * HEADS
        if "lora_A" in key:
            assert 0.95 * inputs**-0.5 < value.abs().max() <= inputs**-0.5
            assert torch.count_nonzero(value) == 16 * inputs
        else:
            assert torch.count_nonzero(value) == 0


def test_blocks_without_chosen_heads_get_no_layers(model: WanTransformer3DModel) -> None:
    handle = attach(model, "motion", CHOSEN, rank=RANK, projections=("q", "o"), seed=0)
    names = {f"blocks.{block}.attn1.{name}" for block in (0, 2) for name in ("to_q", "to_out.0")}
    assert handle.lora("any").modules().keys() == names
    width = HEADS * HEAD_DIM
    assert handle.parameter_count() == sum(2 * RANK * (width + HEAD_DIM * count) for count in (2, 3))


def test_only_the_lora_gets_gradients_and_it_can_be_frozen(model: WanTransformer3DModel) -> None:
    handle = attach(model, "motion", EVERY, rank=RANK, seed=0)
    own = {id(weight) for weight in handle.parameters()}
    assert {id(weight) for weight in model.parameters() if weight.requires_grad} == own
    handle.trainable(False)
    assert not any(weight.requires_grad for weight in model.parameters())


def test_a_second_lora_leaves_the_first_acting_and_frozen(model: WanTransformer3DModel) -> None:
    first = attach(model, "spatial", CHOSEN, rank=RANK, seed=0)
    shake(first)
    first.trainable(False)
    with_first, state = output(model), first.state()
    second = attach(model, "temporal", ~CHOSEN, rank=2, seed=1)
    assert strengths(model) == {"spatial": 1.0, "temporal": 1.0}
    assert torch.equal(output(model), with_first)
    train(model, second, steps=5)
    assert same(first.state(), state)
    assert torch.count_nonzero(outside(second)) == 0
    assert not any(weight.requires_grad for weight in first.parameters())
    second.remove()
    assert torch.equal(output(model), with_first)
    assert not any(weight.requires_grad for weight in first.parameters())


def test_strengths_are_hand_merged_weights(model: WanTransformer3DModel) -> None:
    plain, merged, wanted = output(model), small_wan(), {"spatial": 0.7, "temporal": -0.5}
    for name, chosen, rank in (("spatial", CHOSEN, RANK), ("temporal", ~CHOSEN, 2)):
        handle = attach(model, name, chosen, rank=rank, seed=0)
        shake(handle)
        add(merged, handle.lora(name), wanted[name])
    set_strengths(model, wanted)
    assert strengths(model) == pytest.approx(wanted)
    torch.testing.assert_close(output(model), output(merged), rtol=0, atol=1e-5)
    for off in ({"spatial": 0.0, "temporal": 0.0}, {}):
        set_strengths(model, off)
        assert torch.equal(output(model), plain)
    set_strengths(model, wanted)
    model.disable_adapters()
    assert torch.equal(output(model), plain)


def test_a_sleeping_lora_is_not_woken_by_the_removal_of_another(model: WanTransformer3DModel) -> None:
    plain = output(model)
    shake(attach(model, "spatial", CHOSEN, rank=RANK, seed=0))
    shake(attach(model, "temporal", CHOSEN, rank=RANK, seed=1))
    set_strengths(model, {"temporal": 1.0})
    unload(model, "temporal")
    assert strengths(model) == {"spatial": 0.0}
    assert torch.equal(output(model), plain)
    unload(model, "spatial")
    assert strengths(model) == {}
    assert bare(model)


def test_lora_is_fp32_on_a_bf16_base() -> None:
    model = small_wan()
    model.to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    plain = output(model, torch.bfloat16)
    handle = attach(model, "motion", CHOSEN, rank=RANK, seed=0)
    assert {weight.dtype for weight in handle.parameters()} == {torch.float32}
    assert torch.equal(output(model, torch.bfloat16), plain)
    output(model, torch.bfloat16).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in handle.parameters())
    shake(handle)
    assert output(model, torch.bfloat16).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        output(model, torch.bfloat16).square().mean().backward()
    load_into(model, handle.lora("temporal"), "again", 0.5)
    assert {p.dtype for name, p in model.named_parameters() if "again" in name} == {torch.float32}


def test_load_refuses_what_is_not_its_own_state(model: WanTransformer3DModel) -> None:
    handle = attach(model, "motion", CHOSEN, rank=RANK, seed=0)
    state, key = handle.state(), "blocks.0.attn1.to_q.lora_B.weight"
    for wrong in (
        {name: value for name, value in state.items() if name != key},
        {**state, "blocks.1.attn1.to_q.lora_A.weight": state[key]},
        {**state, key: state[key][:, :2]},
        {**state, key: torch.full_like(state[key], float("nan"))},
        {**state, key: torch.ones_like(state[key])},
    ):
        with pytest.raises(InputError):
            handle.load(wrong)
    assert same(handle.state(), state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chosen": np.zeros_like(CHOSEN)}, "No head is chosen"),
        ({"chosen": CHOSEN[:2]}, "3 blocks x 4 heads"),
        ({"chosen": CHOSEN.astype(float)}, "bool map"),
        ({"rank": 0}, "rank"),
    ],
)
def test_attach_refuses_early(model: WanTransformer3DModel, change: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        attach(model, "motion", **{"chosen": CHOSEN, "rank": RANK, "seed": 0, **change})
    assert bare(model)


def test_attach_refuses_taken_names_and_fused_projections(model: WanTransformer3DModel) -> None:
    attach(model, "motion", CHOSEN, rank=RANK, seed=0)
    with pytest.raises(InputError, match="already has an adapter 'motion'"):
        attach(model, "motion", CHOSEN, rank=RANK, seed=0)
    for wrong in ({"nobody": 1.0}, {"motion": float("nan")}):
        with pytest.raises(InputError):
            set_strengths(model, wrong)
    with pytest.raises(InputError, match="it has motion"):
        unload(model, "nobody")
    fused = small_wan()
    fused.fuse_qkv_projections()
    with pytest.raises(InputError, match="fused"):
        attach(fused, "motion", CHOSEN, rank=RANK, seed=0)


def strange_lora(alpha: float = 2.0) -> MotionLora:
    """As trained elsewhere: no mask, feed-forward and cross-attention, ranks that differ."""
    sizes = {"blocks.0.attn1.to_q": (48, 48), "blocks.1.ffn.net.0.proj": (64, 48), "blocks.1.ffn.net.2": (48, 64)}
    sizes |= {"blocks.2.attn2.to_k": (48, 48), "proj_out": (64, 48)}
    weights = {}
    for seed, (module, (rows, columns)) in enumerate(sizes.items()):
        r = 2 * RANK if module == "blocks.2.attn2.to_k" else RANK
        weights[f"{module}.lora_A.weight"] = noise(r, columns, seed=seed)
        weights[f"{module}.lora_B.weight"] = 0.1 * noise(rows, r, seed=100 + seed)
    return MotionLora(weights, RANK, alpha)


@pytest.mark.parametrize("alpha", [2.0, 0.0])
def test_a_loaded_lora_is_the_merged_weight_with_alpha_and_every_rank(
    model: WanTransformer3DModel, alpha: float
) -> None:
    lora, merged, plain = strange_lora(alpha), small_wan(), output(model)
    add(merged, lora, 0.8)
    load_into(model, lora, "strange", 0.8)
    assert strengths(model) == pytest.approx({"strange": 0.8})
    assert not any(weight.requires_grad for name, weight in model.named_parameters() if "lora" in name)
    torch.testing.assert_close(output(model), output(merged), rtol=0, atol=1e-5)
    unload(model, "strange")
    assert torch.equal(output(model), plain)


def test_a_finished_lora_acts_as_the_trained_one(model: WanTransformer3DModel) -> None:
    handle = attach(model, "motion", CHOSEN, rank=RANK, seed=0)
    shake(handle)
    trained, lora = output(model), handle.lora("temporal", rule="code")
    assert lora.provenance["heads"] == {"per_block": HEADS, "chosen": {"0": [0, 3], "2": [1, 2, 3]}}
    fresh = small_wan()
    load_into(fresh, lora, "motion", 1.0)
    torch.testing.assert_close(output(fresh), trained, rtol=0, atol=1e-6)


A, B = torch.ones(4, 48), torch.ones(48, 4)


@pytest.mark.parametrize(
    ("module", "factors", "words"),
    [
        ("blocks.7.attn1.to_q", {"A": A, "B": B}, r"blocks\.7\.attn1\.to_q, which this model of 3 blocks"),
        ("blocks.0.attn1.to_q", {"A": torch.ones(4, 64), "B": B}, r"\(4, 64\) and \(48, 4\) for .*\(48, 48\)"),
        ("blocks.0.attn1", {"A": A, "B": B}, "WanAttention"),
        ("patch_embedding", {"A": A, "B": B}, "Conv3d"),
        ("blocks.0.attn1.to_q", {"A": A, "B": torch.ones(48, 5)}, "factors"),
        ("blocks.0.attn1.to_q", {"A": A, "B": torch.ones(48, 4, 1)}, "factors"),
        ("blocks.0.attn1.to_q", {"A": A, "B": B / 0}, "NaN or infinite"),
        ("blocks.0.attn1.to_v", {"B": B}, r"to_v\.lora_A"),
        ("blocks.0.attn1.to_q", {"C": A}, "lora_C.weight is no LoRA weight"),
    ],
)
def test_load_names_the_weight_that_does_not_belong(
    model: WanTransformer3DModel, module: str, factors: dict[str, Tensor], words: str
) -> None:
    wrong = {f"{module}.lora_{letter}.weight": value for letter, value in factors.items()}
    for weights in (wrong, {**strange_lora().weights, **wrong}):
        with pytest.raises(InputError, match=words):
            load_into(model, MotionLora(weights, 4, 4.0), "wrong")
    with pytest.raises(InputError, match="no tensor"):
        load_into(model, MotionLora({}, 4, 4.0), "wrong")
    assert bare(model)
