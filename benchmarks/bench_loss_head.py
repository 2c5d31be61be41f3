"""Every method on every case in pytest-benchmark's tables: what `loss_head_cell.measure_cell`
measured, played back.

All methods of a case take turns in one process; the first test of a case measures all of them.
Errors, peak memory and cool times are in extra_info. A method of this project that raises or whose
results are off fails; a peer that does not import, raises or runs out of memory is skipped with the
reason. On a GPU choose cells with -k, or have `gpu_run.py` measure them in slices, each method
where it cannot bring down the others. Compare rows of one group only; CPU ratios that are to be
quoted come from `bars.py`.
"""

import functools
import itertools

import pytest
from loss_head_cases import CASES
from loss_head_cell import measure_cell, summary
from loss_head_measure import environment
from loss_head_peers import METHODS

ROWS = [
    (case, name) for case in CASES for name, method in METHODS.items() if method.applies_to(case)
]


class Playback:
    """A clock on which the calls of a benchmark take the seconds that were measured."""

    def load(self, seconds: list[float]) -> None:
        self._times = itertools.chain.from_iterable((0.0, x) for x in seconds)

    def __call__(self) -> float:
        return next(self._times)


playback = Playback()


@functools.lru_cache(maxsize=1)
def measured(case):
    print(f"\n{case.name}:", end="", flush=True)
    return measure_cell(case, {}, lambda name: print(f" {name}", end="", flush=True))


@pytest.mark.benchmark(timer=playback)
@pytest.mark.parametrize(("case", "name"), ROWS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_step(benchmark, case, name, capsys):
    with capsys.disabled():  # the first test of a case takes the time of all
        cell = measured(case)
    found = cell["methods"][name]
    assert "failed" not in found, found["failed"]
    if "reason" in found:
        pytest.skip(f"{name}: {found['reason']}")
    benchmark.group = case.name
    benchmark.extra_info.update(
        environment(),
        errors=found["errors"],
        peak_extra_bytes=found["extra_bytes"],
        cool=summary(found["cool"]) if "cool" in found else None,
        flops_per_product=case.flops_per_product,
        rows=case.rows,
        hidden=case.hidden,
        vocab=case.vocab,
        dtype=str(case.dtype),
        softcap=case.softcap,
    )
    playback.load(found["hot"])
    benchmark.pedantic(lambda: None, rounds=len(found["hot"]))
