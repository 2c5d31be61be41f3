"""The least memory: the backward takes a part of the vocabulary after the other, with all rows.

dweight is written once, in its own dtype, and dhidden is added up in float32, [n, D]: less memory
than a float32 [V, D] sum as long as there are fewer rows than words. Four products a row, for the
logits are computed again.
"""

import torch
from torch import Tensor

from treg.ops.call import Batch
from treg.ops.head import part_of
from treg.ops.head.gemm import add_transposed
from treg.ops.head.gradients import Gradients
from treg.ops.head.head import local_target, without_autocast
from treg.ops.head.memory import check_budget, row_width
from treg.ops.plans.base import Saved, ScoredFirst, Scores, score_rows

WORDS = 128  # a part has a multiple of so many words


class Columns(ScoredFirst):
    name = "columns"
    saved_names = ("norm",)

    def saved(self, batch: Batch) -> Saved:
        rows = batch.hidden.shape[0]
        return {"norm": batch.hidden.new_empty(rows, 2, dtype=batch.tiles.compute)}

    def forward(self, batch: Batch) -> tuple[Scores, Saved]:
        outputs = batch.call.outputs
        check_budget(batch.tiles, batch.call.budget, stash=True, outputs=outputs)
        scores = score_rows(batch, outputs)
        return scores, {"norm": scores.pop("norm")}

    def gradients(self, batch: Batch, coef: Tensor, saved: Saved) -> Gradients:
        tiles, head, rows = batch.tiles, batch.head, batch.rows
        hidden, target = rows.read(batch.hidden), rows.read(batch.target)
        norm, coef = rows.read(saved["norm"]), rows.read(coef)
        if not rows.looked:
            hidden = torch.where((target != head.ignore_index).unsqueeze(-1), hidden, 0.0)
        hidden = tiles.readable(hidden)  # once for all parts
        needs, (words, columns) = batch.call.needs, head.weight.shape
        total = dweight = dbias = None
        if needs.hidden:
            total = hidden.new_zeros(len(rows), columns, dtype=tiles.compute)
        if needs.weight:
            dweight = hidden.new_empty(words, columns, dtype=batch.dweight_dtype)
        if needs.bias:
            dbias = hidden.new_empty(words, dtype=tiles.compute)
        step = self._words(batch, len(rows))
        widest = row_width(min(step, words), tiles.row_multiple)
        tile = hidden.new_empty(len(rows) * widest, dtype=tiles.stash_dtype)
        with without_autocast(hidden):
            for first in range(0, words, step):
                part = slice(first, min(first + step, words))
                count = part.stop - part.start
                width = row_width(count, tiles.row_multiple)
                out = tile[: len(rows) * width].view(len(rows), width)[:, :count]
                here = local_target(target, first, count, head.ignore_index)
                part_of(tiles, part).gradient(hidden, here, norm, coef, out)
                if total is not None:
                    add_transposed(total, out.T, head.weight[part], first=False)
                if dweight is not None:
                    add_transposed(dweight[part], out, hidden, first=True)
                if dbias is not None:
                    dbias[part] = out.sum(0, dtype=tiles.compute)
        return Gradients(_at_rows(batch, total), dweight, dbias)

    def _words(self, batch: Batch, rows: int) -> int:
        """Words of a part, from the budget.

        The last part has more than one word, as far as that can be: Triton compiles a kernel of its
        own for a size of 1, and how many words are left depends on the rows.
        """
        tiles = batch.tiles
        free = max(0, batch.call.budget - tiles.fixed_bytes)
        words = free // max(1, tiles.column_bytes(rows))
        step = max(WORDS, words // WORDS * WORDS)
        while step > WORDS and batch.head.weight.shape[0] % step == 1:
            step -= WORDS
        return step


def _at_rows(batch: Batch, dhidden: Tensor | None) -> Tensor | None:
    """[N, D] with these gradients of the selected rows, and 0 elsewhere."""
    if dhidden is None:
        return None
    if batch.rows.complete:
        return dhidden.to(batch.hidden_dtype)
    found = batch.hidden.new_zeros(batch.hidden.shape, dtype=batch.hidden_dtype)
    batch.rows.write(found, dhidden.to(batch.hidden_dtype))
    return found
