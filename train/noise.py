"""Which noise levels to train on, and noise that depends on nothing but seed, stage, step, micro-batch and process.

Keyed draws are what makes a resumed run bit-identical: no generator lives from one step to the next.
"""

from hashlib import blake2b

import torch
from jaxtyping import Float
from torch import Generator, Tensor


def keyed_generator(*key: int | str) -> Generator:
    """A CPU generator whose seed is a hash of `key`; equal keys give equal draws on every machine."""
    digest = blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()
    return Generator().manual_seed(int.from_bytes(digest, "big"))


def shifted(uniform: Tensor, shift: float) -> Tensor:
    """`s = k u / (1 + (k - 1) u)`: maps [0, 1] onto itself, towards noise for k above 1 (methods.md section 1.2)."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def drawn_times(count: int, shift: float, generator: Generator) -> Float[Tensor, " b"]:
    """`count` noise levels in (0, 1], u uniform, shifted."""
    # 1 - [0, 1) is (0, 1]: time 0 has no noise to predict.
    return shifted(1 - torch.rand(count, generator=generator), shift)
