"""How long each scheme should take on an H200: a model to hold measurements against, not a
measurement.

    python benchmarks/roofline.py

writes results/predicted-h200.json (milliseconds, cool and hot) and, in NOTES.md, the tables
between the two markers: the fit, the bars most in doubt first, where the host decides.

Units: seconds, bytes, FLOP. N rows, D hidden, V vocabulary, rows C at a time, W = 2 V D bytes of
weight.

    f                 = 790 / 661 cool, 700 / 665 hot: what H200s reach over what an H100 did, the
                      vendor's library in both; the Triton kernels take the same factor
    vendor(m, n, k)   = 2 m n k / (f cublas(k));  cublas: upstream's curve below, linear in log k,
                      constant outside of it
    triton(m, n, k)   = tiles / 132 * (ceil(k / 64) + o + e) * step, at least one tile
                      tiles = ceil(m / 128) * ceil(n / 256), a whole one a program at a time
                      step  = 2 * 128 * 256 * 64 / (f R / 132): 64 of k, 1024 clocks of the tensor
                              cores;  R = 656.4e12
                      o     = 167.5 / 64 steps: what a plain tile costs beside its steps
                      e     = (instructions - 480) * 8 warps / 4 schedulers / 0.7 a clock / 1024
                      instructions of a thread outside the loop over k, from results/aot/sm90.json:
                      all but the loop and the side of the epilogue that a tile does not take. A
                      tile is full, not plain, where it holds a target: 1 - (1 - 256 / V)^128
    product           = max(vendor or triton, (2 m k + 2 k n + out) / B)
                      out: 2 m n, or what it says
    B                 = 4.3e12 bytes/s, read and written
    pass over x bytes = x / B;  adding a product's result to sums in float32 = 0.5 * 8 m n / B, half
                      of it hidden
    launch            = 4e-6 s of idleness each
    step              = max(the sum of these, host): nothing is queued ahead. host: of this
                      project's methods alone, results/cpu/host.json or HOST_US

R and o are fitted to upstream's measurement of this tile (UPSTREAM, a plain epilogue), so that the
greatest relative error of a time is least: 2.0 %. The same product compiled by Triton for sm90 has
480 instructions a thread outside its loop, what is done once included, as it is in ours.

    gemm_k            k products of [N, D] x [D, V], [N, V] x [V, D], [V, N] x [N, D], N <= 16384 at
                      a time
    treg_fused        groups of whole pairs, C = budget / (2 V + 8 V / 256) rows at most: a Triton
                      product that writes E (2 C V), E W, E^T h, 4 C D for scaled rows, and 4 N D in
                      the end. One group: dweight is written once. Several: added in float32 from
                      the second on, and 6 V D in the end to round
      smallest        forward, then 192 MiB / 2 N columns at a time: the Triton product again, two
                      products, dhidden added in float32; in the end 6 N D
      frozen          Triton product and E W, 4 N D
      forward         Triton product that writes 8 N V / 256
    treg_logprobs     trainable: C - t rows kept, t = sqrt(512 (N - C)); the others computed again,
                      t at a time: a fourth product of theirs
    trl_chunked       tiles of 4096 x 32768, 4 products; a tile is read (2 N V) for the sums, read
                      and written (4 N V) for the gradient; dhidden, dweight added in float32; in
                      the end 6 V D + 6 N D. frozen: no dweight
    liger_scaled_ce   4 products, dweight added in bfloat16 (4 V D) every 1024 rows
    liger_dpo         3 products over all rows, 20 N V, per pair 8 V D for a bfloat16 dweight
    liger_mean_ce     C = next power of 2 of N D / V; 3 products, 6 N V, per chunk 8 V D
    quack_mean_ce     C = 4096; 3 products, 4 N V, dweight added in float32, 6 V D
    verl              forward in Triton, taken to be as ours; backward slabs of 9504 tokens: Triton,
                      two products, dhidden added in bfloat16
    dense_log_softmax 3 products, 34 N V        dense_compiled: 3 products, 10 N V
    torch_linear_cross_entropy    4 products, 20 N V, dweight added once per 4096 rows

Where a part of the rows is scored, TRL and treg run those alone, the others all. Not modelled: the
last round of tiles on the 132 multiprocessors, which is 3 % of upstream's measurement too; clock
and power, by which a chip that waits in an epilogue runs faster after it; L2; the host's time of
other methods; and cut-cross-entropy, whose speed hangs on its filter and its locks.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from gpu_bars import BARS, Bar
from loss_head_cases import HEADS, Case, gpu_case, gpu_cases, scored_mask

HERE = Path(__file__).parent
OUT, NOTES = HERE / "results" / "predicted-h200.json", HERE / "NOTES.md"
AOT, HOST = HERE / "results" / "aot" / "sm90.json", HERE / "results" / "cpu" / "host.json"
BEGIN = "<!-- model: python benchmarks/roofline.py writes what follows -->"
END = "<!-- model: end -->"
BUDGET, LEAST = 1 << 30, 192 << 20
LAUNCH = 4e-6

# TFLOP/s of float16 products [8192, k] x [k, 8192] on an H100, as Triton's Gluon tutorial on
# persistent kernels reports them. "triton": tiles of 128 x 256 x 64, 8 warps, 3 buffers, a plain
# epilogue. "peeled": the next tile's first copies begin before the epilogue.
UPSTREAM = {
    "triton": {512: 485, 1024: 575, 2048: 595, 4096: 630, 8192: 646, 16384: 660},
    "cublas": {512: 588, 1024: 588, 2048: 616, 4096: 646, 8192: 661, 16384: 665},
    "peeled": {512: 540, 1024: 603, 2048: 626, 4096: 640, 8192: 662, 16384: 670},
}
TILE = (128, 256, 64)
MULTIPROCESSORS, SCHEDULERS, WARPS = 132, 4, 8
STEP_CLOCKS = 1024  # of the tensor cores, 4096 FLOP each
PLAIN_RATE, PLAIN_OVERHEAD = 656.4e12, 167.5  # FLOP/s, elements of k
PLAIN_INSTRUCTIONS = 480
ISSUED = 0.7  # instructions of a scheduler in a clock, in an epilogue: assumed

# Microseconds of the host for a step of 128 rows, the least of many, where host.json is missing:
# through Triton's own launcher into a libcuda that does nothing, one thread of a server CPU. What
# a launch costs in the driver and two waits for the device are not in it.
HOST_US = {
    "treg_fused": {"fwd_bwd_us": 1450.0, "no_grad_us": 710.0},
    "treg_logprobs": {"fwd_bwd_us": 1150.0, "no_grad_us": 710.0},
}


@dataclass(frozen=True)
class Rates:
    scale: float  # of the H100's, see f
    memory: float = 4.3e12  # bytes/s
    issued: float = ISSUED

    def vendor(self, k: float) -> float:
        """FLOP/s of a large product of the vendor's library."""
        return self.scale * cublas(k)

    @property
    def step(self) -> float:
        """Seconds in which a multiprocessor does 64 of k of a tile, in Triton."""
        return 2 * math.prod(TILE) / (self.scale * PLAIN_RATE / MULTIPROCESSORS)


RATES = {"cool": Rates(790 / 661), "hot": Rates(700 / 665)}


def cublas(k: float) -> float:
    """FLOP/s on the H100: UPSTREAM, linear in log k, constant outside of it."""
    points = [(math.log2(x), y * 1e12) for x, y in UPSTREAM["cublas"].items()]
    x = min(max(math.log2(k), points[0][0]), points[-1][0])
    for (left, low), (right, high) in itertools.pairwise(points):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)
    raise AssertionError("log k is within the curve")


def plain_rate(k: float) -> float:
    """FLOP/s on the H100 of a product in Triton with a plain epilogue: the fit."""
    return PLAIN_RATE / (1 + PLAIN_OVERHEAD / k)


@functools.cache
def _compiled() -> list[dict]:
    return [row for row in json.loads(AOT.read_text())["rows"] if "plain_epilogue" in row]


def epilogue_row(kind: str, softcap: bool) -> dict:
    """The row of the compiler's report for a kind of tile kernel: "forward", "stash", "gradient".

    With a softcap a case of its own where the report has one, else that of all options.
    """
    rows = [row for row in _compiled() if row["case"].startswith(f"{kind}, bfloat16")]
    names = ("softcap", "gemma", "all options") if softcap else ("",)
    for name in names:
        for row in rows:
            rest = row["case"].removeprefix(f"{kind}, bfloat16").lower()
            if (name in rest if name else not rest) and row["block"] == "x".join(map(str, TILE)):
                return row
    raise ValueError(
        f"{AOT.name}: expected a row {kind!r}, bfloat16{', softcap' * softcap}, of tiles of "
        f"{TILE}, got none; run python benchmarks/aot_report.py"
    )


def instructions(kind: str, vocab: int, softcap: bool) -> float:
    """Of a thread for a tile, outside the loop over k, on average over plain and full tiles."""
    row = epilogue_row(kind, softcap)
    outside = row["instructions"] - row["loop"]["instructions"]
    plain, full = outside - row["full_epilogue"], outside - row["plain_epilogue"]
    share = 1 - (1 - min(1.0, TILE[1] / vocab)) ** TILE[0]
    return plain + share * (full - plain)


def extra_steps(kind: str, vocab: int, softcap: bool, issued: float) -> float:
    """What a tile's epilogue takes beyond a plain one, in steps of the loop over k."""
    more = instructions(kind, vocab, softcap) - PLAIN_INSTRUCTIONS
    return more * WARPS / SCHEDULERS / issued / STEP_CLOCKS


def rate(kind: str, case: Case, rates: Rates) -> float:
    """FLOP/s of a tile kernel on many rows of a case's head."""
    steps = case.hidden / TILE[2]
    extra = extra_steps(kind, case.vocab, case.softcap is not None, rates.issued)
    whole = steps + PLAIN_OVERHEAD / TILE[2] + extra
    return rates.scale * PLAIN_RATE * steps / whole


class Cost:
    """Seconds of a scheme on [n, d] x [d, v], added up; those of tile kernels also apart."""

    def __init__(self, case: Case, rates: Rates, rows: int):
        self.n, self.d, self.v, self.rates, self.mode = (
            rows,
            case.hidden,
            case.vocab,
            rates,
            case.mode,
        )
        self.softcap = case.softcap is not None
        self.seconds = self.in_kernels = 0.0

    def product(
        self, m: float, n: float, k: float, *, kind: str | None = None, out: float | None = None
    ) -> "Cost":
        """kind: of tile kernel, see `epilogue_row`; None for the vendor's library."""
        moved = (2 * m * k + 2 * k * n + (2 * m * n if out is None else out)) / self.rates.memory
        if kind is None:
            self.seconds += max(2 * m * n * k / self.rates.vendor(k), moved) + LAUNCH
        else:
            tiles = math.ceil(m / TILE[0]) * math.ceil(n / TILE[1])
            steps = math.ceil(k / TILE[2]) + PLAIN_OVERHEAD / TILE[2]
            steps += extra_steps(kind, self.v, self.softcap, self.rates.issued)
            took = max(tiles / MULTIPROCESSORS, 1) * steps * self.rates.step
            self.seconds += max(took, moved) + LAUNCH
            self.in_kernels += max(took, moved)
        return self

    def moved(self, size: float) -> "Cost":
        self.seconds += size / self.rates.memory + LAUNCH * (size > 0)
        return self

    def gradients(self, rows: float, columns: float | None = None) -> "Cost":
        """dhidden, and dweight of a trainable head, of a tile of logit gradients."""
        columns = columns or self.v
        if self.mode != "forward":
            self.product(rows, self.d, columns)
        if self.mode == "trainable":
            self.product(columns, self.d, rows)
        return self

    @property
    def trainable(self) -> bool:
        return self.mode == "trainable"


def gemm(c: Cost, logits: int, dhidden: bool, dweight: bool) -> None:
    for rows in _split(c.n, 16384):
        for _ in range(logits):
            c.product(rows, c.v, c.d)
        if dhidden:
            c.product(rows, c.d, c.v)
        if dweight:
            c.product(c.v, c.d, rows)


def treg_fused(c: Cost, budget: int = BUDGET, pair: int = 1) -> None:
    """3 products with a trainable head, 2 with a frozen one, 1 forward; `pair`: rows that stay
    together.
    """
    if c.mode == "forward":
        c.product(c.n, c.v, c.d, kind="forward", out=8 * c.n * c.v / 256)
        return
    rows = _stash_rows(c, budget)
    groups = _split(c.n, max(1, rows // pair) * pair if rows >= pair else rows)
    for i, part in enumerate(groups):
        c.product(part, c.v, c.d, kind="stash").gradients(part).moved(4 * part * c.d)
        if c.trainable and i:
            c.moved(0.5 * 8 * c.v * c.d)
    c.moved(4 * c.n * c.d + 6 * c.v * c.d * (c.trainable and len(groups) > 1))


def treg_smallest(c: Cost) -> None:
    """4 products, a part of the vocabulary after the other."""
    c.product(c.n, c.v, c.d, kind="forward", out=8 * c.n * c.v / 256)
    c.product(c.n, c.v, c.d, kind="gradient")
    for columns in _split(c.v, max(128, LEAST // (2 * c.n))):
        c.gradients(c.n, columns).moved(0.5 * 8 * c.n * c.d)
    c.moved(6 * c.n * c.d)


def treg_logprobs(c: Cost) -> None:
    capacity = _stash_rows(c, BUDGET)
    if not c.trainable or c.n <= capacity:
        return treg_fused(c)
    tile = min(capacity, math.isqrt(512 * (c.n - capacity)))
    again = c.n - (capacity - tile)
    c.product(again, c.v, c.d, kind="forward", out=8 * again * c.v / 256)
    treg_fused(c)  # its groups are the kept rows' and then the tiles that are computed again
    for _ in range(math.ceil(again / tile) - math.ceil(again / capacity)):
        c.moved(0.5 * 8 * c.v * c.d)
    return None


def trl_chunked(c: Cost) -> None:
    for rows in _split(c.n, 4096):
        for columns in _split(c.v, 32768):
            c.product(rows, columns, c.d).moved(2 * rows * columns)
            if c.mode == "forward":
                continue
            c.product(rows, columns, c.d).moved(4 * rows * columns).gradients(rows, columns)
            c.moved(0.5 * 8 * rows * c.d + 0.5 * 8 * columns * c.d * c.trainable)
    if c.mode != "forward":
        c.moved(6 * c.n * c.d + 6 * c.v * c.d * c.trainable)


def liger_scaled_ce(c: Cost) -> None:
    c.product(c.n, c.v, c.d, out=12 * c.n * c.v / 320)
    if c.mode != "forward":
        for rows in _split(c.n, 1024):  # a frozen head's dweight is made too
            c.product(rows, c.v, c.d).product(rows, c.d, c.v).product(c.v, c.d, rows).moved(
                0.5 * 4 * c.v * c.d
            )


def chunked(c: Cost, rows: int, products: int, row_bytes: float, chunk_bytes: float) -> None:
    """Logits (again in a fourth product) and gradients, a chunk at a time, with passes over logits
    and dweight.
    """
    for i, part in enumerate(_split(c.n, rows)):
        for _ in range(1 if c.mode == "forward" else products - 2):
            c.product(part, c.v, c.d)
        c.gradients(part).moved(row_bytes * part * c.v)
        if c.trainable and i:
            c.moved(chunk_bytes)


def verl(c: Cost) -> None:
    c.product(c.n, c.v, c.d, kind="forward", out=12 * c.n * c.v / 1024)
    if c.mode != "forward":
        for columns in _split(c.v, 9504):
            c.product(c.n, columns, c.d, kind="gradient").product(c.n, c.d, columns).product(
                columns, c.d, c.n
            )
            c.moved(4 * c.n * c.d)


def schemes(case: Case) -> dict[str, tuple[int, Callable[[Cost], None]]]:
    """The rows that a method runs and what it does with them, for those that are modelled."""
    scored = int(scored_mask(case).sum())
    per_pair = case.rows // case.pairs
    weight = case.vocab * case.hidden
    next_power = 1 << max(0, math.ceil(case.rows * case.hidden / case.vocab) - 1).bit_length()
    everywhere = {  # method: (rows, scheme)
        "treg_logprobs": (scored, treg_logprobs),
        "trl_chunked": (scored, trl_chunked),
        "verl": (case.rows, verl),
        "dense_log_softmax": (
            case.rows,
            lambda c: chunked(c, case.rows, 3, 10 if c.mode == "forward" else 34, 0),
        ),
        "dense_compiled": (
            case.rows,
            lambda c: chunked(c, case.rows, 3, 4 if c.mode == "forward" else 10, 0),
        ),
        "liger_scaled_ce": (case.rows, liger_scaled_ce),
        "torch_linear_cross_entropy": (case.rows, lambda c: chunked(c, 4096, 4, 20, 4 * weight)),
    }
    if case.mode != "forward":
        everywhere |= {
            "treg_fused": (scored, lambda c: treg_fused(c, pair=scored // case.pairs)),
            "liger_dpo": (case.rows, lambda c: chunked(c, per_pair, 3, 20, 8 * weight)),
            "liger_mean_ce": (case.rows, lambda c: chunked(c, next_power, 3, 6, 8 * weight)),
            "quack_mean_ce": (case.rows, lambda c: chunked(c, 4096, 3, 4, 0.5 * 8 * weight)),
        }
    if case.mask == "realistic" and case.mode != "forward":
        everywhere["treg_packed"] = (scored, lambda c: treg_fused(c, pair=scored // case.pairs))
    if case.mode == "trainable":
        everywhere |= {
            "treg_smallest": (scored, treg_smallest),
            "gemm_3": (case.rows, lambda c: gemm(c, 1, True, True)),
            "gemm_4": (case.rows, lambda c: gemm(c, 2, True, True)),
        }
    elif case.mode == "frozen":
        everywhere |= {
            "gemm_2": (case.rows, lambda c: gemm(c, 1, True, False)),
            "gemm_3": (case.rows, lambda c: gemm(c, 1, True, True)),
        }
    else:
        everywhere["gemm_1"] = (case.rows, lambda c: gemm(c, 1, False, False))
    if case.softcap is not None:
        for name in (
            "verl",
            "liger_scaled_ce",
            "torch_linear_cross_entropy",
            "liger_dpo",
            "quack_mean_ce",
        ):
            everywhere.pop(name, None)
    return everywhere


def cost(case: Case, method: str, kind: str, issued: float = ISSUED) -> Cost:
    """Of the GPU alone; kind: "cool" or "hot"."""
    rows, scheme = schemes(case)[method]
    found = Cost(case, replace(RATES[kind], issued=issued), rows)
    scheme(found)
    return found


def predict(case: Case) -> dict[str, dict[str, float]]:
    """Milliseconds by method and "cool" or "hot"."""
    return {
        name: {kind: milliseconds(case, name, kind) for kind in RATES} for name in schemes(case)
    }


def milliseconds(case: Case, method: str, kind: str) -> float:
    seconds = max(cost(case, method, kind).seconds, host_seconds(method, case.mode))
    return float(f"{1e3 * seconds:.4g}")


@functools.cache
def _host_record() -> dict:
    """Microseconds by method and kind of step: the record's latest, or HOST_US."""
    if not HOST.exists():
        return HOST_US
    found = json.loads(HOST.read_text())
    return found["after"] if "after" in found else {x: found[x]["after"] for x in HOST_US}


def host_seconds(method: str, mode: str) -> float:
    """Of a step of this project's methods; 0 for others, whose host's time is not known."""
    if not method.startswith("treg"):
        return 0.0
    name = method if method in HOST_US else "treg_fused"
    return 1e-6 * _host_record()[name]["no_grad_us" if mode == "forward" else "fwd_bwd_us"]


def host_bound_rows(head: str, mode: str, kind: str = "cool") -> int:
    """The most rows, in steps of 32, whose step takes the host longer than the GPU; at most
    4096.
    """
    method = "treg_logprobs" if mode == "forward" else "treg_fused"
    shape = replace(gpu_case(head, 128, "all", mode), pairs=1)
    found = 0
    for rows in range(32, 4097, 32):
        case = replace(shape, length=rows // 2)
        if cost(case, method, kind).seconds > host_seconds(method, mode):
            break
        found = rows
    return found


def _stash_rows(c: Cost, budget: int) -> int:
    return max(1, int(budget / (2 * c.v + 8 * c.v / 256)))


def _split(total: int, step: int) -> list[int]:
    return [min(step, total - start) for start in range(0, total, step)]


# -- the bars, and the tables of NOTES.md


@dataclass(frozen=True)
class Outlook:
    """What the model says of a bar of time, by "cool" and "hot"."""

    bar: Bar
    ratio: dict[str, float]
    room: dict[str, float]  # the tile kernel may take so much of its predicted time
    bounds: tuple[float, float]  # the worse ratio where 1.0 or 0.5 instructions are issued a clock

    @property
    def margin(self) -> float:
        """Of the worse ratio: positive where the bar is met."""
        return 1 - max(self.ratio.values()) / self.bar.limit


def outlooks() -> list[Outlook]:
    """Bars of time that name a method with a prediction, the one most in doubt first."""
    cases = {case.name: case for case in gpu_cases()}
    found = []
    for bar in BARS:
        if bar.quantity != "time":
            continue
        case, ratio, room = cases[bar.cell], {}, {}
        for kind in RATES:
            ours, least = cost(case, bar.ours, kind), _least(case, bar, kind, ISSUED)
            ratio[kind] = ours.seconds / least
            room[kind] = 1 + (bar.limit * least - ours.seconds) / ours.in_kernels
        bounds = [
            max(
                cost(case, bar.ours, kind, issued).seconds / _least(case, bar, kind, issued)
                for kind in RATES
            )
            for issued in (1.0, 0.5)
        ]
        found.append(Outlook(bar, ratio, room, tuple(bounds)))
    return sorted(found, key=lambda x: x.margin)


def _least(case: Case, bar: Bar, kind: str, issued: float) -> float:
    """Seconds of the fastest of the methods that a bar compares with and that are modelled."""
    known = schemes(case)
    return min(cost(case, x, kind, issued).seconds for x in bar.against if x in known)


def bars_table() -> str:
    header = "bar | limit | cool | hot | margin | at 1.0 / 0.5 a clock | hangs on the tile kernel"
    lines = [f"| {header}, which may take |", "|---|---|---|---|---|---|---|"]
    for x in outlooks():
        cool, hot = (f"{x.ratio[kind]:.3f}" for kind in RATES)
        kernel = "forward" if x.bar.ours == "treg_logprobs" else "stash"
        capped = ", softcap" if "gemma" in x.bar.cell else ""
        lines.append(
            f"| {x.bar.what} | {x.bar.limit:g} | {cool} | {hot} | {100 * x.margin:+.1f} % | "
            f"{x.bounds[0]:.3f} / {x.bounds[1]:.3f} | "
            f"{kernel}{capped}: {min(x.room.values()):.2f} of what is expected |"
        )
    return "\n".join(lines)


def heads_table() -> str:
    """Of each head: FLOP/s of the tile kernels hot, over those of the vendor's library at D."""
    kinds = ("forward", "stash", "gradient")
    header = "| head | D | softcap | vendor | " + " | ".join(
        f"{kind}: instructions | of the vendor's" for kind in kinds
    )
    lines = [f"{header} |", "|" + "---|" * (4 + 2 * len(kinds))]
    for head, (D, V, softcap) in HEADS.items():
        case, rates = gpu_case(head, 16384, "all", "trainable"), RATES["hot"]
        row = [head, str(D), str(softcap or ""), f"{rates.vendor(D) / 1e12:.0f}"]
        for kind in kinds:
            row.append(f"{instructions(kind, V, softcap is not None):.0f}")
            row.append(f"{rate(kind, case, rates) / rates.vendor(D):.2f}")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def fit_table() -> str:
    header = ["k", *(str(k) for k in UPSTREAM["triton"])]
    measured = UPSTREAM["triton"]
    fitted = {k: plain_rate(k) / 1e12 for k in measured}
    rows = [
        header,
        ["---"] * len(header),
        ["upstream, TFLOP/s", *(str(x) for x in measured.values())],
        ["fit", *(f"{x:.0f}" for x in fitted.values())],
        ["fit / upstream - 1, %", *(f"{100 * (fitted[k] / measured[k] - 1):+.1f}" for k in fitted)],
        ["cuBLAS there", *(str(x) for x in UPSTREAM["cublas"].values())],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# head, N, mode, method, bare products
EXPECTED = (
    ("llama-3-8b", 16384, "trainable", "treg_fused", "gemm_3"),
    ("llama-3-8b", 16384, "frozen", "treg_fused", "gemm_2"),
    ("llama-3-8b", 16384, "forward", "treg_logprobs", "gemm_1"),
    ("llama-3-8b", 16384, "trainable", "treg_smallest", "gemm_4"),
    ("llama-3-8b", 2048, "trainable", "treg_fused", "gemm_3"),
    ("llama-3-8b", 128, "trainable", "treg_fused", "gemm_3"),
    ("gemma-2-9b", 16384, "trainable", "treg_fused", "gemm_3"),
    ("gemma-2-9b", 16384, "forward", "treg_logprobs", "gemm_1"),
    ("qwen2.5-7b", 16384, "trainable", "treg_fused", "gemm_3"),
    ("qwen3", 16384, "trainable", "treg_fused", "gemm_3"),
    ("gemma-3-270m", 16384, "trainable", "treg_fused", "gemm_3"),
)


def expected_table() -> str:
    """Milliseconds cool / hot, over the bare products; what came is from the records of GPUs."""
    lines = ["| | expected | over the bare products | came |", "|---|---|---|---|"]
    records = [json.loads(path.read_text()) for path in HERE.glob("results/*/loss_head.json")]
    for head, rows, mode, method, bare in EXPECTED:
        case = gpu_case(head, rows, "all", mode)
        ours, floor = ({k: milliseconds(case, x, k) for k in RATES} for x in (method, bare))
        measured = [
            " / ".join(f"{methods[method][k]['median']:.4g}" for k in RATES if k in methods[method])
            for record in records
            if method in (methods := record["cells"].get(case.name, {}).get("methods", {}))
        ]
        lines.append(
            f"| {head}, N = {rows}, {mode}, `{method}` | {ours['cool']:.4g} / {ours['hot']:.4g} | "
            f"{ours['cool'] / floor['cool']:.2f} / {ours['hot'] / floor['hot']:.2f} of `{bare}` | "
            f"{', '.join(measured) or 'not measured on a GPU'} |"
        )
    return "\n".join(lines)


def host_table() -> str:
    lines = ["| head | trainable | frozen | forward |", "|---|---|---|---|"]
    for head in HEADS:
        rows = [str(host_bound_rows(head, mode)) for mode in ("trainable", "frozen", "forward")]
        lines.append(f"| {head} | {' | '.join(rows)} |")
    return "\n".join(lines)


def region() -> str:
    """The tables of NOTES.md."""
    source = f"`{HOST.relative_to(HERE)}`" if HOST.exists() else "`HOST_US`: there is no record yet"
    host = ", ".join(
        f"{name} {x['fwd_bwd_us']:.0f} us with gradients and {x['no_grad_us']:.0f} without"
        for name, x in _host_record().items()
        if name in HOST_US
    )
    paragraphs = (
        "The fit to upstream's tile, H100:",
        fit_table(),
        "Rates by head, expected hot: instructions of a thread for a tile outside the loop over D, "
        "and\nthe kernel's FLOP/s over the vendor's at that D (its TFLOP/s stand in front).",
        heads_table(),
        "Milliseconds, cool / hot:",
        expected_table(),
        "Bars of time, the one most in doubt first. Then the worse ratio where a scheduler issues "
        "1.0 or\n0.5 instructions a clock in an epilogue, not 0.7. Last, how much of its expected "
        "time the tile\nkernel may take until the bar is missed.",
        bars_table(),
        f"The host ({source}): {host}.\nUp to so many rows a step waits for it, cool:",
        host_table(),
    )
    return "\n\n".join((BEGIN, *paragraphs, END))


def with_region(text: str) -> str:
    """The notes with the tables as the model gives them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{NOTES.name}: expected the lines {BEGIN!r} and {END!r}")
    return before + region() + after


def main() -> None:
    cells = {case.name: predict(case) for case in gpu_cases()}
    lines = [f" {json.dumps(name)}: {json.dumps(found)}" for name, found in cells.items()]
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    NOTES.write_text(with_region(NOTES.read_text()))
    print(region())


if __name__ == "__main__":
    main()
