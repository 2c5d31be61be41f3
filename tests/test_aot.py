"""What the compiler makes of every kernel, without a device: legality, registers, tensor cores; see aot_worker.py."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot
ARCHS = ["sm80", "sm90", "sm100", "sm120", "gfx942"]
GEMMS = ("_tile_kernel", "_gradient_kernel")


@functools.cache
def rows(arch: str) -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    worker = Path(__file__).with_name("aot_worker.py")
    done = subprocess.run([sys.executable, str(worker), arch], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def label(row: dict) -> str:
    block = "x".join(str(row[k]) for k in ("BLOCK_N", "BLOCK_V", "BLOCK_D") if k in row)
    return f"{row['kernel']} {block} ({row['case']})"


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles_and_fits(arch):
    cases = {(r["case"], r["kernel"]) for r in rows(arch)}
    for case in ("forward", "stash", "gradient"):
        assert any(c.startswith(f"{case}, ") and k in GEMMS for c, k in cases), case
    too_large = [label(r) for r in rows(arch) if not r["fits"]]
    assert not too_large, f"more shared memory than {arch} has: {too_large}"


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills_but_the_widest_tile(arch):
    """The 256-wide tile may spill a few bytes in its epilogue, outside the loop; the tuner decides by time."""
    spills = {label(r): r["spill_bytes"] for r in rows(arch) if r["spill_bytes"] and not r["wide"]}
    assert not spills, spills
    assert all(r["spill_bytes"] <= 1024 for r in rows(arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_16_bit_products_run_on_tensor_cores(arch):
    products = [r for r in rows(arch) if r["kernel"] in GEMMS and "float32" not in r["case"]]
    assert {r["kernel"] for r in products} == set(GEMMS)
    without = [label(r) for r in products if r["matrix_ops"] == 0]
    assert not without, f"no tensor-core instruction on {arch}: {without}"


@pytest.mark.parametrize("arch", ARCHS)
def test_no_atomics(arch):
    """Atomics would make the same inputs give different bits."""
    assert not [label(r) for r in rows(arch) if r["atomics"]]


def test_wide_tiles_only_where_tensor_cores_read_shared_memory():
    assert any(r["wide"] for r in rows("sm90")) and any(r["wide"] for r in rows("sm100"))
    assert not any(r["wide"] for r in rows("sm80") + rows("sm120") + rows("gfx942"))
