"""How long each scheme should take on an H200: a model to hold measurements against, not a
measurement.

    python benchmarks/roofline.py

writes results/predicted-h200.json: milliseconds, cool and hot.

Units: seconds, bytes, FLOP. N rows, D hidden, V vocabulary, rows C at a time, W = 2 V D bytes of
weight.

    product(m, n, k)  = max(2 m n k / R, (2 m k + 2 k n + out) / B)
                      out: 2 m n, or what it says
    R                 = 790e12 FLOP/s cool, 700e12 hot (cuBLAS); 680e12 and 640e12 for a product in
                      Triton
    B                 = 4.3e12 bytes/s, read and written
    pass over x bytes = x / B;  adding a product's result to sums in float32 = 0.5 * 8 m n / B, half
                      of it hidden
    launch            = 4e-6 s of idleness each

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
    verl              forward in Triton; backward slabs of 9504 tokens: Triton, two products,
                      dhidden added in bfloat16
    dense_log_softmax 3 products, 34 N V        dense_compiled: 3 products, 10 N V
    torch_linear_cross_entropy    4 products, 20 N V, dweight added once per 4096 rows

Where a part of the rows is scored, TRL and treg run those alone, the others all. Not modelled:
quantisation of tiles to the 132 multiprocessors, L2, and cut-cross-entropy, whose speed hangs on
its filter and its locks.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from loss_head_cases import Case, gpu_cases, scored_mask

OUT = Path(__file__).parent / "results" / "predicted-h200.json"
BUDGET, LEAST = 1 << 30, 192 << 20
LAUNCH = 4e-6


@dataclass(frozen=True)
class Rates:
    vendor: float  # FLOP/s
    triton: float
    memory: float = 4.3e12  # bytes/s


RATES = {"cool": Rates(790e12, 680e12), "hot": Rates(700e12, 640e12)}


class Cost:
    """Seconds of a scheme on [n, d] x [d, v], added up."""

    def __init__(self, case: Case, rates: Rates, rows: int):
        self.n, self.d, self.v, self.rates, self.mode = (
            rows,
            case.hidden,
            case.vocab,
            rates,
            case.mode,
        )
        self.seconds = 0.0

    def product(
        self, m: float, n: float, k: float, *, triton: bool = False, out: float | None = None
    ) -> "Cost":
        moved = 2 * m * k + 2 * k * n + (2 * m * n if out is None else out)
        rate = self.rates.triton if triton else self.rates.vendor
        self.seconds += max(2 * m * n * k / rate, moved / self.rates.memory) + LAUNCH
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
        c.product(c.n, c.v, c.d, triton=True, out=8 * c.n * c.v / 256)
        return
    rows = _stash_rows(c, budget)
    groups = _split(c.n, max(1, rows // pair) * pair if rows >= pair else rows)
    for i, part in enumerate(groups):
        c.product(part, c.v, c.d, triton=True).gradients(part).moved(4 * part * c.d)
        if c.trainable and i:
            c.moved(0.5 * 8 * c.v * c.d)
    c.moved(4 * c.n * c.d + 6 * c.v * c.d * (c.trainable and len(groups) > 1))


def treg_smallest(c: Cost) -> None:
    """4 products, a part of the vocabulary after the other."""
    c.product(c.n, c.v, c.d, triton=True, out=8 * c.n * c.v / 256)
    c.product(c.n, c.v, c.d, triton=True)
    for columns in _split(c.v, max(128, LEAST // (2 * c.n))):
        c.gradients(c.n, columns).moved(0.5 * 8 * c.n * c.d)
    c.moved(6 * c.n * c.d)


def treg_logprobs(c: Cost) -> None:
    capacity = _stash_rows(c, BUDGET)
    if not c.trainable or c.n <= capacity:
        return treg_fused(c)
    tile = min(capacity, math.isqrt(512 * (c.n - capacity)))
    again = c.n - (capacity - tile)
    c.product(again, c.v, c.d, triton=True, out=8 * again * c.v / 256)
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
    c.product(c.n, c.v, c.d, triton=True, out=12 * c.n * c.v / 1024)
    if c.mode != "forward":
        for columns in _split(c.v, 9504):
            c.product(c.n, columns, c.d, triton=True).product(c.n, c.d, columns).product(
                columns, c.d, c.n
            )
            c.moved(4 * c.n * c.d)


def predict(case: Case) -> dict[str, dict[str, float]]:
    """Milliseconds by method and "cool" or "hot"."""
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
    return {
        name: {kind: _milliseconds(case, rates, *how) for kind, rates in RATES.items()}
        for name, how in everywhere.items()
    }


def _milliseconds(case: Case, rates: Rates, rows: int, scheme) -> float:
    cost = Cost(case, rates, rows)
    scheme(cost)
    return float(f"{1e3 * cost.seconds:.4g}")


def _stash_rows(c: Cost, budget: int) -> int:
    return max(1, int(budget / (2 * c.v + 8 * c.v / 256)))


def _split(total: int, step: int) -> list[int]:
    return [min(step, total - start) for start in range(0, total, step)]


def main() -> None:
    cells = {case.name: predict(case) for case in gpu_cases()}
    lines = [f" {json.dumps(name)}: {json.dumps(found)}" for name, found in cells.items()]
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(json.dumps(cells["llama-3-8b-N16384-all-trainable"], indent=1))


if __name__ == "__main__":
    main()
