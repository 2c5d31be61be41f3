"""A few kills and a few damaged files; tests/support/stress.py makes as many as one likes."""

from pathlib import Path

import processes
import pytest

SCRIPT = Path(__file__).parent / "support" / "stress.py"


@pytest.mark.slow
@pytest.mark.parametrize(("what", "count"), [("kills", 6), ("damages", 16)])
def test_stress(tmp_path, what, count):
    """In a process of its own, which forks before it has threads."""
    said = processes.run(SCRIPT, what, "--count", count, "--folder", tmp_path, timeout=600)
    assert "0 wrong" in said
