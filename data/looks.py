"""One clip in other colours: the same motion, pixel by pixel, in up to six looks whose captions stay true.

A LoRA that is learned from one look binds the motion to it. Colour jitter would do for pixels, but the caption would
then say what is not there. Turning the three channels round and taking negatives moves the six hues, black and white
onto one another, so that the caption's words can be exchanged with them. Ours.
"""

import re
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from motionlora.data.clip import Clip

ORDERS = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
LOOKS = 2 * len(ORDERS)
"""Three turns of the hues, and the negative of each: of every hue all six."""
HUES: dict[str, tuple[int, ...]] = {
    "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "cyan": (0, 1, 1), "magenta": (1, 0, 1),
    "yellow": (1, 1, 0), "black": (0, 0, 0), "white": (1, 1, 1),
}  # fmt: skip
"""Words whose colour becomes that of another of them in every look; as red, green and blue."""
SHADES = {"dark": "light", "light": "dark", "bright": "dark"}
"""Words that a negative turns round, and into what."""
BETWEEN = ("orange", "brown", "purple", "violet", "pink", "turquoise", "golden", "beige", "blond", "blonde")
"""Words of colours that have no counterpart: left out of the caption of every look but the clip's own."""


def looks(clip: "Clip", count: int) -> "list[Clip]":
    """The first `count` of 1 to `LOOKS` looks: the clip itself, its channels turned round, then negatives."""
    ways = product((False, True), ORDERS)
    return [_look(clip, order, negative) for _, (negative, order) in zip(range(count), ways, strict=False)]


def _look(clip: "Clip", order: tuple[int, ...], negative: bool) -> "Clip":
    if order == ORDERS[0] and not negative:
        return clip
    pixels = clip.pixels[..., list(order)].copy()
    return replace(clip, pixels=255 - pixels if negative else pixels, caption=_reworded(clip.caption, order, negative))


def _reworded(caption: str, order: tuple[int, ...], negative: bool) -> str:
    """The caption with the words of colours exchanged as the pixels were; a capital letter stays one."""
    names = {value: word for word, value in HUES.items()}

    def exchanged(match: re.Match[str]) -> str:
        word, space = match[1].lower(), match[2]
        if word in BETWEEN:
            return ""
        if word in HUES:
            word = names[tuple(int(HUES[word][channel]) ^ negative for channel in order)]
        elif negative:
            word = SHADES[word]
        else:
            return match[0]
        return (word.capitalize() if match[1][0].isupper() else word) + space

    return re.sub(rf"\b({'|'.join((*HUES, *SHADES, *BETWEEN))})\b(\s*)", exchanged, caption, flags=re.IGNORECASE)
