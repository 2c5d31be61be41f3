"""One cell of the matrix: every method that applies to a case, checked, then timed in turns in one
process.

hot      calls follow each other without a pause: medians over HOT_ROUNDS rounds or more
cool     idleness before every call: for the cells that bars are set on
errors   of one step against float64, see `loss_head_measure.errors`
extra    peak memory beyond inputs, gradients and log-probs

A cell for which time runs out ends after the round that it is in. It is late where that leaves
fewer rounds than HOT_ROUNDS or COOL_ROUNDS.
"""

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from loss_head_cases import DEVICE, FIRST, Case, batch_of, blank_batch
from loss_head_measure import (
    OURS,
    Alternation,
    checked_errors,
    errors,
    oracle,
    peak_bytes,
    synchronize,
)
from loss_head_peers import METHODS, step

HOT_ROUNDS, MOST_ROUNDS, HOT_SECONDS = (7, 50, 2.0) if DEVICE == "cuda" else (2, 2, 0.0)
COOL_ROUNDS, PAUSE = 3, 2.0
LONG = 0.5  # seconds of a round: to wait for each costs nothing then
Tell = Callable[[dict], object]


@dataclass(frozen=True)
class Timing:
    """What is run of a case, and for how long."""

    methods: tuple[str, ...] | None = None  # None: all that apply
    cool: tuple[str, ...] | None = None  # None: all methods of a cell that bars are set on
    pause: float = PAUSE  # seconds before each cool call
    left: Callable[[], float] = lambda: math.inf  # seconds until it must end

    def names(self, case: Case) -> list[str]:
        return [
            name
            for name, method in METHODS.items()
            if method.applies_to(case) and (self.methods is None or name in self.methods)
        ]

    def cool_names(self, case: Case) -> tuple[str, ...]:
        if self.cool is not None:
            return self.cool
        return tuple(self.names(case)) if case.name in FIRST else ()


def measure_cell(
    case: Case,
    excluded: dict[str, str],
    at: Callable[[str], None] = lambda name: None,
    timing: Timing = Timing(),
    keep: Tell = lambda found: None,
) -> dict:
    """The result of a cell.

    Args:
        excluded: reasons for which methods are not to be run, by name. at: is told what is about to
            be run. keep: is given what has been found so far, after every method and every kind of
            round.
    Returns:
        {"rows", "scored", "methods": {name: {"hot", "cool", "errors", "extra_bytes"} or
        {"reason"}}}; a method of this project that raises has "failed" instead, one whose results
        are off has it besides. "late": what time was too short for.
        Raises where the GPU is unusable after a method.
    """
    if DEVICE == "cuda":
        # a compiled peer must not fall back to eager for having seen many shapes
        torch._dynamo.reset()
    found: dict[str, dict] = {}
    result = {"rows": case.rows, "scored": len(batch_of(case).scored), "methods": found}
    for name in timing.names(case):
        if timing.left() <= 0:
            found[name] = {"reason": "no time was left"}
            result["late"] = "methods"
            continue
        at(name)
        found[name] = {"reason": excluded[name]} if name in excluded else _prepared(name, case, at)
        keep(result)
    calls = {name: _call(name, case) for name in found if "errors" in found[name]}
    cool = {name: calls[name] for name in timing.cool_names(case) if name in calls}
    for kind, some, rounds, least in (
        ("hot", calls, _hot, HOT_ROUNDS),
        ("cool", cool, _cool, COOL_ROUNDS),
    ):
        some = {name: some[name] for name in some if "errors" in found[name]}
        if not some or (kind == "cool" and DEVICE != "cuda"):
            continue
        at(kind)
        ran = rounds(some, timing, at)
        for name, seconds in ran.seconds.items():
            if seconds:
                found[name][kind] = seconds
            if len(seconds) < least:
                result.setdefault("late", f"{kind} rounds")
        found.update(ran.broken)
        keep(result)
    if timing.left() <= 0:
        result.setdefault("late", "rounds")
    return result


def launch_cell(case: Case, timing: Timing, mine: Callable[[], bool]) -> dict[str, str]:
    """One step of each of this project's methods on numbers of no meaning, so that every kernel of
    the cell is launched; and of those peers for which `mine` says so. Returns what went wrong.
    """
    batch, wrong = blank_batch(case), {}
    for name in timing.names(case):
        method = METHODS[name]
        if method.gives == "products" or (not name.startswith(OURS) and not mine()):
            continue
        if method.missing() is not None:
            continue
        try:
            step(method, batch)
            synchronize()
        except Exception as e:
            wrong[name] = _short(f"{type(e).__name__}: {e}")
    return wrong


def summarised(found: dict) -> dict:
    """The same with medians in place of times."""
    methods = {
        name: {
            key: summary(value) if key in ("hot", "cool") else value
            for key, value in method.items()
        }
        for name, method in found["methods"].items()
    }
    return {**found, "methods": methods}


def summary(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median, quartiles, least."""
    q1, median, q3 = (
        statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    )
    numbers = {"median": median, "q1": q1, "q3": q3, "least": min(seconds)}
    return {**{key: float(f"{1e3 * x:.4g}") for key, x in numbers.items()}, "rounds": len(seconds)}


class Rounds:
    """Calls in turns, of which one that finds no memory is dropped."""

    def __init__(self, calls: dict[str, Callable], pause: float = 0.0):
        self.broken: dict[str, dict] = {}
        self._run = Alternation({name: self._guarded(name, calls[name]) for name in calls}, pause)

    def round(self) -> None:
        before = set(self.broken)
        self._run.round()
        for name in self.broken.keys() - before:
            self._run.drop(name)
            _free()

    @property
    def seconds(self) -> dict[str, list[float]]:
        return self._run.seconds

    def _guarded(self, name: str, call: Callable) -> Callable[[], None]:
        def run():
            try:
                call()
            except torch.OutOfMemoryError as e:
                self.broken[name] = _problem(name, e)

        return run


def _hot(calls: dict[str, Callable], timing: Timing, at: Callable[[str], None]) -> Rounds:
    """Back to back, after a round that only warms up."""
    warm = Rounds(calls)
    began = time.perf_counter()
    warm.round()
    synchronize()
    once = time.perf_counter() - began
    hot = Rounds({name: calls[name] for name in calls if name not in warm.broken})
    hot.broken.update(warm.broken)
    most = max(HOT_ROUNDS, min(MOST_ROUNDS, int(HOT_SECONDS / once)))
    alive = (lambda: at("hot")) if once > LONG else None
    return _until(hot, most, timing.left() / once, alive)


def _cool(calls: dict[str, Callable], timing: Timing, at: Callable[[str], None]) -> Rounds:
    cool = Rounds(calls, timing.pause)
    fit = timing.left() / (len(calls) * timing.pause or 1.0)
    return _until(cool, COOL_ROUNDS, fit, lambda: at("cool"))


def _until(
    rounds: Rounds, most: int, fit: float, alive: Callable[[], None] | None = None
) -> Rounds:
    """So many rounds, or as many as fit into the time that is left.

    alive: is called after each, which is then waited for, so that a long row of rounds is not taken
    for a hang.
    """
    for _ in range(int(max(0.0, min(most, fit)))):
        rounds.round()
        if alive is not None:
            synchronize()
            alive()
    synchronize()
    return rounds


def _call(name: str, case: Case) -> Callable[[], object]:
    return functools.partial(step, METHODS[name], batch_of(case))


def _prepared(name: str, case: Case, at: Callable[[str], None]) -> dict:
    """Errors and memory of a method, which warm it up; or why it is not timed."""
    if (reason := METHODS[name].missing()) is not None:
        return {"reason": _short(reason)}
    if METHODS[name].gives != "products":
        oracle(case, METHODS[name].loss)  # not within try: it is no method's failure
        synchronize()
        at(name)  # the oracle may take as long as the method's own compilation
    try:
        found = _checked(name, case)
        run = _call(name, case)
        results = sum(x.nbytes for x in run().values())
        peak = peak_bytes(run)
        return {**found, "extra_bytes": None if peak is None else max(0, peak - results)}
    except Exception as e:
        problem = _problem(name, e)
    _free()  # what the exception's frames held
    synchronize()  # an error that stays with the GPU is no method's that follows
    return problem


def _checked(name: str, case: Case) -> dict:
    """Errors; of a method of this project that are over what is allowed also that it failed. Its
    times are worth having all the same.
    """
    try:
        return {"errors": checked_errors(name, case)}
    except AssertionError as e:
        return {"errors": errors(name, case), "failed": _short(str(e))}


def _problem(name: str, error: Exception) -> dict:
    key = "failed" if name.startswith(OURS) else "reason"
    return {key: _short(f"{type(error).__name__}: {error}")}


def _free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def _short(text: str) -> str:
    return " ".join(text.split())[:300]
