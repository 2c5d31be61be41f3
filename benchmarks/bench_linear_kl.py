"""The CPU ratios of `bars_kl.py` in one round, with as many rows as there is time for: a look at
them, not the record, which is the script's.

The benchmark's time is that of a whole round; ratios and medians are in extra_info.
"""

import bars_kl
import cpu_look
import pytest
from loss_head_cases import DEVICE
from loss_head_measure import environment

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="ratios on a CPU; this run measures a GPU")


def test_time(benchmark, capsys):
    session = cpu_look.session()
    sizes = bars_kl.Sizes(*cpu_look.size_or_skip(session, "linear_kl"))
    shape = f"N {sizes.rows} D {sizes.hidden} V {sizes.vocab}"
    with capsys.disabled():
        print(f"\nlinear_kl: {shape}", flush=True)
    run = bars_kl.alternation(sizes)
    benchmark.group = "linear_kl"
    benchmark.pedantic(run.round, rounds=1)
    benchmark.extra_info.update(environment(), **bars_kl.times(run))
    session.add("KL divergence of two heads, float32", bars_kl.OURS, run.seconds, shape)
