"""Other colours of a clip: the same motion, and a caption that stays true."""

import numpy as np
import pytest

from motionlora.data.benchmark import references
from motionlora.data.clip import Clip
from motionlora.data.looks import LOOKS, looks
from motionlora.data.sprites import render
from motionlora.infer.measure_sprites import observe

OBJECTS = references()[:8]


@pytest.mark.parametrize("reference", OBJECTS, ids=lambda reference: reference.name)
def test_every_look_shows_what_its_caption_says_where_the_clip_shows_it(reference) -> None:
    every = looks(render(reference.scene), LOOKS)
    assert len({look.pixels.tobytes() for look in every}) == LOOKS
    for look in every:
        _, colour, shape, _, _, background, _ = look.caption.split()
        seen = observe(look.pixels[::8])
        assert seen.background == background
        for blobs, place in zip(seen.blobs, reference.scene.sprites[0].path[::8], strict=True):
            assert [(blob.colour, blob.shape) for blob in blobs] == [(colour, shape)]
            assert np.abs(np.subtract(blobs[0].centre, place)).max() < 0.7


def test_the_first_look_is_the_clip_and_fewer_are_the_first_of_more() -> None:
    clip = render(OBJECTS[0].scene)
    assert looks(clip, 1)[0] is clip
    for some, more in zip(looks(clip, 4), looks(clip, LOOKS), strict=False):
        assert some.caption == more.caption
        assert np.array_equal(some.pixels, more.pixels)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "A Red car, an orange cat; yellow reeds, a bright sky, colored."),
        (1, "A Blue car, an cat; magenta reeds, a bright sky, colored."),
        (3, "A Cyan car, an cat; blue reeds, a dark sky, colored."),
    ],
)
def test_words_follow_the_pixels(number: int, said: str) -> None:
    """Look 1 turns red to blue, green to red, blue to green; look 3 is the negative; orange has no counterpart."""
    clip = Clip(np.zeros((5, 8, 8, 3), np.uint8), 8.0, "A Red car, an orange cat; yellow reeds, a bright sky, colored.")
    assert looks(clip, LOOKS)[number].caption == said
