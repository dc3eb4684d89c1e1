"""Killed runs end bit-identical: seven SIGKILLs by the harness that is run by hand for more than a hundred."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    script = Path(__file__).with_name("bench_kill.py")
    words = [sys.executable, str(script), "--kills", "5", "--results", str(tmp_path / "kill_resume")]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    facts = json.loads((tmp_path / "kill_resume.json").read_text())
    assert {name: kind["kills"] for name, kind in facts["kinds"].items()} == {
        "training": 3,
        "caching": 2,
        "comparing": 2,
    }
    assert facts["runs_equal"] == facts["runs"] >= 1
