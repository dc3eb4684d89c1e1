"""Cross-attention of Wan to the words of a caption alone, equal to the 512 tokens with their zeros, and cheaper.

All zeros behind a caption are the same token, so n of them, of which m are kept, weigh as much as m with log(n/m) added
to their logits. On the tiny Wan half of the time of attention goes to those zeros; on the large models next to none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from jaxtyping import Float
from torch import Tensor, nn


class FoldedPads(WanAttnProcessor):
    """Cross-attention whose keys have `bias`, "b 1 1 l", added to their logits."""

    bias: Tensor | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)


@contextmanager
def folding(transformer: nn.Module) -> Iterator[list[FoldedPads]]:
    """Puts `FoldedPads` on every cross-attention of a Wan network, the stock processors back after it.

    Nothing is put, and the list is empty, where weights are not fp32 (a bias rounded to bf16 would be off by 2 %) or
    where other processors than diffusers' own are there, as in CogVideoX.
    """
    network: Any = transformer
    stock = dict(getattr(network, "attn_processors", {}))
    crossing = {name: processor for name, processor in stock.items() if ".attn2." in name}
    stocked = crossing and all(type(processor) is WanAttnProcessor for processor in crossing.values())
    if not stocked or network.dtype != torch.float32:
        yield []
        return
    folded = {name: FoldedPads() for name in crossing}
    for name, processor in folded.items():
        vars(processor).update(vars(crossing[name]))  # the chosen backend
    network.set_attn_processor(stock | folded)
    try:
        yield list(folded.values())
    finally:
        network.set_attn_processor(dict(stock))


def shortened(transformer: nn.Module, embeds: Float[Tensor, "b l d"]) -> Float[Tensor, "b m d"]:
    """Embedded captions to the end of the longest and one zero; as they are outside of `folding`."""
    processors = getattr(transformer, "attn_processors", {}).values()
    folded = [processor for processor in processors if isinstance(processor, FoldedPads)]
    if not folded:
        return embeds
    places = torch.arange(embeds.shape[1], device=embeds.device)
    lengths = ((embeds != 0).any(-1) * (places + 1)).amax(1, keepdim=True)
    kept = min(int(lengths.max()) + 1, embeds.shape[1])
    weight = torch.log((embeds.shape[1] - lengths) / (kept - lengths))
    bias = torch.where(places[:kept] < lengths, torch.zeros_like(weight), weight)[:, None, None]
    for processor in folded:
        processor.bias = bias
    return embeds[:, :kept]
