"""What a test finds around it: the environment of other processes, the real data."""

import os
from pathlib import Path

import pytest


def environment() -> dict[str, str]:
    """Of a process that imports this checkout and the modules beside the tests; one thread."""
    support = Path(__file__).resolve().parent
    root = support.parents[1]
    paths = [root, root / "kernels", support, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}


def shared_data(*parts: str) -> Path:
    """A path below the real data: $TREG_TEST_DATA, or shared/data beside the repository. Skips
    where there is none.
    """
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(os.environ.get("TREG_TEST_DATA") or default, *parts)
    if not path.exists():
        pytest.skip("real data not present")
    return path
