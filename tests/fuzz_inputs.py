"""Broken inputs for `bench_fuzz.py`: files of our own making, changed at random; each follows from its kind and a seed.

Three kinds: media (MP4, GIF, WebP, a folder of PNG), LoRA files (three layouts), settings (a YAML file and options).
"""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from motionlora.data.clip import Clip, write_clip
from motionlora.data.yaml_file import config_path
from motionlora.heads.backbone import TokenGrid
from motionlora.heads.head_map import HeadMap
from motionlora.heads.lora import MotionLora
from motionlora.heads.lora_file import save_lora

KINDS = ("media", "lora", "settings")
MEDIA = ("plain.mp4", "exact.mp4", "clip.gif", "clip.webp", "clip.webm")
LAYOUTS = ("native", "diffusers", "kohya")
NUMBERS = ("0", "-1", "1e400", ".nan", "-.inf", "1e-400", "9" * 40, "0x10", "1_0", "4.5", "2e-4", "-0", "true", "null")
JSON_VALUES = (
    "0", "-1", "1e400", "NaN", "-Infinity", "9" * 30, "9" * 5000, '"x"', "[]", "null", "[[1]]", "{}", "1.5", "true",
)  # fmt: skip
PATTERNS = '{"transformer.r": 2, "transformer.lora_alpha": 1, "transformer.alpha_pattern": {"%s": 1}}'
WORDS = (
    "~", "''", "[]", "{}", "[1, 2]", "{a: b}", "[[[[]]]]", "'\\0'", '"\\ud800"', "é\u202e", "x" * 5000, "2024-01-01",
    "!!python/object/apply:os.system ['echo']", "!!binary aGk=", "!!set {a}", "&a [*a]", "*b", "<<", "? a", "- 1", "|",
    "../../../etc/passwd", "/", "", "12:30:00", "0o7", "!!float x", "!!int x", "!!timestamp x", "!!null x", "%",
)  # fmt: skip


def make_sources(folder: Path) -> None:
    """The whole files, in folder/sources."""
    place = folder / "sources"
    place.mkdir(parents=True)
    draw = np.random.default_rng(0)
    still, moving = draw.integers(0, 256, (32, 48, 3)), draw.integers(0, 60, (13, 1, 1, 3))
    clip = Clip((still * 0.75 + moving).astype(np.uint8), 10.0, "")
    for name in MEDIA[:-1]:
        write_clip(clip, place / name, comment="a comment", exact=name == "exact.mp4")
    _write_webm(clip, place / MEDIA[-1])
    (place / "pictures").mkdir()
    for index, frame in enumerate(clip.pixels[:5]):
        Image.fromarray(frame).save(place / "pictures" / f"{index}.png")
    generator = torch.Generator().manual_seed(0)
    outer, inner = "attn1.to_q attn1.to_k attn1.to_v attn1.to_out.0 attn2.to_q attn2.to_k", "attn2.to_v attn2.to_out.0"
    weights = {}
    for module in [*outer.split(), *inner.split(), "ffn.net.0.proj", "ffn.net.2"]:
        weights[f"blocks.0.{module}.lora_A.weight"] = torch.randn(2, 8, generator=generator)
        weights[f"blocks.0.{module}.lora_B.weight"] = torch.randn(8, 2, generator=generator)
    scores = np.random.default_rng(0).uniform(0, 0.5, (1, 4, 2))
    heads = HeadMap("tiny", TokenGrid(13, 4, 6), (0.9998,), scores, 1, "abc", "a red circle")
    for layout in LAYOUTS:
        lora = MotionLora(weights, 2, 1.0, heads, provenance={"heads": {"per_block": 4}})
        save_lora(lora, place / f"{layout}.safetensors", layout)


def _write_webm(clip: Clip, path: Path) -> None:
    """VP9 in WebM, which we read and do not write."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libvpx-vp9", rate=10)
        stream.height, stream.width, stream.pix_fmt = clip.height, clip.width, "yuv420p"
        for picture in clip.pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def input_of(kind: str, seed: int, folder: Path) -> Any:
    """The input of a kind and seed, made under folder/in: a path, or (subcommand, arguments) for settings."""
    dice = random.Random(f"{kind} {seed}")
    place = folder / "in"
    place.mkdir(exist_ok=True)
    return {"media": _media, "lora": _lora, "settings": _settings}[kind](dice, folder / "sources", place)


def _media(dice: random.Random, sources: Path, place: Path) -> Path:
    if dice.random() < 0.1:
        folder = place / "pictures"
        folder.mkdir()
        for path in (sources / "pictures").iterdir():
            (folder / path.name).write_bytes(_damaged(dice, path.read_bytes(), sources / "clip.gif"))
        return folder
    name = dice.choice(MEDIA)
    path = place / dice.choice([name, name, name, f"a{dice.choice(['.mp4', '.mov', '.webm', '.gif', '', '.txt'])}"])
    path.write_bytes(_damaged(dice, (sources / name).read_bytes(), sources / dice.choice(MEDIA)))
    if dice.random() < 0.1:
        path.with_suffix(".txt").write_bytes(dice.choice([b"\xff\xfe", b"a\x00b", b"x" * 9000, "grün\n".encode()]))
    return path


def _damaged(dice: random.Random, data: bytes, other: Path) -> bytes:
    """Bytes changed in one to four ways."""
    for _ in range(dice.choice([1, 1, 2, 4])):
        data = dice.choice(DAMAGES)(dice, data, other)
    return data


def _flipped(dice: random.Random, data: bytes, other: Path) -> bytes:
    del other
    found = bytearray(data)
    near = dice.choice([len(found), 64, 1024])
    for _ in range(dice.choice([1, 4, 32]) if found else 0):
        found[dice.randrange(min(near, len(found)))] = dice.randrange(256)
    return bytes(found)


def _bits(dice: random.Random, data: bytes, other: Path) -> bytes:
    del other
    found = bytearray(data)
    for _ in range(dice.choice([1, 8]) if found else 0):
        found[dice.randrange(len(found))] ^= 1 << dice.randrange(8)
    return bytes(found)


def _field(dice: random.Random, data: bytes, other: Path) -> bytes:
    """A number of 2, 4 or 8 bytes in the front set to an extreme."""
    del other
    size = dice.choice([2, 4, 8])
    at = dice.randrange(max(1, min(len(data), 2048)))
    top = 2 ** (8 * size - 1)
    value = dice.choice([0, 1, top - 1, 2 * top - 1, top])
    return data[:at] + value.to_bytes(size, dice.choice(["big", "little"])) + data[at + size :]


def _cut(dice: random.Random, data: bytes, other: Path) -> bytes:
    del other
    return data[: dice.randrange(len(data) + 1)]


def _dropped(dice: random.Random, data: bytes, other: Path) -> bytes:
    del other
    start, end = sorted(dice.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + data[start + (end - start) // dice.choice([1, 10, 100]) :]


def _filled(dice: random.Random, data: bytes, other: Path) -> bytes:
    del other
    at, length = dice.randrange(len(data) + 1), dice.choice([4, 64, 512])
    filling = dice.choice([b"\0" * length, b"\xff" * length, dice.randbytes(length)])
    return data[:at] + filling + data[at + length * dice.choice([0, 1]) :]


def _spliced(dice: random.Random, data: bytes, other: Path) -> bytes:
    rest = other.read_bytes()
    return data[: dice.randrange(len(data) + 1)] + rest[dice.randrange(len(rest) + 1) :]


def _repeated(dice: random.Random, data: bytes, other: Path) -> bytes:
    del other
    start, end = sorted(dice.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[start:end] * dice.choice([1, 3]) + data[end:]


DAMAGES: tuple[Callable[[random.Random, bytes, Path], bytes], ...] = (
    _flipped, _bits, _field, _cut, _dropped, _filled, _spliced, _repeated,
)  # fmt: skip


def _lora(dice: random.Random, sources: Path, place: Path) -> Path:
    data = (sources / f"{dice.choice(LAYOUTS)}.safetensors").read_bytes()
    if dice.random() < 0.7:
        data = _other_header(dice, data)
    if dice.random() < 0.5:
        data = _damaged(dice, data, sources / "native.safetensors")
    path = place / dice.choice(["a.safetensors", "a.safetensors", "adapter_model.safetensors", "a.pt"])
    path.write_bytes(data)
    if dice.random() < 0.15:
        alpha, pattern = dice.choice([1, 0, -1, "x", None, 1e400, []]), dice.choice([{}, 3])
        config = {"r": 2, "lora_alpha": alpha, "rank_pattern": pattern}
        (place / "adapter_config.json").write_text(dice.choice([json.dumps(config), "{", "[" * 5000, "null"]))
    return path


def _other_header(dice: random.Random, data: bytes) -> bytes:
    """One to three entries of the header changed, its length right."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    for _ in range(dice.choice([1, 1, 3])):
        key = dice.choice(list(header) or ["x"])
        entry = header.get(key)
        odd = dice.choice([0, -1, 2**63, 2**64, 1.5, "x", None, [], {}, [[0]], True, "\0", "x" * 3000, float("nan")])
        if key == "__metadata__" and isinstance(entry, dict):
            pattern = dice.choice(["((.*)*)*!", "([a-z_]+[.]?)+!", "[", "to_q", "x" * 9000, "(?i)to_q"])
            text = dice.choice([PATTERNS % pattern, '{"r": 0}', "[" * 3000, "NaN", "{}", "null", "1e999", str(odd)])
            name = dice.choice([*entry, "motion.head_map", "motion.heads", "lora_adapter_metadata", "lora_config"])
            numbers = list(re.finditer(r"-?\d+(\.\d+)?(e-?\d+)?", entry.get(name, "")))
            if numbers and dice.random() < 0.7:
                found = dice.choice(numbers)
                text = entry[name][: found.start()] + dice.choice(JSON_VALUES) + entry[name][found.end() :]
            entry[name] = text
        elif isinstance(entry, dict) and dice.random() < 0.6:
            field = dice.choice(["dtype", "shape", "data_offsets", "shape"])
            entry[field] = dice.choice([odd, "F64", "BF16", "I8", "F8_E4M3", [1], [2, 8, 1], [0, 0], [2**32, 2**32]])
        elif dice.random() < 0.5:
            header[_other_name(dice, key)] = header.pop(key, odd)
        else:
            header[key] = odd
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def _other_name(dice: random.Random, key: str) -> str:
    return dice.choice(
        [
            key.replace("0", dice.choice(["1", "-1", "99999999999999999999", "x", "²", "../..", ""])),
            key.replace("lora_A", "lora_B"), key.replace(".weight", ".alpha"), key.replace("lora_", "lokr_"),
            key.replace(".", "_"), f"base_model.model.{key}", key.rpartition(".")[0], f"{key}.default", "", "blocks",
            key.replace("weight", "dora_scale"), key.partition(".")[2], "__metadata__",
        ]
    )  # fmt: skip


def _settings(dice: random.Random, sources: Path, place: Path) -> tuple[str, list[str]]:
    del sources
    name, path = dice.choice(["train", "generate", "heads", "compare"]), place / "a.yaml"
    text = config_path(dice.choice(["tiny", "wan2.1_1.3b"])).read_text(encoding="utf-8")
    for _ in range(dice.choice([0, 1, 1, 2, 5])):
        text = dice.choice(EDITS)(dice, text)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    if dice.random() < 0.1:
        path.write_bytes(_damaged(dice, path.read_bytes(), path))
    arguments = ["--config", str(path)]
    options = re.findall(r"(?m)^ *([a-z_]+):", text) or ["model"]
    for _ in range(dice.choice([0, 0, 1, 1, 2])):
        option = dice.choice(["--", "--lora.", "--temporal."]) + dice.choice([*options, "guidance"])
        value = dice.choice(NUMBERS + WORDS).replace("\0", "")
        ways = [[option, value], [f"{option}={value}"], [option], [value, option], [option, *[value] * 3]]
        arguments += dice.choice(ways)
    return name, arguments


def _line_value(dice: random.Random, text: str) -> str:
    """The value of a key becomes an odd one."""
    keys = list(re.finditer(r"(?m)^( *[a-z_.]+:) *[^#\n]*", text))
    if not keys:
        return text
    found = dice.choice(keys)
    return f"{text[: found.start()]}{found[1]} {dice.choice(NUMBERS + WORDS)} {text[found.end() :]}"


def _lines(dice: random.Random, text: str) -> str:
    """A line is doubled, taken out, moved right, or broken."""
    lines = text.split("\n")
    at = dice.randrange(len(lines))
    change = dice.choice([[lines[at]] * 2, [], [f"  {lines[at]}"], [f"\t{lines[at]}"], [lines[at].replace(":", "")]])
    return "\n".join(lines[:at] + change + lines[at + 1 :])


def _characters(dice: random.Random, text: str) -> str:
    for _ in range(dice.choice([1, 3, 10])):
        at = dice.randrange(len(text) + 1)
        text = text[:at] + dice.choice("\0\x1b{}[]&*!|>'\"%@`:#-,?\n\t\ufeff\u2028é\ud800") + text[at + 1 :]
    return text


def _bomb(dice: random.Random, text: str) -> str:
    """Aliases of aliases, deep nesting, a key that is no word, or a very long file."""
    levels = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12))
    whole = f"model: &l0 [x]\n{levels}\nlora: *l11\n"
    return dice.choice(
        [whole, f"model: {'[' * 3000}", f"train: {'{a: ' * 2000}", f"{text}\n? [a, b]\n: 1\n", f"{text}\n1: 2\n",
         f"{text}\n{'#' * 3_000_000}", "&a {b: *a}", f"a: &a\n  b: *a\n{text}", "- 1\n- 2", "", "\0", "--- 1\n--- 2",
         f"{text}\ntrain:\n  <<: 5", f"{text}\nlora: &x {{rank: *x}}", "? {a: b}\n: c", "? !!python/tuple [1]\n: 2"]
    )  # fmt: skip


EDITS: tuple[Callable[[random.Random, str], str], ...] = (
    _line_value, _line_value, _line_value, _lines, _characters, _bomb,
)  # fmt: skip
