"""Laws of separate rotary tables: the stock ones change nothing, others reach the attention, nothing stays behind."""

import pytest
import torch
from torch import Tensor

from motionlora.heads.backbone import Prompt
from motionlora.heads.wan import WanBackbone


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (2, 16, 3, 4, 8), generator=torch.Generator().manual_seed(seed))


def said(model: WanBackbone, latent: Tensor) -> Tensor:
    return model.velocity(latent, torch.tensor([0.5]), Prompt(drawn(5, 1, 512, 32)))


@torch.no_grad()
def test_stock_tables_are_the_stock_output_bit_for_bit_and_others_are_not(twin: WanBackbone) -> None:
    latent = drawn(0)
    plain = said(twin, latent)
    with twin.turning() as turned:
        assert torch.equal(said(twin, latent), plain)
        stock = turned.stock(latent)
        assert stock.shape == (2, 4, 24, 6)
        turned.put(stock)
        assert torch.equal(said(twin, latent), plain)
        for which in range(4):
            other = stock.clone()
            other[:, which] += 0.1 * drawn(which, 24, 6)
            turned.put(other)
            assert not torch.allclose(said(twin, latent), plain, atol=1e-4)
        turned.clear()
        assert torch.equal(said(twin, latent), plain)
        turned.put(stock + 1)
    assert torch.equal(said(twin, latent), plain)


@torch.no_grad()
def test_queries_and_keys_are_turned_apart_and_each_clip_by_its_own(twin: WanBackbone) -> None:
    latent = drawn(0)
    with twin.capturing([0, 1], "qk") as seen:
        said(twin, latent)
    stock_q, stock_k = seen[0]
    with twin.turning() as turned, twin.capturing([0, 1], "qk") as seen:
        tables = turned.stock(latent)
        tables[1, 2:] = torch.tensor([1.0, 0.0]).view(2, 1, 1)  # keys of the second clip are not turned at all
        turned.put(tables)
        said(twin, latent)
        q, k = seen[0]
    assert torch.equal(q, stock_q)
    assert torch.equal(k[:1], stock_k[:1])
    assert not torch.allclose(k[1:], stock_k[1:], atol=1e-3)
    assert torch.equal(k[1, 0], stock_k[1, 0])  # the first token stands at zero in time, height and width


def test_gradients_reach_the_tables_of_every_block(twin: WanBackbone) -> None:
    latent = drawn(0)
    with twin.turning() as turned, twin.capturing([2], "qk", stop=True) as seen:
        leaf = turned.stock(latent).requires_grad_()
        turned.put(leaf)
        seen.run(lambda: said(twin, latent))
        (gradient,) = torch.autograd.grad(seen[2][0].square().sum() + seen[2][1].sum(), leaf)
    assert (gradient.abs().amax((0, 2, 3)) > 0).all()


def with_tables_of_another_size(model: WanBackbone) -> None:
    with model.turning() as turned:
        turned.put(turned.stock(drawn(0, 2, 16, 3, 4, 4)))
        said(model, drawn(0))


def test_nothing_stays_behind_after_an_exception(twin: WanBackbone) -> None:
    modules = list(twin.transformer.modules())
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    with pytest.raises(RuntimeError):
        with_tables_of_another_size(twin)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules] == before
