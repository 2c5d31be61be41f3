"""What `pytest benchmarks/` runs on a CPU, in which order and at which sizes, so that it ends in
time.

There are eleven items: six cases of the loss head and five other parts, in order of worth.
An item's size is chosen when its turn comes, from the time left and the machine's speed then, and
so is whether torch takes all threads or one.
Its share is its part of the time left, beside the items still to come, by weight.
It takes the largest size that fits its share; where none does, its smallest, if the rest has room.
Otherwise it is left out, by name.
Items too long for their share at the start come last: they get what the others have not used.

    calls of a case   each method once, warm, and three times in turns, the bare products too
    seconds           calls * N V (2 p D / rate(dtype) + 1.5 logit)

p products a row, 3.5 on average over the methods with a trainable head, 2.5 with a frozen one, 1
forward. logit: seconds of log_softmax and its gradient for each logit; methods take a third to
three times that.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from loss_head_cases import Case

LIMIT = 160.0  # seconds since the process was started; the rest of three minutes is spare
SWING = 1.5  # by so much a machine with other work on it may become slower than it was measured
START = 4.0  # seconds in which a process imports torch, on a CPU with nothing else to do
LEAST_ROUNDS = 3
WORTH_THREADS = 1.2  # all threads are taken where they are so much faster than one


class Speed(NamedTuple):
    """FLOP/s of the three products of a step: logits, dhidden, dweight; seconds of a logit."""

    fp32: float
    bf16: float
    logit: float

    def at(self, fp32: float) -> "Speed":
        """The same machine where other work has changed its rate in float32 to this."""
        pace = fp32 / self.fp32
        return Speed(fp32, pace * self.bf16, self.logit / pace)

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


# The first is that of the record, bars.py. D shrinks before N and V: logits that fit a cache tell
# nothing of a real head, and its D is a hundredth of V or less.
LADDER = (
    Size(2, 1024, 512, 32000),
    Size(2, 512, 512, 32000),
    Size(2, 256, 512, 32000),
    Size(2, 128, 512, 32000),
    Size(2, 128, 256, 32000),
    Size(2, 128, 128, 32000),
    Size(2, 64, 128, 32000),
    Size(2, 64, 128, 16000),
    Size(2, 32, 128, 8000),
    Size(2, 32, 64, 4000),
)
PRODUCTS = {"trainable": 3.5, "frozen": 2.5, "forward": 1.0}


@dataclass(frozen=True)
class Kind:
    """A case without its size: its weight in the sharing of time, and how many methods run; a slow
    one counts for several.
    """

    weight: float
    methods: int
    dtype: torch.dtype | None  # None: the faster one
    mode: str = "trainable"
    softcap: float | None = None
    ignored: float = 0.0


KINDS = {
    "fp32-trainable": Kind(28, 12, torch.float32),
    "bf16-trainable": Kind(24, 9, torch.bfloat16),
    "frozen": Kind(10, 4, None, "frozen"),
    "forward": Kind(5, 3, None, "forward"),
    "softcap": Kind(9, 3, None, softcap=30.0),
    "half-ignored": Kind(10, 4, None, ignored=0.5),
}


class Work(NamedTuple):
    flop: float  # float32
    logits: float


class Part(NamedTuple):
    """Of the benchmarks that are not cases: imports, in those of torch, and work at each size."""

    weight: float
    starts: float
    sizes: tuple[tuple, ...]
    work: tuple[Work, ...]

    def seconds(self, speed: Speed, start: float) -> list[float]:
        fixed = self.starts * start
        return [fixed + x.flop / speed.fp32 + x.logits * speed.logit for x in self.work]


def _kl_work(rows: int, hidden: int, vocab: int) -> Work:
    """Seven calls of four products and two heads' logits, once and a half."""
    return Work(1.5 * 7 * 8 * rows * hidden * vocab, 1.5 * 7 * 2 * rows * vocab)


def _memory_work(over: int) -> Work:
    """Two steps at N = 2048 / over: D 256, V 64000."""
    logits = 2 * 2048 / over * 64000
    return Work(6 * 256 * logits, 1.5 * logits)


def _trl_work(pairs: int, vocab: int) -> Work:
    """576 positions a pair, D 256; four steps of 12 products in all, warm and once."""
    logits = 576 * pairs * vocab
    return Work(2 * 2 * 12 * 256 * logits, 15 * logits)


def _end_to_end_work(prompt: int, answer: int) -> Work:
    """Three steps, warm and once: 4 P + 6 R tokens of 3 million parameters; few logits."""
    return Work(2 * 6 * 3e6 * (4 * prompt + 6 * answer), 2 * 8 * answer * 8000)


_KL = (
    *((rows, 512, 32000) for rows in (2048, 1024, 512, 256)),
    *((rows, 128, 32000) for rows in (256, 128)),
    (64, 128, 16000),
)
_TRL = ((4, 32000), (4, 16000), (4, 8000), (2, 8000), (2, 4000))  # pairs, vocabulary
_OVER = (1, 2, 4, 8)
_ENDS = ((512, 128), (256, 64), (128, 32))  # prompt, answers
PARTS = {
    "memory": Part(24, 2, tuple((x,) for x in _OVER), tuple(map(_memory_work, _OVER))),
    "linear_kl": Part(10, 0, _KL, tuple(_kl_work(*x) for x in _KL)),
    "trl": Part(20, 1.5, _TRL, tuple(_trl_work(*x) for x in _TRL)),
    "annotate": Part(10, 1, ((),), (Work(0.0, 0.0),)),
    "end_to_end": Part(10, 1, _ENDS, tuple(_end_to_end_work(*x) for x in _ENDS)),
}


WEIGHTS = {name: x.weight for name, x in (KINDS | PARTS).items()}  # in order of worth


@dataclass(frozen=True)
class Item:
    """What was chosen: the size, or None and why."""

    name: str
    share: float  # seconds
    seconds: float  # expected, at the size chosen; 0 where left out
    size: tuple | None
    case: Case | None = None
    reason: str | None = None


def case_of(name: str, size: Size, faster: torch.dtype) -> Case:
    kind = KINDS[name]
    base = Case(name, *size, kind.dtype or faster, kind.mode, kind.softcap)
    return replace(base, ignored=kind.ignored)


def call_seconds(case: Case, speed: Speed) -> float:
    each = 2 * PRODUCTS[case.mode] * case.hidden / speed.of(case.dtype) + 1.5 * speed.logit
    return case.rows * case.vocab * each


def case_seconds(case: Case, speed: Speed) -> float:
    calls = (KINDS[case.name].methods + 1) * (1 + LEAST_ROUNDS)
    return calls * call_seconds(case, speed)


@dataclass(frozen=True)
class Machine:
    """What seconds hang on. faster: the dtype that a user would take, which stays for a run; start:
    seconds of a process until torch is imported.
    """

    speed: Speed
    faster: torch.dtype
    start: float = START

    def sizes(self, name: str) -> list[tuple[tuple, float]]:
        """Of an item, the largest first, each with the seconds it would take."""
        if name in PARTS:
            part = PARTS[name]
            return list(zip(part.sizes, part.seconds(self.speed, self.start), strict=True))
        cases = [(size, case_of(name, size, self.faster)) for size in LADDER]
        return [(size, case_seconds(case, self.speed)) for size, case in cases]


def share_of(name: str, coming: Iterable[str], left: float) -> float:
    """Seconds of those left that fall to an item; coming: those not begun, itself among them."""
    return left * WEIGHTS[name] / sum(WEIGHTS[x] for x in coming)


def order(names: Iterable[str], machine: Machine, left: float) -> tuple[list[str], list[str]]:
    """By worth, and those whose smallest size is longer than their share, which come last."""
    wanted = set(names)
    coming = [name for name in WEIGHTS if name in wanted]
    waiting = [x for x in coming if machine.sizes(x)[-1][1] > share_of(x, coming, left)]
    return [x for x in coming if x not in waiting], waiting


def choose(name: str, machine: Machine, share: float, left: float) -> Item:
    """The largest size that fits the share, else the smallest if it fits in the time left; both
    must end in the time left even if the machine becomes SWING times slower.
    """
    sizes = machine.sizes(name)
    fitting = [x for x in sizes if x[1] <= min(share, left / SWING)]
    size, seconds = fitting[0] if fitting else sizes[-1]
    if seconds > left / SWING:
        reason = f"its smallest size takes {seconds:.0f} s here, up to {SWING * seconds:.0f} s"
        reason += f" with other work on the machine; {left:.0f} s were left"
        return Item(name, share, 0.0, None, reason=reason)
    case = case_of(name, Size(*size), machine.faster) if name in KINDS else None
    return Item(name, max(share, seconds), seconds, size, case)


# -- calibration

_MEDIUM, _SMALL = (128, 512, 4000), (32, 128, 2000)


def choose_threads(seconds: float = 0.1) -> float:
    """FLOP/s in float32 as the machine is now, other work on it included.

    Leaves torch with one thread where all together are hardly faster: where others use the cores
    too, threads wait for each other. It stays with one, as others may come back.
    """
    threads = torch.get_num_threads()
    together = _rate(torch.float32, _MEDIUM, seconds)
    if threads == 1:
        return together
    torch.set_num_threads(1)
    alone = _rate(torch.float32, _MEDIUM, seconds)
    if together <= WORTH_THREADS * alone:
        return alone
    torch.set_num_threads(threads)
    return together


def calibrate(seconds: float = 0.25) -> Speed:
    """Of this machine as it is now; some five times so many seconds. Chooses the threads too.

    A CPU without instructions for bfloat16 emulates it, up to a hundred times slower: small
    matrices tell that; where they are fast, larger ones are taken.
    """
    fp32 = choose_threads(seconds)
    bf16 = _rate(torch.bfloat16, _SMALL, seconds / 2)
    if bf16 > fp32 / 8:
        bf16 = _rate(torch.bfloat16, _MEDIUM, seconds)
    return Speed(fp32, bf16, _logit(seconds))


def _logit(seconds: float) -> float:
    """Seconds for each of the logits of a log_softmax and its gradient.

    They take 40 MB: more than an allocator keeps for the next call (32 MiB in glibc), as those of a
    real step do. Memory that the system hands out anew makes a logit several times slower.
    """
    rows = 320
    logits, target = torch.zeros(rows, 32000, requires_grad=True), torch.zeros(rows, 1).long()

    def run() -> None:
        torch.autograd.grad(logits.log_softmax(-1).gather(-1, target).sum(), logits)

    return _median(run, seconds) / logits.numel()


def _rate(dtype: torch.dtype, shape: tuple[int, int, int], seconds: float) -> float:
    """FLOP/s of the products of a step."""
    n, d, v = shape
    hidden, weight = torch.ones(n, d, dtype=dtype), torch.ones(v, d, dtype=dtype)
    tile = torch.zeros(n, v, dtype=dtype)

    def run() -> None:
        torch.mm(hidden, weight.T, out=tile)
        torch.mm(tile, weight)
        torch.mm(tile.T, hidden)

    return 3 * 2 * n * d * v / _median(run, seconds)


def _median(run: Callable[[], None], seconds: float) -> float:
    """Seconds of a call, of as many as there is time for; the first warms up where it can."""
    took, end = [], time.perf_counter() + seconds
    while not took or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
    return statistics.median(took[len(took) > 1 :])
