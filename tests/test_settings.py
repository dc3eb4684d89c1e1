"""Laws of reading settings: file below command line, and every mistake is one sentence with the nearest name."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field

from motionlora.data.errors import nearest
from motionlora.data.settings import InputError, Settings, as_yaml, parse


class Inner(Settings):
    """A group of settings."""

    rank: int = Field(default=32, ge=1)
    """Rank of every layer."""
    keep: tuple[str, ...] = ("q", "k")


class Walk(Settings):
    """A made-up subcommand with every kind of setting that the project uses."""

    model: str = "tiny"
    clip: Path | None = None
    lr: float = Field(default=1e-4, gt=0)
    steps: int = Field(default=10, ge=1)
    rule: str = "code"
    save_memory: bool = False
    inner: Inner = Inner(rank=8)


class Other(Settings):
    """Another subcommand that reads the same file."""

    model: str = "tiny"
    scale: float = 4.0


class Needy(Settings):
    """A setting without a default, and one with."""

    caption: str
    rank: int = 4


def read(tmp_path: Path, text: str = "", *args: str, cls: type[Settings] = Walk) -> Any:
    """The settings that a file of this text and these options give."""
    file = tmp_path / "my.yaml"
    file.write_text(text)
    sections = {"walk": cls, "other": Other}
    return parse(cls, args, prog="motionlora walk", config=str(file), section="walk", sections=sections)


def refusal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, *args: str, cls: type[Settings] = Walk
) -> str:
    """The sentence that the same reading is refused with; nothing else may be said."""
    with pytest.raises(InputError) as refused:
        read(tmp_path, text, *args, cls=cls)
    assert capfd.readouterr() == ("", "")
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert "─" not in sentence
    assert sentence.endswith((".", ")"))
    return sentence


def test_section_lies_over_shared_keys_and_options_over_both(tmp_path: Path) -> None:
    text = "model: a\nlr: 1e-3\nsteps: 5\nwalk:\n  lr: 2e-3\n  inner: {keep: [v]}\nother:\n  scale: 1\n"
    settings = read(tmp_path, text, "--steps", "7")
    assert (settings.model, settings.lr, settings.steps) == ("a", 2e-3, 7)
    assert settings.inner == Inner(rank=8, keep=("v",)), "a group keeps the defaults of its field"


@pytest.mark.parametrize("number", ["2e-4", "2E-4", "2.0e-4", "+2e-4", ".2e-3", "0.0002", "2.e-4"])
def test_every_way_to_write_a_number_is_one(tmp_path: Path, number: str) -> None:
    assert read(tmp_path, f"walk: {{lr: {number}}}").lr == 2e-4
    assert read(tmp_path, "", "--lr", number).lr == 2e-4


def test_a_whole_number_may_have_an_exponent(tmp_path: Path) -> None:
    assert read(tmp_path, "steps: 1e3").steps == 1000


def test_words_that_look_like_numbers_stay_words(tmp_path: Path) -> None:
    assert read(tmp_path, "model: e5\nrule: 1e\n").rule == "1e"


@pytest.mark.parametrize("flag", ["--save-memory", "--save_memory"])
def test_dashes_and_underscores_are_the_same(tmp_path: Path, flag: str) -> None:
    assert read(tmp_path, "", flag).save_memory
    assert not read(tmp_path, "save_memory: true", "--no-save-memory").save_memory
    assert not read(tmp_path, "", flag, "--no-save-memory").save_memory
    assert read(tmp_path, "", "--no-save-memory", flag).save_memory


def test_lists_and_nothing_on_the_command_line(tmp_path: Path) -> None:
    assert read(tmp_path, "", "--inner.keep", "a", "b").inner.keep == ("a", "b")
    assert read(tmp_path, "", "--inner.keep", "a", "--inner.keep=b", "c").inner.keep == ("b", "c"), (
        "the last one counts"
    )
    assert read(tmp_path, "", "--inner.keep").inner == Inner(rank=8, keep=())
    assert read(tmp_path, "clip: x.mp4", "--clip", "None").clip is None


def test_printed_settings_can_be_given_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read(tmp_path, "lr: 3e-5", "--inner.rank", "5", "--clip", "a b.mp4", "--print-config")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    again = read(tmp_path, printed)
    assert again == Walk(lr=3e-5, clip=Path("a b.mp4"), inner=Inner(rank=5))
    assert as_yaml(again, "walk") == printed


def test_settings_without_default_may_come_from_either_side(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert read(tmp_path, "caption: a dog\nrank: 2", cls=Needy) == Needy(caption="a dog", rank=2)
    assert read(tmp_path, "rank: 2", "--caption", "a dog", cls=Needy) == Needy(caption="a dog", rank=2)
    assert "--caption is missing" in refusal(tmp_path, capfd, "rank: 2", cls=Needy)
    assert "my.yaml, line 1: rank is 'x'" in refusal(tmp_path, capfd, "rank: x", cls=Needy)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: a\nstep: 3", ["line 2", "`step`", "did you mean steps?"]),
        ("walk:\n  inner:\n    rnk: 3", ["line 3", "`inner.rnk`", "inner.rank"]),
        ("rank: 3", ["line 1", "`rank`"]),
        ("walk: {rank: 3}", ["line 1", "`walk.rank`"]),
        ("other:\n  scal: 3", ["line 2", "`other.scal`", "scale"]),
        ("scal: 3", ["line 1", "did you mean scale?"]),
        ("wlk: {lr: 1}", ["line 1", "did you mean walk?"]),
        ("lr: fast", ["line 1", "lr is 'fast'", "valid number"]),
        ("\nwalk:\n  lr: -1", ["line 3", "lr is -1", "greater than 0"]),
        ("lr: .inf", ["--lr is inf", "finite"]),
        ("lr: .nan", ["lr is nan"]),
        ("steps: 2.5", ["steps is 2.5", "integer"]),
        ("inner: 3", ["line 1", "inner is 3"]),
        ("inner: {keep: [1, [2]]}", ["inner.keep"]),
        ("walk: 3", ["line 1", "is a section"]),
        ("lr: 1\nlr: 2", ["line 2", "`lr` stands twice", "line 1"]),
        ("lr: [1", ["my.yaml, line", "not YAML"]),
        ("lr: 1\n\tsteps: 2", ["line 2", "not YAML"]),
        ("lr: @x", ["line 1", "not YAML"]),
        ("- 1", ["holds a list"]),
        ("just words", ["holds a str"]),
        ("a: !!python/object:os.system x", ["line 1", "not YAML"]),
        ("\x00", ["not YAML"]),
    ],
)
def test_a_wrong_file_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, parts: list[str]
) -> None:
    sentence = refusal(tmp_path, capfd, text)
    assert [part for part in parts if part not in sentence] == [], sentence


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--rank", "3"], ["--rank", "did you mean --inner.rank?"]),
        (["--iner.rank=3"], ["did you mean --inner.rank?"]),
        (["--stps", "3"], ["did you mean --steps?"]),
        (["--lr", "fast"], ["--lr is 'fast'", "valid number"]),
        (["--lr", "-1"], ["--lr is '-1'", "greater than 0"]),
        (["--inner.rank", "0"], ["--inner.rank is '0'", "greater than or equal to 1"]),
        (["--lr"], ["--lr needs a value"]),
        (["--lr", "1", "2"], ["--lr is ['1', '2']"]),
        (["--save-memory", "yes"], ["takes no value", "--no-save-memory"]),
        (["word"], ["unexpected word 'word'"]),
        (["--lr", "1", "--", "x"], ["unknown option --"]),
        (["--no-lr"], ["unknown option --no-lr"]),
        (["--lr", "inf"], ["finite"]),
        (["--config"], ["--config needs a value"]),
        (["--config", "tinny"], ["tinny does not exist", "did you mean tiny?"]),
        (["--config", "."], ["is a folder"]),
    ],
)
def test_a_wrong_option_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], args: list[str], parts: list[str]
) -> None:
    sentence = refusal(tmp_path, capfd, "", *args)
    assert [part for part in parts if part not in sentence] == [], sentence


def test_a_file_that_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as text"):
        parse(Walk, [], prog="x", config=str(file))


def test_settings_are_frozen_and_know_their_keys() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Walk().lr = 1.0
    with pytest.raises(ValueError, match="Extra inputs"):
        Walk(lrr=1.0)  # pyright: ignore


def test_help_is_tyros_and_tells_where_defaults_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read(tmp_path, "steps: 77", "--help")
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "77" in said
    assert "my.yaml" in said
    assert "Rank of every layer." in said


@pytest.mark.parametrize(
    ("word", "names", "expected"),
    [
        ("rank", ["model", "lora.rank"], "lora.rank"),
        ("--tempral.lr", ["--spatial.lr", "--temporal.lr"], "--temporal.lr"),
        ("generat", ["train", "generate"], "generate"),
        ("qqqqqq", ["a"], ""),
        ("--boxes", ["--model", "--out"], ""),
        ("x", [], ""),
    ],
)
def test_nearest_prefers_the_same_last_part(word: str, names: list[str], expected: str) -> None:
    assert nearest(word, names) == expected


def test_numbers_survive_the_printed_file() -> None:
    for value in (1e-12, 3e22, 0.1 + 0.2):
        assert math.isclose(yaml.safe_load(as_yaml(Walk(lr=value)))["lr"], value, rel_tol=0, abs_tol=0)


def test_importing_the_loader_imports_nothing_heavy() -> None:
    code = "import sys, motionlora.data.settings; print([m for m in ('torch', 'numpy', 'tyro') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"


BOMB = "\n".join(["l0: &l0 [x]", *(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12))])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "more than 100,000 values by its aliases"),
        ("&a {model: *a}", "more than 100,000 values by its aliases"),
        (f"model: {'[' * 3000}", "nested too deeply"),
        ("# " + "x" * 100_000, "more than 100,000 characters"),
        ("steps: !!int x", "line 1: 'x' cannot be read as its tag says"),
        ("model: !!timestamp x", "line 1: 'x' cannot be read as its tag says"),
        (f"steps: {'9' * 30}", "--steps is a number of 25 hex digits: use one below 2^63"),
        ('model: "\\ud800"', "--model is '\\ud800': it should hold no NUL and UTF-8 text only"),
        ('inner: {keep: ["a\\0b"]}', "--inner.keep is 'a\\x00b': it should hold no NUL"),
    ],
)  # fmt: skip
def test_a_file_that_yaml_or_python_would_choke_on_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    assert words in refusal(tmp_path, capfd, text)


def test_aliases_that_stay_small_are_read(tmp_path: Path) -> None:
    settings = read(tmp_path, "inner: {keep: &kept [v, q]}\nwalk:\n  inner: {keep: *kept}")
    assert settings.inner.keep == ("v", "q")
