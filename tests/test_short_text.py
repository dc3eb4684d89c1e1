"""Laws of short texts: the same velocity and gradients as with 512 tokens, and no trace afterwards."""

from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from motionlora.heads.lora import attach
from motionlora.heads.short_text import folding, shortened
from motionlora.heads.tiny import random_twin
from motionlora.heads.wan import WanBackbone

LATENT, TIME = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.3])


@pytest.fixture
def model(tmp_path: Path) -> WanBackbone:
    model = WanBackbone.load(random_twin(tmp_path / "wan", blocks=2, seed=3))
    for name, weight in model.transformer.named_parameters():  # large values show a pad's wrong weight
        if "attn2.to_v" in name:
            weight.data.mul_(10)
    return model


def kinds(model: WanBackbone) -> set[type]:
    return {type(processor) for processor in model.transformer.attn_processors.values()}  # pyright: ignore


def test_a_short_text_gives_the_velocity_and_the_gradients_of_512_tokens(model: WanBackbone) -> None:
    import numpy as np

    prompt = model.embed(["a fox", "a longer caption of a fox that runs over the snow"])
    layers = attach(model.transformer, "temporal", np.ones((model.blocks, model.heads), bool), rank=2, seed=1)
    found = []
    for fold in (False, True):
        with torch.enable_grad():
            if fold:
                with folding(model.transformer) as folded:
                    velocity = model.velocity(LATENT, TIME, prompt)
                assert len(folded) == model.blocks
            else:
                velocity = model.velocity(LATENT, TIME, prompt)
            gradients = torch.autograd.grad(velocity.square().mean(), layers.parameters())
        found.append((velocity.detach(), *gradients))
    for ours, stock in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-4)
    assert not torch.equal(found[0][0], found[1][0]), "the keys were fewer"


def test_it_leaves_no_trace_also_after_an_exception(model: WanBackbone) -> None:
    prompt = model.embed(["a fox"])
    before = model.velocity(LATENT, TIME, prompt)
    with pytest.raises(ZeroDivisionError), folding(model.transformer):
        _ = 1 / 0
    assert kinds(model) == {WanAttnProcessor}
    assert torch.equal(model.velocity(LATENT, TIME, prompt), before)
    assert shortened(model.transformer, prompt.embeds) is prompt.embeds


def test_a_text_without_pads_and_one_without_words_stay_what_they_are(model: WanBackbone) -> None:
    full = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(1))
    texts = torch.cat([full, torch.zeros_like(full)])
    with folding(model.transformer) as folded:
        assert torch.equal(shortened(model.transformer, texts), texts)
        assert folded[0].bias is not None
        assert not folded[0].bias.any(), "each pad stands for itself"
        assert shortened(model.transformer, texts[1:]).shape[1] == 1
        assert folded[0].bias.item() == pytest.approx(torch.tensor(8.0).log())


def test_where_it_would_not_be_exact_nothing_is_folded(model: WanBackbone, tmp_path: Path) -> None:
    model.transformer.to(torch.bfloat16)
    with folding(model.transformer) as folded:
        assert folded == []
        assert kinds(model) == {WanAttnProcessor}
