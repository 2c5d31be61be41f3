"""Pairs that do not fit into the budget at once: their gradients are made in the forward, one group
of pairs after the other, so that a trainable head needs three products instead of four.

    stash      pairs whose tiles fit into the budget together keep the unscaled gradient E of all
               their rows until their loss is known; then v_t = coef_t * factor_t,
               dhidden = v * (E W), dweight += E^T (v * h)                           any objective
    scale      one pair longer than that, where coef_t = w * s_t with s_t known beforehand: add up
               S = E^T (s * factor * h) over its tiles, then dweight += w * S
               objectives with `LossOptions.pair_scalar`
    recompute  one pair longer than that, anything else: log-probs first, then each tile again
               (a fourth product)

Which, is decided on the host from lengths alone. All pairs must get the same upstream gradient.
"""

import itertools
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from treg.losses import LossOptions
from treg.losses.pairs import STATS, PairOutputs, TokenInputs, evaluate_pairs
from treg.ops.call import Batch
from treg.ops.head.gemm import scaled_to
from treg.ops.head.gradients import Gradients, GradientSums
from treg.ops.head.memory import check_budget, empty_rows, stash_rows, tile_rows, tile_step
from treg.ops.head.selection import RowSelection
from treg.ops.plans.base import Ends, Saved, Scores, row_factors

MIN_TILE_ROWS = 16  # below this a product reads the weight more often than it is worth


class PairGroups:
    name = "pair_groups"
    saved_names = ("dhidden", "row_scale", "dweight", "dbias", "weight_scale")
    backward_reads_rows = False

    def saved(self, batch: Batch) -> Saved:
        hidden, head, needs = batch.hidden, batch.head, batch.call.needs
        compute = batch.tiles.compute
        found: Saved = {name: hidden.new_empty(0) for name in self.saved_names}
        found["row_scale"] = hidden.new_empty(hidden.shape[0], dtype=compute)
        found["weight_scale"] = hidden.new_empty((), dtype=compute)
        if needs.hidden:
            found["dhidden"] = hidden.new_empty(hidden.shape)
        if needs.weight:
            found["dweight"] = hidden.new_empty(head.weight.shape, dtype=compute)
        if needs.bias and head.bias is not None:
            found["dbias"] = hidden.new_empty(head.bias.shape, dtype=compute)
        return found

    def forward(self, batch: Batch) -> tuple[Scores, Saved]:
        raise NotImplementedError("pair_groups takes pairs whose loss is known: forward_pairs")

    def forward_pairs(
        self, batch: Batch, pairs: TokenInputs, options: LossOptions, ends: Ends
    ) -> tuple[Scores, Saved, PairOutputs]:
        call = batch.call
        check_budget(batch.tiles, call.budget, stash=True, outputs=call.outputs)
        work = GroupWork.of(batch, pairs, options, ends())
        work.run()
        sums = work.sums

        def given(x: Tensor | None) -> Tensor:
            # each its own: an operator's results share no memory
            return batch.hidden.new_empty(0) if x is None else x

        saved = {
            "dhidden": given(sums.dhidden),
            "row_scale": sums.row_scale,
            "dweight": given(sums.dweight),
            "dbias": given(sums.dbias),
            "weight_scale": work.weight_scale,
        }
        return work.scores, saved, work.outputs

    def backward(self, batch: Batch, coef: Tensor, saved: Saved) -> Gradients:
        raise NotImplementedError("pair_groups takes pairs whose loss is known: forward_pairs")

    def backward_pairs(
        self, batch: Batch, upstream: Tensor, coef: Tensor, saved: Saved
    ) -> Gradients:
        needs = batch.call.needs
        scale = saved["weight_scale"] * upstream[0]
        scale_of_row = saved["row_scale"]  # 0 where nothing is scored, whatever upstream is
        rows = torch.where(scale_of_row == 0.0, 0.0, scale_of_row * upstream[0]).unsqueeze(-1)
        dhidden = dweight = dbias = None
        if needs.hidden:
            dhidden = scaled_to(saved["dhidden"], rows, batch.hidden_dtype)
        if needs.weight:
            dweight = scaled_to(saved["dweight"], scale, batch.weight_dtype)
        if needs.bias and batch.head.bias is not None:
            dbias = scaled_to(saved["dbias"], scale, batch.head.bias.dtype)
        return Gradients(dhidden, dweight, dbias)


class Group(NamedTuple):
    """Pairs first .. last-1, taken together."""

    mode: str  # "stash", "scale" or "recompute"
    first: int
    last: int


def plan_groups(
    batch: Batch, pairs: int, lengths: list[int] | None, pair_scalar: bool
) -> list[Group]:
    """Groups of pairs, and how each is computed.

    lengths: scored rows of each of the 2B sequences; None where only the device knows.
    """
    tiles, call = batch.tiles, batch.call
    capacity = tile_rows(tiles, call.budget, stash=True, outputs=call.outputs)
    if lengths is None:
        return [Group("recompute", 0, pairs)]
    V, D = batch.head.weight.shape
    second_sum = 0 if pairs == 1 else V * D * tiles.compute.itemsize
    beside = tile_rows(tiles, call.budget, stash=True, outputs=call.outputs, reserved=second_sum)
    can_scale = pair_scalar and beside >= min(MIN_TILE_ROWS, capacity)
    groups: list[Group] = []
    used = 0
    for b in range(pairs):
        rows = lengths[b] + lengths[pairs + b]
        if rows > capacity:
            groups.append(Group("scale" if can_scale else "recompute", b, b + 1))
        elif groups and groups[-1].mode == "stash" and used + rows <= capacity:
            groups[-1] = groups[-1]._replace(last=b + 1)
            used += rows
        else:
            groups.append(Group("stash", b, b + 1))
            used = rows
    return groups


def scored_lengths(batch: Batch, ends: list[int] | None) -> list[int] | None:
    """Scored rows of each sequence, as far as the host knows. ends: [2B+1] offsets of all rows."""
    if ends is None:
        return None
    if not batch.rows.complete:
        listed = batch.rows.numbers
        ends = torch.searchsorted(listed, torch.tensor(ends, device=listed.device)).tolist()
    return [stop - start for start, stop in itertools.pairwise(ends)]


@dataclass
class GroupWork:
    """The groups of one call: scores, loss and statistics, and the sums of the gradients."""

    batch: Batch
    pairs: TokenInputs  # logps is scores["logprobs"]
    options: LossOptions
    lengths: list[int] | None  # scored rows of each sequence
    groups: list[Group]
    scores: Scores
    outputs: PairOutputs
    sums: GradientSums
    weight_scale: Tensor  # of dweight and dbias, where one pair makes all of them
    _buffer: Tensor | None = field(default=None, init=False)
    _apart: GradientSums | None = field(default=None, init=False)

    @classmethod
    def of(
        cls, batch: Batch, pairs: TokenInputs, options: LossOptions, ends: list[int] | None
    ) -> "GroupWork":
        scores = empty_rows(batch.hidden, batch.tiles, ("logprobs", *batch.call.outputs))
        logps = scores["logprobs"]
        count = pairs.pairs
        lengths = scored_lengths(batch, ends)
        return cls(
            batch=batch,
            pairs=pairs,
            options=options,
            lengths=lengths,
            groups=plan_groups(batch, count, lengths, options.pair_scalar),
            scores=scores,
            outputs=PairOutputs.empty(count, logps),
            sums=GradientSums(
                batch.hidden, batch.tiles, batch.call.needs, complete=batch.rows.complete
            ),
            weight_scale=logps.new_ones(()),
        )

    def run(self) -> None:
        """Every group, in order."""
        ways = {"stash": self._stash, "scale": self._scale, "recompute": self._recompute}
        for group in self.groups:
            ways[group.mode](group, self._rows(group))
        self.sums.finish()
        self.batch.tiles.release()

    def _stash(self, group: Group, rows: RowSelection) -> None:
        self._apart = None  # the stash may take all of the budget
        stash = self._tile(len(rows))
        factor = self.outputs.coef.new_empty(len(rows))
        at = 0
        for selection in rows.chunks(self.batch.tiles.max_rows):
            place = slice(at, at + len(selection))
            factor[place] = self._score(selection, stash[place])["factor"]
            at = place.stop
        self._evaluate(group)
        self.sums.add(stash, rows, rows.read(self.outputs.coef), factor)

    def _scale(self, group: Group, rows: RowSelection) -> None:
        # The first pair's sums are scaled in place; a later one's are kept apart until its w is
        # known.
        total, apart = self.sums, not self.sums.empty
        reserved = total.dweight.nbytes if apart and total.dweight is not None else 0
        step = self._step(stash=True, reserved=reserved)
        if self._buffer is not None and self._buffer.shape[0] > step:
            self._buffer = None  # a larger tile of an earlier group
        sums = self._sums_apart() if apart else total
        known = self._known_coefficients(group, rows)
        tile = self._tile(min(step, len(rows)))
        at = 0
        for selection in rows.chunks(step):
            n = len(selection)
            factor = self._score(selection, tile[:n])["factor"]
            sums.add(tile[:n], selection, known[at : at + n], factor)
            at += n
        self._evaluate(group)
        w = -self.outputs.stats[STATS.index("chosen_slope"), group.first]
        for _, part in rows.places():
            total.row_scale[part] *= w
        if len(self.groups) == 1:
            self.weight_scale = w.clone()
            return
        for x, part in ((total.dweight, sums.dweight), (total.dbias, sums.dbias)):
            if x is None or part is None:
                continue
            if apart:
                x.addcmul_(part, w)
            else:
                x.mul_(w)

    def _recompute(self, group: Group, rows: RowSelection) -> None:
        self._apart = self._buffer = None
        batch = self.batch
        norm = self.outputs.coef.new_empty(batch.rows.total, 2)
        for selection in rows.chunks(self._step(stash=False)):
            selection.write(norm, self._score(selection)["norm"])
        batch.tiles.release()
        self._evaluate(group)
        step = tile_step(batch.tiles, batch.call.budget, stash=True)
        tile = self._tile(min(step, len(rows)))
        for selection in rows.chunks(step):
            hidden, target = selection.read(batch.hidden), selection.read(batch.target)
            coef = selection.read(self.outputs.coef)
            out = tile[: len(selection)]
            batch.tiles.gradient(hidden, target, selection.read(norm), coef, out)
            self.sums.add(out, selection, row_factors(batch, selection, target))

    def _rows(self, group: Group) -> RowSelection:
        """Scored rows of a group: its chosen sequences, then its rejected ones."""
        rows = self.batch.rows
        if self.lengths is None:
            return rows
        starts = [0, *itertools.accumulate(self.lengths)]
        pairs = len(self.lengths) // 2
        chosen = slice(starts[group.first], starts[group.last])
        rejected = slice(starts[pairs + group.first], starts[pairs + group.last])
        if rows.complete:
            return replace(rows, parts=(chosen, rejected))
        listed = rows.numbers
        return RowSelection(rows.total, (torch.cat([listed[chosen], listed[rejected]]),))

    def _score(self, rows: RowSelection, stash: Tensor | None = None) -> dict[str, Tensor]:
        batch = self.batch
        hidden, target = rows.read(batch.hidden), rows.read(batch.target)
        got = batch.tiles.forward(hidden, target, batch.call.outputs, stash)
        for name, x in self.scores.items():
            rows.write(x, got[name])
        return got

    def _evaluate(self, group: Group) -> None:
        """Loss, statistics and coefficients of a group whose log-probs are there."""
        count = group.last - group.first
        impl, logps = self.batch.call.impl, self.scores["logprobs"]
        evaluate_pairs(impl, logps, self.pairs, self.options, self.outputs, group.first, count)

    def _known_coefficients(self, group: Group, rows: RowSelection) -> Tensor:
        """s_t = d L / d lp_t / w, for one pair:

        -beta * (u_t + alpha * rhat_t) at chosen tokens, beta * (u_t - alpha * rhat_t) at rejected.
        """
        pairs, o = self.pairs, self.options
        assert self.lengths is not None
        chosen = self.lengths[group.first]
        dtype = self.outputs.coef.dtype
        sign = self.outputs.coef.new_ones(len(rows))
        sign[chosen:] = -1.0
        weight = sign
        weights, rewards = pairs.given.token_weights, pairs.given.token_rewards
        if weights is not None:
            weight = sign * rows.read(weights).to(dtype)
        if o.alpha and rewards is not None:
            weight = weight + o.alpha * rows.read(rewards).to(dtype)
        scored = rows.read(self.batch.target) != self.batch.head.ignore_index
        if o.objective.length_normalised:
            counts = (scored[:chosen].sum(), scored[chosen:].sum())
            sizes = (chosen, len(rows) - chosen)
            length = [count.expand(size) for count, size in zip(counts, sizes, strict=True)]
            weight = weight / torch.cat(length)
        return torch.where(scored, -o.beta * weight, 0.0).to(dtype)

    def _sums_apart(self) -> GradientSums:
        """Empty sums of one pair; its dhidden goes into the common one."""
        if self._apart is None:
            self._apart = self.sums.apart()
        self._apart.empty = True
        return self._apart

    def _step(self, *, stash: bool, reserved: int = 0) -> int:
        call = self.batch.call
        tiles = self.batch.tiles
        return tile_step(tiles, call.budget, stash=stash, outputs=call.outputs, reserved=reserved)

    def _tile(self, rows: int) -> Tensor:
        """[rows, V]; one buffer serves all groups."""
        if self._buffer is None or self._buffer.shape[0] < rows:
            self._buffer = None  # freed before its successor is allocated
            batch, tiles = self.batch, self.batch.tiles
            self._buffer = stash_rows(
                batch.hidden,
                rows,
                batch.head.weight.shape[0],
                dtype=tiles.stash_dtype,
                multiple=tiles.row_multiple,
            )
        return self._buffer[:rows]
