"""The sprite protocol through the machinery of a comparison: known motions, exact references, every control.

For methods that need no training; LoRAs are trained on the references by `motionlora bench sprites ablation`.
"""

from collections.abc import Callable
from functools import partial

from motionlora.data.benchmark import Case, Form, cases, protocol_hash
from motionlora.data.errors import InputError
from motionlora.data.sprites import FPS, FRAMES, SIZE, render
from motionlora.infer.compare import compared
from motionlora.infer.compare_settings import BenchSpritesSettings
from motionlora.infer.method import parsed_method
from motionlora.infer.pairs import Pair, Source
from motionlora.infer.row import Row
from motionlora.infer.studio import Size
from motionlora.infer.workers import ALONE, Workers

SPRITES = Size(FRAMES, SIZE, SIZE, FPS)
"""Of every clip of the protocol."""


def bench_sprites(
    settings: BenchSpritesSettings, say: Callable[[str], None] = print, workers: Workers = ALONE
) -> list[Row]:
    """A form of the protocol by the methods of the settings; the protocol's hash stands at the head of its tables.

    Raises:
        InputError: a method needs a LoRA, or the model cannot make such clips; otherwise as `compare`.
        NumbersError, StorageError: as `compare`.
    """
    trained = [name for name in settings.methods if parsed_method(name).lora]
    if trained:
        raise InputError(
            f"Method {trained[0]} needs a LoRA for each reference, and nothing is trained here: take guidances, or "
            "make the clips with `motionlora clip sprite`, train on each and run `motionlora compare --loras DIR`."
        )
    workers.heard(say)(f"Sprite protocol {protocol_hash()}, form {settings.form}")
    facts = {"protocol": f"sprite protocol, hash {protocol_hash()}, form {settings.form}"}
    return compared(protocol_pairs(settings.form), settings, SPRITES, facts, say, workers=workers)


def protocol_pairs(form: Form) -> list[Pair]:
    """The cases of a form, a pair for each reference and class of caption, with its seeds."""
    asked = cases(form)
    sources = {case.reference.name: case.reference for case in asked}
    clips = {
        name: Source(name, partial(render, reference.scene), render(reference.scene).content_hash(), reference.scene)
        for name, reference in sources.items()
    }
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in asked:
        groups.setdefault((case.reference.name, case.change), []).append(case)
    return [
        Pair(clips[name], group[0].target.caption, tuple(case.seed for case in group), "", change, group[0].target)
        for (name, change), group in groups.items()
    ]
