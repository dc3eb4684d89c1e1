"""A killed run ends bit-identical: three SIGKILLs by the harness that is run by hand for a hundred."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_run_killed_three_times_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    script = Path(__file__).with_name("bench_kill.py")
    words = [sys.executable, str(script), "--kills", "3", "--results", str(tmp_path / "kill_resume")]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    facts = json.loads((tmp_path / "kill_resume.json").read_text())
    assert facts["kills"] == 3
    assert facts["runs_equal"] == facts["runs"] >= 1
