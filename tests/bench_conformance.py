"""Do our LoRA files load elsewhere, as strong as they were trained? Stock diffusers and peft at two sets of versions.

    make conformance        builds the older environment, runs this, and writes results/conformance.*

Every layout that is written, with alpha other than the rank, missing blocks, with and without o, in three precisions,
of differing ranks, merged, resized, two at a half each, fused and unfused; and controls that are wrong on purpose and
must be found out. `tests/conformance.py` does the loading, here and with `--other PYTHON`. ComfyUI's published key
rules (`tests/comfy_rules.py`) are applied by hand; ComfyUI itself is not run.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch
from comfy_rules import comfy_updates
from safetensors.torch import load_file, save_file
from torch import Tensor

from motionlora.heads.lora import MotionLora
from motionlora.heads.lora_combine import merged, resized
from motionlora.heads.lora_file import Precision, save_lora
from motionlora.heads.lora_write import Written, padded, whole_shapes
from motionlora.heads.tiny import tiny_transformer

BLOCKS, HEADS, HEAD_DIM = 3, 4, 12
WIDTH = HEADS * HEAD_DIM
WITHIN: dict[Precision, float] = {"fp32": 1e-5, "bf16": 4e-2, "fp16": 5e-3}
"""Rounding of the numbers in a file, as a share of the largest change."""
QKV = ("to_q", "to_k", "to_v")
COMFY: dict[Written, str] = {"native": "right", "kohya": "right", "diffusers": "not loaded"}
"""What ComfyUI's rules should make of each layout that we write."""


Parts = Sequence[tuple[MotionLora, float]]


@dataclass(frozen=True, eq=False)
class Case:
    """Files that are loaded together at their strengths, and what shall come of it: `updates` module -> "o i"."""

    name: str
    files: Sequence[Path]
    strengths: Sequence[float]
    updates: Mapping[str, Tensor]
    within: float = WITHIN["fp32"]
    verdict: str = "right"
    comfy: str = "right"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--other", type=Path, help="a Python that has other versions of diffusers and peft")
    parser.add_argument("--results", type=Path, default=Path("results/conformance"))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        comfy = write_cases(Path(name))
        pythons = [Path(sys.executable), *([chosen.other] if chosen.other else [])]
        matrices = [matrix_by(python, Path(name)) for python in pythons]
    raise SystemExit(1 if report(matrices, comfy, chosen.results) else 0)


def write_cases(folder: Path) -> list[dict[str, str]]:
    """Writes the transformer, the files and `cases.json`; returns what ComfyUI's rules make of each case."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = tiny_transformer(blocks=BLOCKS, heads=HEADS, head_dim=HEAD_DIM, ffn_dim=64, text_dim=32, freq_dim=32)
    config = {key: value for key, value in base.config.items() if not key.startswith("_")}
    save_file({key: value.contiguous() for key, value in base.state_dict().items()}, folder / "base.safetensors")
    plan, comfy = [], []
    for index, case in enumerate([*written(folder, config), *combined(folder), *controls(folder)]):
        save_file(dict(case.updates), folder / f"updates-{index}.safetensors")
        told = {"name": case.name, "files": [path.name for path in case.files], "strengths": list(case.strengths)}
        told |= {"updates": f"updates-{index}.safetensors", "within": case.within, "verdict": case.verdict}
        plan.append(told)
        comfy.append({"case": case.name, "expected": case.comfy, "verdict": by_comfy(case, config)})
    whole = {"config": config, "weights": "base.safetensors", "cases": plan}
    (folder / "cases.json").write_text(json.dumps(whole, indent=1))
    return comfy


def written(folder: Path, config: Mapping[str, Any]) -> Iterator[Case]:
    """Each layout in each precision: alone, and two at a half each; and one with modules of differing ranks."""
    one, two, mixed = motion_lora(4, 2.0, QKV), motion_lora(3, 6.0, (*QKV, "to_out.0"), seed=1), of_two_ranks()
    for (layout, comfy), precision in product(COMFY.items(), WITHIN):
        for name, parts in (
            ("alpha 2 of rank 4, no o, no block 1", [(one, 1.0)]),
            ("two at 0.5, the second alpha 6 of rank 3 with o", [(one, 0.5), (two, 0.5)]),
            ("ranks 4 and 2 in one file, at -1.5", [(mixed, -1.5)]),
        ):
            files = []
            for index, (lora, _) in enumerate(parts):
                files.append(folder / f"{layout}-{precision}-{name[:3].strip()}-{index}.safetensors")
                whole = padded(lora, config) if layout == "kohya" else lora
                save_lora(whole, files[-1], layout, precision)
            strengths = [strength for _, strength in parts]
            yield Case(
                f"{layout}, {precision}: {name}", files, strengths, summed(parts), WITHIN[precision], comfy=comfy
            )


def combined(folder: Path) -> Iterator[Case]:
    """A merged file and a resized one in the two layouts that they are written in."""
    parts = [(motion_lora(4, 2.0, QKV), 0.5), (motion_lora(3, 6.0, ("to_q", "to_out.0"), seed=1), -1.5)]
    small, _ = resized(motion_lora(6, 3.0, QKV), 2)
    layouts: tuple[Written, ...] = ("native", "diffusers")
    for layout in layouts:
        for name, lora, updates in (
            ("merged", merged(parts), summed(parts)),
            ("resized", small, summed([(small, 1.0)])),
        ):
            path = folder / f"{layout}-{name}.safetensors"
            save_lora(lora, path, layout)
            yield Case(f"{layout}, fp32: {name}", [path], [1.0], updates, comfy=COMFY[layout])


def controls(folder: Path) -> Iterator[Case]:
    """Files that are wrong on purpose: a check that calls one of them right is no check."""
    lora, good = motion_lora(4, 2.0, QKV), folder / "control.safetensors"
    save_lora(lora, good, "diffusers")
    tensors = load_file(good)
    for name, prefix, verdict in (
        ("peft's prefix base_model.model.", "base_model.model.", "not loaded, no error"),
        ("diffusers' names behind the native prefix", "diffusion_model.", "refused"),
        ("diffusers without its metadata", "transformer.", "2 times as strong"),
    ):
        path = folder / f"control-{verdict.split()[0]}.safetensors"
        save_file({prefix + key.removeprefix("transformer."): value for key, value in tensors.items()}, path)
        updates = summed([(lora, 1.0)])
        yield Case(f"control: {name}", [path], [1.0], updates, verdict=verdict, comfy="not loaded")


def motion_lora(rank: int, alpha: float, modules: Sequence[str], seed: int = 0) -> MotionLora:
    """Random, on head 0 and 3 of block 0 and head 2 of block 2: rows of q, k, v or columns of o, the rest zeros."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for block, heads in ((0, (0, 3)), (2, (2,))):
        kept = torch.zeros(HEADS, HEAD_DIM)
        kept[list(heads)] = 1
        for module in modules:
            a, b = (torch.randn(shape, generator=generator) for shape in ((rank, WIDTH), (WIDTH, rank)))
            a, b = (a * kept.reshape(1, -1), b) if module == "to_out.0" else (a, b * kept.reshape(-1, 1))
            stem = f"blocks.{block}.attn1.{module}"
            weights[f"{stem}.lora_A.weight"], weights[f"{stem}.lora_B.weight"] = a, b
    return MotionLora(weights, rank, alpha, stage="temporal")


def whole_lora(rank: int = 2, alpha: float = 2.0) -> MotionLora:
    """Random, in all ten linear modules of every block."""
    config = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "ffn_dim": 64, "num_layers": BLOCKS}
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    for module, (outputs, inputs) in whole_shapes(config).items():
        weights[f"{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        weights[f"{module}.lora_B.weight"] = 0.2 * torch.randn(outputs, rank, generator=generator)
    return MotionLora(weights, rank, alpha)


def of_two_ranks() -> MotionLora:
    """Rank 4 in q and v, rank 2 in k, alpha half of each."""
    many, few = motion_lora(4, 2.0, ("to_q", "to_v")), motion_lora(2, 1.0, ("to_k",), seed=2)
    return replace(many, weights={**many.weights, **few.weights})


def summed(parts: Parts) -> dict[str, Tensor]:
    """Module -> update "o i" of all parts at their strengths: the sum of strength * alpha / r * b a."""
    total: dict[str, Tensor] = {}
    for lora, strength in parts:
        for module, (a, b) in lora.modules().items():
            update = strength * lora.alpha / lora.rank * b @ a
            total[module] = total[module] + update if module in total else update
    return total


def by_comfy(case: Case, config: Mapping[str, Any]) -> str:
    """What ComfyUI's key rules make of a case's files at its strengths: `right`, `not loaded` or `wrong`."""
    found: dict[str, Tensor] = {}
    for path, strength in zip(case.files, case.strengths, strict=True):
        for module, update in comfy_updates(load_file(path), whole_shapes(config)).items():
            found[module] = found.get(module, torch.zeros_like(update)) + strength * update
    if not found:
        return "not loaded"
    missed = [found.get(module, torch.zeros_like(update)) - update for module, update in case.updates.items()]
    missed += [update for module, update in found.items() if module not in case.updates]
    size = max(float(update.abs().max()) for update in case.updates.values())
    return "right" if max(float(value.abs().max()) for value in missed) <= case.within * size else "wrong"


def matrix_by(python: Path, folder: Path) -> dict[str, Any]:
    """What `conformance.py` found under an interpreter; its exit code is judged by its rows."""
    script = Path(__file__).with_name("conformance.py")
    # diffusers 0.35 refuses files that are here, too, in offline mode, unless their name is given apart from the folder
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    # -I: nothing of this tree can be imported there; the loaders are alone with the files
    ended = subprocess.run([python, "-I", script, folder], capture_output=True, text=True, env=online)
    if not ended.stdout.startswith("{"):
        raise RuntimeError(f"{python} could not run {script.name}: {ended.stderr.strip()[-2000:]}")
    return json.loads(ended.stdout)


def report(matrices: Sequence[dict[str, Any]], comfy: Sequence[dict[str, str]], results: Path) -> list[str]:
    """Writes results/conformance.md and .json; the cases that came out otherwise than they should."""
    names = [f"diffusers {each['versions']['diffusers']}, peft {each['versions']['peft']}" for each in matrices]
    columns = {name: matrix["rows"] for name, matrix in zip(names, matrices, strict=True)}
    columns["ComfyUI's key rules"] = list(comfy)
    wrong = [
        f"{row['case']} in {name}: {row['verdict']}"
        for name, rows in columns.items()
        for row in rows
        if row["verdict"] != row["expected"]
    ]
    facts = {
        "what": "LoRA files as motionlora writes them, loaded by stock loaders, against arithmetic",
        "machine": f"{platform.machine()}, one core",
        "date": str(date.today()),
        "command": "make conformance",
        "wrong": wrong,
        "columns": [{"name": name, "rows": rows} for name, rows in columns.items()],
        "versions": [matrix["versions"] for matrix in matrices],
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    results.with_suffix(".md").write_text(as_markdown(facts, columns))
    print("\n".join(wrong) or f"{len(comfy)} cases in {len(columns)} columns are as they should be")
    return wrong


def as_markdown(facts: Mapping[str, Any], columns: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The matrix; a figure behind `right` is the largest difference of the output as a share of the change."""
    cells = [[cell(row) for row in rows] for rows in columns.values()]
    cases = [row["case"] for row in next(iter(columns.values()))]
    lines = [f"| {' | '.join(row)} |" for row in zip(cases, *cells, strict=True)]
    versions = "\n".join(
        "* " + ", ".join(f"{name} {value}" for name, value in each.items()) for each in facts["versions"]
    )
    verdict = "No case is otherwise than it should be." if not facts["wrong"] else "Wrong: " + "; ".join(facts["wrong"])
    return (
        f"# LoRA files in other loaders\n\n{facts['what']}.\nMeasured on {facts['date']}, {facts['machine']}: "
        f"`{facts['command']}`.\n\n{versions}\n\n**{verdict}** Each file is loaded in a stock random Wan "
        "transformer, alone or together at the strengths named, compared with the same transformer with the updates "
        "added to its weights by hand, then fused and compared again, then unfused and unloaded, which must leave "
        "nothing. `right` is followed by the largest difference of the output as a share of the largest change. "
        "ComfyUI was not run: its published rules for keys were applied by hand. Controls are wrong on purpose.\n\n"
        f"| file | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}\n" + "\n".join(lines) + "\n"
    )


def cell(row: Mapping[str, Any]) -> str:
    more = f" ({row['differs']:.0e})" if row["verdict"] == "right" and "differs" in row else ""
    return row["verdict"] + more + ("" if row["verdict"] == row["expected"] else f", expected: {row['expected']}")


if __name__ == "__main__":
    main()
