"""The whole job in minutes, on the embedded tiny Wan: a clip, its heads, a motion LoRA, new clips, their measures.

`make demo`, or `python -m motionlora.train.demo --out runs/demo`. The parts are the ones that `motionlora train` and
`motionlora generate` use; only the clip is made up, so that every figure is exact.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import get_args

import tyro

from motionlora.data.benchmark import Case, Reference, references, target_of
from motionlora.data.clip import Clip, write_clip
from motionlora.data.errors import InputError, Stopped
from motionlora.data.sprites import Change, render
from motionlora.heads.lora import unload
from motionlora.heads.wan import WanBackbone
from motionlora.infer.guide_none import NoGuidance
from motionlora.infer.measure_sprites import SpriteScores, observe, scores
from motionlora.infer.order import loaded_lora, settled, slug
from motionlora.infer.sample import Bar, new_walk, sample
from motionlora.infer.settings import GenerateSettings
from motionlora.infer.sheet import contact_sheet
from motionlora.train.command import settings_of
from motionlora.train.endings import exit_code
from motionlora.train.run import TrainResult, train


@dataclass(frozen=True)
class Demo:
    """Learns the motion of a made-up reference, and moves it to another subject, another background, and both."""

    out: Path = Path("runs/demo")
    """Everything goes here; a folder of an earlier demo is taken up where it stopped."""
    motion: str = "zigzag"
    """One of the sixteen references of the sprite protocol (`data/benchmark.py`)."""
    seeds: tuple[int, ...] = (0, 1)
    """One clip each, with the LoRA and without."""


def command(demo: Demo) -> int:
    """The demo as a command: its exit code, and one sentence of what ended it early."""
    try:
        main(demo)
    except BaseException as error:
        return exit_code(error)
    return 0


def main(demo: Demo) -> None:
    """Runs the demo and prints what came out as a table.

    Raises:
        InputError: there is no such motion.
        Stopped: Ctrl-C or SIGTERM while it learns, after saving.
    """
    began = time.perf_counter()
    reference = next((r for r in references() if r.name == demo.motion), None)
    if reference is None:
        raise InputError(
            f"There is no motion {demo.motion!r}: choose one of {', '.join(r.name for r in references())}."
        )
    looked = learn(reference, demo.out, "--stages", "heads")  # for the map; the tiny's recipe trains all heads
    learned = learn(reference, demo.out)
    seconds = {**learned.seconds, **looked.seconds}
    cases = [Case(reference, c, target_of(reference, c), seed) for c in get_args(Change) for seed in demo.seeds]
    model = WanBackbone.load("tiny")
    clips: dict[str, list[Clip]] = {}
    for name, lora in (("without LoRA", None), ("with LoRA", learned.paths["temporal"])):
        since = time.perf_counter()
        clips[name] = shown(model, cases, lora, name)
        seconds[f"generate {name}"] = round(time.perf_counter() - since, 2)
    since = time.perf_counter()
    found = {name: [judged(clip, case) for clip, case in zip(made, cases, strict=True)] for name, made in clips.items()}
    rows = [("reference", render(reference.scene))]
    for index, case in enumerate(cases):
        for name, made in clips.items():
            file = f"{slug(case.target.caption)}-seed{case.seed}-{slug(name)}.mp4"
            write_clip(made[index], demo.out / file, comment=case.target.caption)
            if case.seed == demo.seeds[0]:
                rows.append((f"{case.target.caption}, {name}", made[index]))
    contact_sheet(rows, demo.out / "sheet.png")
    seconds["measure"] = round(time.perf_counter() - since, 2)
    seconds["total"] = round(time.perf_counter() - began, 2)
    summary = summarised(found) | {"motion": reference.name, "clips": len(cases), "seconds": seconds}
    (demo.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(table(found, seconds, demo.out))


def learn(reference: Reference, out: Path, *overrides: str) -> TrainResult:
    """Trains both stages on a reference of the sprite world with `configs/tiny.yaml`; goes on where it stopped."""
    clip = out / "clip.mp4"
    if not clip.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_clip(render(reference.scene), clip, comment=reference.scene.caption)
    options = ["--config", "tiny", "--clip", str(clip), "--caption", reference.scene.caption, "--out", str(out)]
    options += ["--resume", "latest", *overrides]
    try:
        return train(settings_of("train", options))
    except Stopped as stopped:
        raise Stopped(
            f"{stopped}; the demo as a whole goes on by the command that started it", stopped.code
        ) from stopped


def shown(model: WanBackbone, cases: Sequence[Case], lora: Path | None, title: str, *, batch: int = 6) -> list[Clip]:
    """A clip of each case's caption with its seed: from the same noise with a LoRA as without."""
    how: GenerateSettings = settings_of("generate", ["--config", "tiny"])
    loras = [loaded_lora(str(lora), how.strength)] if lora else []
    for one in loras:
        one.load_onto(model, "motion")
    clips = []
    try:
        for at in range(0, len(cases), batch):
            part = cases[at : at + batch]
            walk = new_walk(
                model,
                model.embed([case.target.caption for case in part]),
                model.embed([how.negative]),
                seed=[case.seed for case in part],
                frames=how.frames,
                height=how.height,
                width=how.width,
                sample=settled(how.sample, loras),
            )
            for latent, case in zip(sample(walk, NoGuidance(), Bar(title)).split(1), part, strict=True):
                clips.append(replace(model.decode(latent, how.fps), caption=case.target.caption))
    finally:
        if loras:
            unload(model.transformer, "motion")
    return clips


def judged(clip: Clip, case: Case) -> SpriteScores:
    """One clip against what its case asked for."""
    return scores(observe(clip.pixels), case.target, case.reference.scene)


def summarised(found: dict[str, list[SpriteScores]]) -> dict[str, float]:
    """Medians over all captions and seeds."""
    plain, moved = found["without LoRA"], found["with LoRA"]
    return {
        "smf_median": round(median(s.smf for s in moved), 4),
        "smf_median_without_lora": round(median(s.smf for s in plain), 4),
        "attr_acc_median": round(median(s.acc for s in moved), 4),
        "attr_acc_median_without_lora": round(median(s.acc for s in plain), 4),
        "attr_leak_median": round(median(s.leak for s in moved), 4),
        "attr_leak_median_without_lora": round(median(s.leak for s in plain), 4),
    }


def table(found: dict[str, list[SpriteScores]], seconds: dict[str, float], out: Path) -> str:
    """Medians by row, and where the time went."""
    names = list(asdict(next(iter(found.values()))[0]))
    lines = ["", f"{'median':<14}" + "".join(f"{name:>10}" for name in names)]
    for row, made in found.items():
        lines.append(f"{row:<14}" + "".join(f"{median(getattr(s, name) for s in made):>10.2f}" for name in names))
    spent = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    return "\n".join([*lines, "", f"seconds: {spent}", f"look at {out / 'sheet.png'}"])


if __name__ == "__main__":
    sys.exit(command(tyro.cli(Demo)))
