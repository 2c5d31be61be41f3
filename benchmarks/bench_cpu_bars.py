"""The CPU ratios of `bars.py` in one round: a look at them, not the record, which is the script's.

The benchmark's time is that of a whole round; ratios, medians and peaks are in extra_info. An
eighth of the rows, and memory stops at twice N.
"""

from dataclasses import replace

import bars
import pytest
from loss_head_cases import DEVICE, SLOW_BF16
from loss_head_measure import environment

ROUNDS = 1
HELD = ("dense_log_softmax", "treg_fused", "treg_fused, 2 N")
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="ratios on a CPU; this run measures a GPU")


@pytest.mark.parametrize("dtype", bars.DTYPES)
def test_time(benchmark, dtype):
    if dtype == "bf16" and SLOW_BF16:
        pytest.skip("this CPU has no instructions for bfloat16: minutes; bars.py measures it")
    run = bars.alternation(dtype, replace(bars.TIMED, length=bars.TIMED.length // 8))
    benchmark.group = "bars"
    benchmark.pedantic(run.round, rounds=ROUNDS)
    benchmark.extra_info.update(environment(), **bars.times(run))


def test_memory(benchmark):
    benchmark.group = "bars"
    held = benchmark.pedantic(bars.peaks, args=(HELD,), rounds=1)
    benchmark.extra_info.update(environment(), peak_extra_bytes=held)
