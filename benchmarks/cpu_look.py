"""A look at this project's times on a CPU: a case's methods in turns, a line for each as it runs,
and at the end a table of ratios.

What is measured ends in time, see `cpu_plan`: a case that turns out slower or faster than expected
goes on with another size; a method that takes SLOW times as long as dense PyTorch is called once,
and not in the cases after.
"""

import functools
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from bars import FLOOR, HELD, TIMED, bare_products, instructions, instructions_text
from cpu_plan import (
    KINDS,
    LADDER,
    LIMIT,
    START,
    SWING,
    WEIGHTS,
    Item,
    Machine,
    Speed,
    calibrate,
    call_seconds,
    case_of,
    case_seconds,
    choose,
    choose_threads,
    order,
    share_of,
)
from loss_head_cases import Case, batch_of
from loss_head_measure import Alternation, checked_errors, environment, peak_bytes
from loss_head_peers import METHODS, step
from process_age import process_age

RECORD = Path(__file__).parent / "results" / "cpu" / "bars.json"
DENSE = "dense_log_softmax"
OURS = "treg"
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
    """Of one run: until when, what was chosen, what came."""

    def __init__(
        self,
        speed: Speed,
        rate: Callable[[], float],  # in float32, as the machine is now
        clock: Callable[[], float] = time.monotonic,
        age: float = 0.0,  # seconds that are over already, of imports
    ):
        self.rate, self.clock, self.end = rate, clock, clock() - age + LIMIT
        self.machine = Machine(speed, speed.faster, max(START, age))
        self.items: dict[str, Item] = {}  # those whose turn has come
        self.rates = [speed.fp32]
        self.rows: list[str] = []
        self.notes: list[str] = []
        self.slow: dict[str, str] = {}  # methods, and why they are not run again
        self.run_only(WEIGHTS)

    def run_only(self, names: Iterable[str]) -> None:
        """Shares the time among these alone."""
        first, self.waiting = order(names, self.machine, self.left())
        self.order = first + self.waiting

    def left(self) -> float:
        return max(0.0, self.end - self.clock())

    def begin(self, name: str) -> Item:
        """Of an item whose turn has come: what it gets of the time left at the speed of now."""
        if name not in self.items:
            coming = [x for x in self.order if x not in self.items]
            self.rates.append(self.rate())
            speed = self.machine.speed.at(self.rates[-1])
            self.machine = replace(self.machine, speed=speed)
            left = self.left()
            share = share_of(name, coming, left)
            self.items[name] = choose(name, self.machine, share, left)
        return self.items[name]

    def left_out(self) -> dict[str, str]:
        return {x.name: x.reason for x in self.items.values() if x.reason is not None}

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
        note += f", {rounds} round{'s' * (rounds > 1)}, {threads()}"
        self.rows.append(_row(label, f"{1e3 * mine:.0f} ms", cells, note))


def _row(label: str, mine: str, cells: list[str], note: str) -> str:
    ratios = "".join(f"{x:>{len(name) + 4}}" for name, x in zip(COLUMNS, cells, strict=True))
    return f"{label:<36}{mine:>10}{ratios}    {note}".rstrip()


@functools.cache
def session() -> Session:
    return Session(calibrate(), choose_threads, age=process_age())


def threads() -> str:
    n = torch.get_num_threads()
    return f"{n} thread{'s' * (n > 1)}"


def header(s: Session) -> list[str]:
    """What is said before anything runs."""
    missing = {
        reason: [name for name, x in METHODS.items() if applies(name) and x.missing() == reason]
        for reason in (x.missing() for x in METHODS.values())
        if reason is not None
    }
    speed = s.machine.speed
    return [
        f"on {cpu()}",
        f"products here and now, {threads()}: {speed.fp32 / 1e9:.0f} GFLOP/s float32, "
        f"{speed.bf16 / 1e9:.3g} bfloat16; {1e9 * speed.logit:.1f} ns a logit; "
        f"sizes are chosen to end in {LIMIT:.0f} s",
        *(f"not installed, left out: {', '.join(x)} ({why})" for why, x in missing.items() if x),
    ]


def applies(name: str) -> bool:
    return "cpu" in METHODS[name].devices


def cpu() -> str:
    return f"{environment()['device']}: {instructions_text(instructions())}"


def size_or_skip(s: Session, name: str) -> tuple:
    """Of a part that is no case; pytest.skip with the reason where it is left out."""
    item = s.begin(name)
    if item.size is None:
        pytest.skip(f"{name}: {item.reason}")
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
    least, most = (f"{f(s.rates) / 1e9:.0f}" for f in (min, max))
    seen = "A look: with few rows fixed costs show, and other work on the machine does: "
    seen += f"its products in float32 ran at {least} to {most} GFLOP/s."
    return [*lines, seen, record(json.loads(RECORD.read_text()))]


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


def cases(s: Session) -> list[Case]:
    """Of every kind, at the smallest size: others have the same methods."""
    return [case_of(name, LADDER[-1], s.machine.faster) for name in KINDS]


def methods_of(case: Case) -> list[str]:
    """What runs, dense PyTorch first: the others are compared with it."""
    names = [n for n, x in METHODS.items() if x.applies_to(case, "cpu") and x.missing() is None]
    if case.name not in ("fp32-trainable", "bf16-trainable"):
        ours = FEW[case.mode == "forward"]
        names = [name for name in names if name in (DENSE, ours, *FEW[2:])]
    return sorted(names, key=lambda name: name != DENSE)


def shape_of(case: Case) -> str:
    return f"N {case.rows} D {case.hidden} V {case.vocab} {str(case.dtype).partition('.')[2]}"


def measure(name: str, s: Session, say: Callable[[str], None] = print) -> Found:
    """The methods of a case: this project's own checked, each called once, then in turns until its
    share of the time is over.
    """
    item = s.begin(name)
    if item.case is None:
        found = Found(case_of(name, LADDER[-1], s.machine.faster))
        found.reasons = dict.fromkeys(methods_of(found.case), item.reason or "")
        say(f"{name}: left out: {item.reason}")
        return found
    found = Found(item.case)
    names = methods_of(item.case)
    say(f"{item.name}: {shape_of(found.case)}")
    _check(found, names)
    found.reasons = {name: s.slow[name] for name in names if name in s.slow}
    for name, why in found.reasons.items():
        say(f"  {name:<28} left out: {why}")
    names = [name for name in names if name not in found.failed | found.reasons]
    _fit(found, min(item.share, s.left()), s, say)
    until = min(s.clock() + item.share, s.end)
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
    run, took = Alternation(again), sum(first[name] for name in again)
    for i in range(MOST_ROUNDS):
        if i and s.clock() + took > until:
            break
        began = s.clock()
        run.round()
        took = s.clock() - began
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


def _fit(found: Found, share: float, s: Session, say: Callable) -> None:
    """Another size where a dense step says so, once: a smaller one where there would be no time for
    two of the four calls, a larger one where it has room for SWING too.
    """
    call = _call_of(DENSE, found.case)
    call()
    began = s.clock()
    call()
    speed = s.machine.speed
    pace = (s.clock() - began) / call_seconds(found.case, speed)
    sizes = [case_of(found.case.name, size, s.machine.faster) for size in LADDER]
    needed = [pace * case_seconds(case, speed) for case in sizes]
    here = sizes.index(found.case)
    if needed[here] > 2 * share:
        smaller = [i for i in range(here, len(sizes)) if needed[i] <= share]
        chosen = smaller[0] if smaller else len(sizes) - 1
    else:
        chosen = next((i for i in range(here) if SWING * needed[i] <= share), here)
    if chosen != here:
        found.case = sizes[chosen]
        how = "faster than expected, larger" if chosen < here else "slower than expected, smaller"
        say(f"  {how}: {shape_of(found.case)}")


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
