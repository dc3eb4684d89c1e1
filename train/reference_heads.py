"""Stage one of a run: which heads of the model are spatial and which temporal, read off the full-length reference."""

from motionlora.data.errors import InputError
from motionlora.heads.backbone import Latent
from motionlora.heads.head_map import HeadMap
from motionlora.heads.head_map_picture import draw_head_map
from motionlora.heads.score import head_scores, mask_block
from motionlora.train.noise import keyed_generator
from motionlora.train.workshop import Workshop


def heads_of(shop: Workshop) -> HeadMap | None:
    """The head map of the full-length reference: the folder's if it fits, else scored. None where all heads train."""
    heads, path = shop.settings.heads, shop.file("heads.json")
    if heads.heads == "all" and shop.settings.stages != ("heads",):
        return None
    with shop.timed("heads"), shop.accelerator.main_process_first():
        latent = shop.model.encode(shop.clip)
        found = HeadMap.load(path) if path.exists() else None
        if found is None or not _fits(found, shop, latent):
            if "heads" not in shop.settings.stages:
                raise InputError(f"{path} is not of this clip and model: add heads to --stages.")
            found = _scored(shop, latent)
            if shop.accelerator.is_main_process:
                found.save(path, heads.rule, heads.ratio)
    if shop.accelerator.is_main_process:
        draw_head_map(found, path.with_suffix(".png"), heads.rule, heads.ratio)
    temporal = found.temporal(heads.rule, heads.ratio)
    shop.say(f"Heads: {int(temporal.sum())} temporal and {int((~temporal).sum())} spatial of {temporal.size}; {path}")
    return found


def _scored(shop: Workshop, latent: Latent) -> HeadMap:
    model, clip, times = shop.model, shop.clip, shop.settings.heads.times
    grid = model.grid(latent)
    scores = head_scores(
        model, latent, model.embed([clip.caption]), times, keyed_generator(shop.settings.seed, "heads")
    )
    block = mask_block(grid.tokens_per_frame)
    return HeadMap(_model_id(shop), grid, times, scores, block, clip.content_hash(), shop.caption)


def _fits(found: HeadMap, shop: Workshop, latent: Latent) -> bool:
    now = (_model_id(shop), shop.model.grid(latent), shop.settings.heads.times, shop.clip.content_hash())
    return (found.backbone, found.grid, found.times, found.clip_hash) == now and found.caption == shop.caption


def _model_id(shop: Workshop) -> str:
    return f"{shop.model_name} {shop.model.fingerprint[:12]}"
