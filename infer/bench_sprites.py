"""The sprite protocol through the machinery of a comparison: known motions, exact references, every control.

LoRAs of the references are trained before (`motionlora train --clips DIR`), or by `motionlora bench sprites ablation`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from motionlora.data.benchmark import Case, Form, cases, protocol_hash
from motionlora.data.sprites import FPS, FRAMES, SIZE, render
from motionlora.infer.compare import compared
from motionlora.infer.compare_settings import BenchSpritesSettings
from motionlora.infer.pairs import Pair, Source, lora_in
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
        InputError: a LoRA is not there, or the model cannot make such clips; otherwise as `compare`.
        NumbersError, StorageError: as `compare`.
    """
    workers.heard(say)(f"Sprite protocol {protocol_hash()}, form {settings.form}")
    facts = {"protocol": f"sprite protocol, hash {protocol_hash()}, form {settings.form}"}
    return compared(protocol_pairs(settings.form, settings.loras), settings, SPRITES, facts, say, workers=workers)


def protocol_pairs(form: Form, loras: Path | None = None) -> list[Pair]:
    """The cases of a form, a pair for each reference and class of caption, with its seeds and its LoRA in `loras`."""
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
        Pair(
            clips[name],
            group[0].target.caption,
            tuple(case.seed for case in group),
            lora_in(loras, name),
            change,
            group[0].target,
        )
        for (name, change), group in groups.items()
    ]
