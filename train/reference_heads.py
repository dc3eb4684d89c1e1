"""Stage one of a run: which heads of the model are spatial and which temporal, read off the full-length reference."""

import numpy as np

from motionlora.data.errors import InputError
from motionlora.heads.head_map import HeadMap
from motionlora.heads.head_map_picture import draw_head_map
from motionlora.heads.score import head_scores, mask_block
from motionlora.heads.token_grid import TokenGrid
from motionlora.train.noise import keyed_generator
from motionlora.train.workshop import Workshop


def heads_of(shop: Workshop) -> HeadMap | None:
    """The head map of the full-length reference: the folder's if it fits, else scored. None where all heads train.

    Of several clips it has the mean scores.
    """
    heads, path = shop.settings.heads, shop.file("heads.json")
    if heads.heads == "all" and shop.settings.stages != ("heads",):
        return None
    with shop.timed("heads"), shop.accelerator.main_process_first():
        grid = shop.model.grid(shop.model.encode(shop.clip))
        found = HeadMap.load(path) if path.exists() else None
        if found is None or not _fits(found, shop, grid):
            if "heads" not in shop.settings.stages:
                raise InputError(f"{path} is not of this clip and model: add heads to --stages.")
            found = _scored(shop, grid)
            if shop.accelerator.is_main_process:
                found.save(path, heads.rule, heads.ratio)
    if shop.accelerator.is_main_process:
        draw_head_map(found, path.with_suffix(".png"), heads.rule, heads.ratio)
    temporal = found.temporal(heads.rule, heads.ratio)
    shop.say(f"Heads: {int(temporal.sum())} temporal and {int((~temporal).sum())} spatial of {temporal.size}; {path}")
    return found


def _scored(shop: Workshop, grid: TokenGrid) -> HeadMap:
    model, times = shop.model, shop.settings.heads.times
    scores = [
        head_scores(
            model, model.encode(clip), model.embed([clip.caption]), times, keyed_generator(shop.settings.seed, "heads")
        )
        for clip in shop.clips
    ]
    block = mask_block(grid.tokens_per_frame)
    return HeadMap(_model_id(shop), grid, times, np.mean(scores, axis=0), block, shop.clip_hash, shop.caption)


def _fits(found: HeadMap, shop: Workshop, grid: TokenGrid) -> bool:
    now = (_model_id(shop), grid, shop.settings.heads.times, shop.clip_hash)
    return (found.backbone, found.grid, found.times, found.clip_hash) == now and found.caption == shop.caption


def _model_id(shop: Workshop) -> str:
    return f"{shop.model_name} {shop.model.fingerprint[:12]}"
