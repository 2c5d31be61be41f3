"""A look at this project's times on a CPU: a case's methods in turns, a line for each as it runs,
and at the end a table of ratios.

What is measured ends in time, see `cpu_plan`: a case that turns out slower or faster than expected
goes on with another size; a method that takes SLOW times as long as dense PyTorch is called once,
and not in the cases after; nothing is begun that would not end within LIMIT seconds.
"""

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from bars import FLOOR, HELD, TIMED, bare_products, instructions, instructions_text
from cpu_plan import (
    KINDS,
    LADDER,
    LEAST_ROUNDS,
    START,
    Item,
    Speed,
    call_seconds,
    case_of,
    machine,
    plan,
)
from loss_head_cases import Case, batch_of
from loss_head_measure import Alternation, checked_errors, environment, peak_bytes
from loss_head_peers import METHODS, step
from process_age import process_age

RECORD = Path(__file__).parent / "results" / "cpu" / "bars.json"
DENSE = "dense_log_softmax"
OURS = "treg"
LIMIT = 155.0  # seconds since the process was started
# what the cases after the first two compare
FEW = ("treg_fused", "treg_logprobs", "trl_chunked", "liger_dpo")
MOST_ROUNDS, SLOW, CHECKED_ROWS = 15, 8.0, 64
COLUMNS = {
    "dense": (DENSE, "dense"),
    "Liger DPO": ("liger_dpo", "liger_jsd"),
    "TRL": ("trl_chunked", "TRL"),
    "bare products": (FLOOR, "four bare products"),
}


class Session:
    """Of one run: since when, what was planned, what came."""

    def __init__(
        self,
        speed: Speed | None = None,
        clock: Callable[[], float] = time.monotonic,
        age: float = 0.0,  # seconds that are over already, of imports
    ):
        self.clock, self.began = clock, clock() - age
        self.speed = speed or machine()
        self.plan = plan(self.speed, start=max(START, age))
        self.rows: list[str] = []
        self.notes: list[str] = []
        self.late: list[str] = []
        self.pace = 1.0  # what a dense step took over what was expected, in the last case
        self.slow: dict[str, str] = {}  # methods, and why they are not run again

    def until(self, name: str) -> float | None:
        """When an item should end; None where there is no time to begin it."""
        now, end = self.clock(), self.began + LIMIT
        if now + max(1.0, self.pace) * self.plan[name].seconds > end:
            self.late.append(name)
            return None
        return min(now + self.plan[name].share, end)

    def left_out(self) -> dict[str, str]:
        reasons = {x.name: x.reason for x in self.plan.values() if x.reason is not None}
        return reasons | dict.fromkeys(self.late, f"it would not end within {LIMIT:.0f} s")

    def add(self, label: str, ours: str, seconds: dict[str, list[float]], note: str) -> None:
        """A row of the table: the least time of ours over those of others, which other work on the
        machine touches least.
        """
        mine = min(seconds[ours])
        cells = []
        for names in COLUMNS.values():
            found = [min(seconds[x]) for x in names if x in seconds]
            cells.append(f"{mine / found[0]:.2f}" if found else "")
        rounds = len(seconds[ours])
        note += f", {rounds} round{'s' * (rounds > 1)}"
        self.rows.append(_row(label, f"{1e3 * mine:.0f} ms", cells, note))


def _row(label: str, mine: str, cells: list[str], note: str) -> str:
    ratios = "".join(f"{x:>{len(name) + 4}}" for name, x in zip(COLUMNS, cells, strict=True))
    return f"{label:<36}{mine:>10}{ratios}    {note}".rstrip()


@functools.cache
def session() -> Session:
    return Session(age=process_age())


def header(s: Session) -> list[str]:
    """What is said before anything runs."""
    missing = {
        reason: [name for name, x in METHODS.items() if applies(name) and x.missing() == reason]
        for reason in (x.missing() for x in METHODS.values())
        if reason is not None
    }
    lines = [
        f"on {cpu()}",
        f"products here and now: {s.speed.fp32 / 1e9:.0f} GFLOP/s float32, "
        f"{s.speed.bf16 / 1e9:.3g} bfloat16; {1e9 * s.speed.logit:.0f} ns a logit; "
        f"sizes are chosen to end in "
        f"{sum(x.seconds for x in s.plan.values()):.0f} s",
        *(f"not installed, left out: {', '.join(x)} ({why})" for why, x in missing.items() if x),
        *(f"left out: {name}: {why}" for name, why in s.left_out().items()),
    ]
    return lines


def applies(name: str) -> bool:
    return "cpu" in METHODS[name].devices


def cpu() -> str:
    threads = torch.get_num_threads()
    has = instructions_text(instructions())
    return f"{environment()['device']}, {threads} thread{'s' * (threads > 1)}: {has}"


def size_or_skip(s: Session, name: str) -> tuple:
    """Of a part that is no case; pytest.skip with the reason where it is left out."""
    item = s.plan[name]
    if item.size is None or s.until(name) is None:
        pytest.skip(f"{name}: {s.left_out()[name]}")
    return item.size


def digest(s: Session) -> list[str]:
    """What is said at the end."""
    lines = [f"on {cpu()}"]
    if s.rows:
        lines.append("treg's least time, and that over others' least: below 1 treg is faster")
        lines.append("bare products: the matrix products of all rows and nothing else")
        lines += [_row("", "treg", [f"/ {x}" for x in COLUMNS], ""), *s.rows]
    lines += s.notes
    lines += [f"left out: {name}: {why}" for name, why in s.left_out().items()]
    lines.append("A look: with few rows fixed costs show, and other work on the machine does.")
    return [*lines, record(json.loads(RECORD.read_text()))]


def record(found: dict) -> str:
    """What `bars.py` found at its size, in a line."""
    ratios = [
        f"{dtype} {x['ratios'][f'treg_fused / {DENSE}']['ratio']:.2f} of dense"
        for dtype, x in found["time"].items()
    ]
    held = found["memory"]["peak_extra_bytes"]
    ours, dense = (f"{held[name] / 2**20:.0f} MiB" for name in ("treg_fused", DENSE))
    return (
        f"The record, {shape_of(TIMED).rpartition(' ')[0]} on another day and CPU "
        f"({found['environment']['device']}): {', '.join(ratios)}; extra memory, "
        f"{shape_of(HELD[DENSE][1])}: {ours} against {dense}. python benchmarks/bars.py"
    )


# -- a case


@dataclass
class Found:
    """seconds of each method that ran; why others did not; extra bytes of the first call."""

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    extra_bytes: dict[str, int | None] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)


def methods_of(case: Case) -> list[str]:
    """What runs, dense PyTorch first: the others are compared with it."""
    names = [n for n, x in METHODS.items() if x.applies_to(case, "cpu") and x.missing() is None]
    if case.name not in ("fp32-trainable", "bf16-trainable"):
        ours = FEW[case.mode == "forward"]
        names = [name for name in names if name in (DENSE, ours, *FEW[2:])]
    return sorted(names, key=lambda name: name != DENSE)


def shape_of(case: Case) -> str:
    return f"N {case.rows} D {case.hidden} V {case.vocab} {str(case.dtype).partition('.')[2]}"


def measure(item: Item, s: Session, say: Callable[[str], None] = print) -> Found:
    """The methods of a case: this project's own checked, each called once, then in turns until its
    share of the time is over.
    """
    until = s.until(item.name)
    found = Found(item.case)
    names = methods_of(item.case)
    if until is None:
        found.reasons = dict.fromkeys(names, "no time was left")
        return found
    say(f"{item.name}: {shape_of(found.case)}")
    _check(found, names)
    found.reasons = {name: s.slow[name] for name in names if name in s.slow}
    for name, why in found.reasons.items():
        say(f"  {name:<28} left out: {why}")
    names = [name for name in names if name not in found.failed | found.reasons]
    _fit(found, until, s, say)
    calls: dict[str, Callable[[], object]] = {}
    first: dict[str, float] = {}
    for name in (DENSE, FLOOR, *names[1:]):
        call = _call_of(name, found.case)
        if s.clock() > until and name != DENSE and not name.startswith(OURS):
            found.reasons[name] = "no time was left"
            continue
        if (took := _first(name, call, found, s.clock)) is None:
            say(f"  {name:<28} left out: {found.reasons.get(name) or found.failed[name]}")
            continue
        first[name], calls[name] = took, call
        over = "" if name == DENSE else f"  {took / first[DENSE]:6.2f} of {DENSE}"
        say(f"  {name:<28} {1e3 * took:8.1f} ms{over}")
    over = {name: took / first[DENSE] for name, took in first.items()}
    always = {DENSE, FLOOR, *(name for name in calls if name.startswith(OURS))}
    again = {name: call for name, call in calls.items() if name in always or over[name] < SLOW}
    for name in calls.keys() - again.keys():
        s.slow[name] = f"{over[name]:.0f} times as long as {DENSE} in {item.name}"
    rounds = int((until - s.clock()) / sum(first[name] for name in again))
    run = Alternation(again)
    for _ in range(max(1, min(MOST_ROUNDS, rounds))):
        run.round()
    found.seconds = {name: [took] for name, took in first.items()}
    for name, seconds in run.seconds.items():
        # one round alone says little
        found.seconds[name] = seconds if len(seconds) > 1 else [first[name], *seconds]
    return found


def _call_of(name: str, case: Case) -> Callable[[], object]:
    if name == FLOOR:
        return bare_products(case)
    return functools.partial(step, METHODS[name], batch_of(case))


def _check(found: Found, names: list[str]) -> None:
    """This project's results on a few rows against float64."""
    length = max(1, min(found.case.length, CHECKED_ROWS // (2 * found.case.pairs)))
    for name in names:
        if name.startswith(OURS):
            try:
                found.errors[name] = checked_errors(name, replace(found.case, length=length))
            except Exception as e:
                found.failed[name] = f"{type(e).__name__}: {e}"


def _fit(found: Found, until: float, s: Session, say: Callable) -> None:
    """Another size where a dense step says so: a smaller one where the planned one takes twice the
    time left, the largest that takes two thirds of it where that is larger.
    """
    calls = (KINDS[found.case.name].methods + 1) * (1 + LEAST_ROUNDS)
    sizes = [case_of(found.case.name, size, s.speed) for size in LADDER]
    while True:
        call = _call_of(DENSE, found.case)
        call()
        began = s.clock()
        call()
        s.pace = (s.clock() - began) / call_seconds(found.case, s.speed)
        left = max(0.0, until - s.clock())
        needed = [s.pace * calls * call_seconds(case, s.speed) for case in sizes]
        here = sizes.index(found.case)
        fitting = [i for i in range(here) if needed[i] <= left / 1.5]
        if fitting:
            found.case = sizes[fitting[0]]
            say(f"  faster than expected, larger: {shape_of(found.case)}")
            return
        if needed[here] <= 2 * left or here + 1 == len(sizes):
            return
        found.case = sizes[here + 1]
        say(f"  slower than expected, smaller: {shape_of(found.case)}")


def _first(name: str, call: Callable, found: Found, clock: Callable[[], float]) -> float | None:
    """Seconds of a first call, whose extra memory is measured; None where it raises."""
    took, held = 0.0, 0

    def run() -> None:
        nonlocal took, held
        began = clock()
        results = call()
        took = clock() - began
        held = sum(x.nbytes for x in results.values()) if isinstance(results, dict) else 0

    try:
        peak = peak_bytes(run)
    except Exception as e:
        problem = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        (found.failed if name.startswith(OURS) else found.reasons)[name] = problem
        return None
    found.extra_bytes[name] = None if peak is None else max(0, peak - held)
    return took


LABELS = {
    "fp32-trainable": "T-REG step",
    "bf16-trainable": "T-REG step",
    "frozen": "with a frozen head",
    "forward": "log-probs alone",
    "softcap": "T-REG step with a softcap",
    "half-ignored": "half of the tokens ignored",
}


def show(found: Found, s: Session) -> None:
    """A row of the table at the end."""
    ours = FEW[found.case.mode == "forward"]
    if ours in found.seconds:
        shape, _, dtype = shape_of(found.case).rpartition(" ")
        s.add(f"{LABELS[found.case.name]}, {dtype}", ours, found.seconds, shape)
