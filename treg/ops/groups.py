"""Pairs through a head, group by group: log-probs, loss and gradients of batches of any size within
a budget.

    stash      pairs whose tiles fit into the budget together: keep the unscaled gradient E of all their rows;
               then v_t = coef_t * factor_t, dhidden = v * (E W), dweight += E^T (v * h)                   any objective
    scale      one pair longer than that, coef_t = w * s_t with s_t known beforehand: add up D = E^T (s * factor * h)
               over its tiles, then dweight += w * D                                  objectives with pair_scalar
    recompute  one pair longer than that, anything else: log-probs first, then each tile again (a
    fourth GEMM)

Which, is decided on the host from lengths alone.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from treg.losses import LossOptions
from treg.losses.pairs import STATS, PairOutputs, TokenInputs, evaluate_pairs
from treg.ops.head import HeadGradients, Rows, chunks, empty_rows, pieces, tile_rows, tile_step
from treg.ops.rows import scored_scale

MIN_TILE_ROWS = 16  # below this a GEMM reads the weight more often than it is worth


class Group(NamedTuple):
    """Pairs first..last-1, taken together."""

    mode: str  # "stash", "scale" or "recompute"
    first: int
    last: int


@dataclass(frozen=True)
class Pairs:
    """Packed rows of 2B sequences, chosen first: what the loss needs beside the head. N rows."""

    hidden: Tensor  # [N, D]
    target: Tensor  # [N]
    token_rewards: Tensor | None  # [N]
    ref_logps: Tensor | None  # [2B] or [N]
    token_weights: Tensor | None  # [N]
    starts: Tensor  # [2B+1] on hidden's device
    rows: Tensor | None  # the rows that are scored, in order; None: all
    lengths: (
        list[int] | None
    )  # rows of each sequence, after `rows`; None where only the device knows
    options: LossOptions
    outputs: tuple[str, ...] = ()  # statistics of each token, as in `linear_logprobs`

    @property
    def count(self) -> int:
        return (self.starts.shape[0] - 1) // 2


def plan(pairs: Pairs, tiles, budget: int) -> list[Group]:
    """Groups of pairs and how each is computed."""
    B, lengths = pairs.count, pairs.lengths
    capacity = tile_rows(tiles, budget, stash=True, outputs=pairs.outputs)
    if lengths is None:
        return [Group("stash" if pairs.hidden.shape[0] <= capacity else "recompute", 0, B)]
    V, D = tiles.head.weight.shape
    accumulator = 0 if B == 1 else V * D * tiles.compute.itemsize
    can_scale = pairs.options.pair_scalar and (
        tile_rows(tiles, budget, stash=True, outputs=pairs.outputs, reserved=accumulator)
        >= min(MIN_TILE_ROWS, capacity)
    )
    groups: list[Group] = []
    used = 0
    for b in range(B):
        rows = lengths[b] + lengths[B + b]
        if rows > capacity:
            groups.append(Group("scale" if can_scale else "recompute", b, b + 1))
        elif groups and groups[-1].mode == "stash" and used + rows <= capacity:
            groups[-1] = groups[-1]._replace(last=b + 1)
            used += rows
        else:
            groups.append(Group("stash", b, b + 1))
            used = rows
    return groups


class Work:
    """The groups of one call: loss, log-probs and statistics, and the gradients of sum_b loss_b,
    group by group.
    """

    def __init__(self, pairs: Pairs, tiles, budget: int, needs: tuple[bool, bool, bool]):
        self.pairs, self.tiles, self.budget = pairs, tiles, budget
        self.needs = needs
        self.found = empty_rows(pairs.hidden, tiles, ("logprobs", *pairs.outputs))
        self.outputs = PairOutputs.empty(pairs.count, self.found["logprobs"])
        self.coef = self.outputs.coef
        self.weight_scale = self.coef.new_ones(
            ()
        )  # of dweight and dbias, where one pair makes all of them
        self.starts = None if pairs.lengths is None else [0, *itertools.accumulate(pairs.lengths)]
        self._buffer: Tensor | None = None
        self._apart: HeadGradients | None = None

    def run_at_once(self, stash: Tensor, scale: Tensor) -> None:
        """Fill the stash of the rows that are scored, and coef_t * factor_t: both gradients follow
        from them.
        """
        at = 0
        for r in chunks(self.pairs.rows, self.pairs.hidden.shape[0], self.tiles.max_rows):
            n = _length(r)
            scale[at : at + n] = self._forward(r, stash[at : at + n])["factor"]
            at += n
        self._objective(Group("stash", 0, self.pairs.count))
        scale[:at] *= self.coef if self.pairs.rows is None else self.coef[self.pairs.rows]
        self.tiles.release()

    def run_groups(self) -> None:
        """Gradients of the sum, group by group."""
        self.groups = plan(self.pairs, self.tiles, self.budget)
        self.grads = HeadGradients(
            self.pairs.hidden, self.tiles, self.needs, complete=self.pairs.rows is None
        )
        for group in self.groups:
            rows = self._rows(group)
            {"stash": self._stash, "scale": self._scale, "recompute": self._recompute}[group.mode](
                group, rows
            )
        self.grads.finish()
        self.tiles.release()

    # -- the three ways
    # -----------------------------------------------------------------------------------------

    def _stash(self, group: Group, rows: Rows) -> None:
        self._apart = None  # the stash may take all of the budget
        n = _length(rows)
        stash, factor = self._tile(n), self.coef.new_empty(n)
        at = 0
        for r in split(rows, self.tiles.max_rows):
            m = _length(r)
            factor[at : at + m] = self._forward(r, stash[at : at + m])["factor"]
            at += m
        self._objective(group)
        coef = torch.cat([self.coef[r] for _, r in pieces(rows, n)])
        self.grads.add(stash, rows, coef * factor)

    def _scale(self, group: Group, rows: Rows) -> None:
        # the first pair's sums are scaled in place; a later one's are kept apart until its w is
        # known
        total, apart = self.grads, not self.grads.empty
        reserved = total.dweight.nbytes if apart and total.dweight is not None else 0
        step = tile_step(
            self.tiles, self.budget, stash=True, outputs=self.pairs.outputs, reserved=reserved
        )
        if self._buffer is not None and self._buffer.shape[0] > step:
            self._buffer = None  # a larger tile of an earlier group
        sums = self._sums_apart() if apart else total
        known, at = self._known_coefficients(group, rows), 0
        tile = self._tile(min(step, _length(rows)))
        for r in split(rows, step):
            n = _length(r)
            factor = self._forward(r, tile[:n])["factor"]
            sums.add(tile[:n], r, known[at : at + n] * factor)
            at += n
        self._objective(group)
        w = -self.outputs.stats[STATS.index("chosen_slope"), group.first]
        for _, r in pieces(rows, at):
            total.row_scale[r] *= w
        if len(self.groups) == 1:
            self.weight_scale = w.clone()
            return
        for x, part in ((total.dweight, sums.dweight), (total.dbias, sums.dbias)):
            if x is not None:
                x.addcmul_(part, w) if apart else x.mul_(w)

    def _recompute(self, group: Group, rows: Rows) -> None:
        self._apart = self._buffer = None
        pairs, norm = self.pairs, torch.empty_like(self.coef)
        step = tile_step(self.tiles, self.budget, stash=False, outputs=pairs.outputs)
        for r in split(rows, step):
            norm[r] = self._forward(r)["norm"]
        self.tiles.release()
        self._objective(group)
        step = tile_step(self.tiles, self.budget, stash=True)
        tile = self._tile(min(step, _length(rows)))
        for r in split(rows, step):
            target = pairs.target[r]
            out = tile[: target.shape[0]]
            self.tiles.gradient(pairs.hidden[r], target, norm[r], self.coef[r], out)
            self.grads.add(out, r, scored_scale(target, self.tiles.head.ignore_index))

    # -- pieces
    # -------------------------------------------------------------------------------------------------

    def _rows(self, group: Group) -> Rows:
        """Rows of a group: its chosen sequences, then its rejected ones."""
        B = self.pairs.count
        if self.starts is None:
            return slice(0, self.pairs.hidden.shape[0])
        spans = tuple(
            slice(self.starts[i + group.first], self.starts[i + group.last]) for i in (0, B)
        )
        if self.pairs.rows is None:
            return spans
        return torch.cat([self.pairs.rows[s] for s in spans])

    def _forward(self, rows: slice | Tensor, stash: Tensor | None = None) -> dict[str, Tensor]:
        got = self.tiles.forward(
            self.pairs.hidden[rows], self.pairs.target[rows], self.pairs.outputs, stash
        )
        for name, x in self.found.items():
            x[rows] = got[name]
        return got

    def _objective(self, group: Group) -> None:
        """Loss, statistics and coefficients of a group whose log-probs are there."""
        pairs = self.pairs
        inputs = TokenInputs(
            logps=self.found["logprobs"],
            target=pairs.target,
            token_rewards=pairs.token_rewards,
            ref_logps=pairs.ref_logps,
            token_weights=pairs.token_weights,
            starts=pairs.starts,
            ignore_index=self.tiles.head.ignore_index,
        )
        count = group.last - group.first
        evaluate_pairs(self.tiles.impl, inputs, pairs.options, self.outputs, group.first, count)

    def _known_coefficients(self, group: Group, rows: Rows) -> Tensor:
        """d L / d lp_t / w:  -beta * (u_t + alpha * rhat_t) chosen, beta * (u_t - alpha * rhat_t)
        rejected.
        """
        pairs, o = self.pairs, self.pairs.options
        n, chosen = _length(rows), pairs.lengths[group.first]

        def of(x: Tensor) -> Tensor:
            return torch.cat([x[r] for _, r in pieces(rows, n)])

        scored = of(pairs.target) != self.tiles.head.ignore_index
        sign = self.coef.new_ones(n)
        sign[chosen:] = -1.0
        weight = (
            sign if pairs.token_weights is None else sign * of(pairs.token_weights).to(sign.dtype)
        )
        if o.alpha:
            weight = weight + o.alpha * of(pairs.token_rewards).to(sign.dtype)
        if o.objective.length_normalised:
            counts = [scored[:chosen].sum(), scored[chosen:].sum()]
            weight = weight / torch.cat(
                [c.expand(m) for c, m in zip(counts, (chosen, n - chosen), strict=True)]
            )
        return torch.where(scored, -o.beta * weight, 0.0).to(sign.dtype)

    def _sums_apart(self) -> HeadGradients:
        """Empty sums of one pair; its dhidden goes into the common one."""
        if self._apart is None:
            self._apart = self.grads.apart()
        self._apart.empty = True
        return self._apart

    def _tile(self, rows: int) -> Tensor:
        """[rows, V]; one buffer serves all groups."""
        if self._buffer is None or self._buffer.shape[0] < rows:
            self._buffer = None  # freed before its successor is allocated
            V = self.tiles.head.weight.shape[0]
            self._buffer = self.pairs.hidden.new_empty(rows, V, dtype=self.tiles.stash_dtype)
        return self._buffer[:rows]


def _length(rows: Rows) -> int:
    if isinstance(rows, tuple):
        return sum(_length(r) for r in rows)
    return rows.stop - rows.start if isinstance(rows, slice) else rows.shape[0]


def split(rows: Rows, step: int) -> Iterator[slice | Tensor]:
    """At most `step` of the rows at a time, in order."""
    for part in rows if isinstance(rows, tuple) else (rows,):
        if isinstance(part, slice):
            yield from (
                slice(a, min(a + step, part.stop)) for a in range(part.start, part.stop, step)
            )
        else:
            yield from chunks(part, part.shape[0], step)
