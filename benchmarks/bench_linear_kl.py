"""The CPU ratios of `bars_kl.py` in one round of an eighth of the rows: a look at them, not the
record, which is the script's.

The benchmark's time is that of a whole round; ratios and medians are in extra_info.
"""

import bars_kl
import pytest
from loss_head_cases import DEVICE
from loss_head_measure import environment

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="ratios on a CPU; this run measures a GPU")


def test_time(benchmark):
    run = bars_kl.alternation(bars_kl.TIMED._replace(rows=bars_kl.TIMED.rows // 8))
    benchmark.group = "linear_kl"
    benchmark.pedantic(run.round, rounds=1)
    benchmark.extra_info.update(environment(), **bars_kl.times(run))
