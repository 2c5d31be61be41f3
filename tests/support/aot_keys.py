"""Which arguments make Triton compile a kernel anew, without a device and without compiling: print
for each case the kernels that another batch would have compiled besides.

    python tests/support/aot_keys.py sm90

A process of its own, as aot_worker.py is. A batch is some rows of longer tensors, as every plan
takes them: they start anywhere, and there are any number.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator

import torch
from aot_worker import fake_device, scalars_of
from triton.runtime.jit import JITFunction

STARTS, ROWS = (0, 1, 2, 3), (1, 5, 128, 2048)
TALL = max(STARTS) + max(ROWS)
BF16, F32 = torch.bfloat16, torch.float32


def rows_of(width: int, dtype=BF16, *, padding: int = 0) -> torch.Tensor:
    """Rows that a batch is cut out of, never touched."""
    return torch.empty(TALL, width + padding, dtype=dtype)[:, :width]


class Rows:
    """Tensors of one head, of which a launch takes rows."""

    def __init__(self, dtype: torch.dtype, V: int, D: int):
        self.V, self.dtype = V, dtype
        self.hidden, self.weight = rows_of(D, dtype), torch.empty(V, D, dtype=dtype)
        self.bias = torch.empty(V, dtype=dtype)
        self.target, self.coef = torch.empty(TALL, dtype=torch.int64), torch.empty(TALL)
        self.norm = torch.empty(TALL, 2)
        self.stash = rows_of(V, dtype, padding=-V % 64)

    def head(self, at: slice) -> tuple:
        hidden, target = self.hidden[at], self.target[at]
        return hidden, self.weight, target, self.bias, scalars_of(True), -100


def head_launches(dtype: torch.dtype, V: int, D: int, tile=None) -> Iterator[Callable]:
    import treg_kernels as K
    from treg_kernels.forward import STATISTICS

    x, rest = Rows(dtype, V, D), {"product": lambda *operands: None, "tile": tile}
    yield lambda at: K.logprob_forward(*x.head(at), STATISTICS, None, **rest)
    yield lambda at: K.logprob_forward(*x.head(at), (), x.stash[at], **rest)
    yield lambda at: K.logits_gradient(*x.head(at), x.norm[at], x.coef[at], x.stash[at], **rest)


def filtered_launches(dtype: torch.dtype, V: int, D: int) -> Iterator[Callable]:
    from treg_kernels import active, filtered

    x, tops, threshold = Rows(dtype, V, D), rows_of(-(-V // 256), F32), torch.empty(())
    out, sums = torch.empty_like(x.hidden), (torch.empty(V, D), torch.empty(V))

    def launch(at: slice) -> None:
        n = at.stop - at.start
        row = x.norm[at], x.coef[at]
        kept = active.active_tiles(tops[at], 256, *row, x.target[at], threshold, V)
        slab = torch.empty(filtered.slab_shape(TALL, V), dtype=dtype)
        filtered.filtered_gradients(*x.head(at)[:5], *row, kept, slab, out[:n], *sums, add=True)

    yield launch


def kl_launches(V: int) -> Iterator[Callable]:
    from treg_kernels.kl import kl_rows, stash_sum

    pad = -V % 64
    a, ref_a = rows_of(V, F32, padding=pad), rows_of(V, F32, padding=pad)
    stashes = [rows_of(V, padding=pad) for _ in range(2)]
    target, coefs = torch.empty(TALL, dtype=torch.int64), (torch.empty(TALL), torch.empty(TALL))
    given = scalars_of(True), scalars_of(True)

    def launch(at: slice) -> None:
        n = at.stop - at.start
        of = target[at], -100
        kept = [x[at] for x in stashes]
        here = tuple(x[at] for x in coefs)
        first = a[:n], ref_a[:n], None, None, *given, *of
        kl_rows(*first, reverse=False, stashes=kept)
        kl_rows(*first, reverse=False, stashes=[], coefs=here, out=stashes[0][:n])
        stash_sum(kept, here, stashes[0][:n])

    yield launch


def objective_launches() -> Iterator[Callable]:
    from treg_kernels.bases import BASES
    from treg_kernels.objective import pair_objective

    row, target = torch.zeros(TALL), torch.zeros(TALL, dtype=torch.int64)
    options = {"base": BASES["dpo"], "beta": 0.1, "alpha": 0.25, "options": (0.1,)}
    options |= {"static": False, "length_normalised": True, "nll": True}
    starts, stats = torch.zeros(2 * TALL + 4, dtype=torch.int64), torch.zeros(11 * TALL)

    def launch(at: slice, *, even: bool) -> None:
        rows, pairs = row[at], at.stop - at.start
        spans = at.start if even else starts[at.start : at.start + 2 * pairs + 1]
        given = rows, target[at], rows, rows, rows, spans, at.start, pairs
        out = stats[at.start : at.start + 11 * pairs].view(11, pairs)
        pair_objective(*given, row[at], out, rows, **options)

    yield functools.partial(launch, even=False)
    yield functools.partial(launch, even=True)


def rows_launches() -> Iterator[Callable]:
    from treg_kernels.rows import scale_rows

    row, numbers, one = torch.zeros(TALL), torch.zeros(TALL, dtype=torch.int64), torch.zeros(1)

    def launch(at: slice, *, D: int, listed: bool) -> None:
        rows = numbers[at] if listed else None
        factors = [row[at], one, row[at]]
        scale_rows(rows_of(D)[at], rows, factors, rows_of(D)[at], clean=listed)

    for D in (64, 63):
        for listed in (False, True):
            yield functools.partial(launch, D=D, listed=listed)


def cases() -> dict[str, Iterator[Callable]]:
    from treg_kernels import configs

    found = {"kl": kl_launches(50257), "objective": objective_launches(), "rows": rows_launches()}
    for name, V, D in (("even", 1024, 64), ("odd V", 50257, 64), ("odd D", 1001, 63)):
        for dtype in (BF16, F32):
            words = f"{name}, {str(dtype)[6:]}"
            found[f"head, {words}"] = head_launches(dtype, V, D)
            found[f"filtered, {words}"] = filtered_launches(dtype, V, D)
    found["head, vendor's product"] = head_launches(BF16, 128256, 64, configs.ROWS)
    return found


def kernels_anew(launches: Iterator[Callable], seen: set[tuple[str, str]]) -> list[str]:
    """What any batch would compile that rows 0 to 63 and rows 0 to 2047 did not. seen: filled by
    the launches with kernels and their keys.
    """
    found = []
    for launch in launches:
        seen.clear()
        launch(slice(0, 64))
        launch(slice(0, max(ROWS)))
        known = set(seen)
        for start in STARTS:
            for rows in ROWS:
                seen.clear()
                launch(slice(start, start + rows))
                found += [f"{name} {start}:{start + rows}" for name, _ in sorted(seen - known)]
    return found


def main(arch: str) -> dict[str, list[str]]:
    seen: set[tuple[str, str]] = set()

    def note(function, key, *rest):
        seen.add((function.fn.__name__, str(key)))

    JITFunction._do_compile = note
    with fake_device(arch):
        return {name: kernels_anew(launches, seen) for name, launches in cases().items()}


if __name__ == "__main__":
    json.dump(main(sys.argv[1]), sys.stdout)
