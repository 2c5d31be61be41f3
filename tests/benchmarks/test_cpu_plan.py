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
from cpu_plan import KINDS, LADDER, LIMIT, SWING, WEIGHTS, Speed, case_of, case_seconds
from loss_head_methods import Method
from loss_head_peers import METHODS

MACHINES = [(150, 25), (150, 400), (8, 1), (2000, 8000), (1, 0.05)]  # GFLOP/s: float32, bfloat16
DTYPES = {"fp32-trainable": torch.float32, "bf16-trainable": torch.bfloat16}


def speed(fp32, bf16):
    """Of so many GFLOP/s; more cores do more logits too."""
    return Speed(fp32 * 1e9, bf16 * 1e9, 16e-9 * min(1.0, 150 / fp32))


class Clock:
    """Every call of a step takes so many seconds; others none."""

    def __init__(self):
        self.now, self.step = 0.0, 0.0

    def __call__(self):
        self.now += self.step
        return self.now


def session_of(at, clock=time.monotonic, age=4.0):
    """A run on a machine that stays as fast as it was."""
    return cpu_look.Session(at, lambda: at.fp32, clock, age)


def run(at, age=4.0, swing=1.0, fill=False):
    """A run in which an item takes `swing` times what is expected; cases at least their share where
    they are to `fill` it. The session, and the seconds of the process when it was over.
    """
    clock = Clock()
    session = session_of(at, clock, age)
    for name in session.order:
        item = session.begin(name)
        least = item.share if fill and item.case else 0.0
        clock.now += max(swing * item.seconds, least if item.size is not None else 0.0)
    return session, age + clock.now


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
    return session_of(speed(150, 100))


# -- sizes


@pytest.mark.parametrize("rates", MACHINES)
@pytest.mark.parametrize("age", [4.0, 15.0, 50.0])
@pytest.mark.parametrize("fill", [False, True])
def test_a_run_ends_in_time_on_a_machine_that_slows_down(rates, age, fill):
    session, seconds = run(speed(*rates), age, SWING, fill)
    assert session.items.keys() == {*KINDS, *cpu_plan.PARTS}
    assert 10 < seconds <= LIMIT
    for x in session.items.values():
        assert (x.size is None) == (x.reason is not None) and x.seconds <= x.share
        assert x.size is not None or "its smallest size takes" in x.reason


def test_what_is_too_long_for_its_share_gets_what_others_leave():
    """Where an import of torch takes 15 s, four parts are longer than their shares: memory takes
    two of them, TRL one and a half, annotation and a training step one each.
    """
    long = ["memory", "trl", "annotate", "end_to_end"]
    early, _ = run(speed(150, 25), age=15.0, swing=0.8)
    assert early.order == [*(x for x in WEIGHTS if x not in long), *long]
    assert early.waiting == long
    assert not early.left_out() and early.items["memory"].seconds > 30.0
    filled, seconds = run(speed(150, 25), age=15.0, fill=True)
    assert filled.left_out().keys() == {"trl", "end_to_end"} and seconds > 140.0
    why = filled.left_out()["trl"]
    assert any(line == f"left out: trl: {why}" for line in cpu_look.digest(filled))
    quick, _ = run(speed(150, 25), age=4.0)
    assert quick.order == list(WEIGHTS) and not quick.waiting


def test_a_share_is_of_the_time_left_and_of_what_is_to_come():
    clock = Clock()
    session = session_of(speed(150, 25), clock)
    left = LIMIT - 4.0
    assert session.begin("fp32-trainable").share == pytest.approx(left * 28 / 160)
    clock.now = left / 2
    assert session.begin("bf16-trainable").share == pytest.approx(left / 2 * 24 / (160 - 28))
    clock.now = 0.0
    assert session.begin("bf16-trainable").share == pytest.approx(left / 2 * 24 / (160 - 28))
    alone = session_of(speed(150, 25), clock)
    alone.run_only(iter(["trl", "frozen"]))
    assert alone.order == ["frozen", "trl"]
    assert alone.begin("frozen").share == pytest.approx(left / 3)
    assert alone.begin("trl").share == pytest.approx(left)


def test_sizes_are_those_of_the_machine_when_their_turn_comes():
    rates = [150e9]
    session = cpu_look.Session(speed(150, 400), lambda: rates[0], Clock(), 4.0)
    fast, slow = session_of(speed(150, 400), Clock()), speed(150, 400).at(50e9)
    assert slow == pytest.approx((50e9, 400e9 / 3, 48e-9))
    rates[0] = 50e9
    got, other = session.begin("frozen"), fast.begin("frozen")
    assert LADDER.index(got.size) > LADDER.index(other.size)
    assert got.seconds == pytest.approx(case_seconds(got.case, slow))
    assert cpu_look.digest(session)[-2].endswith(" in float32 ran at 50 to 150 GFLOP/s.")
    rates[0] = 150e9
    assert session.begin("linear_kl").seconds == fast.begin("linear_kl").seconds


@pytest.mark.parametrize("rates", MACHINES[:4])
def test_the_cases_of_both_dtypes_are_kept(rates):
    session, _ = run(speed(*rates), fill=True)
    for name, dtype in DTYPES.items():
        assert session.items[name].case.dtype == dtype and session.items[name].seconds > 0


def test_what_does_not_fit_is_named():
    session, _ = run(speed(1, 0.05), fill=True)
    assert session.items["bf16-trainable"].case is None
    assert session.left_out()["bf16-trainable"].startswith("its smallest size takes ")


def test_a_machine_with_bfloat16_gets_real_cases_of_it():
    fast, slow = (run(speed(150, x), fill=True)[0].items for x in (400, 25))
    for name in ("frozen", "forward", "softcap", "half-ignored"):
        assert fast[name].case.dtype == torch.bfloat16 and slow[name].case.dtype == torch.float32
    fp32, bf16 = (fast[name].case.flops_per_product for name in DTYPES)
    assert bf16 >= fp32 > 0
    assert slow["bf16-trainable"].case.flops_per_product < fp32


def test_a_faster_machine_gets_no_less():
    runs = [run(speed(x, 2 * x), fill=True)[0].items for x in (8, 30, 150, 600, 2000)]
    for slow, fast in pairwise(runs):
        for name in KINDS:
            works = [x[name].case.flops_per_product if x[name].case else 0 for x in (slow, fast)]
            assert works[0] <= works[1]
    record = bars.TIMED
    assert runs[-1]["fp32-trainable"].size == dataclasses.astuple(record)[1:5]


def test_seconds_of_a_case_by_hand():
    """N 512: 13 calls (12 methods, and the bare products) four times, at 150 GFLOP/s."""
    size = cpu_plan.Size(2, 128, 512, 32000)
    each = 512 * 32000 * (2 * 3.5 * 512 / 150e9 + 1.5 * 16e-9)
    case = case_of("fp32-trainable", size, torch.float32)
    assert case_seconds(case, speed(150, 25)) == pytest.approx(13 * 4 * each)


def test_sizes_fall_and_hold_whole_pairs():
    work = [pairs * 2 * length * hidden * vocab for pairs, length, hidden, vocab in LADDER]
    assert all(a > b for a, b in pairwise(work))
    assert all(size.vocab == 32000 for size in LADDER[:-3])
    assert case_of("softcap", LADDER[0], torch.float32).softcap == 30.0
    assert case_of("half-ignored", LADDER[0], torch.float32).ignored == 0.5


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
    both = 100  # the others' work has ended, for now
    assert cpu_plan.choose_threads() == (100 if chosen == 2 else alone) * 1e9
    assert here[0] == chosen


# -- a run


def test_a_case_is_measured_and_shown(session):
    said = []
    found = cpu_look.measure("fp32-trainable", session, said.append)
    names = set(cpu_look.methods_of(found.case))
    assert {"treg_fused", "dense_log_softmax"} <= names
    assert found.seconds.keys() == {*names, bars.FLOOR} and not found.reasons
    assert said[0] == "fp32-trainable: N 16 D 16 V 97 float32"
    assert len(said) == 2 + len(names) and "of dense_log_softmax" in said[-1]
    assert found.errors["treg_fused"]["dhidden"] < 1e-5
    cpu_look.show(found, session)
    [row] = session.rows
    mine, dense = (min(found.seconds[x]) for x in ("treg_fused", cpu_look.DENSE))
    assert row.startswith("T-REG step, float32")
    assert row.endswith(f"N 16 D 16 V 97, 2 rounds, {cpu_look.threads()}")
    assert f" {mine / dense:.2f} " in row and row in cpu_look.digest(session)


def test_ratios_of_a_row_are_least_over_least(session):
    here = cpu_look.threads()
    seconds = {"treg_fused": [9.0, 3.0, 2.0], "dense_log_softmax": [8.0, 4.0, 5.0]}
    session.add("label", "treg_fused", seconds | {"TRL": [20.0]}, "note")
    assert " ".join(session.rows[0].split()) == f"label 2000 ms 0.50 0.10 note, 3 rounds, {here}"


def test_a_peer_that_raises_is_one_line_and_the_others_run(session, methods):
    def raises(b):
        raise RuntimeError("no such  kernel")

    methods["peer"] = Method(raises, "logprobs")
    said = []
    found = cpu_look.measure("fp32-trainable", session, said.append)
    assert found.reasons == {"peer": "RuntimeError: no such kernel"}
    assert sum("peer" in line for line in said) == 1 and "treg_fused" in found.seconds


def test_a_missing_peer_is_one_line_of_the_header(session, methods):
    methods["peer"] = Method(lambda b: None, "logprobs", "no_such_package")
    lines = [line for line in cpu_look.header(session) if "no_such_package" in line]
    assert len(lines) == 1 and lines[0].startswith("not installed, left out: peer (")
    assert "peer" not in cpu_look.methods_of(cpu_look.cases(session)[0])


def test_own_wrong_result_fails(session, methods, monkeypatch):
    def off(b):
        loss, logps = METHODS["treg_fused"].fn(b)
        return loss * 1.001, logps

    methods["treg_wrong"] = Method(off, "loss")
    monkeypatch.setitem(METHODS, "treg_wrong", methods["treg_wrong"])
    found = cpu_look.measure("fp32-trainable", session, lambda line: None)
    assert re.search("d(hidden|weight) has a relative error", found.failed["treg_wrong"])
    assert "treg_wrong" not in found.seconds


def test_a_slow_method_is_called_once_and_not_again(session, methods):
    def slow(b):
        time.sleep(0.5)
        return methods["dense_logsumexp"].fn(b)

    methods["liger_dpo"] = Method(slow, "logprobs")
    found = cpu_look.measure("fp32-trainable", session, lambda line: None)
    assert len(found.seconds["liger_dpo"]) == 1 < len(found.seconds["treg_fused"])
    assert "times as long as dense_log_softmax in fp32-trainable" in session.slow["liger_dpo"]
    again = cpu_look.measure("half-ignored", session, lambda line: None)
    assert again.reasons["liger_dpo"] == session.slow["liger_dpo"]
    assert "liger_dpo" not in again.seconds and "treg_fused" in again.seconds


@pytest.mark.parametrize(
    ("step", "length", "how"),
    [
        # a share of 20 s; N 64 takes 20 steps, half and twice as many rows half and twice as long
        (0.1, 64, "faster than expected, larger"),
        (0.3, 32, "faster than expected, larger"),
        (0.6, 16, None),  # N 128 would take 24 s
        (0.4, 16, None),  # N 128 would take 16 s: no room for other work on the machine
        (1.9, 16, None),  # two of four calls still fit
        (2.2, 4, "slower than expected, smaller"),  # N 32 would take 22 s
        (90.0, 4, "slower than expected, smaller"),
    ],
)
def test_a_case_gets_another_size_where_a_step_says_so(monkeypatch, step, length, how):
    sizes = tuple(cpu_plan.Size(2, n, 16, 97) for n in (64, 32, 16, 8, 4))
    monkeypatch.setattr(cpu_look, "LADDER", sizes)
    monkeypatch.setattr(cpu_look, "_call_of", lambda name, case: lambda: None)
    clock = Clock()
    session, said = session_of(speed(150, 100), clock), []
    clock.step = step
    found = cpu_look.Found(case_of("frozen", sizes[2], torch.float32))
    cpu_look._fit(found, 20.0, session, said.append)
    assert found.case.length == length
    shape = cpu_look.shape_of(found.case)
    assert said == ([] if how is None else [f"  {how}: {shape}"])


def test_a_case_ends_with_its_share(session, monkeypatch):
    monkeypatch.setattr(cpu_look, "MOST_ROUNDS", 15)
    session.clock = clock = Clock()
    session.end = LIMIT
    clock.step = 10.0
    found = cpu_look.measure("fp32-trainable", session, lambda line: None)
    assert found.reasons == dict.fromkeys(["dense_logsumexp", bars.FLOOR], "no time was left")
    assert len(found.seconds["treg_fused"]) == 2  # the first, and one round
    clock.now, clock.step = LIMIT, 0.0
    late = cpu_look.measure("frozen", session, lambda line: None)
    assert not late.seconds and set(late.reasons.values()) == {session.left_out()["frozen"]}


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
