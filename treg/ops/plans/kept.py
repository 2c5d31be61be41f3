"""A trainable head: as many rows as the budget holds keep their stash until the backward.

kept rows     3 products   dhidden = coef * factor * (E W)      dweight += E^T (coef * factor * h)
other rows    4 products   their logits are computed again when coef is known
float16       4 products   no row is kept: a loss scaler's factor must reach the 16-bit products
"""

import functools
from math import isqrt

import torch
from torch import Tensor

from treg.ops.call import Batch
from treg.ops.head import Tiles
from treg.ops.head.gradients import Gradients, GradientSums
from treg.ops.head.head import without_autocast
from treg.ops.head.memory import (
    check_budget,
    held_bytes,
    pass_rows,
    stash_rows,
    tile_rows,
    tile_step,
)
from treg.ops.head.selection import RowSelection
from treg.ops.plans.base import (
    Saved,
    ScoredFirst,
    Scores,
    row_factors,
    score_rows,
)


class Kept(ScoredFirst):
    name = "kept"
    saved_names = ("norm", "stash", "factor")

    def saved(self, batch: Batch) -> Saved:
        stash, dtype = self._room(batch), batch.tiles.compute
        return {
            "norm": batch.hidden.new_empty(batch.hidden.shape[0], 2, dtype=dtype),
            "stash": stash,
            "factor": batch.hidden.new_empty(stash.shape[0], dtype=dtype),
        }

    def forward(self, batch: Batch) -> tuple[Scores, Saved]:
        outputs = batch.call.outputs
        check_budget(batch.tiles, batch.call.budget, stash=True, outputs=outputs)
        room = self._room(batch)
        stash = self._of_kept_rows(batch, room)
        scores = score_rows(batch, outputs, stash)
        factor = factors_of(room, scores.pop("factor", None), batch.tiles.compute)
        return scores, {"norm": scores.pop("norm"), "stash": room, "factor": factor}

    def backward(self, batch: Batch, coef: Tensor, saved: Saved) -> Gradients:
        return self._gradients(batch, (coef,), saved)

    def backward_pairs(
        self, batch: Batch, upstream: Tensor, coef: Tensor, saved: Saved
    ) -> Gradients:
        return self._gradients(batch, (coef, upstream), saved)

    def _gradients(self, batch: Batch, coefs: tuple[Tensor, ...], saved: Saved) -> Gradients:
        stash = self._of_kept_rows(batch, saved["stash"])
        factor = saved["factor"]
        if stash is not None and stash.shape[0] < factor.shape[0]:
            factor = factor[: stash.shape[0]]
        sums = differentiate_rows(batch, saved["norm"], coefs, stash, factor)
        dhidden = sums.dhidden  # of complete gradients, if no row was kept
        if stash is not None or batch.hidden_dtype != batch.call.dtype:
            dhidden = sums.scaled_hidden_gradient(batch.hidden_dtype)
        return Gradients(dhidden, sums.dweight, sums.dbias)

    def _kept(self, batch: Batch, rows: int) -> int:
        if batch.call.dtype == torch.float16:
            return 0
        return kept_rows(batch.tiles, batch.call.budget, rows, batch.call.outputs)

    def _room(self, batch: Batch) -> Tensor:
        """Room for the stash of as many rows as are kept where all of a batch are scored."""
        tiles, hidden = batch.tiles, batch.hidden
        rows, words = self._kept(batch, hidden.shape[0]), batch.head.weight.shape[0]
        like = {"dtype": tiles.stash_dtype, "multiple": tiles.row_multiple}
        return stash_rows(hidden, rows, words, **like)

    def _of_kept_rows(self, batch: Batch, room: Tensor) -> Tensor | None:
        """The stash of the rows that are kept of those that are scored; None without any."""
        most, count = room.shape[0], len(batch.rows)
        kept = most if most == count else min(most, self._kept(batch, count))
        if not kept:
            return None
        return room if kept == most else room[:kept]


def factors_of(room: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """factor [kept] with a place for each row of room [kept or more, V]; the others are not filled.

    factor: None where no row is kept.
    """
    if factor is not None and factor.shape[0] == room.shape[0]:
        return factor
    found = room.new_empty(room.shape[0], dtype=dtype)
    if factor is not None:
        found[: factor.shape[0]] = factor
    return found


def kept_rows(tiles: Tiles, budget: int, count: int, outputs: tuple[str, ...]) -> int:
    """How many of `count` rows keep their stash: all, or what the budget holds beside a tile of the
    others.

    C rows of stash fit in all. Of n = count - C more, C - t rows kept leave n + t to be computed
    again, t at a time: n + t rows and (n + t) / t passes, each worth P = pass_rows of them, are the
    least at t = sqrt(P * n). n is taken to be C, whatever it is: that is close enough, and no
    number of rows needs a graph of its own under torch.compile.
    """
    capacity = tile_rows(tiles, budget, stash=True, outputs=outputs)
    if count <= capacity:
        return count
    each = pass_rows(tiles.head.weight.device)
    kept = capacity - min(tiles.max_rows, isqrt(each * capacity))
    return kept if kept >= each else 0  # they cost a pass of their own


def differentiate_rows(
    batch: Batch, norm: Tensor, coefs: tuple[Tensor, ...], stash: Tensor | None, factor: Tensor
) -> GradientSums:
    """Gradients of sum_t coef_t lp_t.

    Args:
        norm: [N, 2]. coefs: coef is their product; [N], anything where nothing is scored, and
            others perhaps, [N] or [1]. stash [kept, V] and factor [kept]: as of `score_rows`, for
            the first rows; the logits of the others are computed again. factor without a stash:
            any.
    """
    tiles, rows, count = batch.tiles, batch.rows, len(batch.rows)
    kept = 0 if stash is None else stash.shape[0]
    step = 0  # rows of a tile of those whose logits are computed again
    if kept < count:
        reserved = 0 if stash is None else held_bytes(stash)
        step = tile_step(tiles, batch.call.budget, stash=True, reserved=reserved)
    one_tile = kept == count or (kept == 0 and count <= step)
    sums = GradientSums(
        batch.hidden,
        tiles,
        batch.call.needs,
        complete=rows.complete,
        dweight_dtype=batch.dweight_dtype if one_tile else None,
    )
    with without_autocast(batch.hidden):
        if stash is not None and rows.complete and kept == count:
            sums.add(stash, rows, *coefs, factor)
        else:
            coef = functools.reduce(torch.mul, coefs)
            if stash is not None:
                first = rows if kept == count else rows.section(0, kept)
                sums.add(stash, first, first.read(coef), factor)
            if kept < count:
                _differentiate_again(batch, norm, coef, sums, rows.section(kept, count), step)
    sums.finish()
    tiles.release()
    return sums


def _differentiate_again(
    batch: Batch,
    norm: Tensor,
    coef: Tensor,
    sums: GradientSums,
    rows: RowSelection,
    step: int,
) -> None:
    """Rows whose stash was not kept, so many at a time."""
    tiles = batch.tiles
    tile = stash_rows(
        batch.hidden,
        min(step, len(rows)),
        batch.head.weight.shape[0],
        dtype=tiles.stash_dtype,
        multiple=tiles.row_multiple,
    )
    for selection in rows.chunks(step):
        target = selection.read(batch.target)
        out = tile[: len(selection)]
        hidden = selection.read(batch.hidden)
        tiles.gradient(hidden, target, selection.read(norm), selection.read(coef), out)
        sums.add(out, selection, row_factors(batch, selection, target))
