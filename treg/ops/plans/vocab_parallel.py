"""`linear_logprobs` where every rank of a process group holds a part of the vocabulary.

Rank r holds rows start_r to start_r + V_r of the weight; hidden and target are the same on all
ranks, and so is the loss. The forward gathers a few numbers a row from every rank, once; the
backward adds up dhidden over the ranks, once.

    lse_r, lp_r    of the softmax over rank r alone, by the tiles of one device
    o              the rank that holds y, the owner
    lse  = log sum_r exp(lse_r)
    w_r  = exp(lse_r - lse)                 the share of the probability on rank r
    lp   = lp_o - log( 1 + sum_{r != o} exp(lse_r - lse_o) )
    H    = sum_r w_r (H_r + lse - lse_r)    mean_v z = sum_r V_r mean_r / sum_r V_r
    log sum_v p_v^2 = log sum_r exp( (log sum_v p_v^2)_r + 2 (lse_r - lse) )

    d lp / d a_v = scale * slope_v * ( 1{v = y} - w_r p^r_v )       on rank r
    dhidden      = sum_r G_r W_r

The log of the sum starts from 1, so that a nearly certain token keeps its relative accuracy, and
every sum from its largest term, so that no gap between ranks overflows. All ranks compute from the
same gathered numbers in the same order: they get the same bits.

The stash E of a row (`treg_kernels.forward`) is that of the rank's own softmax, for target 0 where
y is elsewhere. For the whole softmax its factor is multiplied by w_r, and one entry is written
anew:

    E_y = -(scale / factor) * slope_y * (p - 1) / w_o       on the owner
    E_0 = -(scale / factor) * slope_0 * p^r_0               elsewhere

Word 0 is the first one that the bias does not forbid with -inf. A rank whose every word is
forbidden has lse_r = -inf and w_r = 0, and no part in any sum.

w_o is kept above 1/256 of a rounding there, which changes nothing that is not below the rounding of
E_y.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from treg.checks import values_visible
from treg.ops.call import Batch, Call
from treg.ops.head.gradients import Gradients
from treg.ops.head.head import ABSENT, IGNORED, local_target
from treg.ops.head.memory import check_budget
from treg.ops.head.selection import RowSelection, same_rows
from treg.ops.plans.base import Saved, Scores, score_rows, scored_coefficients
from treg.ops.plans.kept import Kept, factors_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MERGED = ("lse", "entropy", "mean_logit", "log_sum_sq_probs")


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of a weight whose rows are spread over a process group: rows start, start +
    1, and so on.

    Args:
        start: >= 0, row of the whole weight that is the first here. The ranks' parts may differ in
            size; they follow one another in the order of the ranks.
        group: the process group; None is the default one.
    Raises:
        ValueError: start is no int >= 0, or this process is not in the group.
    """

    start: int
    group: "ProcessGroup | None" = None

    def __post_init__(self):
        if isinstance(self.start, bool) or not isinstance(self.start, int) or self.start < 0:
            raise ValueError(f"start: expected an int >= 0, got {self.start!r}")
        _rank(self.group)

    @classmethod
    def even(cls, weight: Tensor, group: "ProcessGroup | None" = None) -> "VocabShard":
        """Of a weight [V / R, D] that has the same size on each of the R ranks: start = rank * V /
        R.
        """
        return cls(_rank(group) * weight.shape[0], group)


def _rank(group) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "group: expected an initialized process group; call "
            "torch.distributed.init_process_group"
        )
    if not isinstance(group, dist.ProcessGroup | None):
        raise ValueError(
            f"group: expected a ProcessGroup that this process is in, or None, got {group!r}"
        )
    return dist.get_rank(group)


def local_operands(hidden, weight, target, bias, shard: VocabShard | None):
    """The same five with DTensors unpacked: Replicate to its value, rows of weight and bias to this
    rank's.

    Anything that is no DTensor is left as it is. Gradients come back as DTensors of the same
    placements.
    """
    if shard is not None and not isinstance(shard, VocabShard):
        raise TypeError(f"shard: expected a VocabShard or None, got {type(shard).__name__}")
    hidden, _ = _local("hidden", hidden)
    target, _ = _local("target", target)
    weight, held = _local("weight", weight, rows=True)
    bias, held_bias = _local("bias", bias, rows=True)
    if held is None and held_bias is None:
        return hidden, weight, target, bias, shard
    if shard is not None:
        raise ValueError(
            f"shard: expected None beside a DTensor, which has a mesh of its own, got {shard}"
        )
    if held is None or (held_bias is not None and held_bias != held):
        raise ValueError(
            "bias: expected a plain tensor, or a DTensor with the mesh and placements of weight"
        )
    return hidden, weight, target, bias, held


def _local(name: str, x, *, rows: bool = False) -> tuple:
    """A DTensor's local tensor, and its shard where it holds rows of the whole."""
    if not hasattr(x, "full_tensor"):
        return x, None
    if all(p.is_replicate() for p in x.placements):
        return x.to_local(), None
    from torch.distributed.tensor import Shard  # whoever made a DTensor has loaded it

    mesh, got = x.device_mesh, f"{tuple(x.placements)} on a mesh of {x.device_mesh.ndim} dimensions"
    if not rows or tuple(x.placements) != (Shard(0),):
        or_rows = ", or Shard(0) on a mesh of one dimension" if rows else ""
        or_part = ", or a part and shard=VocabShard(...)" if rows else ""
        raise ValueError(
            f"{name}: expected a plain tensor or a DTensor with Replicate(){or_rows}, got {got}; "
            f"pass {name}.full_tensor(){or_part}"
        )
    local, each = x.to_local(), -(-x.shape[0] // mesh.size())  # as torch.chunk parts it
    start = mesh.get_local_rank() * each
    if each * (mesh.size() - 1) >= x.shape[0] or local.shape[0] != min(each, x.shape[0] - start):
        raise ValueError(
            f"{name}: expected a DTensor of parts of {each} rows, the last one smaller perhaps and "
            f"not empty, got {list(x.shape)} over {mesh.size()} ranks, {local.shape[0]} rows here; "
            f"pass {name}.to_local() and "
            "shard=VocabShard(start, group)"
        )
    return local, VocabShard(start, mesh.get_group())


def run_vocab_parallel(
    call: Call,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    numbers: list[float],
    shard: VocabShard,
) -> Scores:
    """Log-probs and statistics [N] of rows under the whole head, of which weight and bias are this
    rank's part; differentiable in hidden, weight and bias. target [N]: ids of the whole vocabulary.
    """
    missing = [name for name in call.outputs if name not in MERGED]
    if missing:
        raise ValueError(
            f"outputs: expected names among {list(MERGED)} with a shard, got {missing}"
        )
    local = local_target(target, shard.start, weight.shape[0], call.ignore_index)
    call = replace(call, ignore_index=IGNORED)
    plan = VocabParallel(shard, target)
    values = _Sharded.apply(hidden, weight, bias, local, call, numbers, plan)
    return dict(zip(("logprobs", *call.outputs), values, strict=True))


class _Sharded(torch.autograd.Function):
    """The plan's forward and backward; what a process group does is no operator of a graph."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, local, call, numbers, plan):
        batch = Batch.of(call, hidden, weight, bias, local, numbers)
        scores, saved = plan.forward(batch)
        ctx.plan, ctx.call, ctx.numbers = VocabParallel(plan.shard), call, numbers
        ctx.note = batch.rows.note
        ctx.save_for_backward(hidden, weight, bias, local, *saved.values())
        results = tuple(scores[name] for name in ("logprobs", *call.outputs))
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, coef, *_):
        nothing = (None, None, None, None)
        if coef is None:
            return None, None, None, *nothing
        hidden, weight, bias, local, *values = ctx.saved_tensors
        rows = same_rows(local, ctx.call.ignore_index, ctx.note)
        batch = Batch.of_shapes(ctx.call, hidden, weight, bias, local, ctx.numbers, rows=rows)
        saved = dict(zip(ctx.plan.saved_names, values, strict=True))
        coef = scored_coefficients(batch, coef)
        gradients = ctx.plan.backward(batch, coef, saved)
        return *gradients.like(hidden, weight, bias), *nothing


class VocabParallel(Kept):
    """`kept` on every rank's part of the vocabulary, merged into the whole softmax.

    A plan of its own call: it carries the shard, and for the forward the targets as ids of the
    whole vocabulary, [N], by which ranks with other rows are noticed. A batch's target is
    `local_target`'s.
    """

    name = "vocab_parallel"

    def __init__(self, shard: VocabShard, whole_target: Tensor | None = None):
        self.shard, self.whole_target = shard, whole_target

    def forward(self, batch: Batch) -> tuple[Scores, Saved]:
        call, tiles, target = batch.call, batch.tiles, batch.target
        outputs = tuple(name for name in call.outputs if name != "lse")
        # "lse" comes of the norm: it is no output of a rank's own tiles
        own = replace(batch, call=replace(call, outputs=outputs))
        check_budget(tiles, call.budget, stash=any(call.needs), outputs=outputs)
        room = self._room(own)
        stash = self._of_kept_rows(own, room)
        # a rank without the target asks for its first word's log-prob
        first, empty = _first_word(batch)
        asked = torch.where(target == ABSENT, first, target)
        found = score_rows(replace(own, target=asked), outputs, stash)
        if empty is not None:
            found = _without_mass(found, empty)
            if stash is not None:
                stash.masked_fill_(empty, 0.0)
        factor = found.pop("factor", None)
        merged = self._merge(batch, found)
        if stash is not None and factor is not None:
            rows = batch.rows.section(0, stash.shape[0])
            factor = _widen(batch, rows, asked, found, merged, stash, factor)
        unscored = target == IGNORED
        values = {"logprobs": merged.logprobs, "lse": merged.lse, **merged.outputs}
        scores = {}
        for name in ("logprobs", *call.outputs):
            scores[name] = values[name].to(tiles.compute).masked_fill_(unscored, 0.0)
        lse = merged.lse * tiles.norm_per_nat
        norm = lse.to(tiles.compute)
        factor = factors_of(room, factor, tiles.compute)
        norm = torch.stack([norm, (lse - norm.double()).to(tiles.compute)], 1)
        return scores, {"norm": norm, "stash": room, "factor": factor}

    def backward(self, batch: Batch, coef: Tensor, saved: Saved) -> Gradients:
        outputs = tuple(name for name in batch.call.outputs if name != "lse")
        own = replace(batch, call=replace(batch.call, outputs=outputs))
        gradients = super().backward(replace(own, hidden_dtype=batch.tiles.compute), coef, saved)
        if gradients.hidden is not None:
            # 16-bit parts are added up in float32, and the sum is rounded once
            dist.all_reduce(gradients.hidden, group=self.shard.group)
        return gradients

    def _kept(self, batch: Batch, rows: int) -> int:
        return super()._kept(batch, rows) if any(batch.call.needs) else 0

    def _merge(self, batch: Batch, found: Scores) -> "_Merged":
        """The whole softmax from every rank's own."""
        assert self.whole_target is not None
        words = batch.head.weight.shape[0]
        unscored = batch.target == IGNORED
        ranks = _gather(batch, found, self.whole_target, self.shard)
        target, start, count = ranks["target"], ranks["start"], ranks["count"]
        held = (target >= start) & (target < start + count)
        same = (target == target[0]).all(0)
        # rank after rank, without gap or overlap
        joined = (start == count.cumsum(0) - count).all(0)
        good = same & joined & (held.sum(0) == 1)
        if values_visible(self.whole_target) and words:
            _check_ranks(ranks, joined)
            _check_targets(self.whole_target, ~unscored, same, good, held.sum(0))

        def owner(x: Tensor) -> Tensor:
            return torch.where(held, x, 0.0).sum(0)

        lse_r = (ranks["norm"] + ranks["norm_rest"]) / batch.tiles.norm_per_nat
        # NaN from here on where no rank or several hold the target; ignored rows are cleared at the
        # end
        lse = torch.where(good | unscored, lse_r.logsumexp(0), float("nan"))
        gap = lse_r.masked_fill(held, -float("inf")).logsumexp(0) - owner(lse_r)
        logprobs = owner(ranks["logprobs"]) - torch.logaddexp(gap, gap.new_zeros(()))
        logprobs = torch.where(lse.isnan(), lse, logprobs)
        share = (lse_r - lse).exp()
        outputs = {}
        if "entropy" in ranks:
            own = ranks["entropy"] + lse - lse_r
            outputs["entropy"] = (share * torch.where(lse_r == -math.inf, 0.0, own)).sum(0)
        if "mean_logit" in ranks:
            outputs["mean_logit"] = (ranks["mean_logit"] * count).sum(0) / count.sum(0)
        if "log_sum_sq_probs" in ranks:
            squares = ranks["log_sum_sq_probs"] + 2.0 * (lse_r - lse)
            outputs["log_sum_sq_probs"] = squares.logsumexp(0)
        return _Merged(logprobs, lse, share[dist.get_rank(self.shard.group)], outputs)


def _first_word(batch: Batch) -> tuple[Tensor | int, Tensor | None]:
    """This rank's first word whose logit is not -inf, and whether there is none (None: there is);
    0-dimensional tensors, for which no device is waited for.
    """
    bias, head = batch.head.bias, batch.head
    if bias is None or head.softcap is not None or not bias.shape[0]:
        return 0, None
    allowed = bias.detach() != -math.inf
    return allowed.int().argmax(), ~allowed.any()


def _without_mass(found: Scores, empty: Tensor) -> Scores:
    """What `score_rows` found, and where this rank is empty what a sum over no words is."""
    nothing = {"logprobs": 0.0, "entropy": 0.0, "factor": 0.0, "log_sum_sq_probs": -math.inf}
    changed = {x: found[x].masked_fill(empty, nothing[x]) for x in nothing if x in found}
    norm = found["norm"].masked_fill(empty, 0.0)
    norm[:, 0].masked_fill_(empty, -math.inf)
    return {**found, **changed, "norm": norm}


class _Merged(NamedTuple):
    """The whole softmax, each [N], float64; NaN where no rank holds the target, or ranks' targets
    or rows disagree.
    """

    logprobs: Tensor
    lse: Tensor
    share: Tensor  # w_r of this rank
    outputs: dict[str, Tensor]


def _gather(
    batch: Batch, found: Scores, whole_target: Tensor, shard: VocabShard
) -> dict[str, Tensor]:
    """Every rank's numbers of each row by name, [R, N] float64."""
    local = batch.target
    norm, rest = found["norm"].unbind(1)
    table = {
        "target": whole_target.masked_fill(local == IGNORED, IGNORED),
        "start": torch.full_like(local, shard.start),
        "count": torch.full_like(local, batch.head.weight.shape[0]),
        **found,
        "norm": norm,
        "norm_rest": rest,
    }
    mine = torch.stack([x.to(norm.dtype) for x in table.values()])
    ranks = mine.new_empty(dist.get_world_size(shard.group), *mine.shape)
    dist.all_gather(list(ranks.unbind(0)), mine, group=shard.group)
    return dict(zip(table, ranks.double().unbind(1), strict=True))


def _check_ranks(ranks: dict[str, Tensor], joined: Tensor) -> None:
    """ValueError on every rank alike where the ranks' parts do not follow one another."""
    if bool(joined.all()):
        return
    starts, counts = ranks["start"][:, 0].tolist(), ranks["count"][:, 0].tolist()
    parts = [(int(a), int(a + n)) for a, n in zip(starts, counts, strict=True)]
    raise ValueError(
        f"shard: expected the ranks' rows one after the other, from 0 on, got {parts} (start, "
        "stop); VocabShard.even is for parts of one size"
    )


def _check_targets(
    target: Tensor, scored: Tensor, same: Tensor, good: Tensor, holders: Tensor
) -> None:
    """ValueError on every rank alike, for all have the same numbers."""
    if not bool(same.all()):
        at = int((~same).nonzero()[0])
        raise ValueError(
            "target: expected the same rows on every rank of the shard's group, got others at row "
            f"{at}; a weight that "
            "is sharded for data parallelism (FSDP) is to be gathered: weight.full_tensor()"
        )
    bad = scored & ~good
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"target: expected ids that one rank holds, got {target[at].item()} at row {at}, which "
            f"{int(holders[at])} "
            "ranks hold; see shard.start and the rows of weight on each rank"
        )


def _widen(
    batch: Batch,
    rows: RowSelection,
    asked: Tensor,
    found: Scores,
    merged: _Merged,
    stash: Tensor,
    factor: Tensor,
) -> Tensor:
    """Turn the stash of some rows from this rank's softmax to the whole one, in place; returns its
    factors. asked: [N], the target, or the word that stands for it on this rank.
    """
    head, tiles = batch.head, batch.tiles
    target = rows.read(batch.target)
    lp, norm = rows.read(found["logprobs"]).double(), rows.read(found["norm"]).double().sum(1)
    slope = torch.ones_like(lp)
    if head.softcap is not None:
        tanh = (lp + norm / tiles.norm_per_nat) * (head.temperature / head.softcap)
        slope = (1.0 - tanh.square()).clamp_(min=0.0)
    owner, share = target >= 0, rows.read(merged.share)
    least = torch.finfo(tiles.compute).eps / 256.0
    share = torch.where(owner, share.clamp(min=least), share)
    part = torch.where(owner, rows.read(merged.logprobs).expm1() / share, lp.exp())
    wide = factor.double()
    entry = torch.where(wide == 0.0, 0.0, -head.scale / wide * slope * part)
    at = rows.read(asked).clamp(min=0).unsqueeze(-1)
    stash.scatter_(1, at, entry.unsqueeze(-1).to(stash.dtype))
    return (wide * share).to(factor.dtype)
