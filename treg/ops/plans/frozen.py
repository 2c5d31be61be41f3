"""A frozen head: two matrix products a row, and nothing of [N, V] is kept.

    d lp_t / d h_t = factor_t * (E_t W)      made in the forward; the backward multiplies by coef_t

The stash E of a tile is used at once. In float16 the product could overflow before it is scaled:
float16 takes the plan `kept`, with no row kept, or `columns`.
"""

from torch import Tensor

from treg.ops.call import Batch
from treg.ops.head.gemm import scaled_to
from treg.ops.head.gradients import Gradients, GradientSums, Needs
from treg.ops.head.memory import check_budget, empty_rows, stash_rows, tile_step
from treg.ops.plans.base import Saved, ScoredFirst, Scores


class Frozen(ScoredFirst):
    name = "frozen"
    saved_names = ("dhidden", "factor")
    backward_reads_rows = False

    def saved(self, batch: Batch) -> Saved:
        return {
            "dhidden": batch.hidden.new_empty(batch.hidden.shape),
            "factor": batch.hidden.new_empty(batch.hidden.shape[0], dtype=batch.tiles.compute),
        }

    def forward(self, batch: Batch) -> tuple[Scores, Saved]:
        tiles, call = batch.tiles, batch.call
        check_budget(tiles, call.budget, stash=True, outputs=call.outputs)
        scores = empty_rows(batch.hidden, tiles, ("logprobs", *call.outputs))
        step = tile_step(tiles, call.budget, stash=True, outputs=call.outputs)
        stash = stash_rows(
            batch.hidden,
            min(step, len(batch.rows)),
            batch.head.weight.shape[0],
            dtype=tiles.stash_dtype,
            multiple=tiles.row_multiple,
        )
        sums = GradientSums(
            batch.hidden, tiles, Needs(True, False, False), complete=batch.rows.complete
        )
        for rows in batch.rows.chunks(step):
            tile = stash[: len(rows)]
            got = tiles.forward(
                rows.read(batch.hidden), rows.read(batch.target), call.outputs, tile
            )
            for name, x in scores.items():
                rows.write(x, got[name])
            sums.add(tile, rows, got["factor"])
        tiles.release()
        assert sums.dhidden is not None
        return scores, {"dhidden": sums.dhidden, "factor": sums.row_scale}

    def gradients(self, batch: Batch, coef: Tensor, saved: Saved) -> Gradients:
        scale = coef * saved["factor"]
        dhidden = scaled_to(saved["dhidden"], scale.unsqueeze(-1), batch.hidden_dtype)
        return Gradients(dhidden, None, None)
