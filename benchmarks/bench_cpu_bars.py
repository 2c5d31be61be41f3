"""The CPU ratios of `bars.py` in few rounds: a look at them, not the record. The script takes seven.

The benchmark's time is that of a whole round; ratios, medians and peaks are in extra_info. The check against float64
runs on a quarter of the rows.
"""

from dataclasses import replace

import bars
import pytest
from loss_head_cases import DEVICE
from loss_head_measure import environment

ROUNDS = 1
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="ratios on a CPU; this run measures a GPU")


@pytest.mark.parametrize("dtype", bars.DTYPES)
def test_time(benchmark, dtype):
    run = bars.alternation(dtype, check=replace(bars.TIMED, length=bars.TIMED.length // 4))
    benchmark.group = "bars"
    benchmark.pedantic(run.round, rounds=ROUNDS)
    benchmark.extra_info.update(environment(), **bars.times(run))


def test_memory(benchmark):
    benchmark.group = "bars"
    held = benchmark.pedantic(bars.peaks, rounds=1)
    benchmark.extra_info.update(environment(), peak_extra_bytes=held)
