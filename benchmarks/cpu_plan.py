"""What `pytest benchmarks/` runs on a CPU: sizes that end in time, chosen from a second's
calibration of the machine.

    calls of a case   each method once, warm, and three times in turns, the bare products too
    seconds           calls * 2 N V (p D / rate(dtype) + 1150 / rate(float32))

p products a row, 3.5 on average over the methods with a trainable head, 2.5 with a frozen one, 1
forward; what is done with each logit beside them takes as long as 1150 multiplications and
additions of a float32 product (measured: 16 ns of a dense step where products ran at 150 GFLOP/s).
A case takes the largest size of LADDER that fits its share of the budget. Where none does it is
left out, by name.
"""

import functools
import statistics
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from loss_head_cases import Case

BUDGET = 150.0  # seconds, of all cases
PER_LOGIT = 1150.0  # float32 multiplications and additions
LEAST_ROUNDS = 3
WORTH_THREADS = 1.2  # all threads must be so much faster than one


class Speed(NamedTuple):
    """FLOP/s of the three products of a step: logits, dhidden, dweight."""

    fp32: float
    bf16: float

    def of(self, dtype: torch.dtype) -> float:
        return self.bf16 if dtype == torch.bfloat16 else self.fp32

    @property
    def faster(self) -> torch.dtype:
        """What a user of this machine would take."""
        return torch.bfloat16 if self.bf16 > self.fp32 else torch.float32


class Size(NamedTuple):
    pairs: int
    length: int
    hidden: int
    vocab: int


# the first is that of the record, bars.py
LADDER = (
    Size(2, 1024, 512, 32000),
    Size(2, 512, 512, 32000),
    Size(2, 256, 512, 32000),
    Size(2, 128, 512, 32000),
    Size(2, 64, 512, 32000),
    Size(2, 64, 256, 16000),
    Size(2, 32, 256, 8000),
    Size(2, 32, 128, 4000),
)
PRODUCTS = {"trainable": 3.5, "frozen": 2.5, "forward": 1.0}


@dataclass(frozen=True)
class Kind:
    """A case without its size: its share of the budget in seconds, and how many methods run; a slow
    one counts for several.
    """

    share: float
    methods: int
    dtype: torch.dtype | None  # None: the faster one
    mode: str = "trainable"
    softcap: float | None = None
    ignored: float = 0.0


KINDS = {
    "fp32-trainable": Kind(32, 12, torch.float32),
    "bf16-trainable": Kind(26, 9, torch.bfloat16),
    "frozen": Kind(10, 4, None, "frozen"),
    "forward": Kind(5, 3, None, "forward"),
    "softcap": Kind(10, 3, None, softcap=30.0),
    "half-ignored": Kind(10, 4, None, ignored=0.5),
}


class Part(NamedTuple):
    """Of the benchmarks that are not cases: seconds that do not shrink, and work at each size."""

    share: float
    fixed: float
    sizes: tuple[tuple, ...]
    work: tuple[float, ...]  # float32 FLOP, of each size


def _kl_work(rows: int, hidden: int, vocab: int) -> float:
    """Seven calls of four products and two heads' logits, once and a half."""
    return 1.5 * 7 * 2 * rows * vocab * (4 * hidden + 2 * PER_LOGIT)


def _memory_work(over: int) -> float:
    """Two steps at N = 2048 / over, one at twice that: D 256, V 64000."""
    return 4 * 2 * 2048 / over * 64000 * (3 * 256 + PER_LOGIT)


_KL = (
    *((rows, 512, 32000) for rows in (2048, 1024, 512, 256)),
    (128, 256, 16000),
    (64, 256, 8000),
)
_TRL = ((4, 32000), (4, 16000), (4, 8000), (2, 8000), (2, 4000))  # pairs, vocabulary
PARTS = {
    "memory": Part(24, 12, ((1,), (2,), (4,), (8,)), tuple(map(_memory_work, (1, 2, 4, 8)))),
    "linear_kl": Part(11, 0, _KL, tuple(_kl_work(*x) for x in _KL)),
    # 2 * 288 positions a pair, 24 kFLOP a logit for a round of four steps, warm and once
    "trl": Part(16, 6, _TRL, tuple(2 * 576 * pairs * vocab * 24e3 for pairs, vocab in _TRL)),
    "annotate": Part(6, 6, ((),), (0.0,)),
}


@dataclass(frozen=True)
class Item:
    """What was chosen: the sizes, or None and why."""

    name: str
    share: float  # seconds
    seconds: float  # expected, at the size chosen; 0 where left out
    size: tuple | None
    case: Case | None = None
    reason: str | None = None


def case_of(name: str, size: Size, speed: Speed) -> Case:
    kind = KINDS[name]
    dtype = kind.dtype or speed.faster
    base = Case(name, *size, dtype, kind.mode, kind.softcap)
    return replace(base, ignored=kind.ignored)


def call_seconds(case: Case, speed: Speed) -> float:
    each = PRODUCTS[case.mode] * case.hidden / speed.of(case.dtype) + PER_LOGIT / speed.fp32
    return 2 * case.rows * case.vocab * each


def case_seconds(name: str, size: Size, speed: Speed) -> float:
    calls = (KINDS[name].methods + 1) * (1 + LEAST_ROUNDS)
    return calls * call_seconds(case_of(name, size, speed), speed)


def plan(speed: Speed, budget: float = BUDGET) -> dict[str, Item]:
    """What is run, by name; the expected seconds of all are at most the budget."""
    total = sum(x.share for x in (*KINDS.values(), *PARTS.values()))
    found = {}
    for name, kind in KINDS.items():
        share = kind.share * budget / total
        sizes = [(size, case_seconds(name, size, speed)) for size in LADDER]
        found[name] = _item(name, share, sizes)
        if found[name].size is not None:
            case = case_of(name, Size(*found[name].size), speed)
            found[name] = replace(found[name], case=case)
    for name, part in PARTS.items():
        share = part.share * budget / total
        seconds = [part.fixed + x / speed.fp32 for x in part.work]
        found[name] = _item(name, share, list(zip(part.sizes, seconds, strict=True)))
    return found


def _item(name: str, share: float, sizes: list[tuple[tuple, float]]) -> Item:
    for size, seconds in sizes:
        if seconds <= share:
            return Item(name, share, seconds, size)
    least = sizes[-1][1]
    reason = f"its smallest size would take {least:.0f} s here, its share is {share:.0f} s"
    return Item(name, share, 0.0, None, reason=reason)


# -- calibration

_MEDIUM, _SMALL = (128, 512, 4000), (32, 128, 2000)


def calibrate(seconds: float = 0.25) -> Speed:
    """Of this machine as it is now, other work on it included; some three times so many seconds.

    Leaves torch with one thread where all together are hardly faster: where others use the cores
    too, threads wait for each other. A CPU without instructions for bfloat16 emulates it, up to a
    hundred times slower: small matrices tell that; where they are fast, larger ones are taken.
    """
    threads = torch.get_num_threads()
    fp32 = _rate(torch.float32, _MEDIUM, seconds)
    if threads > 1:
        torch.set_num_threads(1)
        alone = _rate(torch.float32, _MEDIUM, seconds)
        if fp32 > WORTH_THREADS * alone:
            torch.set_num_threads(threads)
        else:
            fp32 = alone
    bf16 = _rate(torch.bfloat16, _SMALL, seconds / 2)
    if bf16 > fp32 / 8:
        bf16 = _rate(torch.bfloat16, _MEDIUM, seconds)
    return Speed(fp32, bf16)


def _rate(dtype: torch.dtype, shape: tuple[int, int, int], seconds: float) -> float:
    """FLOP/s of the products of a step, the median of as many as there is time for."""
    n, d, v = shape
    hidden, weight = torch.ones(n, d, dtype=dtype), torch.ones(v, d, dtype=dtype)
    tile = torch.zeros(n, v, dtype=dtype)
    took, end = [], time.perf_counter() + seconds
    while not took or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(hidden, weight.T, out=tile)
        torch.mm(tile, weight)
        torch.mm(tile.T, hidden)
        took.append(time.perf_counter() - start)
    return 3 * 2 * n * d * v / statistics.median(took[len(took) > 1 :])  # the first warms up


@functools.cache
def machine() -> Speed:
    """`calibrate`, once in a process."""
    return calibrate()
