"""Text, quality and box measures of one clip, as far as there are encoders for them; what is missing says why."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from torch import Tensor, cat

from motionlora.data.clip import Clip
from motionlora.data.errors import InputError
from motionlora.infer.measure_boxes import asked_boxes, box_scores, centres, sprite_boxes
from motionlora.infer.measure_encoders import Encoders
from motionlora.infer.measure_quality import aesthetic, consistency, smoothness_linear
from motionlora.infer.measure_text import (
    ImageTextEncoder,
    Pixels,
    adjacent_similarity,
    all_pairs_similarity,
    paired_similarity,
    text_similarity,
)
from motionlora.infer.points import Boxes
from motionlora.infer.track_points import Tracks

B32 = ("text_b32", "text_b32_whole", "tc_adjacent", "background", "to_reference", "csim", "csim_gt")
L14 = ("text_l14", "text_l14_whole", "tc_pairs", "aesthetic")
NEVER = {
    "smoothness": "needs AMT-S, whose weights are not read here; `smooth (linear)` stands in for it",
    "lpips": "needs the package lpips, whose AlexNet comes as a pickle through torchvision: it is not used here",
    "fml": "its paper names it and does not define it, so no number may bear the name",
}
NO_BOXES = "no sprite is recognised in the reference, so there are no boxes"
SELDOM = "sprites are seen in fewer than half of the frames, and such clips have no score (Peekaboo)"


class FrameJudge:
    """Measures frames by encoders; features of references are kept."""

    def __init__(self, encoders: Encoders) -> None:
        self.encoders = encoders
        self._kept: dict[str, Tensor] = {}

    def measured(
        self, clip: Clip, caption: str, reference: Clip, boxes: Boxes | None
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Values by name, and the reason of each that is missing. `boxes` are the reference's sprites, if any."""
        encoders, values = self.encoders, {"smooth_linear": smoothness_linear(clip.pixels)}
        absent = {"b32": B32, "l14": L14, "dino": ("subject",), "aesthetic": ("aesthetic",)}
        missing = NEVER | {name: why for part, why in encoders.missing.items() for name in absent[part]}
        for encoder, name, more in (
            (encoders.b32, "text_b32", partial(self._by_b32, reference=reference)),
            (encoders.l14, "text_l14", self._by_l14),
        ):
            if encoder:
                middle = encoder.images(clip.pixels, "crop")
                values |= more(encoder, clip.pixels, middle)
                try:
                    text = encoder.text(caption)
                except InputError as refusal:
                    missing |= dict.fromkeys((name, f"{name}_whole"), str(refusal))
                else:
                    values[name] = text_similarity(middle, text)
                    values[f"{name}_whole"] = text_similarity(encoder.images(clip.pixels, "whole"), text)
        if encoders.dino:
            values["subject"] = consistency(encoders.dino.images(clip.pixels))
        if boxes is None:
            return values, missing | dict.fromkeys(("miou", "csim_gt"), NO_BOXES)
        miou = box_scores(clip.pixels, boxes).miou
        if math.isnan(miou):
            missing["miou"] = SELDOM
        else:
            values["miou"] = miou
        if encoders.b32:
            values["csim_gt"] = all_pairs_similarity(within(encoders.b32, clip.pixels, boxes))
        return values, missing

    def _by_b32(self, encoder: ImageTextEncoder, pixels: Pixels, middle: Tensor, reference: Clip) -> dict[str, float]:
        key = reference.content_hash()
        if key not in self._kept:
            self._kept[key] = encoder.images(reference.pixels, "crop")
        return {
            "tc_adjacent": adjacent_similarity(middle),
            "csim": all_pairs_similarity(middle),
            "background": consistency(encoder.images(pixels, "plain")),
            "to_reference": paired_similarity(middle, self._kept[key]),
        }

    def _by_l14(self, encoder: ImageTextEncoder, pixels: Pixels, middle: Tensor) -> dict[str, float]:
        values = {"tc_pairs": all_pairs_similarity(middle)}
        if self.encoders.aesthetic:
            values["aesthetic"] = aesthetic(encoder.images(pixels, "plain"), *self.encoders.aesthetic)
        return values


def within(encoder: ImageTextEncoder, pixels: Pixels, boxes: Boxes) -> Tensor:
    """Features of the first box's content in the frames that have it, "f d"; all of it is shown, with borders."""
    rows = asked_boxes(boxes)[0]
    crops = []
    for frame in np.flatnonzero(boxes.tracks.visible[0]):
        top, left, bottom, right = np.rint(rows[frame]).astype(int).clip(0)
        crop = pixels[frame : frame + 1, top : max(bottom, top + 1), left : max(right, left + 1)]
        crops.append(encoder.images(crop, "whole"))
    return cat(crops)


def boxes_of_sprites(pixels: Pixels, objects: int) -> Boxes | None:
    """The boxes of a sprite clip's largest sprites in every frame; None where none is ever seen.

    Objects are in the order of their size, frame by frame: which is which does not matter to those who ask for the
    nearest.
    """
    found = sprite_boxes(pixels, objects)
    visible = np.array([[len(boxes) > number for boxes in found] for number in range(objects)])
    if not visible.any():
        return None
    rows = np.zeros((objects, len(pixels), 4))
    for frame, boxes in enumerate(found):
        rows[: len(boxes), frame] = boxes
    return Boxes(Tracks(centres(rows) - 0.5, visible), rows[..., 2:] - rows[..., :2])
