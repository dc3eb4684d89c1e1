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


def drawn_times(
    count: int,
    shift: float,
    generator: Generator,
    between: tuple[float, float] = (0.0, 1.0),
    known: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, " b"]:
    """`count` noise levels above 0, u uniform, shifted; of these, as they are spread, only those in `between`.

    Where a model knows single levels alone (CogVideoX), one of `known` each, all equally likely; they carry the shift.
    """
    if known is not None:
        known = known[(known >= between[0]) & (known <= between[1])]
        return known[torch.randint(len(known), (count,), generator=generator)]
    low, high = (level / (shift - (shift - 1) * level) for level in between)  # `shifted` turned round
    # 1 - [0, 1) is (0, 1]: time 0 has no noise to predict.
    uniform = low + (high - low) * (1 - torch.rand(count, generator=generator))
    return shifted(uniform, shift).clamp(*between)
