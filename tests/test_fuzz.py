"""Broken inputs end in a result or one sentence: a part of what `bench_fuzz.py` tries."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_fuzz import BAD, INTERESTING, is_sentence, tried
from fuzz_inputs import KINDS, input_of, make_sources


def test_the_fixed_corpus_has_no_bad_ending(tmp_path: Path) -> None:
    script, results = Path(__file__).with_name("bench_fuzz.py"), tmp_path / "fuzz"
    counts = {"media": 12, "lora": 40, "settings": 40}
    words = [word for kind, count in counts.items() for word in (f"--{kind}", str(count))]
    words = [sys.executable, str(script), *words, "--interesting", "--results", str(results)]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    facts = json.loads(results.with_suffix(".json").read_text())
    for kind in KINDS:
        found = facts["counts"]["functions"][kind]
        assert sum(found.values()) == len(set(range(counts[kind])) | set(INTERESTING[kind]))
        assert min(found["result"], found["sentence"]) >= 1, "the inputs show nothing: all end alike"


def test_an_input_follows_from_its_seed(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        folder = tmp_path / name
        make_sources(folder)
        path = input_of("lora", 3, folder)
        made.append((path.name, path.read_bytes()))
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("fault", "ending"),
    [
        ("raise KeyError(1)", "traceback"),
        ("raise InputError('two\\nlines.')", "traceback"),
        ("raise MemoryError", "memory"),
        ("raise InputError('One sentence.')", "sentence"),
        ("(folder / 'work' / 'new').touch()", "escape"),
        ("(folder / 'sources' / 'native.safetensors').unlink()", "escape"),
        ("out.mkdir(); (out / 'new').touch()", "result"),
    ],
)
def test_every_ending_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, ending: str) -> None:
    from bench_fuzz import CALLS

    from motionlora.data.errors import InputError

    def call(given: object, out: Path, seed: int) -> str:
        del given, seed
        exec(fault, {"InputError": InputError, "folder": tmp_path, "out": out})
        return ""

    make_sources(tmp_path)
    (tmp_path / "work").mkdir()
    monkeypatch.setitem(CALLS, "lora", call)
    outcome = tried("lora", 0, tmp_path)
    assert outcome.ending == ending
    assert (ending in BAD) == (ending not in ("result", "sentence"))


def test_what_is_a_sentence() -> None:
    assert is_sentence("a.mp4 is damaged: copy it again.")
    assert not is_sentence("")
    assert not is_sentence("Traceback (most recent call last):\n  File ...\nKeyError: 1")
    assert not is_sentence("word " * 1000 + ".")
    assert not is_sentence("a.mp4: no full stop")
