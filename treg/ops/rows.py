"""Rows through a head, tile by tile: scored, and differentiated once their coefficients are known.

By rows: a tile has all of the vocabulary, and dweight is added up in float32. By columns: a tile
has all rows, dweight is written once, and dhidden is added up in float32: less memory as long as
there are fewer rows than words.

    kept rows    d lp_t / d a_t = factor_t * E_t:   dhidden = coef * factor * (E W),  dweight += E^T (coef * factor * h)

As many rows are kept as a budget holds beside a tile of the others, whose logits are computed
again.
"""

from math import isqrt

import torch
from torch import Tensor

from treg.ops.filtered import Gradients
from treg.ops.gemm import add_transposed
from treg.ops.head import (
    HeadGradients,
    chunks,
    empty_rows,
    local_target,
    part_of,
    pass_rows,
    sees_values,
    tile_rows,
    tile_step,
    without_autocast,
)


def kept_rows(tiles, budget: int, count: int, outputs: tuple[str, ...]) -> int:
    """How many of `count` rows have their stash kept: all, or what the budget holds beside a tile
    of the others.

    C rows of stash fit in all. Of n = count - C more, C - t rows kept leave n + t to be computed
    again, t at a time: n + t rows and (n + t) / t passes, each worth P = pass_rows of them, are the
    least at t = sqrt(P * n). n is taken to be C, whatever it is: close enough, and no number of
    rows needs a graph of its own under torch.compile.
    """
    capacity = tile_rows(tiles, budget, stash=True, outputs=outputs)
    if count <= capacity:
        return count
    each = pass_rows(tiles.head.weight.device)
    kept = capacity - min(tiles.max_rows, isqrt(each * capacity))
    return kept if kept >= each else 0  # they cost a pass of their own


def score_rows(
    tiles,
    hidden: Tensor,
    target: Tensor,
    rows: Tensor | None,
    outputs: tuple[str, ...],
    budget: int,
    stash: Tensor | None,
    factor: Tensor | None,
) -> dict[str, Tensor]:
    """Score the rows listed (None: all of N) tile by tile: "logprobs", "norm" and the outputs, [N],
    0 where ignored.

    stash [kept, V] and factor [kept], or None, are filled with those of the first rows.
    """
    N = hidden.shape[0]
    found = empty_rows(hidden, tiles, ("logprobs", "norm", *outputs))
    kept, reserved = (0, 0) if stash is None else (stash.shape[0], stash.nbytes)
    step = tile_step(tiles, budget, stash=False, outputs=outputs, reserved=reserved)
    at = 0
    for r in (
        *chunks(rows, N, min(tiles.max_rows, kept), stop=kept),
        *chunks(rows, N, step, start=kept),
    ):
        y = target[r]
        here = slice(at, at + y.shape[0])
        got = tiles.forward(
            hidden[r], y, outputs, None if stash is None or at >= kept else stash[here]
        )
        for name, x in found.items():
            x[r] = got[name]
        if factor is not None and at < kept:
            factor[here] = got["factor"]
        at = here.stop
    tiles.release()
    return found


def differentiate_rows(
    tiles,
    hidden: Tensor,
    target: Tensor,
    rows: Tensor | None,
    norm: Tensor,
    coef: Tensor,
    stash: Tensor | None,
    factor: Tensor | None,
    budget: int,
    needs: tuple[bool, bool, bool],
) -> HeadGradients:
    """Gradients of sum_t coef_t lp_t over the rows listed; norm is [N], coef [N], stash and factor
    as of `score_rows`.

    The stash of the first rows gives theirs; the logits of the others are computed again.
    """
    N, head = hidden.shape[0], tiles.head
    count = N if rows is None else rows.shape[0]
    kept, reserved = (0, 0) if stash is None else (stash.shape[0], stash.nbytes)
    step = tile_step(tiles, budget, stash=True, reserved=reserved)
    grads = HeadGradients(
        hidden,
        tiles,
        needs,
        complete=rows is None,
        single=kept == count or (not kept and count <= step),
    )
    with without_autocast(hidden):
        for r in chunks(rows, N, kept, stop=kept):
            grads.add(stash, r, coefficients(coef[r], factor))
        tile = hidden.new_empty(
            min(step, count - kept), head.weight.shape[0], dtype=tiles.stash_dtype
        )
        for r in chunks(rows, N, step, start=kept):
            y = target[r]
            out = tile[: y.shape[0]]
            tiles.gradient(hidden[r], y, norm[r], coef[r], out)
            grads.add(out, r, scored_scale(y, head.ignore_index))
    grads.finish()
    tiles.release()
    return grads


def differentiate_columns(
    tiles,
    hidden: Tensor,
    target: Tensor,
    rows: Tensor | None,
    norm: Tensor,
    coef: Tensor,
    budget: int,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of sum_t coef_t lp_t over the rows listed, for a part of the vocabulary after the
    other.

    Temporaries: budget, and dhidden in float32, [n, D].
    """
    weight, bias, ignore_index = tiles.head.weight, tiles.head.bias, tiles.head.ignore_index
    V = weight.shape[0]
    need_hidden, need_weight, need_bias = needs
    if rows is None:
        h, y, n, c = hidden, target, norm, coef
        if not sees_values(target):
            h = torch.where((y != ignore_index).unsqueeze(-1), h, 0.0)
    else:
        h, y, n, c = hidden[rows], target[rows], norm[rows], coef[rows]
    total = h.new_zeros(h.shape, dtype=tiles.compute) if need_hidden else None
    dweight = (
        torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else None
    )
    dbias = torch.empty_like(bias, dtype=tiles.compute) if need_bias else None
    step = max(
        128,
        max(0, budget - tiles.fixed_bytes) // max(1, tiles.column_bytes(h.shape[0])) // 128 * 128,
    )
    tile = h.new_empty(h.shape[0] * min(step, V), dtype=tiles.stash_dtype)
    with without_autocast(hidden):
        for first in range(0, V, step):
            columns = slice(first, min(first + step, V))
            words = columns.stop - first
            out = tile[: h.shape[0] * words].view(h.shape[0], -1)
            part_of(tiles, columns).gradient(
                h, local_target(y, first, words, ignore_index), n, c, out
            )
            if total is not None:
                add_transposed(total, out.T, weight[columns], first=False)
            if dweight is not None:
                add_transposed(dweight[columns], out, h, first=True)
            if dbias is not None:
                dbias[columns] = out.sum(0, dtype=tiles.compute)
    dhidden = None if total is None else total.to(hidden.dtype)
    if rows is not None and dhidden is not None:
        dhidden = hidden.new_zeros(hidden.shape).index_copy_(0, rows, dhidden)
    return Gradients(dhidden, dweight, dbias)


def scored_scale(target: Tensor, ignore_index: int) -> Tensor | None:
    """1 at scored rows and 0 at others, where those could not be left out; else None, for 1
    everywhere.
    """
    return None if sees_values(target) else (target != ignore_index).float()


def coefficients(coef: Tensor, factor: Tensor) -> Tensor:
    """coef * factor; 0 where factor is, whatever a loss leaves at rows that are not scored (NaN
    even).
    """
    return torch.where(factor == 0.0, factor, coef * factor)


def frozen_rows(
    tiles,
    hidden: Tensor,
    target: Tensor,
    rows: Tensor | None,
    outputs: tuple[str, ...],
    budget: int,
) -> tuple[dict[str, Tensor], HeadGradients]:
    """Score the rows listed, and dhidden of each for a coefficient of 1, its row_scale not yet
    multiplied in.
    """
    N, head = hidden.shape[0], tiles.head
    found = empty_rows(hidden, tiles, ("logprobs", "norm", *outputs))
    step = tile_step(tiles, budget, stash=True, outputs=outputs)
    count = N if rows is None else rows.shape[0]
    stash = hidden.new_empty(min(step, count), head.weight.shape[0], dtype=tiles.stash_dtype)
    grads = HeadGradients(hidden, tiles, (True, False, False), complete=rows is None)
    for r in chunks(rows, N, step):
        y = target[r]
        tile = stash[: y.shape[0]]
        got = tiles.forward(hidden[r], y, outputs, tile)
        for name, x in found.items():
            x[r] = got[name]
        grads.add(tile, r, got["factor"])
    tiles.release()
    return found, grads


def weight_gradients(
    grads: HeadGradients, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """dweight and dbias in the dtypes of their tensors."""
    dweight = None if grads.dweight is None else grads.dweight.to(weight.dtype)
    return dweight, None if grads.dbias is None else grads.dbias.to(bias.dtype)
