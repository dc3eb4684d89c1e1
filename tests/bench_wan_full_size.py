"""Full-size Wan 2.1 without its weights: FLOPs of training steps and of a head-scoring pass at 480x832. Run by hand.

    python tests/bench_wan_full_size.py

Our own code (LoRA on heads, positions, losses, head scores) is traced through the stock classes on tensors that have
shapes and no data, so that a laptop can count what a 14B model would do. Nothing is computed, no seconds are measured.
Writes results/wan_full_size.md and .json.
"""

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from motionlora.heads.backbone import Prompt
from motionlora.heads.lora import attach
from motionlora.heads.positions import sparse_positions
from motionlora.heads.score import scoring
from motionlora.heads.wan import WanBackbone
from motionlora.heads.wan_outline import META, PUBLISHED
from motionlora.train.count import Count as Counted
from motionlora.train.count import counting
from motionlora.train.settings import NoiseSettings, TemporalSettings
from motionlora.train.stages import Stage

RESULTS = Path(__file__).resolve().parent.parent / "results"
WANS = {
    "Wan2.1 1.3B": PUBLISHED["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"],
    "Wan2.1 14B": PUBLISHED["Wan-AI/Wan2.1-T2V-14B-Diffusers"],
}
FRAMES, STRIDE, HEIGHT, WIDTH, RANK, TEXT = 81, 5, 480, 832, 32, (512, 4096)


@dataclass(frozen=True)
class Count:
    """What one traced piece of work takes."""

    model: str
    what: str
    latent_frames: int
    tokens: int
    tflops: float
    attention_share: float
    """Of all FLOPs, the share in attention, to itself and to the caption, and in head scores."""
    trainable_parameters: int | None = None


def main() -> None:
    """Counts both models, prints the table and writes it."""
    counts = [count for name in WANS for count in counts_of(name)]
    record = {
        "what": "FLOPs of Wan 2.1 at 480x832, bf16, traced on tensors without data; nothing was run",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", "tests/bench_wan_full_size.py", *sys.argv[1:]]),
        "rank": RANK,
        "counts": [asdict(count) for count in counts],
    }
    text = table(record, counts)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "wan_full_size.md").write_text(text)
    (RESULTS / "wan_full_size.json").write_text(json.dumps(record, indent=1) + "\n")


def counts_of(name: str, blocks: int | None = None) -> list[Count]:
    """Forward, temporal step and head scores of one model; with `blocks`, of one that has only so many."""
    sparse = (FRAMES - 1) // STRIDE + 1
    return [
        forward(name, "forward", sparse, blocks),
        forward(name, "forward", FRAMES, blocks),
        temporal_step(name, "temporal step, sparse (17 frames)", STRIDE, blocks),
        temporal_step(name, "temporal step, all 81 frames", 1, blocks),
        forward(name, "head-scoring pass", FRAMES, blocks, scored=True),
    ]


def forward(name: str, what: str, frames: int, blocks: int | None = None, *, scored: bool = False) -> Count:
    """One forward of a clip of `frames` pixel frames, with the heads scored in it if wanted."""
    with FakeTensorMode(), torch.no_grad():
        model = WANS[name].without_weights(torch.bfloat16, blocks=blocks, device=torch.device("cpu"))
        latent, prompt = new_latent(frames, torch.device("cpu")), Prompt(torch.empty(1, *TEXT))
        grid = model.grid(latent)
        with counting() as counter, ExitStack() as stack:
            if scored:
                stack.enter_context(scoring(model.transformer, grid))
            model.velocity(latent, torch.full((1,), 0.9998), prompt)
    return Count(name, what, grid.frames, grid.tokens, *totals(counter))


def temporal_step(name: str, what: str, stride: int, blocks: int | None = None) -> Count:
    """Forward, loss and backward of the temporal stage with gradient checkpointing, LoRA on every second head."""
    model = WANS[name].without_weights(torch.bfloat16, blocks=blocks)
    latents = new_latent((FRAMES - 1) // stride + 1, META)
    positions = sparse_positions("aligned", frames=FRAMES, stride=stride)
    layers, stage = tuned(model, latents, TEXT, positions, RANK)
    generator = torch.Generator().manual_seed(0)
    with counting() as counter, model.positioned(stage.positions):
        stage.loss(model, stage.point(generator), stage.told(generator)).total.backward()
    assert all(weight.grad is not None for weight in layers.parameters())
    grid = model.grid(stage.latents)
    return Count(name, what, grid.frames, grid.tokens, *totals(counter), layers.parameter_count())


def tuned(
    model: WanBackbone, latents: torch.Tensor, text: tuple[int, int], positions: torch.Tensor, rank: int
) -> tuple[Any, Stage]:
    """A LoRA on every second head of a model whose blocks are run once more, and its temporal stage."""
    transformer: Any = model.transformer
    transformer.enable_gradient_checkpointing()
    chosen = np.arange(model.blocks * model.heads).reshape(model.blocks, model.heads) % 2 == 1
    layers = attach(transformer, "temporal", chosen, rank=rank, seed=0)
    stage = Stage(
        name="temporal",
        latents=latents,
        prompt=Prompt(torch.zeros(1, *text, device=latents.device)),
        chosen=chosen,
        positions=positions,
        motion="frame",
        motion_weight=1.0,
        noise=NoiseSettings(),
        settings=TemporalSettings(),
    )
    return layers, stage


def totals(count: Counted) -> tuple[float, float]:
    """TFLOPs, and the share of them in attention and head scores."""
    return count.flops / 1e12, count.attention_flops / count.flops


def new_latent(frames: int, device: torch.device) -> torch.Tensor:
    """Of one clip."""
    return torch.empty(1, 16, (frames - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8, device=device)


def table(record: dict[str, Any], counts: list[Count]) -> str:
    """The counts as Markdown, with the ratio of all frames to sparse ones and what the head scores add."""
    rows = "\n".join(
        f"| {c.model} | {c.what} | {c.latent_frames} | {c.tokens} | {c.tflops:.1f} | {100 * c.attention_share:.0f} % | "
        f"{'' if c.trainable_parameters is None else f'{c.trainable_parameters:,}'} |"
        for c in counts
    )
    notes = []
    for name in WANS:
        short, long, sparse, dense, scored = (c.tflops for c in counts if c.model == name)
        notes.append(
            f"* {name}: a step on all frames is {dense / sparse:.1f} sparse steps; a sparse step is "
            f"{sparse / short:.2f} forwards of its clip; scoring the heads adds {scored - long:.1f} TFLOP "
            f"({100 * (scored / long - 1):.0f} %) to the forward."
        )
    return (
        f"# Full-size Wan 2.1 at {HEIGHT}x{WIDTH}\n\n{record['what']}.\ntorch {record['torch']}, {record['date']}, "
        f"`{record['command']}`.\n\n"
        "| model | what | latent frames | tokens | TFLOP | in attention | trainable parameters |\n"
        f"|---|---|---|---|---|---|---|\n{rows}\n\n" + "\n".join(notes) + "\n\n"
        f"A step is forward, loss and backward of one clip with gradient checkpointing, LoRA of rank {RANK} on half of "
        "the heads (q, k, v, o) and the positions of the sparse clip. FLOPs are 2 a multiply-add in matrix products "
        "and convolutions (`motionlora.train.count`). The backward of attention counts 5 products, "
        "as a flash kernel does them. "
        "The head-scoring pass is one forward of the full clip at one noise level. VAE and text encoder are left out.\n"
    )


if __name__ == "__main__":
    main()
