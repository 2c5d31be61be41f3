"""The backward of a head without the tiles of the logits' gradient that are below filter_eps:
1 + 3 rho products for a trainable head, 1 + 2 rho for a frozen one.

The forward leaves, beside the norm, the largest z of each block of words and row ("tops"). With the
coefficients coef_t = d L / d lp_t known, tile (i, j) of 128 rows by 128 words is inactive if

    max_{t in i, scored} |coef_t| * exp(top_t[j] - lse_t) < filter_eps * max_t |coef_t|

and no row of i with a coefficient has its target in j. Inactive tiles add nothing to any gradient;
the others are computed as ever. rho is the share of active tiles. The coefficients enter, so pairs
that a loss is done with cost nothing; filter_eps = 0 keeps every tile. What is left out has one
sign, so this is approximate and never the default. docs/maths.md says when it pays.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from treg.ops.call import Batch
from treg.ops.head import part_of
from treg.ops.head.gemm import add_transposed
from treg.ops.head.gradients import Gradients
from treg.ops.head.head import local_target, on_device, without_autocast
from treg.ops.head.memory import check_budget, empty_rows
from treg.ops.head.selection import RowSelection
from treg.ops.plans.base import Saved, ScoredFirst, Scores, score_rows, scored_coefficients

TILE = 128  # rows, and words: the tiles of treg_kernels.active
PIECE = 2048  # words that the torch path takes at once, at most


class Filtered(ScoredFirst):
    name = "filtered"
    saved_names = ("norm", "tops")

    def saved(self, batch: Batch) -> Saved:
        return empty_rows(batch.hidden, batch.tiles, self.saved_names)

    def forward(self, batch: Batch) -> tuple[Scores, Saved]:
        outputs = batch.call.outputs
        check_budget(batch.tiles, batch.call.budget, stash=True, outputs=outputs)
        check_slab(batch)
        scores = score_rows(batch, (*outputs, "tops"))
        return scores, {name: scores.pop(name) for name in self.saved_names}

    def backward(self, batch: Batch, coef: Tensor, saved: Saved) -> Gradients:
        return self.gradients(batch, coef, saved)  # which cleans coef itself

    def gradients(self, batch: Batch, coef: Tensor, saved: Saved) -> Gradients:
        gradients, _ = filtered_gradients(batch, coef, saved["norm"], saved["tops"])
        return gradients


def check_slab(batch: Batch) -> None:
    """ValueError where the budget does not hold one row of tiles in Triton."""
    least = TILE * _slab_row_bytes(batch)
    if batch.call.impl == "triton" and batch.call.budget < least:
        words = batch.head.weight.shape[0]
        raise ValueError(
            f"memory_budget: filter_eps needs at least {least} bytes ({TILE} rows at V={words}), "
            f"got {batch.call.budget}"
        )


def filtered_gradients(
    batch: Batch, coef: Tensor, norm: Tensor, tops: Tensor
) -> tuple[Gradients, Tensor]:
    """Gradients of sum_t coef_t lp_t from the active tiles, and their share rho, 0-dim float32.

    Args:
        coef: [N], anything where nothing is scored. norm: [N, 2], as `Tiles.forward` gives it;
            tops: [N, ceil(V / top_width)] in the same unit. Rows make tiles in the order of the
            selection.
    """
    coef = scored_coefficients(batch, coef)
    eps = batch.call.filter_eps or 0.0
    threshold = eps * coef.abs().amax() if len(coef) else coef.sum()
    work = _by_triton if batch.call.impl == "triton" else _by_torch
    with without_autocast(batch.hidden):
        gradients, active = work(batch, coef, norm, tops, threshold)
    if not active:
        return gradients, torch.zeros((), device=batch.hidden.device)
    return gradients, torch.cat([tiles.flatten() for tiles in active]).float().mean()


def _slab_row_bytes(batch: Batch) -> int:
    """A row of the slab, and copies of its hidden state and dhidden."""
    words, columns = batch.head.weight.shape
    width = -(-words // TILE) * TILE
    return (width + 2 * columns) * batch.tiles.stash_dtype.itemsize + 64


def _by_triton(
    batch: Batch, coef: Tensor, norm: Tensor, tops: Tensor, threshold: Tensor
) -> tuple[Gradients, list[Tensor]]:
    """Slabs of rows, whole tiles each, without looking at a value."""
    from treg_kernels import active, filtered
    from treg_kernels.tiles import Scalars

    head, rows, tiles = batch.head, batch.rows, batch.tiles
    words = head.weight.shape[0]
    bias = None if head.bias is None else head.bias.contiguous()
    scalars = Scalars.of(head.logit_scale, head.softcap, head.temperature)
    step = batch.call.budget // _slab_row_bytes(batch) // TILE * TILE
    one_slab = 0 < len(rows) <= step
    sums = _empty(batch, batch.dweight_dtype if one_slab else tiles.compute)
    if not len(rows):
        return _zeroed(sums), []
    slab = batch.hidden.new_empty(filtered.slab_shape(min(len(rows), step), words))
    found = []
    with on_device(head.weight):
        for selection in rows.chunks(step):
            h, y = selection.read(batch.hidden), selection.read(batch.target)
            c, lse = selection.read(coef), selection.read(norm)
            top = selection.read(tops)
            found.append(active.active_tiles(top, tiles.top_width, lse, c, y, threshold, words))
            out = None if sums.hidden is None else h.new_empty(h.shape)
            filtered.filtered_gradients(
                h,
                head.weight,
                y,
                bias,
                scalars,
                lse,
                c,
                found[-1],
                slab,
                out,
                sums.weight,
                sums.bias,
                add=len(found) > 1,
            )
            if sums.hidden is not None and out is not None:
                selection.write(sums.hidden, out)
    return sums, found


def _by_torch(
    batch: Batch, coef: Tensor, norm: Tensor, tops: Tensor, threshold: Tensor
) -> tuple[Gradients, list[Tensor]]:
    """Row tile by row tile: each run of its active words is a head of its own, for the rows with a
    coefficient.

    Their numbers are looked at: a GPU would be waited for. Temporaries are those of `PIECE` words,
    whatever the budget: less than a forward takes.
    """
    sums = _zeroed(_empty(batch, batch.tiles.compute))
    numbers = torch.arange(batch.rows.total, device=batch.hidden.device)
    found = []
    for listed in batch.rows.read(numbers).split(TILE):
        listed = listed[coef[listed] != 0.0]
        active = _active_words(batch, tops[listed], norm[listed], coef[listed], listed, threshold)
        found.append(active)
        if len(listed):
            _add_tiles(batch, RowSelection(batch.rows.total, (listed,)), active, norm, coef, sums)
    return sums, found


def _add_tiles(
    batch: Batch,
    rows: RowSelection,
    active: Tensor,
    norm: Tensor,
    coef: Tensor,
    sums: Gradients,
) -> None:
    """Add the active tiles of at most TILE rows to the sums."""
    head, compute = batch.head, batch.tiles.compute
    h, y, n, c = (rows.read(x) for x in (batch.hidden, batch.target, norm, coef))
    dhidden = h.new_zeros(h.shape, dtype=compute)
    for words in _runs(active.tolist(), head.weight.shape[0]):
        count = words.stop - words.start
        tile = h.new_empty(len(rows), count)
        here = local_target(y, words.start, count, head.ignore_index)
        part_of(batch.tiles, words).gradient(h, here, n, c, tile)
        if sums.hidden is not None:
            add_transposed(dhidden, tile.T, head.weight[words], first=False)
        if sums.weight is not None:
            add_transposed(sums.weight[words], tile, h, first=False)
        if sums.bias is not None:
            sums.bias[words] += tile.sum(0, dtype=compute)
    if sums.hidden is not None:
        rows.write(sums.hidden, dhidden.to(sums.hidden.dtype))


def _empty(batch: Batch, dweight: torch.dtype) -> Gradients:
    """Gradients not yet written, dhidden 0."""
    needs, hidden, head = batch.call.needs, batch.hidden, batch.head
    dhidden = weight = bias = None
    if needs.hidden:
        dhidden = hidden.new_zeros(hidden.shape)
    if needs.weight:
        weight = hidden.new_empty(head.weight.shape, dtype=dweight)
    if needs.bias and head.bias is not None:
        bias = hidden.new_empty(head.bias.shape, dtype=batch.tiles.compute)
    return Gradients(dhidden, weight, bias)


def _zeroed(sums: Gradients) -> Gradients:
    for total in (sums.weight, sums.bias):
        if total is not None:
            total.zero_()
    return sums


def _active_words(
    batch: Batch, tops: Tensor, norm: Tensor, coef: Tensor, listed: Tensor, threshold: Tensor
) -> Tensor:
    """The active tiles of rows with a coefficient, [ceil(V / TILE)] bool; NaN keeps a tile."""
    words = batch.head.weight.shape[0]
    target = batch.target[listed]
    small = coef.abs().unsqueeze(1) * torch.exp(tops - norm[:, :1]) < threshold
    inactive = small.all(0) & (threshold > 0.0)
    active = ~inactive.repeat_interleave(batch.tiles.top_width // TILE)[: -(-words // TILE)]
    active[target[(target >= 0) & (target < words)] // TILE] = True
    return active


def _runs(active: list[bool], words: int) -> Iterator[slice]:
    """The words of successive active tiles, at most PIECE at once."""
    start = None
    for tile, on in enumerate((*active, False)):
        if start is not None and (not on or (tile - start) * TILE >= PIECE):
            yield slice(start * TILE, min(tile * TILE, words))
            start = None
        if on and start is None:
            start = tile
