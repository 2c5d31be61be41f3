"""One cell of the matrix: every method that applies to a case, checked, then timed in turns in one
process.

hot      calls follow each other without a pause: medians over HOT_ROUNDS rounds or more
cool     3.5 s of idleness before every call: for the cells that bars are set on
errors   of one step against float64, see `loss_head_measure.errors`
extra    peak memory beyond inputs, gradients and log-probs
"""

import functools
import gc
import statistics
import time
from collections.abc import Callable

import torch
from loss_head_cases import DEVICE, FIRST, Case, batch_of
from loss_head_measure import OURS, Alternation, checked_errors, oracle, peak_bytes, synchronize
from loss_head_peers import METHODS, step

HOT_ROUNDS, MOST_ROUNDS, HOT_SECONDS = (5, 50, 6.0) if DEVICE == "cuda" else (2, 2, 0.0)
COOL_ROUNDS, PAUSE = 3, 3.5


def measure_cell(
    case: Case, excluded: dict[str, str], at: Callable[[str], None] = lambda name: None
) -> dict:
    """The result of a cell.

    Args:
        excluded: reasons for which methods are not to be run, by name. at: is told what is about to
            be run.
    Returns:
        {"rows", "methods": {name: {"hot", "cool", "errors", "extra_bytes"} or {"reason"}}}; a
        method of this project that raises or whose results are off has "failed" instead.
    """
    if DEVICE == "cuda":
        # a compiled peer must not fall back to eager for having seen many shapes
        torch._dynamo.reset()
    names = [name for name, method in METHODS.items() if method.applies_to(case)]
    found: dict[str, dict] = {}
    for name in names:
        at(name)
        found[name] = {"reason": excluded[name]} if name in excluded else _prepared(name, case)
    calls = {name: _call(name, case) for name in names if "errors" in found[name]}
    for kind, times in _times(calls, case.name in FIRST, at).items():
        for name, seconds in times.items():
            found[name][kind] = seconds
    return {"rows": case.rows, "scored": len(batch_of(case).scored), "methods": found}


def summary(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median, quartiles, least."""
    q1, median, q3 = (
        statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    )
    numbers = {"median": median, "q1": q1, "q3": q3, "least": min(seconds)}
    return {**{key: float(f"{1e3 * x:.4g}") for key, x in numbers.items()}, "rounds": len(seconds)}


def _call(name: str, case: Case) -> Callable[[], object]:
    return functools.partial(step, METHODS[name], batch_of(case))


def _prepared(name: str, case: Case) -> dict:
    """Errors and memory of a method, which warm it up; or why it is not timed."""
    if (reason := METHODS[name].missing()) is not None:
        return {"reason": _short(reason)}
    if METHODS[name].gives != "products":
        oracle(case, METHODS[name].loss)  # not within try: it is no method's failure
    try:
        found = {"errors": checked_errors(name, case)}
        run = _call(name, case)
        results = sum(x.nbytes for x in run().values())
        peak = peak_bytes(run)
        return {**found, "extra_bytes": None if peak is None else max(0, peak - results)}
    except Exception as e:
        problem = _short(f"{type(e).__name__}: {e}")
    gc.collect()  # what the exception's frames held
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return {"failed" if name.startswith(OURS) else "reason": problem}


def _short(text: str) -> str:
    return " ".join(text.split())[:300]


def _times(
    calls: dict[str, Callable], cool: bool, at: Callable[[str], None]
) -> dict[str, dict[str, list[float]]]:
    """Seconds by kind and method."""
    if not calls:
        return {}
    at("hot")
    hot = Alternation(calls)
    rounds = HOT_ROUNDS
    if DEVICE == "cuda":
        began = time.perf_counter()
        hot.round()
        synchronize()
        rounds = min(MOST_ROUNDS, max(HOT_ROUNDS, int(HOT_SECONDS / (time.perf_counter() - began))))
        hot = Alternation(calls)  # that round only warmed up
    for _ in range(rounds):
        hot.round()
    found = {"hot": hot.seconds}
    if cool and DEVICE == "cuda":
        rested = Alternation(calls, PAUSE)
        for _ in range(COOL_ROUNDS):
            at("cool")
            rested.round()
        found["cool"] = rested.seconds
    return found
