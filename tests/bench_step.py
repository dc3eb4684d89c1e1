"""A training step's seconds, peak memory and share of the matrix rate measured in the same run. Run by hand.

    python tests/bench_step.py                                    the embedded tiny Wan's shape, on any machine
    python tests/bench_step.py --model 1.3b --frames 17 33 81     random weights at 480x832, on a GPU
    python tests/bench_step.py --model 14b --frames 81 --rank 64 --backends native _native_cudnn --compiled

A step is forward, losses, backward and AdamW of the temporal stage on a clip of so many frames, with a LoRA on every
second head; blocks are run once more (`--memory low`), which is counted. FLOPs are those of the same step on tensors
without data. Rows of another model, machine or way stay. Writes results/steps.md and .json. It has never run on a GPU.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median

import torch
from bench_wan_full_size import tuned

from motionlora.heads.compiled import compiled as compiling
from motionlora.heads.positions import sparse_positions
from motionlora.heads.tiny import TINY
from motionlora.heads.wan import WanBackbone
from motionlora.heads.wan_outline import META, PUBLISHED, WanOutline, outline_of
from motionlora.infer.machine import machine
from motionlora.train.count import counting
from motionlora.train.noise import keyed_generator
from motionlora.train.plan import matmul_rate
from motionlora.train.stages import Stage

MODELS: dict[str, tuple[Callable[[], WanOutline], int, int, tuple[int, int]]] = {
    "tiny": (lambda: outline_of(TINY), 16, 16, (512, 64)),
    "1.3b": (lambda: PUBLISHED["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"], 60, 104, (512, 4096)),
    "14b": (lambda: PUBLISHED["Wan-AI/Wan2.1-T2V-14B-Diffusers"], 60, 104, (512, 4096)),
}
"""Its outline, height and width of a latent, and the size of a prompt."""


@dataclass(frozen=True)
class Row:
    """One way to make a step. `share` is of the matrix rate; `gib` the peak on the GPU with the base, None on a CPU."""

    model: str
    machine: str
    dtype: str
    frames: int
    tokens: int
    rank: int
    attention: str
    compiled: bool
    tflop: float
    seconds: float
    share: float
    gib: float | None
    command: str

    @property
    def place(self) -> tuple:
        return (self.model, self.machine, self.dtype, self.frames, self.rank, self.attention, self.compiled)


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step's seconds, memory and share of the matrix rate.")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--frames", type=int, nargs="+", default=(17, 25, 49))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--backends", nargs="+", default=("native",))
    parser.add_argument("--compiled", action="store_true", help="blocks compiled as well as eager")
    parser.add_argument("--results", type=Path, default=Path("results/steps"))
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = matmul_rate(device, dtype, seconds=3.0)
    for attention in asked.backends:
        for compiled in (False, True) if asked.compiled else (False,):
            for frames in asked.frames:
                work = (asked.model, frames, asked.rank)
                tokens, flops = counted(*work, dtype)
                seconds, peak = timed(*work, asked.steps, device, dtype, attention, compiled)
                command = " ".join(["python", "tests/bench_step.py", *sys.argv[1:]])
                row = Row(
                    asked.model, machine(), str(dtype).removeprefix("torch."), frames, tokens, asked.rank, attention,
                    compiled, flops / 1e12, seconds, flops / seconds / rate, peak, command,
                )  # fmt: skip
                write(row, asked.results, rate)


def counted(model: str, frames: int, rank: int, dtype: torch.dtype) -> tuple[int, int]:
    """Tokens and FLOPs of a step, on tensors without data."""
    with step_of(model, frames, rank, META, dtype) as (backbone, stage, step):
        with counting() as count:
            step(0)
        return backbone.grid(stage.latents).tokens, count.flops


def timed(
    model: str,
    frames: int,
    rank: int,
    steps: int,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    compiled: bool,
) -> tuple[float, float | None]:
    """Median seconds of a step after two that warm up, and GiB at the peak."""
    with step_of(model, frames, rank, device, dtype) as (backbone, _, step), compiling(backbone.transformer, compiled):
        backbone.use_attention(attention)
        gpu, found = device.type == "cuda", []
        for number in range(steps + 2):
            if gpu:
                torch.cuda.synchronize()
            began = time.perf_counter()
            step(number)
            if gpu:
                torch.cuda.synchronize()
            found.append(time.perf_counter() - began)
        return median(found[2:]), torch.cuda.max_memory_allocated() / 2**30 if gpu else None


@contextmanager
def step_of(
    model: str, frames: int, rank: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[WanBackbone, Stage, Callable[[int], None]]]:
    """A model with random weights, a temporal stage on random latents, and what makes its numbered step."""
    outline, height, width, text = MODELS[model]
    backbone = outline().without_weights(dtype, device=device)
    latents = torch.zeros(1, 16, (frames - 1) // 4 + 1, height, width, device=device)
    layers, stage = tuned(backbone, latents, text, sparse_positions("none", frames=frames, stride=1), rank)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-4)

    def step(number: int) -> None:
        generator = keyed_generator(number)
        with backbone.positioned(stage.positions):
            stage.loss(backbone, stage.point(generator), stage.told(generator)).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    try:
        yield backbone, stage, step
    finally:
        layers.remove()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def write(row: Row, results: Path, rate: float) -> None:
    """The table with this row in it, in place of an older one of the same work."""
    path = results.with_suffix(".json")
    rows = [Row(**values) for values in json.loads(path.read_text())["rows"]] if path.is_file() else []
    rows = [*(other for other in rows if other.place != row.place), row]
    lines = ["# Training steps", ""]
    heads = ("model", "machine", "dtype", "frames", "tokens", "rank", "attention", "blocks", "TFLOP", "s a step")
    lines += ["| " + " | ".join((*heads, "of the matrix rate", "peak GiB")) + " |"]
    lines += ["|" + " --- |" * 12]
    for r in rows:
        blocks, peak = "compiled" if r.compiled else "eager", "-" if r.gib is None else f"{r.gib:.1f}"
        lines += [
            f"| {r.model} | {r.machine} | {r.dtype} | {r.frames} | {r.tokens} | {r.rank} | {r.attention} | {blocks} | "
            f"{r.tflop:.4g} | {r.seconds:.3g} | {100 * r.share:.0f} % | {peak} |"
        ]
    measured = f"{rate / 1e12:.3g} TFLOP/s in matrix products in the last run ({date.today()})"
    lines += ["", f"Median seconds; {measured}. `{row.command}`", ""]
    path.parent.mkdir(exist_ok=True)
    results.with_suffix(".md").write_text("\n".join(lines))
    path.write_text(json.dumps({"rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    print(lines[2], lines[3], *lines[4:-2], sep="\n", flush=True)


if __name__ == "__main__":
    main()
