"""Every method on every case: time in the benchmark's statistics, errors and peak memory in its extra_info.

A method of this project whose results are off fails before it is timed. A peer's errors are recorded; a peer that does
not import, raises or runs out of memory is skipped with the reason. Calls follow each other without a pause, so a GPU
is hot. Compare rows of one group only; CPU ratios that are to be quoted come from `bars.py`, which alternates.
"""

import pytest
import torch
from loss_head_cases import CASES, DEVICE, batch_of
from loss_head_measure import checked_errors, environment, peak_bytes
from loss_head_peers import METHODS, step

ROUNDS, WARMUP = (20, 5) if DEVICE == "cuda" else (2, 0)  # the check and the memory run warm a CPU up
ROWS = [(case, name) for case in CASES for name, method in METHODS.items() if method.applies_to(case)]


@pytest.mark.parametrize(("case", "name"), ROWS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_step(benchmark, case, name):
    method = METHODS[name]
    if (reason := method.missing()) is not None:
        pytest.skip(f"{name}: {reason}")

    def run():
        step(method, batch_of(case))
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    try:
        errors = checked_errors(name, case)
        peak = peak_bytes(run)
    except Exception as e:
        if name.startswith("treg"):
            raise
        pytest.skip(f"{name}: {type(e).__name__}: {e}")
    benchmark.group = case.name
    benchmark.extra_info.update(
        environment(), relative_errors=errors, peak_extra_bytes=peak, flops_per_product=case.flops_per_product,
        rows=case.rows, hidden=case.hidden, vocab=case.vocab, dtype=str(case.dtype), softcap=case.softcap,
    )  # fmt: skip
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=WARMUP)
