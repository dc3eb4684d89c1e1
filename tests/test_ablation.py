"""Laws of the ablations: one thing changes, each LoRA is learned once, a failure is a row, figures are arithmetic."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from processes import together

from motionlora.data.errors import InputError
from motionlora.data.say import silent
from motionlora.data.yaml_file import config_path
from motionlora.heads.lora_file import load_lora
from motionlora.heads.score import head_scores
from motionlora.heads.wan import WanBackbone
from motionlora.infer import studio as studios
from motionlora.infer.bench_sprites import protocol_pairs
from motionlora.infer.compare_settings import AblationSettings
from motionlora.infer.plot import Mark, plotted
from motionlora.infer.row import Row
from motionlora.train import lesson as lessons
from motionlora.train.ablate import ablate, recipe_of
from motionlora.train.ablation_plan import planned
from motionlora.train.ablation_table import Chapter, differences, plot_of, verdict, write_chapters
from motionlora.train.ablations import Ablation, Claim, Variant, ablations, chosen_ablations, latent_frames, work_of
from motionlora.train.command import main
from motionlora.train.identity import flattened
from motionlora.train.lesson import learn, lesson_of, reranked
from motionlora.train.noise import keyed_generator
from motionlora.train.settings import TrainSettings

NAMES = ["heads", "positions", "frames", "motion", "rule", "rank", "lr", "strength", "loras", "steps"]


def never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("This was done before.")


@pytest.fixture(scope="module")
def twin_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random twin of two blocks of four heads."""
    from motionlora.heads.tiny import random_twin

    return random_twin(tmp_path_factory.mktemp("twin") / "wan", blocks=2, seed=3)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, twin_of_two: Path) -> Path:
    """The tiny's recipe with stages of two steps, and heads split where half of the twin's are temporal."""
    folder = tmp_path_factory.mktemp("recipe")
    source = protocol_pairs("sweep")[0].source
    model = WanBackbone.load(twin_of_two)
    scores = head_scores(model, model.encode(source.read()), model.embed(["a"]), (0.9998,), keyed_generator(0, "heads"))
    values = yaml.safe_load(config_path("tiny").read_text())
    values["heads"] |= {"heads": "split", "rule": "code", "ratio": float(np.median(scores[..., 1] / scores[..., 0]))}
    values["train"]["spatial"] |= {"steps": 2, "batch": 1}
    values["train"]["temporal"] |= {"steps": 2, "batch": 1, "stride": 6, "until": 0.0}
    values["train"]["lora"] |= {"rank": 4, "projections": ["q"]}
    (folder / "small.yaml").write_text(yaml.safe_dump(values))
    return folder / "small.yaml"


@pytest.fixture
def settings(twin_of_two: Path, recipe_file: Path, tmp_path: Path) -> AblationSettings:
    return settings_in(tmp_path, twin_of_two, recipe_file)


def settings_in(folder: Path, model: Path, recipe: Path) -> AblationSettings:
    return AblationSettings.model_validate(
        {"model": str(model), "recipe": str(recipe), "out": folder / "out", "cache": folder / "cache",
         "references": 2, "sample": {"steps": 1, "scale": 1.0}, "points": 0, "device": "cpu"}
    )  # fmt: skip


@pytest.mark.parametrize("heads", ["split", "all"])
def test_every_ablation_begins_with_the_main_method_and_changes_one_thing(heads: str) -> None:
    recipe = recipe_of(AblationSettings())
    recipe = recipe.model_copy(update={"heads": recipe.heads.model_copy(update={"heads": heads})})
    made = ablations(recipe)
    assert [ablation.name for ablation in made] == NAMES
    for ablation in made:
        main, *others = ablation.variants
        assert main.is_main(recipe)
        assert not any(variant.is_main(recipe) for variant in others)
        names = [variant.name for variant in ablation.variants]
        assert len(set(names)) == len(names) >= 4
        assert not any(":" in name for name in names)
        whole = flattened(recipe.model_dump(mode="json"))
        kinds = []
        for variant in others:
            now = flattened(variant.settings(recipe).model_dump(mode="json"))
            changed = {name for name in whole if whole[name] != now[name]} - {"heads.heads"}
            kinds.append((frozenset(changed), variant.ranking, variant.strength, variant.spatial))
            assert len(changed) <= 2, variant
        assert len({*kinds}) > 1 or kinds[0][0], "something is changed"
        for claim in ablation.claims:
            assert {claim.better, claim.worse} <= {*names, "main method"}


def test_loras_that_act_in_one_file_learn_the_same_noise_levels() -> None:
    """One of the two could not rest alone, and `merged` refuses them."""
    recipe = recipe_of(AblationSettings())
    assert recipe.temporal.until > 0
    (loras,) = chosen_ablations(("loras",), recipe)
    assert any(variant.spatial for variant in loras.variants)
    assert {v.settings(recipe).temporal.until for v in loras.variants if not v.is_main(recipe)} == {0.0}


def test_what_cannot_be_run_is_one_sentence(settings: AblationSettings, capsys: Any) -> None:
    recipe = recipe_of(settings)
    with pytest.raises(InputError, match=r"no ablation 'headz'.*did you mean heads\?"):
        chosen_ablations(("headz",), recipe)
    with pytest.raises(InputError, match="rank came twice"):
        chosen_ablations(("rank", "rank"), recipe)
    assert [ablation.name for ablation in chosen_ablations(("rank", "heads"), recipe)] == ["rank", "heads"]
    assert main(["bench", "sprites", "ablation", "--only", "rnk", "--out", str(settings.out)]) == 2
    assert "did you mean rank?" in capsys.readouterr().err
    assert not settings.out.exists()


def test_work_is_counted_in_latent_frames() -> None:
    """17 of 81 frames are 5 latent frames; three passes a step; the spatial stage has one latent frame a sample."""
    settings = TrainSettings.model_validate(
        {"frames": 81, "temporal": {"steps": 10, "batch": 2, "stride": 5}, "spatial": {"steps": 7, "batch": 3}}
    )
    assert [latent_frames(81, stride) for stride in (1, 5, 20)] == [21, 5, 2]
    assert work_of(settings, spatial=False) == 3 * 10 * 2 * 5
    assert work_of(settings, spatial=True) == 3 * (10 * 2 * 5 + 7 * 3)


def test_other_heads_are_as_many_or_all_others() -> None:
    temporal = np.array([[True, False, False], [False, False, True]])
    assert np.array_equal(reranked(temporal, "scored", 0), temporal)
    assert np.array_equal(reranked(temporal, "exchanged", 0), ~temporal)
    drawn = [reranked(temporal, "random", seed) for seed in range(20)]
    assert {int(mask.sum()) for mask in drawn} == {2}
    assert len({mask.tobytes() for mask in drawn}) > 5
    assert np.array_equal(drawn[3], reranked(temporal, "random", 3))


def heads_learned(path: Path) -> np.ndarray:
    """Heads of the twin, 12 wide, whose rows of q are not zero."""
    weights = load_lora(path).weights
    rows = np.stack([weights[f"blocks.{block}.attn1.to_q.lora_B.weight"].numpy().any(1) for block in range(2)])
    return np.asarray(rows.reshape(2, 4, 12).any(-1))


@pytest.mark.parametrize(
    ("changes", "same"),
    [({"private": True}, True), ({"recompute_every": 2}, True), ({"seed": 1}, False), ({"memory": "lowest"}, False)],
)
def test_a_lesson_is_found_again_unless_its_numbers_are_others(
    settings: AblationSettings, changes: dict[str, Any], same: bool
) -> None:
    recipe, source = recipe_of(settings), protocol_pairs("sweep")[0].source
    folders = {
        lesson_of(Variant("main"), source, each, "twin", settings.out).folder
        for each in (recipe, recipe.model_copy(update=changes))
    }
    assert (len(folders) == 1) is same


def test_lessons_learn_the_heads_that_they_name_and_more_steps_go_on_from_fewer(settings: AblationSettings) -> None:
    recipe = recipe_of(settings)
    source = protocol_pairs("sweep")[0].source

    def learned(variant: Variant, root: str = "a") -> Path:
        made = lesson_of(variant, source, recipe, "twin", settings.out / root)
        learn(made, silent)
        assert made.is_done
        return made.folder / "temporal.safetensors"

    alone = (("spatial.steps", 0),)
    scored = heads_learned(learned(Variant("t", alone)))
    assert 0 < scored.sum() < 8
    assert np.array_equal(heads_learned(learned(Variant("s", alone, "exchanged"))), ~scored)
    assert heads_learned(learned(Variant("r", alone, "random"))).sum() == scored.sum()

    def four(root: str) -> dict[str, Any]:
        return load_lora(learned(Variant("four", (("temporal.steps", 4),)), root)).weights  # type: ignore[return-value]

    before = learned(Variant("two"), "b").read_bytes()
    grown, straight = four("b"), four("c")
    assert all(np.array_equal(grown[name], straight[name]) for name in straight)
    folder = lesson_of(Variant("four", (("temporal.steps", 4),)), source, recipe, "twin", settings.out / "b").folder
    steps = [json.loads(line)["step"] for line in (folder / "log-temporal.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert learned(Variant("two"), "b").read_bytes() == before


def few_ablations(recipe: TrainSettings) -> tuple[Ablation, ...]:
    """In place of all ablations one, in which a variant fails and another one loads two LoRAs."""
    loras = next(ablation for ablation in ablations(recipe) if ablation.name == "loras")
    broken = Variant("rule code 1e6", (("heads.rule", "code"), ("heads.ratio", 1e6)))
    both = next(variant for variant in loras.variants if variant.name == "both LoRAs")
    return (Ablation("loras", "Both?", (loras.variants[0], broken, both)),)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motionlora.train.ablations.ablations", few_ablations)


@pytest.fixture(scope="module")
def alone(
    twin_of_two: Path, recipe_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[AblationSettings, list[str]]:
    """One process has made the few ablations by these settings, and said this; they lie in its `out`."""
    settings, said = settings_in(tmp_path_factory.mktemp("alone"), twin_of_two, recipe_file), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("motionlora.train.ablations.ablations", few_ablations)
        with pytest.raises(InputError, match=r"^2 of 18 cells failed.*No head is temporal by rule code"):
            ablate(settings, said.append)
    return settings, said


@pytest.mark.usefixtures("few")
def test_a_dry_run_tells_the_work_and_makes_nothing(settings: AblationSettings) -> None:
    said: list[str] = []
    assert ablate(settings.model_copy(update={"dry_run": True}), said.append) == []
    assert not settings.out.exists()
    assert re.search(r"^loras +6 +4 +18 +14 ", said[-1], re.M), said[-1]


@pytest.mark.usefixtures("few")
def test_a_run_learns_once_survives_a_failure_and_goes_on(
    alone: tuple[AblationSettings, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, said = alone
    assert any(re.search(r"^loras, LoRA 1/6, .*: learned; about .* left$", line) for line in said), said
    rows = [json.loads(line) for line in (settings.out / "ablation.jsonl").read_text().splitlines()]
    failed = [row for row in rows if row["status"] == "failed"]
    assert {row["method"] for row in failed} == {"rule code 1e6", "wrong:rule code 1e6"}
    assert all("No head is temporal" in row["sentence"] for row in failed)
    split = few_ablations(recipe_of(settings))[0].variants[0].name
    keys = {row["method"]: row["key"] for row in rows if row["status"] == "done" and row["clip"] == "v"}
    assert {"static", "reference"} <= keys.keys()
    assert len({keys[name] for name in ("none", split, f"wrong:{split}", "both LoRAs", "wrong:both LoRAs")}) == 5
    assert all(row["cost"]["seconds_tuning"] > 0 for row in rows if row["method"] == "both LoRAs")
    text = (settings.out / "ablation.md").read_text()
    assert "one state of the training code" in text
    assert (settings.out / "loras" / "report.html").is_file()
    ElementTree.parse(settings.out / "loras.svg")
    # the same command again makes nothing, but tries what failed
    monkeypatch.setattr(studios, "walked", never)
    tried: list[Any] = []
    trains = lessons.train
    monkeypatch.setattr(lessons, "train", lambda s, say: tried.append(s) or trains(s, say))
    with pytest.raises(InputError, match="2 of 18 cells failed"):
        ablate(settings, silent)
    assert {s.heads.ratio for s in tried} == {1e6}
    assert [json.loads(line) for line in (settings.out / "ablation.jsonl").read_text().splitlines()] == rows


def words_of(settings: AblationSettings) -> list[str]:
    """The command of `settings_in`."""
    words = f"bench sprites ablation --model {settings.model} --recipe {settings.recipe} --cache {settings.cache}"
    words += " --references 2 --sample.steps 1 --sample.scale 1 --sample.shift 3 --points 0 --device cpu"
    return [*words.split(), "--out", str(settings.out)]


def lines_of(out: Path) -> list[dict[str, Any]]:
    """The cells of all ablations, less what a clock told."""
    lines = [json.loads(line) for line in (out / "ablation.jsonl").read_text().splitlines()]
    for line in lines:
        line["cost"] = {name: cost for name, cost in line["cost"].items() if not name.startswith("seconds")}
    return lines


@pytest.mark.usefixtures("few")
def test_processes_learn_each_lora_once_and_write_what_one_writes(
    settings: AblationSettings,
    alone: tuple[AblationSettings, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trains = lessons.train

    def counted(run: TrainSettings, say: Any) -> Any:
        with (tmp_path / f"learned-{os.getpid()}").open("a") as file:
            file.write(f"{run.out}\n")
        return trains(run, say)

    monkeypatch.setattr(lessons, "train", counted)
    said = together(lambda rank: main(words_of(settings)), tmp_path, (2, 0))
    assert lines_of(settings.out) == lines_of(alone[0].out)
    assert len(lines_of(settings.out)) == 18
    learned = [file.read_text().splitlines() for file in tmp_path.glob("learned-*")]
    assert len(learned) == 2, "both had a share"
    assert len({*learned[0], *learned[1]}) == len(learned[0]) + len(learned[1]) == 4
    assert "2 of 18 cells failed" in said[0]
    assert [sum(f"LoRA {place}/6" in text for text in said) for place in range(1, 7)] == [1] * 6
    assert [sum(f"clip {place}/18" in text for text in said) for place in range(1, 19)] == [1] * 18
    assert [text.count("is done: look at") for text in said] == [1, 0]
    assert "in this call of 2 processes at once" in (settings.out / "ablation.md").read_text()


@pytest.mark.usefixtures("few")
def test_a_process_that_dies_ends_the_others_with_a_sentence_and_the_rest_is_learned_later(
    settings: AblationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trains = lessons.train

    def dying(run: TrainSettings, say: Any) -> Any:
        result = trains(run, say)
        if "rank-1" in names:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    names: list[str] = []

    def work(rank: int) -> int:
        names.append(f"rank-{rank}")
        return main(words_of(settings))

    monkeypatch.setattr(lessons, "train", dying)
    said = together(work, tmp_path, (1, -signal.SIGKILL))
    assert "motionlora: Process 0 of 2 had to end: " in said[0]
    assert f"what is done is kept in {settings.out}, and the same command goes on" in said[0]
    assert "Traceback" not in said[0]
    assert not (settings.out / "ablation.jsonl").exists()
    monkeypatch.setattr(lessons, "train", trains)
    said = together(work, tmp_path, (2, 0))
    assert "2 of 18 cells failed" in said[0]
    assert sum(text.count(": was there; ") for text in said) >= 2
    assert len(lines_of(settings.out)) == 18


def test_lessons_that_go_on_from_each_other_are_of_one_process(settings: AblationSettings) -> None:
    """Those of fewer steps first, where the rate does not fall by their number; all others may go to anybody."""
    recipe, pairs = recipe_of(settings).model_copy(update={"schedule": "constant"}), protocol_pairs("sweep")[:2]
    steps, rank = (
        planned(ablation, pairs, recipe, "twin", settings.out)
        for ablation in chosen_ablations(("steps", "rank"), recipe)
    )
    assert sorted(at for unit in steps.neighbours for at in unit) == [*range(len(steps.lessons))]
    counts = [[steps.lessons[at][1].settings.temporal.steps for at in unit] for unit in steps.neighbours]
    assert counts == [sorted(counts[0])] * 2
    assert len(counts[0]) > 2
    assert rank.neighbours == [[at] for at in range(10)]
    falling = recipe.model_copy(update={"schedule": "cosine"})
    (steps,) = (planned(one, pairs, falling, "twin", settings.out) for one in chosen_ablations(("steps",), falling))
    assert all(len(unit) == 1 for unit in steps.neighbours)


@pytest.mark.parametrize("words", ["bench sprites ablation", "train --clips refs"])
def test_deepspeed_is_refused_where_each_process_learns_alone(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert main([*words.split(), "--out", str(tmp_path / "out")]) == 2
    assert "DeepSpeed divides one run, and " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def rows_with(values: dict[str, list[float]], measure: str = "smf") -> list[Row]:
    """A row a clip and method; clips are numbered."""
    return [
        Row(f"clip {at}", "", "c", name, 0, values={measure: value})
        for name, line in values.items()
        for at, value in enumerate(line)
    ]


ABLATION = Ablation("motion", "Does it?", (Variant("with"), Variant("without"), Variant("half")))


def chapter_with(**values: list[float]) -> Chapter:
    known = {"none": [0.0] * 3, "static": [0.0] * 3, "reference": [1.0] * 3}
    return Chapter(ABLATION, rows_with({**known, **values}))


def test_variants_are_compared_with_the_main_method_in_the_same_pairs(tmp_path: Path) -> None:
    chapter = chapter_with(**{"with": [0.5, 0.7, 0.9], "without": [0.1, 0.3, 0.5], "half": [0.5, 0.7, 0.9]})
    found = differences(chapter, "smf")
    assert found["without"].mean == pytest.approx(-0.4)
    assert (found["without"].low, found["without"].high) == pytest.approx((-0.4, -0.4))
    assert found["without"].p == 2 / 2**3
    assert found["without"].p_holm == 4 / 2**3
    assert (found["half"].mean, found["half"].p) == (0.0, 1.0)
    write_chapters([chapter], tmp_path, {"machine": "one"})
    text = (tmp_path / "ablation.md").read_text()
    assert "| without | 3 of 3 | 0.30 | 0.10 .. 0.50 | -0.40 | -0.40 .. -0.40 | 0.5 |" in text
    lines = (tmp_path / "ablation.csv").read_text().splitlines()
    assert any(line.startswith("motion,without,smf,3,3,3,0.3,") and ",-0.4," in line for line in lines)


@pytest.mark.parametrize(
    ("better", "equal", "said"),
    [
        ([0.9, 0.8, 0.9], False, "agrees in direction"),
        ([0.1, 0.0, 0.1], False, "does not agree"),
        ([0.1, 0.9, 0.5], False, "undecided"),
        ([0.1, 0.9, 0.5], True, "agrees, no difference"),
        ([0.9, 0.8, 0.9], True, "does not agree"),
    ],
)
def test_what_the_paper_found_stands_beside_what_is_found_here(better: list[float], equal: bool, said: str) -> None:
    chapter = chapter_with(**{"with": better, "without": [0.5, 0.5, 0.5]})
    assert said in verdict(Claim("with", "without", "much", equal), chapter)
    assert "not both were measured" in verdict(Claim("with", "half", "much"), chapter)


def test_a_plot_shows_what_there_is_and_names_what_there_is_not() -> None:
    marks = [Mark("1 step", 1, 0.1, 0.0, 0.2), Mark("<10>", 10, 0.4, 0.3, 0.5), Mark("100", 100, *[float("nan")] * 3)]
    root = ElementTree.fromstring(plotted(marks, "steps & more", "steps", ("none", -0.25)))
    name = "{http://www.w3.org/2000/svg}"
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter(f"{name}circle")]
    assert len(circles) == 2
    assert circles[1][1] < circles[0][1], "larger is higher"
    texts = [text.text for text in root.iter(f"{name}text")]
    assert {"<10>", "100 (none)", "steps & more", "none", "-0.25"} <= {*texts}
    curve = next(root.iter(f"{name}polyline")).attrib["points"].split()
    assert [tuple(map(float, point.split(","))) for point in curve] == circles
    assert not list(ElementTree.fromstring(plotted(marks, "t", "")).iter(f"{name}polyline"))
    assert plot_of(chapter_with(**{"with": [0.5] * 3})).count("<circle") == 1
