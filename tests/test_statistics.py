"""Statistics of comparisons against arithmetic: Holm's own example, intervals without width, pairs that are pairs."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest

from motionlora.infer.compare_table import as_csv, as_markdown, by_clip, verdicts
from motionlora.infer.gains import figures_of, gains_of, paired
from motionlora.infer.guidance_list import guidance_names
from motionlora.infer.published import ROWS, published_of
from motionlora.infer.row import Row
from motionlora.infer.statistics import holm, mean_interval, mean_of, median_interval, median_of, sign_flip_p


def row(method: str, clip: str = "a", seed: int = 0, caption: str = "c", control: str = "none", **values: float) -> Row:
    return Row(clip, "", caption, method, seed, control, values=values)  # pyright: ignore[reportArgumentType]


def test_holm_on_a_known_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_a_constant_has_no_width_and_a_wider_spread_a_wider_interval() -> None:
    assert mean_interval([[0.3, 0.3]] * 5) == median_interval([[0.3, 0.3]] * 5) == pytest.approx((0.3, 0.3))
    narrow, wide = ([[size * value] for value in np.linspace(-1, 1, 9)] for size in (0.1, 1.0))
    for interval in (mean_interval, median_interval):
        spans = [np.ptp(interval(groups)) for groups in (narrow, wide)]
        assert spans[1] == pytest.approx(10 * spans[0])
        low, high = interval(wide)
        assert low < 0 < high
        assert all(math.isnan(end) for end in interval([[1.0, 2.0]])), "one reference tells nothing of others"


def test_the_interval_is_that_of_a_normal_mean() -> None:
    """For many references the bootstrap tends to mean +- 1.96 standard errors."""
    values = np.random.default_rng(1).normal(2.0, 3.0, 400)
    low, high = mean_interval([[value] for value in values])
    error = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.05)


def test_references_count_alike_however_many_cells_they_have() -> None:
    groups = [[1.0] * 9, [3.0]]
    assert mean_of(groups) == 2.0
    assert median_of(groups) == 1.0
    assert math.isnan(mean_of([]))
    assert math.isnan(median_of([]))
    low, high = mean_interval(groups)
    assert (low, high) == (1.0, 3.0), "what is drawn is references, not cells"


def test_sign_flips_are_counted() -> None:
    assert sign_flip_p([[1.0], [2.0], [3.0], [4.0]]) == 2 / 16
    assert sign_flip_p([[1.0], [-1.0]]) == 1.0
    assert sign_flip_p([[3.0], [1.0], [-1.0]]) == 6 / 8  # of 3 +- 1 +- 1 one alone is below 3
    assert sign_flip_p([[0.0]] * 3) == 1.0
    assert sign_flip_p([[1.0 + 0.1 * i] for i in range(16)]) < 1e-3
    assert math.isnan(sign_flip_p([]))


def test_pairs_share_clip_caption_and_seed() -> None:
    rows = [row("none", "a", 0, smf=0.1), row("none", "a", 1, smf=0.5), row("none", "b", 0, smf=0.0)]
    rows += [
        row("m", "a", 1, smf=0.9),
        row("m", "a", 0, smf=0.4),
        row("m", "b", 7, smf=1.0),
        row("m", "b", 0, gain=1.0),
    ]
    rows += [row("m", "a", 0, caption="other", smf=1.0)]
    assert paired(rows, "m", "none", "smf") == [pytest.approx([0.4, 0.3])]
    assert paired(rows, "m", "none", "gain") == []


def test_gains_are_over_each_baseline_and_corrected_among_methods() -> None:
    rows, effects = [], {"none": 0.0, "good": 0.5, "idle": 0.0, "static": 0.1, "wrong:good": 0.2, "wrong:idle": 0.0}
    for name, effect in effects.items():
        control = {"static": "static", "none": "none"}.get(name, "wrong" if ":" in name else "none")
        for at in range(6):
            jitter = 0.01 * (at - 2.5) if name == "idle" else 0.0
            rows.append(row(name, f"clip{at}", 0, control=control, smf=effect + at + jitter))
    found = {(gain.method, gain.against): gain for gain in gains_of(rows) if gain.measure == "smf"}
    assert set(found) == {(m, a) for m in ("good", "idle") for a in ("none", "static", f"wrong:{m}")}
    good = found["good", "none"]
    assert (good.mean, good.low, good.high) == pytest.approx((0.5, 0.5, 0.5))
    assert (good.p, good.p_holm, good.pairs, good.references) == (2 / 64, 4 / 64, 6, 6)
    assert found["good", "wrong:good"].mean == pytest.approx(0.3)
    assert found["idle", "none"].low < 0 < found["idle", "none"].high
    assert verdicts(list(found.values()))[2:-1] == [
        "- good: works, above none, static, wrong",
        "- idle: not shown to work (not above none, not above static, not above wrong)",
    ]
    lines = {
        (line["method"], line["measure"]): line
        for line in csv.DictReader(as_csv(figures_of(rows), gains_of(rows)).splitlines())
    }
    assert lines["good", "smf"]["over_none_gain"] == "0.5"
    assert lines["good", "smf"]["over_wrong_p_holm"] == "0.0625"
    assert lines["none", "smf"]["over_none_gain"] == ""


def test_selectivity_has_the_random_moves_of_equal_dose_to_beat_and_nothing_else() -> None:
    effects = {"m": 0.6, "dose:m": 0.1, "idle": 0.1, "dose:idle": 0.1}
    generator, rows = np.random.default_rng(0), []
    for at in range(6):
        for name, effect in effects.items():
            rows.append(row(name, f"clip{at}", selectivity=effect + generator.normal(0, 0.05)))
    control = {"dose:m": "dose", "dose:idle": "dose"}
    rows = [replace(each, control=control.get(each.method, "none")) for each in rows]
    found = verdicts(gains_of(rows))
    assert found[0] == "By selectivity, with intervals that exclude 0:"
    assert found[2:-1] == ["- m: works, above dose", "- idle: not shown to work (not above dose)"]


def test_a_method_without_controls_is_never_said_to_work() -> None:
    rows = [row(name, f"clip{at}", smf=effect) for name, effect in (("none", 0.0), ("m", 1.0)) for at in range(6)]
    (line,) = verdicts(gains_of(rows))[2:-1]
    assert line == "- m: not shown to work (not compared with static, not compared with wrong)"


def test_a_figure_says_how_many_cells_it_rests_on() -> None:
    rows = [row("none", f"clip{at}", smf=float(at)) for at in range(3)]
    rows[2] = replace(rows[2], values={}, missing={"smf": "it hid | <b>"})
    (figure,) = [figure for figure in figures_of(rows) if figure.measure == "smf"]
    assert (figure.asked, figure.cells, figure.median) == (3, 2, 0.5)
    text = as_markdown(rows, figures_of(rows), [], {"model": "a|b"})
    assert "0.50 (2)" in text
    assert "SMF (1): it hid | <b>" in text.replace("\\|", "|").replace("&lt;", "<")
    assert "a\\|b" in text


def test_papers_figures_stand_apart_and_only_beside_their_methods() -> None:
    """Each number is printed once for its paper; a control and a method of nobody's have none."""
    assert {p.method for p in published_of(["lora:0.5+smm", "wrong:lora+ditflow", "static"])} == {"lora", "smm"}
    assert [p.fidelity for p in published_of(["ditflow:lr=0.01"])] == [0.785, 0.813, 0.4062, 0.691]
    assert {p.method for p in ROWS} <= {"lora", *guidance_names()}
    rows = [row(name, clip=clip, smf=0.5) for name in ("none", "smm") for clip in "ab"]
    text = as_markdown(rows, figures_of(rows), gains_of(rows), {})
    ours, _, theirs = text.partition("## What papers print")
    assert "not to be merged" in theirs
    assert "| smm | SMM | 0.276 | 0.927 | 0.924 | 785 | Follow-Your-Motion" in theirs
    assert "0.927" not in ours
    controls = [row("static")]
    assert "What papers print" not in as_markdown(controls, figures_of(controls), gains_of(controls), {})


def test_clips_stand_apart_with_means_over_seeds_and_without_controls() -> None:
    rows = [row("none", smf=0.0), row("lora", smf=0.5), row("lora", seed=1, smf=1.0), row("lora", clip="b")]
    rows += [row("static", control="static", smf=9.0)]
    lines = [line for line in by_clip(rows, "smf") if line.startswith("| ")]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "--" not in line] == [
        ["clip", "none", "lora"],
        ["a", "0.00", "0.75"],
        ["b", "-", "-"],
    ]
