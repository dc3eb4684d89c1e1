"""The check of our files in other loaders finds what is wrong; the whole matrix is `make conformance`."""

import json
import re
from pathlib import Path

import pytest
from bench_conformance import motion_lora, of_two_ranks, report, summed, write_cases
from conformance import matrix_of, verdict_of
from safetensors.torch import load_file, save_file

from motionlora.heads.lora_file import load_lora, save_lora
from motionlora.heads.lora_write import Written

CHOSEN = re.compile("native, fp32|diffusers, fp32|.*: two at 0.5|control")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the cases that `make conformance` runs, and one whose expectation is doubled."""
    folder = tmp_path_factory.mktemp("conformance")
    comfy = write_cases(folder)
    assert [row for row in comfy if row["verdict"] != row["expected"]] == []
    assert {row["verdict"] for row in comfy} == {"right", "not loaded"}
    plan = json.loads((folder / "cases.json").read_text())
    plan["cases"] = [case for case in plan["cases"] if CHOSEN.match(case["name"])]
    first = plan["cases"][0]
    save_file({key: 2 * value for key, value in load_file(folder / first["updates"]).items()}, folder / "doubled")
    plan["cases"].append({**first, "name": "doubled", "updates": "doubled"})
    (folder / "cases.json").write_text(json.dumps(plan))
    return folder


def test_right_files_are_right_and_wrong_ones_are_found_out(folder: Path, tmp_path: Path) -> None:
    matrix = matrix_of(folder)
    verdicts = {row["case"]: row["verdict"] for row in matrix["rows"]}
    assert verdicts.pop("doubled") == "0.5 times as strong"
    controls = [verdict for case, verdict in verdicts.items() if case.startswith("control")]
    assert sorted(controls) == ["2 times as strong", "not loaded, no error", "refused"]
    right = [case for case, verdict in verdicts.items() if verdict == "right"]
    assert len(right) == len(verdicts) - len(controls) == 17
    comfy = [{"case": row["case"], "expected": "right", "verdict": "right"} for row in matrix["rows"]]
    wrong = report([matrix], comfy, tmp_path / "results")
    assert [line.partition(" in ")[0] for line in wrong] == ["doubled"], "the report hides a wrong case"
    page = (tmp_path / "results.md").read_text()
    assert "0.5 times as strong, expected: right" in page
    assert matrix["versions"]["peft"] in page


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "right"),
        ({"strength": 2.0, "differs": 0.7}, "2 times as strong"),
        ({"differs": 0.1}, "another output"),
        ({"fused": 0.1}, "fused otherwise"),
        ({"left": 0.1}, "leaves a trace"),
        ({"strength": float("nan")}, "nan times as strong"),
        ({"left": float("nan")}, "leaves a trace"),
    ],
)
def test_each_figure_has_its_verdict(changes: dict[str, float], verdict: str) -> None:
    figures = {"strength": 1.0, "differs": 0.0, "fused": 0.0, "left": 0.0} | changes
    assert verdict_of(**figures, within=1e-3) == verdict


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_ranks_that_differ_are_one_rank_in_the_native_layout(tmp_path: Path, layout: Written) -> None:
    path, lora = tmp_path / "two.safetensors", of_two_ranks()
    save_lora(lora, path, layout)
    loaded = load_lora(path)
    assert {len(a) for a, _ in loaded.modules().values()} == ({4} if layout == "native" else {2, 4})
    expected, found = summed([(lora, 1.0)]), summed([(loaded, 1.0)])
    assert all((found[module] - update).abs().max() < 1e-6 for module, update in expected.items())


def test_a_lora_of_one_rank_is_not_filled_up(tmp_path: Path) -> None:
    lora = motion_lora(4, 2.0, ("to_q",))
    save_lora(lora, tmp_path / "one.safetensors")
    assert {value.numel() for value in load_file(tmp_path / "one.safetensors").values()} == {4 * 48}
