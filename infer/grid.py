"""The cells of a comparison and what they take at most, known before a model is loaded."""

from collections.abc import Sequence
from dataclasses import replace

from motionlora.data.errors import InputError
from motionlora.heads.wan_folder import found_folder, read_json
from motionlora.infer.compare_settings import GridSettings
from motionlora.infer.method import Method
from motionlora.infer.pairs import Pair
from motionlora.infer.studio import Cell, Size


def grid(pairs: Sequence[Pair], methods: Sequence[Method]) -> list[Cell]:
    """Every cell, clip by clip, so that a reference and a LoRA stay loaded for as long as they can.

    Raises:
        InputError: a method asks for a LoRA that is not there, or for another clip where there is only one.
    """
    by_source: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_source.setdefault(pair.source.content, []).append(pair)
    groups = list(by_source.values())
    if len(groups) < 2 and any(method.control == "wrong" for method in methods):
        raise InputError(
            "A wrong motion needs a second clip and there is one (equal ones count once): add a clip, or set "
            "--no-controls."
        )
    cells, turned = [], any(method.control == "reversed" for method in methods)
    for at, group in enumerate(groups):
        donors = {"wrong": groups[(at + 1) % len(groups)][0]}
        if turned:
            donors["reversed"] = replace(group[0], source=group[0].source.backwards())
        for method in methods:
            for pair in group:
                donor = donors.get(method.control, pair)
                cells += [Cell(pair, method, seed, donor) for seed in pair.seeds]
    lacking = sorted({cell.donor.source.name for cell in cells if cell.method.lora and not cell.donor.lora})
    if lacking:
        raise InputError(
            f"Method lora has no LoRA for {', '.join(lacking)}: train one for each (`motionlora train --clip CLIP "
            "--out DIR/NAME`) and give --loras DIR, or name it in the captions file."
        )
    return cells


def prediction(cells: Sequence[Cell], settings: GridSettings, size: Size) -> str:
    """The grid and the forwards that it takes at most, without loading the model."""
    folder, walk = found_folder(settings.model, weights=False, cogvideox=True), settings.sample
    blocks = int(read_json(folder / "transformer" / "config.json")["num_layers"])
    clips = {cell.pair.source.name for cell in cells}
    pairs, seeds = {id(cell.pair) for cell in cells}, {cell.seed for cell in cells}
    lines = [
        f"{len(clips)} clips, {len(pairs)} captions, {len(seeds)} seeds, {len(cells)} cells of {size}, "
        f"{walk.steps} steps by {settings.model}",
        f"{'method':<34}{'cells':>7}{'forwards each':>15}{'forwards':>12}{'gradients':>12}",
    ]
    total = 0.0
    for name, method in {cell.method.name: cell.method for cell in cells}.items():
        count = sum(cell.method.name == name for cell in cells)
        each = method.forwards(walk.steps, walk.passes, blocks)
        backwards = count * method.gradients(walk.steps, blocks)
        total += count * each
        lines.append(f"{method.name:<34}{count:>7}{each:>15.6g}{count * each:>12.6g}{backwards:>12.6g}")
    return "\n".join([*lines, f"{total:.6g} forwards at most: cells that lie in {settings.out} are used again"])
