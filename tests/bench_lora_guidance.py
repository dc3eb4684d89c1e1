"""A guidance beside the motion LoRA of the same clip: does the sum beat both? The eight object motions, one seed.

    python tests/bench_lora_guidance.py --loras runs/transfer     those that bench_transfer.py has trained

Rates are those that `bench_rates.py` chose outside of the protocol. Resumes; writes results/lora_guidance.md.
"""

import argparse
import json
from pathlib import Path

from motionlora.data.cache import write_text
from motionlora.infer.bench_sprites import bench_sprites
from motionlora.infer.compare_settings import BenchSpritesSettings
from motionlora.infer.gains import family
from motionlora.infer.row import Row
from motionlora.infer.table_text import markdown_table, span

RATES = Path("results/guidance_rates.json")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loras", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--out", type=Path, default=Path("runs/lora-guidance"))
    parser.add_argument("--results", type=Path, default=Path("results/lora_guidance.md"))
    parser.add_argument("--methods", nargs="+", default=list(json.loads(RATES.read_text())["chosen"].values()))
    chosen = parser.parse_args()
    sums = [f"lora+{method}" for method in chosen.methods]
    methods = ("lora", *chosen.methods, *sums)
    rows = bench_sprites(
        BenchSpritesSettings(
            out=chosen.out, loras=chosen.loras, methods=methods, controls=False, points=0, form="sweep"
        )
    )
    table = (chosen.out / "table.md").read_text().replace("# Comparison", "# A guidance beside the LoRA of its clip", 1)
    table = table.replace("- command: motionlora ", "- command: python tests/bench_lora_guidance.py ", 1)
    write_text(chosen.results, "\n".join([table, *over_both(rows, chosen.methods)]))


def over_both(rows: list[Row], methods: list[str]) -> list[str]:
    """What the sum has over the LoRA alone and over the guidance alone, by SMF and by accuracy."""
    lines = []
    for measure, label in (("smf", "SMF"), ("acc", "AttrAcc")):
        for against in ({f"lora+{m}": "lora" for m in methods}, {f"lora+{m}": m for m in methods}):
            for gain in family(rows, against, measure):
                ends = span(gain.low, gain.high)
                lines.append([gain.method, gain.against, label, f"{gain.mean:+.3f}", ends, f"{gain.p_holm:.3g}"])
    heads = ["sum", "over", "measure", "gain", "95 %", "p (Holm)"]
    return ["## The sum over its parts", "", *markdown_table(heads, lines), ""]


if __name__ == "__main__":
    main()
