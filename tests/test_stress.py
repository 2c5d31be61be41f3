"""A few kills and a few damaged files; tests/support/stress.py makes as many as one likes."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import environment

SCRIPT = Path(__file__).parent / "support" / "stress.py"


@pytest.mark.slow
@pytest.mark.parametrize(("what", "count"), [("kills", 6), ("damages", 16)])
def test_stress(tmp_path, what, count):
    """In a process of its own, which forks before it has threads."""
    command = [sys.executable, SCRIPT, what, "--count", str(count), "--folder", tmp_path]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "0 wrong" in done.stdout
