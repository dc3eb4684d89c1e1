"""Where CogVideoX's latent frames stand in time: rotary tables (5B), or embeddings added to the tokens (2B).

Letters: f latent frame, s token in (f h w) order, d channel of a head, e channel of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.embeddings import (
    get_1d_rotary_pos_embed,
    get_1d_sincos_pos_embed_from_grid,
    get_3d_rotary_pos_embed,
)
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from motionlora.heads.capture import unwrapped
from motionlora.heads.positions import refuse_count, refuse_odd, with_time_lanes

if TYPE_CHECKING:
    from motionlora.heads.positions import Positions
    from motionlora.heads.token_grid import TokenGrid


def rotary_tables(
    config: Any, grid: TokenGrid, device: torch.device
) -> tuple[Float[Tensor, "s d"], Float[Tensor, "s d"]]:
    """Cosine and sine of a clip's tokens, as `CogVideoXPipeline` has them: places are those of the trained size."""
    sides = config.sample_width // config.patch_size, config.sample_height // config.patch_size
    place = get_resize_crop_region_for_grid((grid.height, grid.width), *sides)
    size = (grid.height, grid.width)
    return get_3d_rotary_pos_embed(  # pyright: ignore[reportReturnType]
        config.attention_head_dim, place, size, grid.frames, device=device
    )


@contextmanager
def placed(transformer: nn.Module, positions: Positions) -> Iterator[None]:
    """Inside the context latent frame i of every forward stands at time `positions[i]`; height and width are stock.

    Positions 0, 1, 2, ... give the stock output. Nested contexts: the inner one counts. Training only: at inference
    positions are stock.

    Args:
        transformer: a CogVideoXTransformer3DModel, or a wrapper that holds one.
        positions: one number a latent frame, any dtype, finite; may be fractional.

    Raises:
        InputError: positions that are not finite; in the forward: not as many positions as the latent has frames.
    """
    refuse_odd(positions)
    model: Any = unwrapped(transformer)
    with (_turned if model.config.use_rotary_positional_embeddings else _added)(model, positions.float()):
        yield


@contextmanager
def _turned(model: Any, positions: Float[Tensor, " f"]) -> Iterator[None]:
    """The first quarter of a head's channels tells the time."""
    times: Any = positions.cpu()
    lanes: Any = get_1d_rotary_pos_embed(model.config.attention_head_dim // 4, times, use_real=True)

    def replace_time(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        refuse_count(positions, kwargs["hidden_states"].shape[1])
        tables = zip(kwargs["image_rotary_emb"], lanes, strict=True)
        tables = tuple(with_time_lanes(table[None, :, None], lane)[0, :, 0] for table, lane in tables)
        return args, {**kwargs, "image_rotary_emb": tables}

    hook = model.register_forward_pre_hook(replace_time, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _added(model: Any, positions: Float[Tensor, " f"]) -> Iterator[None]:
    """The first quarter of the model's channels tells the time."""
    embed = model.patch_embed
    text, scale = embed.max_text_seq_length, embed.temporal_interpolation_scale
    lanes = get_1d_sincos_pos_embed_from_grid(embed.embed_dim // 4, positions.cpu() / scale, output_type="pt")

    def with_times(height: int, width: int, frames: int, device: torch.device | None = None) -> Tensor:
        refuse_count(positions, (frames - 1) // embed.temporal_compression_ratio + 1)
        joint = type(embed)._get_positional_embeddings(embed, height, width, frames, device)
        video = joint[:, text:].unflatten(1, (len(positions), -1))
        video[..., : lanes.shape[1]] = rearrange(lanes.to(joint), "f e -> 1 f 1 e")
        return joint

    # Of the size that it was made for the stock module keeps a table; 0 frames are never that size.
    with _replaced(embed, _get_positional_embeddings=with_times, sample_frames=0):
        yield


@contextmanager
def _replaced(module: nn.Module, **values: Any) -> Iterator[None]:
    """Attributes of this one module, put back afterwards."""
    before = {name: vars(module)[name] for name in values if name in vars(module)}
    vars(module).update(values)
    try:
        yield
    finally:
        for name in values:
            vars(module).pop(name, None)
        vars(module).update(before)
