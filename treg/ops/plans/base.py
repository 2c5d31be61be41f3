"""What a plan is: an order in which rows go through a head, forward and backward."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from treg.losses import LossOptions
from treg.losses.pairs import PairOutputs, TokenInputs, evaluate_pairs
from treg.ops.call import Batch
from treg.ops.head.gradients import Gradients
from treg.ops.head.memory import empty_rows, held_bytes, tile_step
from treg.ops.head.selection import RowSelection

Saved = dict[str, Tensor]  # what a backward needs, by name
Scores = dict[str, Tensor]  # of each row: "logprobs", and the statistics asked for, by name
# Where the 2B sequences begin and end, [2B+1] offsets; None where only the device knows. The call
# may wait for the device.
Ends = Callable[[], list[int] | None]


class Plan(Protocol):
    """One order of the matrix products, chosen by `treg.ops.plans.choose_plan`.

    A plan keeps nothing between its calls: what its backward needs, it saves. It sees the rows of a
    `Batch`, of which only those in batch.rows are computed.
    """

    @property
    def name(self) -> str: ...

    @property
    def saved_names(self) -> tuple[str, ...]: ...

    @property
    def backward_reads_rows(self) -> bool:
        """Whether `backward` reads rows of hidden and target, or the weight. Which rows are scored
        must then be as in `forward`. Otherwise they may have any dtype.
        """
        ...

    def saved(self, batch: Batch) -> Saved:
        """What `forward` saves, not filled. Its shapes and dtypes follow from shapes alone,
        whatever rows are scored: this serves the operators' fake kernels.
        """
        ...

    def forward(self, batch: Batch) -> tuple[Scores, Saved]:
        """Score the rows."""
        ...

    def backward(self, batch: Batch, coef: Tensor, saved: Saved) -> Gradients:
        """Gradients of sum_t coef_t lp_t.

        coef: [N] in the dtype of sums, contiguous; anything at rows that are not scored. The
        gradients may have any floating dtype: the operator rounds them.
        """
        ...

    def forward_pairs(
        self, batch: Batch, pairs: TokenInputs, options: LossOptions, ends: Ends
    ) -> tuple[Scores, Saved, PairOutputs]:
        """Score pairs and evaluate their loss."""
        ...

    def backward_pairs(
        self, batch: Batch, upstream: Tensor, coef: Tensor, saved: Saved
    ) -> Gradients:
        """Gradients of the pairs' losses, each times its upstream gradient.

        upstream: [N], that of the row's pair, or [1] where it is the same for all. coef: [N],
        d loss / d lp_t, as `forward_pairs` gave it.
        """
        ...


class ScoredFirst:
    """A plan that scores all pairs, and differentiates them when the upstream gradient is known."""

    backward_reads_rows = True

    def gradients(self, batch: Batch, coef: Tensor, saved: Saved) -> Gradients:
        """`backward` for coef [N] that is 0 at rows that are not scored, or NaN where upstream is
        not finite.
        """
        raise NotImplementedError

    def backward(self, batch: Batch, coef: Tensor, saved: Saved) -> Gradients:
        return self.gradients(batch, scored_coefficients(batch, coef), saved)

    def forward_pairs(
        self: Plan,
        batch: Batch,
        pairs: TokenInputs,
        options: LossOptions,
        ends: Ends,
    ) -> tuple[Scores, Saved, PairOutputs]:
        scores, saved = self.forward(batch)
        logps = scores["logprobs"]
        outputs = PairOutputs.empty(pairs.pairs, logps)
        evaluate_pairs(batch.call.impl, logps, pairs, options, outputs)
        return scores, saved, outputs

    def backward_pairs(
        self, batch: Batch, upstream: Tensor, coef: Tensor, saved: Saved
    ) -> Gradients:
        return self.gradients(batch, coef * upstream, saved)


def score_rows(
    batch: Batch,
    outputs: tuple[str, ...],
    stash: Tensor | None = None,
) -> dict[str, Tensor]:
    """Score the rows of a batch tile by tile.

    Args:
        outputs: statistics, "tops" perhaps.
        stash: [kept, V], filled with that of the first rows; or None.
    Returns:
        "logprobs" and the outputs [N], "norm" [N, 2]; 0 where nothing is scored. Beside a stash
        "factor" [kept].
    """
    tiles, rows = batch.tiles, batch.rows
    count = len(rows)
    kept = 0 if stash is None else stash.shape[0]
    reserved = 0 if stash is None else held_bytes(stash)
    step = tiles.max_rows
    if kept < count:
        step = tile_step(tiles, batch.call.budget, stash=False, outputs=outputs, reserved=reserved)
    if rows.complete and 0 < count <= step and kept in (0, count):
        found = tiles.forward(batch.hidden, batch.target, outputs, stash)
        tiles.release()
        return found
    found, more = empty_rows(batch.hidden, tiles, ("logprobs", "norm", *outputs)), {}

    def score(selection, tile_stash=None):
        hidden, target = selection.read(batch.hidden), selection.read(batch.target)
        got = tiles.forward(hidden, target, outputs, tile_stash)
        for name, x in found.items():
            selection.write(x, got[name])
        return got

    if stash is not None:
        factor, at = batch.hidden.new_empty(kept, dtype=tiles.compute), 0
        for selection in rows.section(0, kept).chunks(tiles.max_rows):
            place = slice(at, at + len(selection))
            factor[place] = score(selection, stash[place])["factor"]
            at = place.stop
        more["factor"] = factor
    for selection in rows.section(kept, count).chunks(step):
        score(selection)
    tiles.release()
    return found | more


def scored_coefficients(batch: Batch, coef: Tensor) -> Tensor:
    """coef in the dtype of sums, 0 where nothing is scored, whatever a loss leaves there."""
    scored = batch.target != batch.head.ignore_index
    kept = torch.where(scored, coef, 0.0)
    return kept if kept.dtype == batch.tiles.compute else kept.to(batch.tiles.compute)


def row_factors(batch: Batch, rows: RowSelection, target: Tensor) -> Tensor | None:
    """What multiplies a tile of complete gradients, whose rows and target these are: 1 at scored
    rows and 0 at others, where those could not be left out; else None, which stands for 1
    everywhere.
    """
    if rows.looked:
        return None
    return (target != batch.head.ignore_index).to(batch.tiles.compute)
