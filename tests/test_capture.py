"""Laws of capturing: what is recorded is what the attention receives, and nothing stays behind."""

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers import transformer_wan
from peft import LoraConfig
from torch import Tensor, nn

from motionlora.data.settings import InputError
from motionlora.heads.capture import What, capturing, rotated

WHATS: tuple[What, ...] = ("qk", "qkv", "block")


def random_model(blocks: int) -> WanTransformer3DModel:
    torch.manual_seed(0)
    size: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": blocks}
    model = WanTransformer3DModel(**size, in_channels=4, out_channels=4, text_dim=8, freq_dim=16, rope_max_seq_len=32)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def small() -> WanTransformer3DModel:
    return random_model(blocks=3)


def call(model: nn.Module, seed: int = 1, grad: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(1, 4, 3, 4, 6, generator=generator, requires_grad=grad)
    prompt = torch.randn(1, 5, 8, generator=generator)
    return latent, model(latent, torch.tensor([500.0]), prompt, return_dict=False)[0]


def tensors(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def hooks_of(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("blocks", [[0], [1], [2], [0, 2], [2, 1]])
def test_truncated_equals_hooks_on_a_full_forward(small: WanTransformer3DModel, what: What, blocks: list[int]) -> None:
    with torch.no_grad():
        with capturing(small, blocks, what) as full:
            call(small)
        with capturing(small, blocks, what, stop=True) as short:
            assert short.run(lambda: call(small)) is None
    assert set(full) == set(short) == set(blocks)
    for block in blocks:
        for a, b in zip(tensors(full[block]), tensors(short[block]), strict=True):
            assert torch.equal(a, b)


def test_captured_are_the_inputs_of_the_attention(
    small: WanTransformer3DModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, ...]] = []
    stock = transformer_wan.dispatch_attention_fn

    def spy(q: Tensor, k: Tensor, v: Tensor, **rest: object) -> Tensor:
        seen.append((q, k, v))
        return stock(q, k, v, **rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", spy)
    with torch.no_grad(), capturing(small, range(3), "qkv") as captured:
        call(small)
    for block, inputs in enumerate(seen[::2]):  # every other one is the attention to the text
        assert captured[block][0].shape == (1, 18, 2, 12)
        assert all(torch.equal(a, b) for a, b in zip(captured[block], inputs, strict=True))


def test_rotary_keeps_bf16(small: WanTransformer3DModel) -> None:
    rope = small.rope(torch.zeros(1, 4, 3, 4, 6))
    x = torch.randn(1, 18, 2, 12).bfloat16()
    assert rotated(x, rope).dtype == torch.bfloat16
    assert torch.equal(rotated(x, rope), rotated(x.float(), rope).bfloat16())


def test_block_outputs_are_the_inputs_of_what_follows(small: WanTransformer3DModel) -> None:
    entered: list[Tensor] = []
    handle = small.blocks[2].register_forward_pre_hook(lambda _module, args: entered.append(args[0]))
    with torch.no_grad(), capturing(small, [1], "block") as seen:
        call(small)
    handle.remove()
    assert torch.equal(seen[1], entered[0])


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("what", WHATS)
def test_the_forward_is_unchanged_and_nothing_stays_behind(
    small: WanTransformer3DModel, what: What, stop: bool
) -> None:
    before, processors = hooks_of(small), dict(small.attn_processors)
    with torch.no_grad():
        plain = call(small)[1]
        with capturing(small, [1], what, stop=stop) as seen:
            result = seen.run(lambda: call(small)[1])
        assert stop or torch.equal(result, plain)  # pyright: ignore[reportArgumentType]
        assert torch.equal(call(small)[1], plain)
    assert hooks_of(small) == before
    assert small.attn_processors == processors


@pytest.mark.parametrize("stop", [False, True])
def test_nothing_stays_behind_after_an_exception(small: WanTransformer3DModel, stop: bool) -> None:
    before = hooks_of(small)
    with pytest.raises(ZeroDivisionError), capturing(small, [0], "qkv", stop=stop) as seen:
        seen.run(lambda: 1 / 0)
    with pytest.raises(RuntimeError), capturing(small, [0], "qkv", stop=stop) as seen:
        seen.run(lambda: small(torch.zeros(1, 3, 3, 4, 6), torch.tensor([1.0]), torch.zeros(1, 5, 8)))
    assert hooks_of(small) == before


def test_a_stopped_forward_costs_only_the_blocks_before(small: WanTransformer3DModel) -> None:
    entered: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: entered.append(name))
        for name, module in small.named_modules()
        if name.endswith(("attn1", "attn2", "to_out.0", "proj_out"))
    ]
    with torch.no_grad(), capturing(small, [1], "qk", stop=True) as seen:
        seen.run(lambda: call(small))
    for handle in handles:
        handle.remove()
    assert entered == [
        "blocks.0.attn1",
        "blocks.0.attn1.to_out.0",
        "blocks.0.attn2",
        "blocks.0.attn2.to_out.0",
        "blocks.1.attn1",
    ]


def test_the_latest_forward_counts(small: WanTransformer3DModel) -> None:
    with torch.no_grad(), capturing(small, [1], "block") as seen:
        call(small, seed=1)
        first = seen[1]
        call(small, seed=2)
        assert not torch.equal(seen[1], first)
        call(small, seed=1)
        assert torch.equal(seen[1], first)
        with pytest.raises(RuntimeError):
            small(torch.zeros(1, 3, 3, 4, 6), torch.tensor([1.0]), torch.zeros(1, 5, 8))
        assert not seen  # a failed forward leaves nothing of the one before


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_gradients_flow_also_through_checkpoints(
    small: WanTransformer3DModel, what: What, stop: bool, inside: bool
) -> None:
    def gradient() -> Tensor:
        with capturing(small, [0, 1], what, stop=stop) as seen:
            latent: list[Tensor] = []
            seen.run(lambda: latent.append(call_with(latent)))
            loss = torch.stack([tensor.square().sum() for block in seen for tensor in tensors(seen[block])]).sum()
            if inside:
                return torch.autograd.grad(loss, latent[0])[0]
        return torch.autograd.grad(loss, latent[0])[0]

    def call_with(latent: list[Tensor]) -> Tensor:
        latent.append(torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(3), requires_grad=True))
        return small(latent[0], torch.tensor([500.0]), torch.ones(1, 5, 8), return_dict=False)[0]

    plain = gradient()
    small.enable_gradient_checkpointing()
    try:
        checkpointed = gradient()
    finally:
        small.disable_gradient_checkpointing()
    assert plain.abs().sum() > 0
    assert torch.allclose(checkpointed, plain, atol=1e-6, rtol=1e-4)
    assert small(torch.zeros(1, 4, 3, 4, 6), torch.tensor([1.0]), torch.zeros(1, 5, 8)).sample.isfinite().all()


class Wrapper(nn.Module):
    """As DDP and accelerate wrap: the model is `.module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor, **kwargs: object) -> object:
        return self.module(*args, **kwargs)


def test_a_wrapped_model_is_the_same_model(small: WanTransformer3DModel) -> None:
    wrapped = Wrapper(Wrapper(small))
    with torch.no_grad():
        with capturing(wrapped, [1], "qk", stop=True) as seen:
            seen.run(lambda: call(wrapped))
        with capturing(small, [1], "qk") as plain:
            call(small)
    assert all(torch.equal(a, b) for a, b in zip(seen[1], plain[1], strict=True))


def test_adapters_of_peft_are_seen() -> None:
    model = random_model(blocks=1)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))
    with torch.no_grad(), capturing(model, [0], "qkv") as seen:
        call(model)
        with_adapter = seen[0]
        model.disable_adapters()
        call(model)
    assert torch.equal(seen[0][0], with_adapter[0])
    assert not torch.equal(seen[0][2], with_adapter[2])


def test_captures_nest(small: WanTransformer3DModel) -> None:
    with torch.no_grad(), capturing(small, [2], "block", stop=True) as outer:
        with capturing(small, [0], "qk", stop=True) as inner:
            outer_result = inner.run(lambda: outer.run(lambda: call(small)))
        assert outer_result is None
        assert 0 in inner
        assert 2 not in outer
        outer.run(lambda: call(small))
    assert 2 in outer


def test_wrong_requests_are_one_sentence(small: WanTransformer3DModel) -> None:
    with pytest.raises(InputError, match="blocks 0 to 2"), capturing(small, [3], "qk"):
        pass
    with pytest.raises(InputError, match="No block"), capturing(small, [], "qk"):
        pass
    with pytest.raises(InputError, match="qk, qkv, block"), capturing(small, [0], "qv"):  # pyright: ignore
        pass
    with pytest.raises(InputError, match="Wan transformer"), capturing(nn.Linear(1, 1), [0], "qk"):
        pass
    with capturing(small, [0], "qk") as seen, pytest.raises(KeyError, match="block 0 was not captured"):
        _ = seen[0]


def test_fused_projections_are_refused() -> None:
    model = random_model(blocks=1)
    model.fuse_qkv_projections()
    with pytest.raises(InputError, match="fused"), capturing(model, [0], "qkv"):
        pass
