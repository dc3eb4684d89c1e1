"""Laws of `compare`: a cell is made once, interrupted is uninterrupted, a failure is a row, missing is told."""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from motionlora.data.benchmark import cases, protocol_hash
from motionlora.data.clip import Clip, read_clip, write_clip
from motionlora.data.errors import InputError
from motionlora.data.say import silent
from motionlora.data.sprites import random_scene, render
from motionlora.data.yaml_file import config_path, read_yaml
from motionlora.heads.lora import MotionLora
from motionlora.heads.lora_file import save_lora
from motionlora.infer import bench_sprites as protocol
from motionlora.infer import own_code
from motionlora.infer import studio as studios
from motionlora.infer.captions_file import read_captions
from motionlora.infer.compare import compare
from motionlora.infer.compare_settings import BenchSpritesSettings, CompareSettings
from motionlora.infer.grid import grid
from motionlora.infer.guidance_list import guidance_class, guidance_names
from motionlora.infer.measure_names import MEASURES
from motionlora.infer.measure_pair import SPRITES, asked_scene
from motionlora.infer.method import parsed_method, parsed_methods
from motionlora.infer.own_code import code_hash, sources
from motionlora.infer.pace import Pace
from motionlora.infer.pairs import benchmark_facts, read_pairs
from motionlora.infer.row import Row
from motionlora.infer.settings import SampleSettings
from motionlora.infer.studio import Cell, Size, Studio
from motionlora.train.command import main

Made = tuple[CompareSettings, list[Row], list[str]]
METHODS = ("flowmotion:share=1.0,iterations=1", "inject:share=1.0,blocks=[0]")
CAPTION, FREE = "a red circle on a dark background", "a fox runs over snow"


def never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("A clip was walked.")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sprite clips of 5 frames with a captions file, one pair a line, and a clip that no line names."""
    folder = tmp_path_factory.mktemp("clips")
    for seed, name in enumerate(("one", "two", "three")):
        scene = random_scene(np.random.default_rng(seed), frames=5)
        write_clip(render(scene), folder / f"{name}.mp4", exact=True)
    (folder / "captions.txt").write_text(f"# pairs\none.mp4 | {CAPTION}\n\ntwo | {FREE}\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random twin of two blocks."""
    from motionlora.heads.tiny import random_twin

    return random_twin(tmp_path_factory.mktemp("twin") / "wan", blocks=2, seed=3)


@pytest.fixture
def settings(clips: Path, model: Path, tmp_path: Path) -> CompareSettings:
    return settings_in(tmp_path, clips, model)


@pytest.fixture(scope="module")
def made(clips: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The whole grid of the settings, its rows, and what was said; its files lie in `out`."""
    settings, said = settings_in(tmp_path_factory.mktemp("made"), clips, model), list[str]()
    return settings, compare(settings, said.append), said


def settings_in(folder: Path, clips: Path, model: Path) -> CompareSettings:
    return CompareSettings.model_validate(
        {"model": str(model), "clips": clips, "methods": METHODS, "out": folder / "out", "cache": folder / "cache",
         "sample": {"steps": 2, "scale": 3.0}, "seeds": (0, 1), "frames": 5, "height": 64, "width": 64, "fps": 12.0,
         "points": 0, "exact": True, "device": "cpu"}
    )  # fmt: skip


def changed(settings: CompareSettings, **values: Any) -> CompareSettings:
    return settings.model_copy(update=values)


def results(settings: CompareSettings) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (settings.out / "results.jsonl").read_text().splitlines()]


def without_seconds(settings: CompareSettings) -> list[dict[str, Any]]:
    found = results(settings)
    for row in found:
        row["cost"] = {name: value for name, value in row["cost"].items() if not name.startswith("seconds")}
    return found


def test_every_cell_is_made_once_measured_and_found_again(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, rows, said = made
    wanted = ["none", *METHODS, "static", *(f"wrong:{name}" for name in METHODS), "reference"]
    assert {row.method for row in rows} == set(wanted)
    assert len(rows) == len(wanted) * 2 * 2 == len({(row.pairing, row.method) for row in rows})
    assert {row.status for row in rows} == {"done"}
    assert any("three.mp4" in line and "left out" in line for line in said)
    assert any(re.search(r"^7/28 .*left$", line) for line in said), said
    before, page = results(settings), (settings.out / "report.html").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in (settings.out / "cells").iterdir()}
    assert len(stamps) == 2 * 2 * 2 * len(("none", *METHODS, *METHODS)), (
        "a clip and a story for each cell of the model's"
    )
    monkeypatch.setattr(studios, "walked", never)
    compare(settings, said.append)
    assert results(settings) == before
    assert {path: path.stat().st_mtime_ns for path in (settings.out / "cells").iterdir()} == stamps
    assert len((settings.out / "report.html").read_text()) - len(page) in range(-20, 20)
    # one method more makes only its own cells
    monkeypatch.undo()
    walks: list[Any] = []
    monkeypatch.setattr(studios, "walked", lambda *args, real=studios.walked: walks.append(args) or real(*args))
    compare(changed(settings, methods=(*METHODS, "moft:share=1.0,channels=0.25"), controls=False), silent)
    assert len(walks) == 4


def test_interrupted_is_uninterrupted(
    settings: CompareSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = changed(settings, methods=METHODS[:1], seeds=(0,))
    whole = changed(settings, out=tmp_path / "whole", cache=tmp_path / "other")
    compare(whole, silent)
    real, calls = studios.walked, iter(range(99))

    def stopped(*args: Any) -> Any:
        if next(calls) in (1, 4, 5):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(studios, "walked", stopped)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            compare(settings, silent)
    compare(settings, silent)
    assert without_seconds(settings) == without_seconds(whole)
    costs = ("seconds", "command", "machine")
    tables = [
        [line for line in (s.out / "table.csv").read_text().splitlines() if "seconds" not in line]
        for s in (settings, whole)
    ]
    assert tables[0] == tables[1], costs


def test_a_failing_cell_is_a_row_with_its_sentence_and_the_rest_goes_on(settings: CompareSettings) -> None:
    settings = changed(settings, methods=("sdedit:start=0.001", "inject"), controls=False)
    with pytest.raises(
        InputError, match=r"^4 of 12 cells failed, the rest is in .*; one reason: guidance\.start is 0\.001"
    ):
        compare(settings, silent)
    found = results(settings)
    failed = [row for row in found if row["status"] == "failed"]
    assert len(found) == 12
    assert {row["method"] for row in failed} == {"sdedit:start=0.001"}
    assert all("guidance.start is 0.001" in row["sentence"] and row["values"] == {} for row in failed)
    table = (settings.out / "table.md").read_text()
    assert "## Failed" in table
    assert "guidance.start is 0.001" in (settings.out / "report.html").read_text()
    lines = list(csv.DictReader((settings.out / "table.csv").read_text().splitlines()))
    (figure,) = [line for line in lines if (line["method"], line["measure"]) == ("sdedit:start=0.001", "smf")]
    assert (figure["asked"], figure["cells"], figure["mean"]) == ("4", "0", ""), "nothing is never 0"


def test_a_bug_in_one_cell_stops_no_other_and_is_told_at_the_end(
    settings: CompareSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, calls, real = changed(settings, methods=("none",), controls=False), iter(range(9)), studios.walked

    def broken(*args: Any) -> Any:
        if next(calls) == 1:
            raise IndexError("seven is too many")
        return real(*args)

    monkeypatch.setattr(studios, "walked", broken)
    with pytest.raises(RuntimeError, match="1 of 4 cells failed") as told:
        compare(settings, silent)
    assert isinstance(told.value.__cause__, IndexError)
    assert [row["sentence"] for row in results(settings)].count(
        "a bug of motionlora, IndexError: seven is too many"
    ) == 1
    compare(settings, silent)
    assert {row["status"] for row in results(settings)} == {"done"}, "what failed is tried again"


def test_a_damaged_cell_is_made_anew(settings: CompareSettings) -> None:
    settings = changed(settings, methods=("none",), controls=False)
    compare(settings, silent)
    before, said = without_seconds(settings), []
    film, story = (sorted((settings.out / "cells").glob(f"*.{suffix}")) for suffix in ("mp4", "json"))
    film[0].write_bytes(film[0].read_bytes()[:300])
    story[1].write_text("{")
    compare(settings, said.append)
    assert without_seconds(settings) == before
    assert sum("damaged, made anew" in line for line in said) == 2


def test_what_cannot_be_measured_says_why_and_is_never_0(settings: CompareSettings) -> None:
    rows = compare(changed(settings, methods=("none",), points=6), silent)
    for row in rows:
        assert set(row.values) | set(row.missing) == {measure.name for measure in MEASURES}
        assert not set(row.values) & set(row.missing)
        if row.caption == FREE:
            assert {row.missing[name] for name in SPRITES} == {"the caption is not of the sprite world"}
        else:
            assert set(SPRITES) <= set(row.values)
        if "mf_sym" in row.values and row.method == "reference":
            assert row.values["mf_sym"] == pytest.approx(1.0)
    table = (settings.out / "table.md").read_text()
    assert "the caption is not of the sprite world" in table.partition("## Missing")[2]
    assert "6 x 6 points. Tracker on 6 pure translations" in table


def test_controls_are_what_they_say(made: Made) -> None:
    own = {row.method: row for row in made[1] if row.caption == CAPTION and row.seed == 0}
    assert own["reference"].values["smf"] > 0.95
    assert own["reference"].values["leak"] >= own["none"].values["leak"]
    assert abs(own["static"].values["gain"]) < 0.01
    assert own["static"].cost == {}
    assert own[METHODS[0]].key != own[f"wrong:{METHODS[0]}"].key


def test_the_reference_fed_in_is_the_donors(settings: CompareSettings) -> None:
    """A wrong motion is the right one of the other clip."""
    pairs = read_pairs(settings, silent)
    for cell in grid(pairs, parsed_methods(METHODS, controls=True)):
        assert (cell.donor.source is cell.pair.source) == (cell.method.control != "wrong")


@pytest.fixture(scope="module")
def key_of(model: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The key of a cell, with one thing changed."""
    out = tmp_path_factory.mktemp("keys")
    base = {"model": str(model), "clips": clips, "out": out, "cache": None, "device": "cpu"}
    base |= {"frames": 5, "height": 64, "width": 64, "fps": 12.0}

    def key(
        clip: int = 0, text: str = "none", seed: int = 0, caption: str = "", wrong: bool = False, **values: Any
    ) -> str:
        settings = CompareSettings.model_validate({**base, **values})
        pairs = read_pairs(settings, silent)
        size = Size(settings.frames, settings.height, settings.width, settings.fps)
        pair = replace(pairs[clip], caption=caption or CAPTION)
        studio = Studio(settings, size, 0.5, [pair.caption])
        return studio.key(Cell(pair, parsed_method(text), seed, pairs[1 - clip] if wrong else pair))

    return key


def test_a_cell_is_known_by_all_that_it_depends_on_and_nothing_else(key_of: Callable[..., str]) -> None:
    flow = "flowmotion:lr=0.01"
    keys = [
        key_of(), key_of(seed=1), key_of(caption=FREE), key_of(negative="grey"), key_of(sample={"scale": 4.0}),
        key_of(sample={"steps": 9}), key_of(sample={"shift": 2.0}), key_of(frames=9 - 4, width=56), key_of(exact=True),
        key_of(text=flow), key_of(1, text=flow), key_of(text="flowmotion"), key_of(text="inject"),
        key_of(text="static"), key_of(text="reference"), key_of(1, text="reference"),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key_of(1) == key_of() == key_of(text="none", points=3), "no transfer does not depend on the clip"
    assert key_of(text="flowmotion:lr=0.003") == key_of(text="flowmotion"), "a default that is written out"
    assert key_of(text=f"wrong:{flow}", wrong=True) == key_of(1, text=flow)


def lora_at(path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for module in ("blocks.0.attn1.to_q", "blocks.1.attn1.to_v"):
        weights[f"{module}.lora_A.weight"] = torch.randn(4, 48, generator=generator)
        weights[f"{module}.lora_B.weight"] = torch.randn(48, 4, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_lora(MotionLora(weights, 4, 4.0, stage="temporal", provenance={"strength": 0.75}), path)


def test_each_clip_brings_its_own_lora_and_leaves_no_trace(
    settings: CompareSettings, clips: Path, tmp_path: Path
) -> None:
    lora_at(tmp_path / "loras/one.safetensors", 1)
    lora_at(tmp_path / "loras/two/temporal.safetensors", 2)
    settings = changed(settings, loras=tmp_path / "loras", seeds=(0,), methods=("lora", "lora:0.2+flowmotion", "none"))
    rows = {(row.clip, row.method): row for row in compare(settings, silent)}
    plain = changed(settings, methods=("none",), controls=False, out=tmp_path / "plain")
    for row in compare(plain, silent):
        assert rows[row.clip, "none"].key == row.key, "made after a LoRA was taken away, or without any"
        films = [s.out / "cells" / f"{row.key}.mp4" for s in (settings, plain)]
        one, other = (read_clip(film, multiple=1, say=silent).pixels for film in films)
        assert np.array_equal(one, other)
    story = json.loads((settings.out / "cells" / f"{rows['two.mp4', 'lora'].key}.json").read_text())
    assert story["lora"]["file"].endswith("two/temporal.safetensors")
    assert story["lora"]["strength"] == 0.75
    mixed = json.loads((settings.out / "cells" / f"{rows['one.mp4', 'lora:0.2+flowmotion'].key}.json").read_text())
    assert (mixed["lora"]["strength"], mixed["reference"]["file"]) == (0.2, "one.mp4")
    wrong = json.loads((settings.out / "cells" / f"{rows['one.mp4', 'wrong:lora'].key}.json").read_text())
    assert wrong["lora"]["file"].endswith("two/temporal.safetensors")
    (tmp_path / "loras/one.safetensors").unlink()
    with pytest.raises(InputError, match=r"no LoRA for one\.mp4: train one"):
        compare(settings, silent)


def test_sparing_memory_makes_the_same_clips_and_rounding_makes_others(settings: CompareSettings) -> None:
    settings = changed(settings, methods=("none",), controls=False, seeds=(0,))
    keys = {
        mode: [row.key for row in compare(changed(settings, memory=mode), silent)] for mode in ("fast", "low", "lowest")
    }
    assert keys["fast"] == keys["low"]
    assert not set(keys["fast"]) & set(keys["lowest"])
    assert "torch.float32 on cpu, fp8 base" in (settings.out / "table.md").read_text()
    films = [settings.out / "cells" / f"{keys[mode][0]}.mp4" for mode in ("fast", "lowest")]
    one, other = (read_clip(film, multiple=1, say=silent).pixels for film in films)
    assert not np.array_equal(one, other)


def test_a_dry_run_tells_the_grid_and_makes_nothing(settings: CompareSettings, made: Made) -> None:
    said: list[str] = []
    assert compare(changed(settings, dry_run=True), said.append) == []
    assert not settings.out.exists()
    told = said[-1]
    assert "2 clips, 2 captions, 2 seeds, 28 cells of 5 frames of 64x64 at 12 fps, 2 steps" in told
    assert re.search(r"^none +4 +4 +16 +0$", told, re.M), told
    for method in METHODS:
        each = float(next(line for line in told.splitlines() if line.startswith(method)).split()[2])
        assert max(row.cost["forwards"] for row in made[1] if row.method == method) == each


def test_every_guidance_there_is_can_be_compared(settings: CompareSettings) -> None:
    said: list[str] = []
    compare(changed(settings, methods=(), dry_run=True), said.append)
    names = {line.split()[0] for line in said[-1].splitlines()[2:-1]}
    moving = {name for name in guidance_names() if guidance_class(name).needs_reference}
    assert names == {*guidance_names(), "static", "reference", *(f"wrong:{name}" for name in moving)}


def test_pace_is_by_forwards_and_by_what_needs_none() -> None:
    pace = Pace([10.0, 0.0, 20.0, 0.0, 30.0])
    assert pace.after(5.0) == "about 25 s left"
    assert pace.after(1.0) == "about 26 s left"
    assert pace.after(10.0) == "about 16 s left"
    assert pace.after(1.0) == "about 15 s left"
    assert pace.after(15.0) == "the last"
    assert Pace([10.0, 10.0, 10.0], processes=2).after(4.0) == "about 4 s left"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.txt", "a.mp4 | x y\nb.mp4 | z | l.safetensors:0.5\n"),
        ("c.yaml", "- {clip: a.mp4, caption: x  y}\n- clip: b.mp4\n  caption: z\n  lora: l.safetensors:0.5\n"),
        (
            "c.json",
            '[{"clip": "a.mp4", "caption": "x y"}, {"clip": "b.mp4", "caption": "z", "lora": "l.safetensors:0.5"}]',
        ),
        (
            "c.jsonl",
            '{"clip": "a.mp4", "caption": "x y"}\n\n{"clip":"b.mp4","caption":"z","lora":"l.safetensors:0.5"}\n',
        ),
        ("c.csv", "\ufeffclip,caption,lora\r\na.mp4,x  y\r\n\r\nb.mp4,z,l.safetensors:0.5\r\n"),
    ],
)
def test_captions_are_the_same_in_every_form(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    found = [(entry.clip, entry.caption, entry.lora) for entry in read_captions(tmp_path / name)]
    assert found == [("a.mp4", "x y", ""), ("b.mp4", "z", "l.safetensors:0.5")]
    (tmp_path / "m.yaml").write_text("a.mp4: x y\nb.mp4: [z, w]\n")
    assert [(e.clip, e.caption) for e in read_captions(tmp_path / "m.yaml")] == [
        ("a.mp4", "x y"), ("b.mp4", "z"), ("b.mp4", "w")
    ]  # fmt: skip


def test_clips_of_a_benchmark_that_are_not_there_are_listed(settings: CompareSettings, tmp_path: Path) -> None:
    entries = [{"clip": clip, "caption": f"{clip} style", "kind": "style"} for clip in ("one", "bear")]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, entries)))
    partly = changed(settings, captions=tmp_path / "c.jsonl", benchmark="loveu")
    assert [pair.caption for pair in read_pairs(partly, silent)] == ["one style"]
    assert "1 of 76 clips; 1 of 304 pairs" in benchmark_facts(partly)["benchmark"]
    assert "not there: bear" in benchmark_facts(partly)["benchmark"]
    with pytest.raises(InputError, match="there is no clip 'bear'"):
        read_pairs(changed(partly, benchmark=None), silent)


LOVEU = """Video name,Our caption,Style Change Caption,Object Change Caption,Background Change Caption,Multiple Changes
DAVIS Videos:,,,,,
one,A man runs,"A man runs, oil painting",A bear runs,A man runs on ice,
lost,A car,A drawn car,A bus,A car at sea,A drawn bus at sea
"""


def test_a_copy_of_a_benchmark_is_read_as_it_is_handed_out(settings: CompareSettings, tmp_path: Path) -> None:
    """LOVEU-TGVE's table and folders, DAVIS's folders, those of DeT's examples; clips that lack are named."""
    (tmp_path / "captions.csv").write_text(LOVEU)
    own = settings.clips
    assert own is not None
    pictures = read_clip(own / "one.mp4", multiple=1, say=silent).pixels
    for place in ("DAVIS_480p/480p_frames/one", "JPEGImages/480p/one", "masks/one"):
        (tmp_path / place).mkdir(parents=True)
        for number, frame in enumerate(pictures):
            Image.fromarray(frame).save(tmp_path / place / f"{number:05d}.png")
    for place in ("one/videos/one.mp4", "DAVIS_480p/480p_videos/one.mp4"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_bytes((own / "one.mp4").read_bytes())
    loveu = changed(settings, clips=tmp_path, benchmark="loveu")
    pairs = read_pairs(loveu, silent)
    assert [(pair.kind, pair.caption) for pair in pairs] == [
        ("style", "A man runs, oil painting"), ("object", "A bear runs"), ("background", "A man runs on ice")
    ]  # fmt: skip
    assert np.array_equal(pairs[0].source.read().pixels, pictures)
    told = benchmark_facts(loveu)["benchmark"]
    assert "1 of 76 clips; 3 of 304 pairs; style 1; object 1; background 1; multiple 0" in told
    assert "not there: lost" in told
    assert told.endswith("clips without all captions: one")
    for name, kind, clip in (("davis", "subject", "one"), ("mtbench", "easy", "one.mp4")):
        (tmp_path / "captions.csv").write_text(f"clip,caption,kind\none,x,{kind}\n")
        (pair,) = read_pairs(changed(loveu, benchmark=name), silent)
        assert pair.source.name == clip


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("c.txt", "one.mp4\n", "line 1: 'one.mp4' should be CLIP | CAPTION"),
        ("c.txt", "# nothing\n", "holds no caption"),
        ("c.txt", "onne | x\n", r"line 1: there is no clip 'onne' .*did you mean one.mp4\?"),
        ("c.txt", "one | x\ntwo | y\none.mp4 | x\n", "line 3: one.mp4 has this caption already .c.txt, line 1."),
        ("c.txt", "one |  \n", "there is no caption"),
        ("c.yaml", "- {clip: one, captoin: x}\n", r"unknown key `captoin` .did you mean caption\?"),
        ("c.yaml", "- {clip: one, caption: 3}\n", "caption is 3, which is no text"),
        ("c.yaml", "- [", "neither YAML nor JSON"),
        *((f"c.{kind}", "[" * 5000, "nested too deeply") for kind in ("yaml", "json", "jsonl")),
        ("c.jsonl", "{\n", "line 1: this is not JSON"),
        ("c.csv", "clip,caption\n", "holds no caption"),
        ("c.csv", "clip,caption\none,a, b\n", "line 2: more cells than headings came"),
        ("c.csv", "clip,captoin\none,a\n", r"unknown key `captoin` .did you mean caption\?"),
        ("c.csv", "clip,caption\n\n\none," + "x" * 200_000, "line 4: this is not CSV, field larger"),
        ("c.xls", "clip,caption\n", "captions come as .txt, .csv"),
    ],
)
def test_a_mistake_in_the_captions_is_one_sentence(
    settings: CompareSettings, tmp_path: Path, name: str, text: str, reason: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=reason):
        read_pairs(changed(settings, captions=tmp_path / name), silent)


def test_kept_clips_and_measures_rest_on_all_the_code_that_makes_them() -> None:
    """Imports inside functions count, other guidances do not: a method that is added leaves the rest in place."""
    names = {name: set(sources(f"motionlora.infer.{name}")) for name in ("guide_ditflow", "guide_flowmotion", "studio")}
    assert {"motionlora.infer.attention_flow", "motionlora.infer.features", "motionlora.infer.found"} <= names[
        "guide_ditflow"
    ]
    assert {"motionlora.infer.sample", "motionlora.heads.wan", "motionlora.data.clip"} <= names["studio"]
    assert not {"motionlora.infer.guide_ditflow", "motionlora.infer.guide_smm"} & (
        names["studio"] | names["guide_flowmotion"]
    )
    measures = set(sources("motionlora.infer.measure_pair"))
    assert {"motionlora.infer.recognise_sprites", "motionlora.infer.track_points"} <= measures
    assert "motionlora.infer.sample" not in measures


def test_the_hash_of_code_is_that_of_what_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("one", "def f():\n    from motionlora.infer.own_two import g\n"), ("two", "g = 1\n")):
        (tmp_path / f"own_{name}.py").write_text(text)
    found = {f"motionlora.infer.own_{name}": tmp_path / f"own_{name}.py" for name in ("one", "two")}
    monkeypatch.setattr(own_code, "find_spec", lambda name: SimpleNamespace(origin=str(found[name])))
    assert sources("motionlora.infer.own_one") == found
    before = code_hash.__wrapped__("motionlora.infer.own_one")
    assert code_hash.__wrapped__("motionlora.infer.own_one") == before
    (tmp_path / "own_two.py").write_text("g = 2\n")
    assert code_hash.__wrapped__("motionlora.infer.own_one") != before


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (("flomotion",), r"there is no method 'flomotion'.*did you mean flowmotion\?"),
        (("flowmotion:lrr=1",), "unknown key `lrr`"),
        (("flowmotion:lr=9",), "--lr is 9: it should be less than or equal to 1"),
        (("flowmotion:lr",), "should be SETTING=VALUE"),
        (("flowmotion:lr=" + "[" * 5000,), "is no value"),
        (("lora:9",), "strength, from -4 to 4"),
        (("flowmotion+inject",), "two guidances"),
        (("wrong:none",), "takes its motion from no clip"),
        (("inject", "inject"), "came twice"),
        (("ditflow:save=v.safetensors",), "over and over: save with `motionlora generate`"),
    ],
)
def test_a_wrong_method_is_one_sentence(texts: tuple[str, ...], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        parsed_methods(texts, controls=True)


def test_a_method_reads_as_it_is_written() -> None:
    method = parsed_method("lora:0.5 + flowmotion: lr=1e-2, share=0.4")
    settings: Any = method.guidance
    assert (method.lora, method.strength, method.guidance_name) == (True, 0.5, "flowmotion")
    assert (settings.lr, settings.share) == (0.01, 0.4)
    blocks: Any = parsed_method("inject:blocks=[0,1],share=0.3").guidance
    assert (blocks.blocks, blocks.share) == ((0, 1), 0.3)
    assert parsed_method("wrong:flowmotion").control == "wrong"


def test_a_caption_of_the_sprite_world_is_known_for_what_it_asks() -> None:
    for case in cases("full"):
        scene = asked_scene(case.target.caption)
        assert scene is not None
        assert scene.caption == case.target.caption
    assert asked_scene(FREE) is None


def test_the_protocol_walks_as_the_tiny_does_and_tells_its_hash(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    bench = BenchSpritesSettings()
    walk = read_yaml(config_path("tiny"))["generate"]["sample"]
    assert bench.sample == SampleSettings.model_validate(walk)
    pairs = protocol.protocol_pairs("full")
    assert sum(len(pair.seeds) for pair in pairs) == 96
    assert len({pair.source.name for pair in pairs}) == 16
    monkeypatch.setattr(protocol, "cases", lambda form: cases("short")[:2])
    words = ["--config", "tiny", "--form", "short", "--model", str(model), "--methods", "sdedit", "--points", "0"]
    words += ["--sample.steps", "2", "--sample.scale", "1", "--device", "cpu"]
    words += ["--out", str(tmp_path), "--cache", "None"]
    assert main(["bench", "sprites", *words]) == 0
    assert f"hash {protocol_hash()}, form short" in (tmp_path / "table.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"none", "sdedit", "static", "wrong:sdedit", "reference"}
    for row in rows:
        if row["method"] == "reference":
            assert row["values"]["smf"] > 0.95
            assert (row["values"]["acc"], row["values"]["leak"]) != (1.0, 0.0)


def test_the_protocol_takes_a_lora_of_each_reference(
    model: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(protocol, "cases", lambda form: cases("short")[:2])
    lora_at(tmp_path / "loras/v.safetensors", 1)
    words = ["bench", "sprites", "--config", "tiny", "--form", "short", "--model", str(model), "--methods", "lora"]
    words += ["--points", "0", "--sample.steps", "1", "--sample.scale", "1", "--device", "cpu", "--no-controls"]
    words += ["--out", str(tmp_path / "out"), "--cache", "None", "--loras", str(tmp_path / "loras")]
    assert main(words) == 2
    assert "no LoRA for zigzag: train one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    lora_at(tmp_path / "loras/zigzag/temporal.safetensors", 2)
    assert main(words) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    made = {row["clip"]: row["key"] for row in rows if row["method"] == "lora"}
    for name, file in (("v", "v.safetensors"), ("zigzag", "temporal.safetensors")):
        story = json.loads((tmp_path / "out/cells" / f"{made[name]}.json").read_text())
        assert Path(story["lora"]["file"]).name == file


def test_a_clip_that_stands_still_can_be_kept_and_read_again(tmp_path: Path) -> None:
    """Lossless files come back as they were, whatever they show."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 24, 3), dtype=np.uint8)
    for clip in (Clip(np.repeat(pixels, 5, 0), 12.0, ""), Clip(np.zeros((5, 16, 24, 3), np.uint8), 7.0, "")):
        write_clip(clip, tmp_path / "still.mp4", exact=True)
        back = read_clip(tmp_path / "still.mp4", multiple=1, say=silent)
        assert np.array_equal(back.pixels, clip.pixels)
        assert back.fps == pytest.approx(clip.fps)
    with pytest.raises(InputError, match=r"written as \.mp4"):
        write_clip(clip, tmp_path / "still.webp", exact=True)
