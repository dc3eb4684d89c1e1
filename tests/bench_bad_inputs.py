"""The bad inputs that a user meets, with the sentence and the exit code that each one gets, from runs of the command.

python tests/bench_bad_inputs.py     a few minutes of one core; writes results/bad_inputs.*
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import platform
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch
from fuzz_inputs import make_sources
from PIL import Image
from safetensors.torch import load_file, save_file

from motionlora.train.command import main as command

TRAIN = "train --out run --caption x --cache cache"
CASES: dict[str, dict[str, str]] = {
    "Clips": {
        "no such file": "clip inspect gone.mp4",
        "an empty file": "clip inspect empty.mp4",
        "a text that is called a video": "clip inspect text.mp4",
        "a download that broke off": "clip inspect half.mp4",
        "damage in the middle": "clip inspect torn.mp4",
        "a single picture": "clip inspect still.webp",
        "a folder without pictures": "clip inspect nothing",
        "pictures of different sizes": "clip inspect sizes",
        "a broken picture in a folder": "clip inspect broken",
        "a pipe": "clip inspect pipe",
        "a terabyte": "clip inspect huge.mp4",
        "frames above the limit": "clip inspect clip.mp4 --limits.frames 12",
        "pixels above the limit": "clip inspect clip.mp4 --limits.pixels 1000",
        "more memory than allowed": f"{TRAIN} --clip clip.mp4 --frames 13 --fps 10 --temporal.stride 1 "
        "--height 1024 --width 1024 --limits.memory-mb 8",
        "a caption beside it of 5,000 letters": "clip inspect talks.mp4",
        "a caption that is not UTF-8": "clip inspect latin.mp4",
        "shorter than asked": f"{TRAIN} --clip clip.mp4 --frames 49",
        "frames that are not 4k + 1": f"{TRAIN} --clip clip.mp4 --frames 12",
        "a size that the model cannot divide": f"{TRAIN} --clip clip.mp4 --frames 5 --temporal.stride 1 --height 60",
        "a rate that is no number of frames": f"{TRAIN} --clip clip.mp4 --frames 5 --fps 0",
    },
    "LoRA files": {
        "no such file": "lora inspect gone.safetensors",
        "an empty file": "lora inspect empty.safetensors",
        "a folder": "lora inspect nothing",
        "a text": "lora inspect text.safetensors",
        "a pickle (.pt), which is never opened": "lora inspect pickle.pt",
        "a header that claims 10 GB": "lora inspect header.safetensors",
        "a download that broke off": "lora inspect half.safetensors",
        "a file of another model": "lora inspect other.safetensors",
        "two layouts in one file": "lora inspect mixed.safetensors",
        "half a pair": "lora inspect pair.safetensors",
        "a NaN": "lora inspect nan.safetensors",
        "alpha unknown": "lora convert peft.safetensors --out new.safetensors",
        "alpha that is no number": "lora inspect native.safetensors --alpha strong",
        "a model of another width": "lora verify native.safetensors --model tiny",
        "the same file in and out": "lora convert native.safetensors --out native.safetensors",
        "a place that cannot be written": "lora convert native.safetensors --out text.mp4/new.safetensors",
        "a rank that is no smaller": "lora resize native.safetensors --rank 64 --out new.safetensors",
        "one file to merge": "lora merge native.safetensors --out new.safetensors",
        "a strength that is none": "generate --lora native.safetensors:9 --caption x",
    },
    "Settings": {
        "an unknown subcommand": "trian --clip a.mp4",
        "an unknown option": "train --stepz 5",
        "a word too many": "train clip.mp4",
        "an option without its value": "train --clip",
        "a wrong type": "train --temporal.steps many",
        "a value out of range": "train --lora.rank 0",
        "a choice that is none": "train --schedule linear",
        "infinity": "train --temporal.lr inf",
        "no clip": "train",
        "no caption": "generate",
        "no such model": f"{TRAIN} --config wan2.1_1.3b --model gone --clip clip.mp4",
        "another model without its file": "train --model gone",
        "no such file of settings": "train --config wan",
        "an unknown key in a file": "train --config typo.yaml",
        "a key twice in a file": "train --config twice.yaml",
        "no YAML": "train --config text.yaml",
        "YAML that wants to run code": "train --config code.yaml",
        "aliases of aliases (a few lines, billions of values)": "train --config bomb.yaml",
        "no such guidance": "generate --guidance flow --caption x",
        "a guidance without its clip": "generate --guidance flowmotion --caption x",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, default=Path("results/bad_inputs"))
    results = parser.parse_args().results.resolve()
    torch.set_num_threads(1)
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        make_files(Path())
        found = {
            group: {what: {"command": line, **ended(line)} for what, line in cases.items()}
            for group, cases in CASES.items()
        }
        os.chdir(home)
    report(results, found)


def make_files(here: Path) -> None:
    """All files that CASES name, in a folder."""
    make_sources(here)
    clip, lora = (here / "sources" / "plain.mp4").read_bytes(), here / "sources" / "native.safetensors"
    for name in ("clip", "talks", "latin"):
        (here / f"{name}.mp4").write_bytes(clip)
    (here / "half.mp4").write_bytes(clip[: len(clip) * 2 // 3])
    (here / "torn.mp4").write_bytes(clip[: len(clip) // 2] + b"\xff" * 400 + clip[len(clip) // 2 + 400 :])
    (here / "talks.txt").write_text("x" * 5000)
    (here / "latin.txt").write_bytes("grün".encode("latin-1"))
    for name in ("empty.mp4", "empty.safetensors"):
        (here / name).touch()
    for suffix in ("mp4", "safetensors", "yaml"):
        (here / f"text.{suffix}").write_text("Once upon a time: there was: a text.\n" * 9)
    Image.new("RGB", (64, 64)).save(here / "still.webp")
    for name in ("nothing", "sizes", "broken"):
        (here / name).mkdir()
    for index in range(5):
        Image.new("RGB", (64, 64 + 2 * (index == 3))).save(here / "sizes" / f"{index}.png")
        Image.new("RGB", (64, 64)).save(here / "broken" / f"{index}.png")
    (here / "broken" / "2.png").write_bytes((here / "broken" / "1.png").read_bytes()[:60])
    os.mkfifo(here / "pipe")
    with (here / "huge.mp4").open("wb") as file:
        file.truncate(2**40)
    whole = load_file(lora)
    (here / "native.safetensors").write_bytes(lora.read_bytes())
    (here / "half.safetensors").write_bytes(lora.read_bytes()[:-100])
    (here / "header.safetensors").write_bytes((10 * 2**30).to_bytes(8, "little") + b"{" * 64)
    (here / "pickle.pt").write_bytes(pickle.dumps({"a": [1, 2, 3]}))
    save_file({"down_blocks.0.lora_A.weight": torch.ones(2, 2)}, here / "other.safetensors")
    save_file({**whole, **load_file(here / "sources" / "kohya.safetensors")}, here / "mixed.safetensors")
    save_file({key: value for key, value in whole.items() if "ffn.2.lora_B" not in key}, here / "pair.safetensors")
    save_file({key: value * np.nan for key, value in whole.items()}, here / "nan.safetensors")
    peft = {f"base_model.model.{key.partition('.')[2]}": value for key, value in whole.items()}
    save_file(peft, here / "peft.safetensors")
    (here / "typo.yaml").write_text("model: tiny\ntrain:\n  temporl:\n    steps: 3\n")
    (here / "twice.yaml").write_text("model: tiny\nseed: 1\nmodel: tiny\n")
    (here / "code.yaml").write_text("model: !!python/object/apply:os.system ['echo']\n")
    levels = [f"  l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12)]
    (here / "bomb.yaml").write_text("\n".join(["train:", "  l0: &l0 [x]", *levels]))


def ended(line: str) -> dict[str, str | int]:
    """Exit code and what stands on stderr after one run; the run must leave nothing behind."""
    before = set(Path().rglob("*"))
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = command(line.split())
    new = set(Path().rglob("*")) - before
    sentence = said.getvalue().strip().removeprefix("motionlora: ")
    print(f"{code} {line}\n  {sentence[-300:]}{f' LEFT {new}' if new else ''}", flush=True)
    return {"exit": code, "sentence": sentence, "left": ", ".join(sorted(map(str, new)))}


def report(results: Path, found: dict[str, dict[str, dict[str, str | int]]]) -> None:
    """results/bad_inputs.md and .json."""
    facts = {
        "what": "bad inputs, the command that met them, its exit code and its sentence",
        "machine": platform.machine(),
        "date": str(date.today()),
        "command": "python tests/bench_bad_inputs.py",
        "cases": found,
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.with_suffix(".json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    parts = [
        "# Bad inputs\n\nWhat the command says to them, and its exit code: 2 input or setting is wrong, 3 storage.\n"
        f"From runs of the command on {facts['date']}: `{facts['command']}`.\n"
    ]
    for group, cases in found.items():
        rows = [
            f"| {what} | `{case['command']}` | {case['exit']} | {escaped(str(case['sentence']))} |"
            for what, case in cases.items()
        ]
        parts += [f"\n## {group}\n\n| input | command | exit | sentence |\n|---|---|---|---|\n", "\n".join(rows), "\n"]
    results.with_suffix(".md").write_text("".join(parts))


def escaped(text: str) -> str:
    """For a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")


if __name__ == "__main__":
    main()
