"""What `pytest benchmarks/` runs on a CPU: sizes by the machine's speed, what is left out, what is
said.
"""

import dataclasses
import re
import time
from itertools import pairwise
from pathlib import Path

import bars
import cpu_look
import cpu_plan
import process_age
import pytest
import torch
from cpu_plan import KINDS, LADDER, Item, Speed, case_of, case_seconds, plan
from loss_head_methods import Method
from loss_head_peers import METHODS

MACHINES = [(150, 25), (150, 400), (8, 1), (2000, 8000), (1, 0.05)]  # GFLOP/s: float32, bfloat16
DTYPES = {"fp32-trainable": torch.float32, "bf16-trainable": torch.bfloat16}


def speed(fp32, bf16):
    """Of so many GFLOP/s; more cores do more logits too."""
    return Speed(fp32 * 1e9, bf16 * 1e9, 16e-9 * min(1.0, 150 / fp32))


OWN = ("dense_log_softmax", "dense_logsumexp", "treg_fused", "treg_logprobs")


@pytest.fixture
def methods(monkeypatch):
    """Those that need no other package, which would take seconds to import."""
    found = {name: METHODS[name] for name in OWN}
    monkeypatch.setattr(cpu_look, "METHODS", found)
    monkeypatch.setattr(cpu_look, "MOST_ROUNDS", 2)
    return found


@pytest.fixture
def session(methods, monkeypatch):
    """Of a machine on which every case is tiny."""
    monkeypatch.setattr(cpu_plan, "LADDER", (cpu_plan.Size(2, 4, 16, 97),))
    monkeypatch.setattr(cpu_look, "LADDER", (cpu_plan.Size(2, 4, 16, 97),))
    return cpu_look.Session(speed(150, 100))


# -- sizes


@pytest.mark.parametrize("rates", MACHINES)
@pytest.mark.parametrize("budget", [150.0, 40.0])
def test_all_that_is_planned_fits_the_budget(rates, budget):
    found = plan(speed(*rates), budget)
    assert found.keys() == {*KINDS, *cpu_plan.PARTS}
    assert sum(x.seconds for x in found.values()) <= budget
    for x in found.values():
        assert (x.size is None) == (x.reason is not None) and x.seconds <= x.share
        assert x.size is not None or "its smallest size would take" in x.reason


def test_imports_that_take_long_count():
    fast, slow = (plan(speed(150, 25), start=start) for start in (4.0, 15.0))
    assert fast["memory"].size == (1,)
    assert slow["memory"].size is None and "its smallest size" in slow["memory"].reason
    session = cpu_look.Session(speed(150, 25), age=15.0)
    assert session.plan == slow


@pytest.mark.parametrize("rates", MACHINES[:4])
def test_the_cases_of_both_dtypes_are_kept(rates):
    found = plan(speed(*rates))
    for name, dtype in DTYPES.items():
        assert found[name].case.dtype == dtype and found[name].seconds > 0


def test_what_does_not_fit_is_named():
    found = plan(speed(1, 0.05))
    assert found["bf16-trainable"].case is None
    assert cpu_look.Session(speed(1, 0.05)).left_out()["bf16-trainable"].startswith("its smallest")


def test_a_machine_with_bfloat16_gets_real_cases_of_it():
    fast, slow = plan(speed(150, 400)), plan(speed(150, 25))
    for name in ("frozen", "forward", "softcap", "half-ignored"):
        assert fast[name].case.dtype == torch.bfloat16 and slow[name].case.dtype == torch.float32
    fp32, bf16 = (fast[name].case.flops_per_product for name in DTYPES)
    assert bf16 >= fp32 > 0
    assert slow["bf16-trainable"].case.flops_per_product < fp32


def test_a_faster_machine_gets_no_less():
    plans = [plan(speed(x, 2 * x)) for x in (8, 30, 150, 600, 2000)]
    for slow, fast in pairwise(plans):
        for name, item in slow.items():
            work = 0 if item.case is None else item.case.flops_per_product
            assert fast[name].case is None or fast[name].case.flops_per_product >= work
    record = bars.TIMED
    assert plans[-1]["fp32-trainable"].size == dataclasses.astuple(record)[1:5]


def test_seconds_of_a_case_by_hand():
    """N 512: 13 calls (12 methods, and the bare products) four times, at 150 GFLOP/s."""
    size = cpu_plan.Size(2, 128, 512, 32000)
    each = 512 * 32000 * (2 * 3.5 * 512 / 150e9 + 1.5 * 16e-9)
    assert case_seconds("fp32-trainable", size, speed(150, 25)) == pytest.approx(13 * 4 * each)


def test_sizes_fall_and_hold_whole_pairs():
    work = [pairs * 2 * length * hidden * vocab for pairs, length, hidden, vocab in LADDER]
    assert all(a > b for a, b in pairwise(work))
    assert all(size.vocab == 32000 for size in LADDER[:-3])
    assert case_of("softcap", LADDER[0], speed(150, 25)).softcap == 30.0
    assert case_of("half-ignored", LADDER[0], speed(150, 25)).ignored == 0.5


def test_the_calibration_is_quick_and_leaves_all_or_one_thread():
    threads = torch.get_num_threads()
    try:
        found = cpu_plan.calibrate(0.02)
        assert found.fp32 > 1e8 and found.bf16 > 1e6 and 1e-11 < found.logit < 1e-5
        assert torch.get_num_threads() in (1, threads)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("both", "alone", "chosen"), [(100, 60, 2), (65, 60, 1), (10, 60, 1)])
def test_threads_that_wait_for_each_other_are_left_out(monkeypatch, both, alone, chosen):
    here = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: here[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: here.__setitem__(0, n))
    monkeypatch.setattr(cpu_plan, "_rate", lambda *_: (both if here[0] == 2 else alone) * 1e9)
    assert cpu_plan.calibrate().fp32 == (both if chosen == 2 else alone) * 1e9
    assert here[0] == chosen


# -- a run


def test_a_case_is_measured_and_shown(session):
    said = []
    found = cpu_look.measure(session.plan["fp32-trainable"], session, said.append)
    names = set(cpu_look.methods_of(found.case))
    assert {"treg_fused", "dense_log_softmax"} <= names
    assert found.seconds.keys() == {*names, bars.FLOOR} and not found.reasons
    assert said[0] == "fp32-trainable: N 16 D 16 V 97 float32"
    assert len(said) == 2 + len(names) and "of dense_log_softmax" in said[-1]
    assert found.errors["treg_fused"]["dhidden"] < 1e-5
    cpu_look.show(found, session)
    [row] = session.rows
    mine, dense = (min(found.seconds[x]) for x in ("treg_fused", cpu_look.DENSE))
    assert row.startswith("T-REG step, float32") and row.endswith("N 16 D 16 V 97, 2 rounds")
    assert f" {mine / dense:.2f} " in row and row in cpu_look.digest(session)


def test_ratios_of_a_row_are_least_over_least(session):
    seconds = {"treg_fused": [9.0, 3.0, 2.0], "dense_log_softmax": [8.0, 4.0, 5.0]}
    session.add("label", "treg_fused", seconds | {"TRL": [20.0]}, "note")
    assert " ".join(session.rows[0].split()) == "label 2000 ms 0.50 0.10 note, 3 rounds"


def test_a_peer_that_raises_is_one_line_and_the_others_run(session, methods):
    def raises(b):
        raise RuntimeError("no such  kernel")

    methods["peer"] = Method(raises, "logprobs")
    said = []
    found = cpu_look.measure(session.plan["fp32-trainable"], session, said.append)
    assert found.reasons == {"peer": "RuntimeError: no such kernel"}
    assert sum("peer" in line for line in said) == 1 and "treg_fused" in found.seconds


def test_a_missing_peer_is_one_line_of_the_header(session, methods):
    methods["peer"] = Method(lambda b: None, "logprobs", "no_such_package")
    lines = [line for line in cpu_look.header(session) if "no_such_package" in line]
    assert len(lines) == 1 and lines[0].startswith("not installed, left out: peer (")
    assert "peer" not in cpu_look.methods_of(session.plan["fp32-trainable"].case)


def test_own_wrong_result_fails(session, methods, monkeypatch):
    def off(b):
        loss, logps = METHODS["treg_fused"].fn(b)
        return loss * 1.001, logps

    methods["treg_wrong"] = Method(off, "loss")
    monkeypatch.setitem(METHODS, "treg_wrong", methods["treg_wrong"])
    found = cpu_look.measure(session.plan["fp32-trainable"], session, lambda line: None)
    assert re.search("d(hidden|weight) has a relative error", found.failed["treg_wrong"])
    assert "treg_wrong" not in found.seconds


def test_a_slow_method_is_called_once_and_not_again(session, methods):
    def slow(b):
        time.sleep(0.5)
        return methods["dense_logsumexp"].fn(b)

    methods["liger_dpo"] = Method(slow, "logprobs")
    found = cpu_look.measure(session.plan["fp32-trainable"], session, lambda line: None)
    assert len(found.seconds["liger_dpo"]) == 1 < len(found.seconds["treg_fused"])
    assert "times as long as dense_log_softmax in fp32-trainable" in session.slow["liger_dpo"]
    again = cpu_look.measure(session.plan["half-ignored"], session, lambda line: None)
    assert again.reasons["liger_dpo"] == session.slow["liger_dpo"]
    assert "liger_dpo" not in again.seconds and "treg_fused" in again.seconds


class Clock:
    """Every call of a step takes so many seconds; others none."""

    def __init__(self):
        self.now, self.step = 0.0, 0.0

    def __call__(self):
        self.now += self.step
        return self.now


def test_a_case_slower_than_expected_gets_smaller(methods, monkeypatch):
    sizes = tuple(cpu_plan.Size(2, n, 16, 97) for n in (16, 8, 4))
    for module in (cpu_plan, cpu_look):
        monkeypatch.setattr(module, "LADDER", sizes)
    clock = Clock()
    session = cpu_look.Session(speed(150, 100), clock)
    item, said = session.plan["frozen"], []
    clock.step = 1.5  # a dense step takes one tick
    found = cpu_look.measure(item, session, said.append)
    assert item.case.length == 16 and found.case.length == 4
    assert sum("slower than expected, smaller" in line for line in said) == 2
    assert {"dense_log_softmax", "treg_fused"} <= found.seconds.keys()
    expected = cpu_plan.call_seconds(found.case, session.speed)
    assert session.pace == pytest.approx(clock.step / expected)


def test_a_case_faster_than_expected_gets_larger(methods, monkeypatch):
    sizes = tuple(cpu_plan.Size(2, n, 16, 97) for n in (64, 32, 16, 8))
    for module in (cpu_plan, cpu_look):
        monkeypatch.setattr(module, "LADDER", sizes)
    clock = Clock()
    session = cpu_look.Session(speed(150, 100), clock)
    item, said = session.plan["frozen"], []
    small = dataclasses.replace(item, case=dataclasses.replace(item.case, length=8))
    # five methods, four calls each: at 0.15 s a dense step 3 s for N 32, 6 for 64, 12 for 128
    clock.step = 0.15
    assert item.share == pytest.approx(10)
    found = cpu_look.measure(small, session, said.append)
    assert found.case.length == 16 and said[1].startswith("  faster than expected, larger: N 64")


def test_nothing_is_begun_that_would_end_late(methods):
    clock = Clock()
    session = cpu_look.Session(speed(150, 100), clock)
    assert session.until("memory") == pytest.approx(session.plan["memory"].share)
    clock.now = cpu_look.LIMIT - 1
    assert session.until("memory") is None
    assert "memory" in session.left_out()
    assert any(line.startswith("left out: memory") for line in cpu_look.digest(session))
    assert cpu_look.Session(speed(150, 100), clock, age=200.0).until("memory") is None
    slow = cpu_look.Session(speed(150, 100), clock)
    assert slow.until("memory") is not None
    slow.pace = 10.0  # calls take ten times as long as expected
    assert slow.until("memory") is None
    item: Item = session.plan["fp32-trainable"]
    found = cpu_look.measure(item, session, lambda line: None)
    assert not found.seconds and set(found.reasons.values()) == {"no time was left"}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not say")
def test_the_time_that_imports_took_counts():
    age = process_age.since_start()
    time.sleep(0.05)
    later = process_age.since_start()
    assert 0.04 < later - age < 60
    assert age > 0.5  # torch was imported
    assert 0.5 < cpu_look.process_age() <= 120.0


# -- the CPU's instructions


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("flags\t\t: fpu avx2 avx512f amx_tile\nflags\t: none\n", ["avx2", "avx512f", "amx_tile"]),
        ("Features\t: fp asimd bf16\n", ["asimd", "bf16"]),
        ("flags\t\t: fpu avx2_not\n", []),
        (None, None),
    ],
)
def test_instructions_are_those_that_the_system_names(tmp_path, text, found):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    got = bars.instructions(path)
    assert got == {"torch": torch.backends.cpu.get_cpu_capability(), "cpu": found}
    assert bars.instructions_text(got).startswith("the CPU has ")
