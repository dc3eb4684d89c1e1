"""The text encoder of a tiny Wan while it is made, and one in which words hear each other.

Trained beside the transformer from random weights, an encoder tends to pass on every word as it is: of "a red star and
a blue circle" and "a blue star and a red circle" the same words arrive, and which sprite is which is never learned,
because the transformer gains nothing by asking (`results/log.md`). `listening` starts it with ears.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from motionlora.data.sprites import BACKGROUNDS, COLOURS, SHAPES
from motionlora.heads.tiny import make_tokenizer, tiny_text_encoder

WORDS = (*COLOURS, *SHAPES, *BACKGROUNDS, "a", "and", "behind", "grey", "bar", "on", "background")
TEXT_LENGTH, WAN_TEXT_LENGTH = 20, 512
ONE_BEFORE, ONE_AFTER = 1, 5
"""Of the encoder's eight buckets of relative places, those of the word before and after."""


class Text(nn.Module):
    """Captions to embeddings "b 512 64", zeros after the end; trained with the transformer."""

    def __init__(self):
        super().__init__()
        self.tokenizer = make_tokenizer(WORDS)
        self.encoder = tiny_text_encoder(len(self.tokenizer))

    def tokens(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask "b 20"."""
        tokens = self.tokenizer(list(captions), padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
        return tokens.input_ids, tokens.attention_mask  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]

    def forward(self, captions: Sequence[str]) -> Tensor:
        ids, mask = self.tokens(captions)
        embeds = self.encoder(ids, mask).last_hidden_state * mask[..., None]
        return nn.functional.pad(embeds, (0, 0, 0, WAN_TEXT_LENGTH - TEXT_LENGTH))


@torch.no_grad()
def listening(text: Text, captions: Sequence[str], strength: float = 0.5) -> Text:
    """A new encoder whose words mean what `text` makes of them, on the mean of `captions`, and are heard by the next.

    Its layers add nothing yet, but for two heads of the first, which add the word before, turned, at `strength` times
    a word's size. The colour that stands before a shape's word so arrives with it.
    Words that no caption has start anew.
    """
    ids, mask = text.tokens(captions)
    said = text(captions)[:, :TEXT_LENGTH] / text.encoder.encoder.final_layer_norm.weight
    new = Text()
    encoder: Any = new.encoder.encoder
    encoder.final_layer_norm.load_state_dict(text.encoder.encoder.final_layer_norm.state_dict())
    for word in ids[mask.bool()].unique():
        new.encoder.shared.weight[word] = said[(ids == word) & mask.bool()].mean(0)
    for block in encoder.block:
        block.layer[1].DenseReluDense.wo.weight.zero_()
        block.layer[0].SelfAttention.o.weight.zero_()
        block.layer[0].SelfAttention.relative_attention_bias.weight.zero_()
    ears = encoder.block[0].layer[0].SelfAttention
    half = ears.inner_dim // 2
    ears.q.weight[:half] = 0
    ears.relative_attention_bias.weight[ONE_BEFORE, : ears.n_heads // 2] = 8.0
    ears.relative_attention_bias.weight[ONE_AFTER, ears.n_heads // 2 :] = 3.0
    ears.o.weight[:, :half] = 2**0.5 * strength * torch.linalg.qr(torch.randn(len(ears.o.weight), half))[0]
    return new
