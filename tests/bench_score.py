"""What scoring the heads adds to a forward: time, peak memory, difference. Run by hand; writes results/head_scores.*.

    python tests/bench_score.py --frames 21 --height 14 --width 20 --heads 4

Each way runs in its own process on the same random model, so that its peak memory is its own. Beside ours: that of the
release, with whole attention maps and masks, and ours before, the same for some rows at a time. For the full size FLOPs
and bytes are counted on tensors without data.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).resolve().parent.parent / "results"
WAYS = {
    "none": "forward alone",
    "scored": "forward + scores",
    "streamed": "forward + scores from streamed rows (before)",
    "dense": "forward + scores from whole maps (release)",
}
STREAMED_BYTES = 2**26


def main() -> None:
    """Runs the ways one after the other, prints the table and writes it."""
    settings = read_settings()
    if settings.way:
        print(json.dumps(measure(settings)))
        return
    runs = {way: in_own_process(way) for way in WAYS}
    alone = runs["none"]["seconds"]
    record = {
        "what": "head scores of one forward of a random Wan transformer in fp32",
        "machine": f"{os.cpu_count()} CPU cores, one thread used; seconds of processor time, least of {settings.runs}",
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", "tests/bench_score.py", *sys.argv[1:]]),
        "tokens": settings.frames * settings.height * settings.width,
        "blocks": settings.blocks,
        "heads": settings.heads,
        "head_dim": settings.head_dim,
        "largest_difference": abs(np.array(runs["scored"]["scores"]) - np.array(runs["dense"]["scores"])).max(),
        "ways": {
            way: {
                "seconds": run["seconds"],
                "forwards_more": (run["seconds"] - alone) / alone,
                "peak_mib": run["peak_mib"] - run["idle_mib"],
            }
            for way, run in runs.items()
        },
        "full_size": full_size(),
    }
    text = table(record)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "head_scores.md").write_text(text)
    (RESULTS / "head_scores.json").write_text(json.dumps(record, indent=1) + "\n")


def read_settings() -> argparse.Namespace:
    """The size of the model and of the clip."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("frames", 21), ("height", 14), ("width", 20), ("blocks", 2), ("heads", 4), ("head-dim", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--runs", type=int, default=3, help="forwards, of which the fastest counts")
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process and print it as JSON")
    return parser.parse_args()


def in_own_process(way: str) -> dict[str, Any]:
    """The measurement of one way, made by this same program."""
    command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(answer.stdout.splitlines()[-1])


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """One forward, scored in one way: seconds, peak memory of the process, scores as nested lists."""
    import torch
    from diffusers import WanTransformer3DModel

    from motionlora.heads.backbone import TokenGrid
    from motionlora.heads.score import scoring

    torch.set_num_threads(1)
    torch.manual_seed(0)
    size: dict[str, Any] = {"num_attention_heads": settings.heads, "attention_head_dim": settings.head_dim}
    size |= {"num_layers": settings.blocks, "ffn_dim": 64, "freq_dim": 32, "text_dim": 16}
    model = WanTransformer3DModel(**size, in_channels=4, out_channels=4).eval().requires_grad_(False)
    grid = TokenGrid(settings.frames, settings.height, settings.width)
    inputs = (
        torch.randn(1, 4, grid.frames, 2 * grid.height, 2 * grid.width),
        torch.tensor([999.8]),
        torch.zeros(1, 8, 16),
    )

    def run() -> Any:
        if settings.way in ("none", "scored"):
            with scoring(model, grid) if settings.way == "scored" else nullcontext() as scores:
                model(*inputs)
            return scores
        row_bytes = 4 * grid.tokens * (settings.heads + 2)
        return scores_by_rows(
            model, grid, inputs, STREAMED_BYTES // row_bytes if settings.way == "streamed" else grid.tokens
        )

    with torch.no_grad():
        model(inputs[0][:, :, :1], *inputs[1:])  # the first call of a process pays for the libraries
        idle, seconds, scores = peak_mib(), [], None
        for _ in range(settings.runs):
            start = time.process_time()
            scores = run()
            seconds.append(time.process_time() - start)
    listed = None if scores is None else scores.tolist()
    return {"seconds": min(seconds), "peak_mib": peak_mib(), "idle_mib": idle, "scores": listed}


def scores_by_rows(model: Any, grid: Any, inputs: tuple[Any, ...], rows: int) -> Any:
    """Attention maps times masks in fp32, so many rows at a time; with all of them as the release does."""
    import torch
    from einops import rearrange

    from motionlora.heads.capture import capturing

    with capturing(model, range(len(model.blocks)), "qk") as seen:
        model(*inputs)
    total = torch.zeros(len(model.blocks), len(seen[0][0][0, 0]), 2, dtype=torch.float64)
    for block in range(len(model.blocks)):
        q, k = (rearrange(x, "1 s h d -> h s d") for x in seen[block])
        for chunk in torch.arange(grid.tokens).split(rows):
            logits = (q[:, chunk] * q.shape[-1] ** -0.5) @ k.mT
            weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
            inside = torch.einsum("hrs,rms->hrm", weights, mask_rows(grid, chunk))
            total[block] += (inside / weights.sum(dim=-1, keepdim=True)).sum(dim=1, dtype=torch.float64)
    return total / grid.tokens


def mask_rows(grid: Any, rows: Any) -> Any:
    """Rows of the spatial and of the temporal mask, 0 or 1, "r 2 s"."""
    import torch

    from motionlora.heads.score import mask_block

    block = mask_block(grid.tokens_per_frame)
    columns = torch.arange(grid.tokens)

    def by_place(index: Any) -> Any:
        return (index % grid.tokens_per_frame) * grid.frames + index // grid.tokens_per_frame

    def band(row: Any, column: Any) -> Any:
        return (row[:, None] // block - column // block).abs() < max(1, grid.tokens_per_frame // block)

    return torch.stack((band(rows, columns), band(by_place(rows), by_place(columns))), dim=1).float()


def full_size() -> dict[str, Any]:
    """Of Wan 2.1 1.3B in bf16, 81 frames of 480x832: what a forward takes, and what scoring adds to it."""
    import torch

    from motionlora.heads.wan_outline import PUBLISHED
    from motionlora.train.rehearsal import Rehearsal
    from motionlora.train.settings import TrainSettings

    name = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    run = Rehearsal(TrainSettings(frames=81, height=480, width=832), PUBLISHED[name], torch.bfloat16)
    plain, scored = run.forward(), run.forward(scored=True)
    return {
        "model": name,
        "tokens": run.whole_grid.tokens,
        "tflop": plain.flops / 1e12,
        "tflop_more": (scored.flops - plain.flops) / 1e12,
        "gib": plain.nbytes / 2**30,
        "gib_more": (scored.nbytes - plain.nbytes) / 2**30,
    }


def peak_mib() -> float:
    """Largest resident size of this process so far (Linux counts in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def table(record: dict[str, Any]) -> str:
    """The measurement as Markdown."""
    rows = "\n".join(
        f"| {WAYS[way]} | {run['seconds']:.2f} | {run['forwards_more']:.2f} | {run['peak_mib']:.0f} |"
        for way, run in record["ways"].items()
    )
    full = record["full_size"]
    return (
        f"# What head scores cost\n\n{record['what']}: {record['blocks']} blocks, "
        f"{record['heads']} heads of {record['head_dim']}, {record['tokens']} tokens.\n"
        f"{record['machine']}, {record['date']}, `{record['command']}`.\n\n"
        "| way | seconds | more than the forward, in forwards | peak memory above idle, MiB |\n|---|---|---|---|\n"
        f"{rows}\n\nLargest difference of a share to that from whole maps: {record['largest_difference']:.1e}.\n\n"
        f"{full['model']} in bf16, {full['tokens']} tokens, counted on tensors without data, not run: a forward "
        f"takes {full['tflop']:.0f} TFLOP, scoring its heads {full['tflop_more']:.0f} more "
        f"({full['tflop_more'] / full['tflop']:.2f} forwards); beside the weights it peaks at {full['gib']:.2f} GiB, "
        f"scored at {full['gib_more']:.2f} GiB more.\n"
    )


if __name__ == "__main__":
    main()
