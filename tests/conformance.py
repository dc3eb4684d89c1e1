"""Do LoRA files do in stock diffusers and peft what they were made to do? Runs wherever those two can be imported.

    python tests/conformance.py FOLDER      with a FOLDER that `tests/bench_conformance.py` made; prints JSON

Nothing of this project is imported, so that any versions can be tried. Each file is loaded into a stock random Wan
transformer as users load it. What it should do then is known without any loader: the updates it was made of (module
-> "o i", strength included) are added to the weights of the same transformer by hand. Exit code 1 where a file, or a
control that is wrong on purpose, got another verdict than FOLDER/cases.json expects.

Letters: b batch, c latent channel, f latent frame, h height, w width, l text token, d width of the text; i inputs and o
outputs of a linear layer.
"""

import argparse
import copy
import json
import logging
import platform
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

PACKAGES = ("torch", "diffusers", "peft", "transformers", "accelerate", "safetensors")
LEFT = 1e-4
"""What unfusing may leave behind by rounding, as a share of the change."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    matrix = matrix_of(parser.parse_args().folder)
    print(json.dumps(matrix, indent=1))
    raise SystemExit(0 if all(row["verdict"] == row["expected"] for row in matrix["rows"]) else 1)


def matrix_of(folder: Path) -> dict[str, Any]:
    """The versions here, and a row for every case of `folder`."""
    torch.set_num_threads(1)
    plan = json.loads((folder / "cases.json").read_text())
    base = WanTransformer3DModel(**plan["config"]).eval()
    base.load_state_dict(load_file(folder / plan["weights"]))
    logging.disable(logging.WARNING)  # what loaders say about a file is told by its verdict
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = [tried(case, base, folder) for case in plan["cases"]]
    finally:
        logging.disable(logging.NOTSET)
    versions = {package: version(package) for package in PACKAGES}
    return {"versions": {"python": platform.python_version(), **versions}, "rows": rows}


def tried(case: dict[str, Any], base: WanTransformer3DModel, folder: Path) -> dict[str, Any]:
    """One case: its files together at their strengths; then fused; then unfused and unloaded.

    Figures are largest differences as shares of the largest change that the LoRA makes: `differs` of the output,
    `fused` of the fused weights, `left` of the output after all is unloaded. `strength` is the factor by which the
    fused weights moved along the right update: 1 is right.
    """
    updates = load_file(folder / case["updates"])
    plain, right = weights_of(base), with_updates(base, updates)
    without, expected = output(base), output(right)
    change, size = float((expected - without).abs().max()), max(float(u.abs().max()) for u in updates.values())
    row = {"case": case["name"], "expected": case["verdict"]}
    pipe = stock_pipeline(copy.deepcopy(base))
    names = [f"part{index}" for index in range(len(case["files"]))]
    try:
        for name, file in zip(names, case["files"], strict=True):
            pipe.load_lora_weights(str(folder / file), adapter_name=name)
    except Exception as error:  # whatever a loader stumbles over is the answer
        return {**row, "verdict": "refused", "why": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
    if set(names) - set(pipe.get_list_adapters().get("transformer", [])):
        same = torch.equal(output(pipe.transformer), without)
        return {**row, "verdict": "not loaded, no error" if same else "loaded in part, no error"}
    pipe.set_adapters(names, case["strengths"])
    differs = float((output(pipe.transformer) - expected).abs().max()) / change
    pipe.fuse_lora(adapter_names=names)
    moved, wanted = weights_of(pipe.transformer), weights_of(right)
    fused = max(float((moved[key] - wanted[key]).abs().max()) for key in wanted) / size
    steps = {module: moved[f"{module}.weight"] - plain[f"{module}.weight"] for module in updates}
    both = sum(float((steps[module] * update).sum()) for module, update in updates.items())
    strength = both / sum(float(update.square().sum()) for update in updates.values())
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    left = float((output(pipe.transformer) - without).abs().max()) / change
    figures = {"strength": strength, "differs": differs, "fused": fused, "left": left}
    verdict = verdict_of(**figures, within=case["within"])
    return {**row, "verdict": verdict} | {name: float(f"{value:.3g}") for name, value in figures.items()}


def verdict_of(*, strength: float, differs: float, fused: float, left: float, within: float) -> str:
    """`right`, or the first thing that is not; NaN is never within."""
    if not abs(strength - 1) <= within:
        return f"{strength:.3g} times as strong"
    if not differs <= within:
        return "another output"
    if not fused <= within:
        return "fused otherwise"
    return "right" if left <= LEFT else "leaves a trace"


def stock_pipeline(transformer: WanTransformer3DModel) -> Any:
    """A `WanPipeline` of nothing but a transformer: that is all that loading a LoRA needs."""
    absent: Any = None
    return WanPipeline(absent, absent, vae=absent, scheduler=absent, transformer=transformer)


def with_updates(base: WanTransformer3DModel, updates: dict[str, Tensor]) -> WanTransformer3DModel:
    """A copy of the transformer with W + update in its linear layers; no LoRA code is involved."""
    changed = copy.deepcopy(base)
    with torch.no_grad():
        for module, update in updates.items():
            layer: Any = changed.get_submodule(module)
            layer.weight.add_(update)
    return changed


def weights_of(transformer: torch.nn.Module) -> dict[str, Tensor]:
    """The model's own weights, without adapters, by the names that they have without any."""
    own = ((name, value) for name, value in transformer.named_parameters() if ".lora_" not in name)
    return {name.replace(".base_layer.", "."): value.detach().clone() for name, value in own}


@torch.no_grad()
def output(transformer: Any) -> Tensor:
    """The velocity "b c f h w" of a fixed latent, time and text "b l d"."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, transformer.config["in_channels"], 3, 4, 4, generator=generator)
    text = torch.randn(1, 7, transformer.config["text_dim"], generator=generator)
    return transformer(latent, torch.tensor([500.0]), text, return_dict=False)[0]


if __name__ == "__main__":
    main()
