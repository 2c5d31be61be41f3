"""Peak memory of `bars.py` on a CPU, with as many rows as there is time for: a look at it, not the
record, which is the script's.

The benchmark's time is that of a cold process each; peaks are in extra_info.
"""

import bars
import cpu_look
import pytest
from loss_head_cases import DEVICE
from loss_head_measure import environment

HELD = ("dense_log_softmax", "treg_fused")
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="memory of a CPU; this run measures a GPU")


def test_memory(benchmark, capsys):
    session = cpu_look.session()
    [over] = cpu_look.size_or_skip(session, "memory")
    case = bars.held_case(HELD[0], over)
    with capsys.disabled():
        print(f"\nmemory: {cpu_look.shape_of(case)}, each in a cold process", flush=True)
    benchmark.group = "memory"
    held = benchmark.pedantic(bars.peaks, args=(HELD, over), rounds=1)
    benchmark.extra_info.update(environment(), rows=case.rows, peak_extra_bytes=held)
    if None not in held.values():
        dense, ours = (f"{held[name] / 2**20:.0f} MiB" for name in HELD)
        session.notes.append(f"extra memory, {cpu_look.shape_of(case)}: treg {ours}, dense {dense}")
