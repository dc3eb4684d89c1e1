"""How good is the embedded tiny Wan? Unseen caption-seed pairs, looked at by the recognisers; VAE reconstruction in dB.

    python tests/bench_tiny.py --pairs 128         about a quarter of an hour on two cores; writes results/tiny_wan.*
                                                   and the first eight pairs as the model card's samples

Bars: colour right in 95 %, shape in 85 %, number of sprites in 90 % of pairs (in most of the frames looked at);
reconstruction of held-out clips at least 30 dB; the motion varies from seed to seed.
"""

import argparse
import json
import os
import platform
from datetime import date
from pathlib import Path
from statistics import mean

import numpy as np

from motionlora.data.benchmark import Case, references
from motionlora.data.clip import Clip
from motionlora.data.sprites import Scene, random_scene, render
from motionlora.heads.tiny import TINY
from motionlora.heads.wan import WanBackbone
from motionlora.infer.measure_direction import main_path
from motionlora.infer.measure_sprites import observe
from motionlora.infer.sheet import contact_sheet
from motionlora.train.command import settings_of
from motionlora.train.demo import shown


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--psnr-clips", type=int, default=32)
    parser.add_argument("--results", type=Path, default=Path("results/tiny_wan"))
    parser.add_argument("--samples", type=Path, default=TINY / "samples.png")
    chosen = parser.parse_args()
    model = WanBackbone.load("tiny")
    generator = np.random.default_rng(20_001)
    scenes = [random_scene(generator, frames=2) for _ in range(chosen.pairs)]
    pairs = [Case(references()[0], "scene", scene, 1000 + index) for index, scene in enumerate(scenes)]
    clips = shown(model, pairs, None, "unseen pairs")
    contact_sheet([(scene.caption, clip) for scene, clip in zip(scenes[:8], clips[:8], strict=True)], chosen.samples)
    seen = [observe(clip.pixels) for clip in clips]
    rights = [right(view.blobs, view.background, scene) for view, scene in zip(seen, scenes, strict=True)]
    shares = {name: mean(r[name] for r in rights) for name in ("colour", "shape", "count", "background")}
    same = [Case(references()[0], "scene", references()[0].scene, seed) for seed in range(6)]
    spread = variety(shown(model, same, None, "one caption, six seeds"))
    psnr = [reconstruction(model, generator) for _ in range(chosen.psnr_clips)]
    figures = {**{f"{name}_right": round(value, 3) for name, value in shares.items()}}
    figures |= {"psnr_mean_db": round(mean(psnr), 2), "psnr_worst_db": round(min(psnr), 2)}
    figures |= {"motion_spread_px": round(spread, 2), "pairs": chosen.pairs, "fingerprint": model.fingerprint[:12]}
    figures["guidance_scale"] = settings_of("generate", ["--config", "tiny"]).sample.scale
    bars = {"colour_right": 0.95, "shape_right": 0.85, "count_right": 0.9, "psnr_mean_db": 30.0}
    lines = ["# The embedded tiny Wan", "", "| figure | measured | bar |", "| --- | --- | --- |"]
    lines += [f"| {name} | {value} | {bars.get(name, '')} |" for name, value in figures.items()]
    command = f"python tests/bench_tiny.py --pairs {chosen.pairs}"
    about = f"{platform.machine()}, {os.cpu_count()} cores, {date.today()}, `{command}`"
    chosen.results.parent.mkdir(exist_ok=True)
    chosen.results.with_suffix(".md").write_text("\n".join([*lines, "", about, ""]))
    chosen.results.with_suffix(".json").write_text(json.dumps({**figures, "about": about}, indent=2) + "\n")
    print("\n".join([*lines, "", about]))


def right(blobs: list, background: str, scene: Scene) -> dict[str, bool]:
    """Whether most frames show the colours, colours with shapes, and the number that the caption asks for."""
    colours = sorted(sprite.colour for sprite in scene.sprites)
    looks = sorted((sprite.colour, sprite.shape) for sprite in scene.sprites)
    frames = blobs[:: max(1, len(blobs) // 12)]
    return {
        "colour": mean(sorted(b.colour for b in frame) == colours for frame in frames) > 0.5,
        "shape": mean(sorted((b.colour, b.shape) for b in frame) == looks for frame in frames) > 0.5,
        "count": mean(len(frame) == len(looks) for frame in frames) > 0.5,
        "background": background == scene.background,
    }


def variety(clips: list[Clip]) -> float:
    """Mean distance in pixels, over pairs of seeds, between the centred paths of the largest sprite."""
    paths = []
    for clip in clips:
        path = main_path(observe(clip.pixels))
        paths.append(path - np.nanmean(path, axis=0))
    distances = [np.nanmean(np.linalg.norm(a - b, axis=1)) for i, a in enumerate(paths) for b in paths[:i]]
    return float(np.nanmean(distances))


def reconstruction(model: WanBackbone, generator: np.random.Generator) -> float:
    """PSNR in dB of a random unseen clip through the VAE."""
    clip = render(random_scene(generator))
    error = model.decode(model.encode(clip), clip.fps).pixels.astype(np.float64) - clip.pixels
    return float(10 * np.log10(255**2 / np.mean(error**2)))


if __name__ == "__main__":
    main()
