"""The pair loss with its gradients taken in the forward: three GEMMs a row for a trainable head.

The coefficient of a token, d L / d lp_t, is known only when its whole pair has been through the head. So that no tile
is computed twice, either what the gradient needs of it is kept until then, or the unknown part is factored out:

    stash      pairs whose tiles fit into the budget together: keep the unscaled gradient E of all their rows;
               then v_t = coef_t * factor_t, dhidden = v * (E W), dweight += E^T (v * h)                   any objective
    scale      one pair longer than that, coef_t = w * s_t with s_t known beforehand: add up D = E^T (s * factor * h)
               over its tiles, then dweight += w * D                                  objectives with pair_scalar
    recompute  one pair longer than that, anything else: log-probs first, then each tile again (a fourth GEMM)

Which, is decided on the host from lengths alone.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from treg.losses import LossOptions, pair_loss, reward_gradient
from treg.ops.gemm import scaled_to
from treg.ops.head import HeadGradients, chunks, empty_rows, select, tile_rows, tile_step
from treg.results import PairLoss

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
    rows: Tensor | None  # the rows that are scored, in order; None: all
    lengths: list[int] | None  # rows of each sequence, after `rows`; None where only the device knows
    cu_seqlens: Tensor | None  # [2B+1], read where lengths is None
    options: LossOptions
    reduction: str
    outputs: tuple[str, ...] = ()  # statistics of each token, as in `linear_logprobs`

    @property
    def count(self) -> int:
        return (self.cu_seqlens.shape[0] - 1 if self.lengths is None else len(self.lengths)) // 2


def plan(pairs: Pairs, tiles, budget: int) -> list[Group] | None:
    """Groups of pairs and how each is computed; None where recomputing everything is all that fits."""
    B, lengths = pairs.count, pairs.lengths
    capacity = tile_rows(tiles, budget, stash=True, outputs=pairs.outputs)
    if lengths is None:
        return [Group("stash", 0, B)] if pairs.hidden.shape[0] <= capacity else None
    if capacity < 1:
        return None
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


def run_pairs(tiles, pairs: Pairs, groups: list[Group], budget: int) -> tuple[Tensor, PairLoss, dict[str, Tensor]]:
    """Reduced loss (differentiable), the unreduced results, and log-probs and statistics of each token, [N]."""
    head = tiles.head
    loss, *rest = _PairLoss.apply(pairs.hidden, head.weight, head.bias, pairs, tiles, groups, budget)
    names, n = ("logprobs", *pairs.outputs), len(PairLoss._fields)
    return loss, PairLoss(*rest[:n]), dict(zip(names, rest[n:], strict=True))


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, pairs, tiles, groups, budget):
        work = _Work(pairs, tiles, groups, budget, ctx.needs_input_grad[:3])
        for group in groups:
            work.run(group)
        tiles.release()
        grads = work.grads
        ctx.save_for_backward(grads.dhidden, grads.row_scale, grads.dweight, grads.dbias, work.weight_scale)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        result = work.result()
        total = result.loss.sum()
        loss = total / pairs.count if pairs.reduction == "mean" else total
        outputs = (loss, *result, *work.found.values())
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * 7
        dhidden, row_scale, dweight, dbias, weight_scale = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        if dhidden is not None:
            dhidden = scaled_to(dhidden, (row_scale * upstream).unsqueeze(-1), dhidden.dtype)
        scale = upstream if weight_scale is None else upstream * weight_scale
        if dweight is not None:
            dweight = scaled_to(dweight, scale, weight_dtype)
        if dbias is not None:
            dbias = scaled_to(dbias, scale, bias_dtype)
        return dhidden, dweight, dbias, None, None, None, None


class _Work:
    """The groups of one call: log-probs and statistics [N] and the gradients, group by group."""

    def __init__(self, pairs: Pairs, tiles, groups: list[Group], budget: int, needs: tuple[bool, bool, bool]):
        self.pairs, self.tiles, self.budget, self.needs = pairs, tiles, budget, needs
        self.found = empty_rows(pairs.hidden, tiles.compute, ("logprobs", *pairs.outputs))
        self.logps = self.found["logprobs"]
        self.grads = self._new_grads(pairs.hidden, tiles.head)
        self.weight_scale: Tensor | None = None  # of dweight and dbias, where one pair makes all of them
        self.alone = len(groups) == 1
        self.starts = None if pairs.lengths is None else [0, *itertools.accumulate(pairs.lengths)]
        self.losses: list[PairLoss] = []
        self._buffer: Tensor | None = None
        self._pair: HeadGradients | None = None

    def run(self, group: Group) -> None:
        rows = self._rows(group)
        {"stash": self._stash, "scale": self._scale, "recompute": self._recompute}[group.mode](group, rows)

    def result(self) -> PairLoss:
        """Results of all pairs, in order."""
        fields = [torch.cat(parts) for parts in zip(*(x[:-1] for x in self.losses), strict=True)]
        weights = [x.weights for x in self.losses]
        if self.pairs.options.objective.margin_only:
            return PairLoss(*fields, torch.cat(weights))
        chosen, rejected = zip(*(w.chunk(2) for w in weights), strict=True)
        return PairLoss(*fields, torch.cat([*chosen, *rejected]))

    # -- the three ways -----------------------------------------------------------------------------------------

    def _stash(self, group: Group, rows: Tensor) -> None:
        self._pair = None  # the stash may take all of the budget
        hidden, target = self._select(rows)
        stash = self._tile(rows.shape[0])
        got = self._forward(rows, hidden, target, stash)
        coef = self._coefficients(group, rows)
        self.grads.add(stash, rows, hidden, coef * got["factor"])

    def _scale(self, group: Group, rows: Tensor) -> None:
        known = self._known_coefficients(group, rows)
        # the first pair's sums are scaled in place; a later one's are kept apart until its w is known
        total, apart = self.grads, not self.grads.empty
        reserved = total.dweight.nbytes if apart and total.dweight is not None else 0
        step = tile_step(self.tiles, self.budget, stash=True, outputs=self.pairs.outputs, reserved=reserved)
        if self._buffer is not None and self._buffer.shape[0] > step:
            self._buffer = None  # a larger tile of an earlier group
        sums = self._pair_sums() if apart else total
        tile = self._tile(min(step, rows.shape[0]))
        for piece in chunks(None, rows.shape[0], step):
            r = rows[piece]
            hidden, target = self._select(r)
            out = tile[: r.shape[0]]
            got = self._forward(r, hidden, target, out)
            sums.add(out, r, hidden, known[piece] * got["factor"])
        loss = self._loss(group, rows, self.logps[rows])
        grad_w, _ = reward_gradient(loss.chosen_rewards, loss.rejected_rewards, self.pairs.options)
        w = (-grad_w * self._reduction).squeeze(0)
        self.grads.row_scale[rows] *= w
        if self.alone:
            self.weight_scale = w
            return
        for x, part in ((total.dweight, sums.dweight), (total.dbias, sums.dbias)):
            if x is not None:
                x.addcmul_(part, w) if apart else x.mul_(w)

    def _recompute(self, group: Group, rows: Tensor) -> None:
        self._pair = self._buffer = None
        norm = torch.empty_like(self.logps[rows])
        step = tile_step(self.tiles, self.budget, stash=False, outputs=self.pairs.outputs)
        for piece in chunks(None, rows.shape[0], step):
            r = rows[piece]
            norm[piece] = self._forward(r, *self._select(r))["norm"]
        self.tiles.release()
        coef = self._coefficients(group, rows)
        step = tile_step(self.tiles, self.budget, stash=True)
        tile = self._tile(min(step, rows.shape[0]))
        for piece in chunks(None, rows.shape[0], step):
            r = rows[piece]
            hidden, target = self._select(r)
            out = tile[: r.shape[0]]
            self.tiles.gradient(hidden, target, norm[piece], coef[piece], out)
            self.grads.add(out, r, hidden)

    # -- pieces -------------------------------------------------------------------------------------------------

    @property
    def _reduction(self) -> float:
        return 1.0 / self.pairs.count if self.pairs.reduction == "mean" else 1.0

    def _rows(self, group: Group) -> Tensor:
        """Row numbers of a group: its chosen sequences, then its rejected ones."""
        B, device = self.pairs.count, self.pairs.hidden.device
        if self.starts is None:
            return torch.arange(self.pairs.hidden.shape[0], device=device)
        spans = [(self.starts[i + group.first], self.starts[i + group.last]) for i in (0, B)]
        rows = torch.cat([torch.arange(a, b, device=device) for a, b in spans])
        return rows if self.pairs.rows is None else self.pairs.rows[rows]

    def _forward(self, rows: Tensor, hidden: Tensor, target: Tensor, stash: Tensor | None = None) -> dict[str, Tensor]:
        got = self.tiles.forward(hidden, target, self.pairs.outputs, stash)
        for name, x in self.found.items():
            x[rows] = got[name]
        return got

    def _select(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return select(self.pairs.hidden, self.pairs.target, rows, self.tiles.head.ignore_index)

    def _loss(self, group: Group, rows: Tensor, logps: Tensor) -> PairLoss:
        """The loss of a group from its log-probs; kept for `result`."""
        pairs, B = self.pairs, self.pairs.count
        cu_seqlens = pairs.cu_seqlens
        if pairs.lengths is not None:
            lengths = [n for i in (0, B) for n in pairs.lengths[i + group.first : i + group.last]]
            cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
        ref = pairs.ref_logps
        if ref is not None:
            per_token = ref.shape == pairs.target.shape
            ref = ref[rows] if per_token else torch.cat([ref[i + group.first : i + group.last] for i in (0, B)])
        loss = pair_loss(
            logps,
            None if pairs.token_rewards is None else pairs.token_rewards[rows],
            ref,
            pairs.options,
            cu_seqlens,
            None if pairs.rows is not None else pairs.target[rows] != self.tiles.head.ignore_index,
            None if pairs.token_weights is None else pairs.token_weights[rows],
        )
        self.losses.append(PairLoss(*(x.detach() for x in loss)))
        return loss

    def _coefficients(self, group: Group, rows: Tensor) -> Tensor:
        """d L / d lp of a group's rows, by autograd through the pure loss."""
        logps = self.logps[rows]
        with torch.enable_grad():
            logps.requires_grad_()
            loss = self._loss(group, rows, logps)
            (coef,) = torch.autograd.grad(loss.loss.sum(), logps)
        return coef * self._reduction

    def _known_coefficients(self, group: Group, rows: Tensor) -> Tensor:
        """d L / d lp_t / w:  -beta * (u_t + alpha * rhat_t) chosen, beta * (u_t - alpha * rhat_t) rejected."""
        pairs, o = self.pairs, self.pairs.options
        chosen, rejected = pairs.lengths[group.first], pairs.lengths[pairs.count + group.first]
        scored = pairs.target[rows] != self.tiles.head.ignore_index
        sign = scored.new_ones(chosen + rejected, dtype=self.logps.dtype)
        sign[chosen:] = -1.0
        weight = sign if pairs.token_weights is None else sign * pairs.token_weights[rows].to(sign.dtype)
        if o.alpha:
            weight = weight + o.alpha * pairs.token_rewards[rows].to(sign.dtype)
        if o.objective.length_normalised:
            counts = [scored[:chosen].sum(), scored[chosen:].sum()]
            weight = weight / torch.cat([c.expand(n) for c, n in zip(counts, (chosen, rejected), strict=True)])
        return torch.where(scored, -o.beta * weight, 0.0).to(self.logps.dtype)

    def _pair_sums(self) -> HeadGradients:
        """Empty sums of one pair; its dhidden goes into the common one."""
        if self._pair is None:
            self._pair = self._new_grads(self.pairs.hidden[:0], self.tiles.head)
            self._pair.dhidden, self._pair.row_scale = self.grads.dhidden, self.grads.row_scale
        self._pair.empty = True
        return self._pair

    def _new_grads(self, hidden: Tensor, head) -> HeadGradients:
        return HeadGradients(hidden, head, self.needs, compute=self.tiles.compute, complete=self.pairs.rows is None)

    def _tile(self, rows: int) -> Tensor:
        """[rows, V]; one buffer serves all groups."""
        if self._buffer is None or self._buffer.shape[0] < rows:
            self._buffer = None  # freed before its successor is allocated
            V = self.tiles.head.weight.shape[0]
            self._buffer = self.pairs.hidden.new_empty(rows, V, dtype=self.tiles.stash_dtype)
        return self._buffer[:rows]
