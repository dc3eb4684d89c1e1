"""Streamed against dense head scores: difference, seconds, peak memory. Run by hand; writes results/head_scores.*.

    python tests/bench_score.py --frames 21 --height 14 --width 20 --heads 4

Each way runs in its own process on the same random model, so that its peak memory is its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results"
WAYS = ("none", "streamed", "dense")


def main() -> None:
    """Runs the ways one after the other, prints the table and writes it."""
    settings = read_settings()
    if settings.way:
        print(json.dumps(measure(settings)))
        return
    runs = {way: in_own_process(way) for way in WAYS}
    tokens = settings.frames * settings.height * settings.width
    pairs = zip(flat(runs["streamed"]["scores"]), flat(runs["dense"]["scores"]), strict=True)
    record = {
        "what": "head scores of one forward of a random Wan transformer, streamed and dense",
        "machine": f"{os.cpu_count()} CPU cores, {runs['none']['threads']} thread(s) used",
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", "tests/bench_score.py", *sys.argv[1:]]),
        "tokens": tokens,
        "blocks": settings.blocks,
        "heads": settings.heads,
        "head_dim": settings.head_dim,
        "largest_difference": max(abs(a - b) for a, b in pairs),
        "ways": {way: {key: run[key] for key in ("seconds", "peak_mib", "idle_mib")} for way, run in runs.items()},
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
    with torch.no_grad():
        model(inputs[0][:, :, :1], *inputs[1:])  # the first call of a process pays for the libraries
        idle = peak_mib()
        start = time.perf_counter()
        scores: Any = None
        if settings.way == "dense":
            scores = dense_scores(model, grid, inputs)
        elif settings.way == "streamed":
            with scoring(model, grid) as scores:
                model(*inputs)
        else:
            model(*inputs)
        seconds = time.perf_counter() - start
    listed = None if scores is None else scores.tolist()
    return {
        "seconds": seconds,
        "peak_mib": peak_mib(),
        "idle_mib": idle,
        "threads": torch.get_num_threads(),
        "scores": listed,
    }


def dense_scores(model: Any, grid: Any, inputs: tuple[Any, ...]) -> Any:
    """As the release does: whole attention maps times whole masks, one block at a time."""
    import torch
    from einops import rearrange

    from motionlora.heads.capture import capturing
    from motionlora.heads.score import mask_rows

    with capturing(model, range(len(model.blocks)), "qk") as seen:
        model(*inputs)
    masks = mask_rows(grid, torch.arange(grid.tokens))
    scores = []
    for block in range(len(model.blocks)):
        q, k = (rearrange(x, "1 s h d -> h s d") for x in seen[block])
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
        scores.append(
            torch.stack([(weights * masks[:, m]).sum(dim=(1, 2), dtype=torch.float64) for m in (0, 1)], dim=1)
        )
    return torch.stack(scores) / grid.tokens


def peak_mib() -> float:
    """Largest resident size of this process so far (Linux counts in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def flat(nested: Any) -> list[float]:
    """All numbers of nested lists in order."""
    return [number for part in nested for number in flat(part)] if isinstance(nested, list) else [nested]


def table(record: dict[str, Any]) -> str:
    """The measurement as Markdown."""
    rows = "\n".join(
        f"| {name} | {run['seconds']:.2f} | {run['peak_mib'] - run['idle_mib']:.0f} |"
        for way, name in (
            ("none", "forward alone"),
            ("streamed", "forward + streamed scores"),
            ("dense", "forward + dense scores"),
        )
        for run in (record["ways"][way],)
    )
    return (
        f"# Head scores: streamed against dense\n\n{record['what']}: {record['blocks']} blocks, "
        f"{record['heads']} heads of {record['head_dim']}, {record['tokens']} tokens.\n"
        f"{record['machine']}, {record['date']}, "
        f"`{record['command']}`.\n\n| way | seconds | peak memory above idle, MiB |\n|---|---|---|\n{rows}\n\n"
        f"Largest difference of a share: {record['largest_difference']:.1e}.\n"
    )


if __name__ == "__main__":
    main()
