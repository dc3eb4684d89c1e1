"""Time positions of a sparse clip's latent frames, and the patch that puts them into the rotary embedding.

Letters: f latent frame, s token in (f h w) order, d channel of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from motionlora.data.settings import InputError
from motionlora.heads.capture import unwrapped

Positions: TypeAlias = Float[Tensor, " f"]
"""Where each latent frame stands on the full-length clip's latent time axis, float64, in latent frames."""
PositionKind: TypeAlias = Literal["none", "paper", "paper_pixel", "linear", "aligned"]


def sparse_positions(kind: PositionKind, *, frames: int, stride: int) -> Positions:
    """Positions for every `stride`-th pixel frame of a clip of `frames` frames, encoded as a clip of its own.

    Args:
        kind: with F latent (P pixel) frames of the full clip and Fs (Ps) of the sparse one, latent frame i stands at
            "none": i, as if the sparse clip were a short one (the release as committed);
            "paper": i F / Fs (Follow-Your-Motion, adaptive RoPE, whose centring cancels; latent counts);
            "paper_pixel": i P / Ps (the same formula with pixel counts);
            "linear": i (F - 1) / (Fs - 1), which is i times the stride: the last frame stands at F - 1;
            "aligned": 0 for i = 0, else stride i - 0.375 (stride - 1): the middle of the pixel frames that latent
            frame i covers, on the full clip's axis (ours: the causal VAE gives latent frame 0 one pixel frame and
            every other one four).
        frames: pixel frames of the full clip, 4k + 1.
        stride: at least 1; (frames - 1) / stride is a multiple of 4.

    Returns:
        Fs numbers in [0, F - 1], the first one 0.

    Raises:
        InputError: unknown kind, or counts that the VAE would cut.
    """
    if kind not in _FORMULAS:
        raise InputError(f"Positions {kind!r} are unknown; allowed are {', '.join(_FORMULAS)}: choose one of them.")
    if frames < 1 or stride < 1 or (frames - 1) % 4 or (frames - 1) % (4 * stride):
        raise InputError(
            f"Every {stride}. of {frames} frames does not leave 4k + 1 frames; choose a clip of 4k + 1 frames and a "
            "stride of which 4 times divides frames - 1."
        )
    sparse = (frames - 1) // stride + 1
    return _FORMULAS[kind](torch.arange((sparse - 1) // 4 + 1, dtype=torch.float64), frames, sparse, stride)


def _paper(i: Positions, frames: int, sparse: int, _: int) -> Positions:
    return i * ((frames - 1) // 4 + 1) / ((sparse - 1) // 4 + 1)


def _aligned(i: Positions, _: int, __: int, stride: int) -> Positions:
    return torch.where(i > 0, stride * i - 0.375 * (stride - 1), 0.0)


_FORMULAS: dict[str, Callable[[Positions, int, int, int], Positions]] = {
    "none": lambda i, _, __, ___: i,
    "paper": _paper,
    "paper_pixel": lambda i, frames, sparse, _: i * frames / sparse,
    "linear": lambda i, _, __, stride: i * stride,
    "aligned": _aligned,
}
assert tuple(_FORMULAS) == get_args(PositionKind)


@contextmanager
def positioned(transformer: nn.Module, positions: Positions) -> Iterator[None]:
    """Inside the context latent frame i of every forward stands at time `positions[i]`; height and width are stock.

    Only differences between positions matter to the attention. Integer positions 0, 1, 2, ... give the stock output
    bit for bit. Nested contexts: the inner one counts. Training only: at inference positions are stock.

    Args:
        transformer: a WanTransformer3DModel, or a wrapper that holds one as `.module`.
        positions: one number a latent frame (not a patch of several), any dtype, finite; may be fractional.

    Raises:
        InputError: positions that are not finite; in the forward: not as many positions as the latent has frames.
    """
    refuse_odd(positions)
    rope: Any = unwrapped(transformer).rope
    cos, sin = _time_lanes(positions, rope.t_dim)

    def replace_time(_: nn.Module, args: tuple[Tensor, ...], out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        refuse_count(positions, args[0].shape[2] // rope.patch_size[0])
        return with_time_lanes(out[0], cos), with_time_lanes(out[1], sin)

    hook = rope.register_forward_hook(replace_time)
    try:
        yield
    finally:
        hook.remove()


def refuse_odd(positions: Positions) -> None:
    """InputError for positions that are not one finite number a latent frame."""
    if positions.ndim != 1 or not torch.isfinite(positions).all():
        raise InputError("Positions must be one finite number a latent frame: use sparse_positions to make them.")


def refuse_count(positions: Positions, frames: int) -> None:
    """InputError where a latent has more or fewer frames than there are positions."""
    if frames != len(positions):
        raise InputError(f"Got {len(positions)} positions for {frames} latent frames: give one for each.")


def _time_lanes(positions: Positions, lanes: int) -> tuple[Float[Tensor, "f d"], Float[Tensor, "f d"]]:
    """Cosine and sine of the time lanes, angles in float64 as in diffusers' own table (arXiv 2104.09864, eq. 15)."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    return get_1d_rotary_pos_embed(  # pyright: ignore[reportReturnType]
        lanes,
        positions.detach().cpu().double(),  # pyright: ignore[reportArgumentType]
        10000.0,
        use_real=True,
        repeat_interleave_real=True,
        freqs_dtype=torch.float64,  # pyright: ignore[reportArgumentType]
    )


def with_time_lanes(table: Float[Tensor, "1 s 1 d"], lanes: Float[Tensor, "f t"]) -> Float[Tensor, "1 s 1 d"]:
    """A rotary table whose first lanes, which tell the time, are those of each frame."""
    tokens_per_frame = table.shape[1] // lanes.shape[0]
    time = repeat(lanes.to(table), "f t -> 1 (f hw) 1 t", hw=tokens_per_frame)
    return torch.cat([time, table[..., lanes.shape[1] :]], dim=-1)
