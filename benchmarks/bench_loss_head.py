"""Every method on every case in pytest-benchmark's tables, measured in turns, played back.

The first test of a case measures all of its methods. On a CPU cases and sizes are those of
`cpu_plan`, and a line is written for each method as it runs (`cpu_look`); on a GPU the whole matrix
(`loss_head_cell.measure_cell`): choose cells with -k, or have `gpu_run.py` measure them in slices.
Errors and peak memory are in extra_info. A method of this project that raises or whose results are
off fails; a peer that does not import, raises or runs out of memory is named with the reason.
Compare rows of one group only; CPU ratios that are to be quoted come from `bars.py`.
"""

import functools
import itertools

import cpu_look
import pytest
from loss_head_cases import DEVICE, Case, gpu_cases
from loss_head_cell import measure_cell, summary
from loss_head_measure import environment
from loss_head_peers import METHODS


class Playback:
    """A clock on which the calls of a benchmark take the seconds that were measured."""

    def load(self, seconds: list[float]) -> None:
        self._times = itertools.chain.from_iterable((0.0, x) for x in seconds)

    def __call__(self) -> float:
        return next(self._times)


playback = Playback()


def rows() -> list[tuple[Case, str]]:
    """Cases and the methods that apply."""
    if DEVICE == "cpu":
        cases = cpu_look.cases(cpu_look.session())
        return [(case, name) for case in cases for name in cpu_look.methods_of(case)]
    return [(case, name) for case in gpu_cases() for name in METHODS if applies(name, case)]


def applies(name: str, case: Case) -> bool:
    return METHODS[name].applies_to(case)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "name"} <= set(metafunc.fixturenames):
        found = rows()
        names = [f"{case.name}-{name}" for case, name in found]
        metafunc.parametrize(("case", "name"), found, ids=names)


@functools.lru_cache(maxsize=1)
def on_gpu(case: Case) -> dict:
    print(f"\n{case.name}:", end="", flush=True)
    return measure_cell(case, {}, lambda name: print(f" {name}", end="", flush=True))


@functools.cache
def on_cpu(name: str) -> cpu_look.Found:
    session = cpu_look.session()
    print()
    found = cpu_look.measure(name, session)
    cpu_look.show(found, session)
    return found


def times(case: Case, name: str) -> tuple[Case, dict]:
    """The case as it was run, and of the method "hot", its seconds, or why there are none."""
    if DEVICE != "cpu":
        return case, on_gpu(case)["methods"][name]
    found = on_cpu(case.name)
    if name in found.failed:
        return found.case, {"failed": found.failed[name]}
    if name not in found.seconds:
        return found.case, {"reason": found.reasons[name]}
    kept = {"hot": found.seconds[name], "errors": found.errors.get(name, {})}
    return found.case, kept | {"extra_bytes": found.extra_bytes[name]}


@pytest.mark.benchmark(timer=playback)
def test_step(benchmark, case, name, capsys):
    with capsys.disabled():  # the first test of a case takes the time of all
        case, found = times(case, name)
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
