"""The crash test in short; the long run's figures stand in docs/reliability.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--kills", "3", "--steps", "4"], {"kills": 3}),
        (["--kills", "1", "--steps", "4", "--ranks", "2"], {"kills": 1}),
        pytest.param(["--kills", "4", "--steps", "2", "--merge"], {"kills": 4}, marks=pytest.mark.slow),
        (["--damage", "--steps", "2"], {"damages": 60, "files": 10}),
    ],
    ids=["runs", "ranks", "merges", "damages"],
)
def test_nothing_is_lost(options, expected):
    """Failure modes 34 and 35."""
    command = [sys.executable, "scripts/crash_test.py", "--minutes", "3", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout)
    assert figures["faults"] == []
    assert all(figures[name] >= number for name, number in expected.items()), figures
