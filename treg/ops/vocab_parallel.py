"""`linear_logprobs` where every rank of a process group holds a part of the vocabulary.

Rank r holds rows start_r to start_r + V_r of the weight; hidden and target are the same on all
ranks, and so is the loss. The forward gathers a few numbers a row from every rank, once; the
backward adds up dhidden over the ranks, once.

    lse_r, lp_r    of the softmax over rank r alone, by the tiles of one device; o is the rank that holds y, the owner
    lse  = log sum_r exp(lse_r)             w_r = exp(lse_r - lse), the share of the probability on rank r
    lp   = lp_o - log( 1 + sum_{r != o} exp(lse_r - lse_o) )
    H    = sum_r w_r (H_r + lse - lse_r)    mean_v z = sum_r V_r mean_r / sum_r V_r
    log sum_v p_v^2 = log sum_r exp( (log sum_v p_v^2)_r + 2 (lse_r - lse) )

    d lp / d a_v = scale * slope_v * ( 1{v = y} - w_r p^r_v )      on rank r;  dhidden = sum_r G_r W_r

The log of the sum starts from 1, so that a nearly certain token keeps its relative accuracy, and
every sum from its largest term, so that no gap between ranks overflows. All ranks compute from the
same gathered numbers in the same order: they get the same bits.

The stash E of a row (`treg_kernels.forward`) is that of the rank's own softmax, for target 0 where
y is elsewhere. For the whole softmax its factor is multiplied by w_r, and one entry is written
anew:

    E_y = -(scale / factor) * slope_y * (p - 1) / w_o   on the owner;     E_0 = -(scale / factor) * slope_0 * p^r_0

w_o is kept above 1/256 of a rounding there, which changes nothing that is not below the rounding of
E_y.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from treg.checks import values_visible
from treg.ops.gemm import scaled_to
from treg.ops.head import ABSENT, IGNORED, check_budget, chunks, local_target, scored_rows
from treg.ops.rows import differentiate_rows, kept_rows, score_rows, weight_gradients

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
            "group: expected an initialized process group; call torch.distributed.init_process_group"
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
    if not isinstance(shard, VocabShard | None):
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
            f"{name}: expected a DTensor of parts of {each} rows, the last one smaller perhaps and not empty, got "
            f"{list(x.shape)} over {mesh.size()} ranks, {local.shape[0]} rows here; pass {name}.to_local() and "
            "shard=VocabShard(start, group)"
        )
    return local, VocabShard(start, mesh.get_group())


def run_vocab_parallel(
    tiles, hidden: Tensor, target: Tensor, outputs: tuple[str, ...], budget: int, shard: VocabShard
) -> dict[str, Tensor]:
    """`treg.ops.logprobs.run_logprobs` for a head whose weight and bias are this rank's; target is
    of the whole.
    """
    missing = [n for n in outputs if n not in MERGED]
    if missing:
        raise ValueError(
            f"outputs: expected names among {list(MERGED)} with a shard, got {missing}"
        )
    ignore_index, head = tiles.head.ignore_index, replace(tiles.head, ignore_index=IGNORED)
    tiles = type(tiles)(head, tiles.logits_dtype)
    y = local_target(target, shard.start, head.weight.shape[0], ignore_index)
    grad = torch.is_grad_enabled()
    values = _VocabParallel.apply(
        hidden, head.weight, head.bias, y, target, tiles, outputs, budget, shard, grad
    )
    return dict(zip(("logprobs", *outputs), values, strict=True))


class _Merged(NamedTuple):
    """The whole softmax, each [N], float64; NaN where no rank holds the target, or ranks' targets
    or rows disagree.
    """

    logprobs: Tensor
    lse: Tensor
    share: Tensor  # w_r of this rank
    outputs: dict[str, Tensor]


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, y, target, tiles, outputs, budget, shard, grad):
        rows = scored_rows(y, IGNORED)
        ctx.needs = tuple(grad and need for need in ctx.needs_input_grad[:3])
        trained = any(ctx.needs)
        count = hidden.shape[0] if rows is None else rows.shape[0]
        local = tuple(n for n in outputs if n != "lse")
        check_budget(tiles, budget, stash=trained, outputs=local)
        kept = (
            kept_rows(tiles, budget, count, local)
            if trained and weight.dtype != torch.float16
            else 0
        )
        asked = torch.where(y == ABSENT, 0, y)
        stash = hidden.new_empty(kept, weight.shape[0], dtype=tiles.stash_dtype) if kept else None
        factor = hidden.new_empty(kept, dtype=tiles.compute) if kept else None
        found = score_rows(tiles, hidden, asked, rows, local, budget, stash, factor)
        merged = _merge(found, y, target, weight.shape[0], tiles.norm_per_nat, shard)
        if stash is not None and factor is not None:
            (r,) = chunks(rows, hidden.shape[0], kept, stop=kept)
            factor = _widen(stash, factor, r, found, y, merged, tiles)
        scored = y != IGNORED
        norm = (merged.lse * tiles.norm_per_nat).to(tiles.compute)
        ctx.tiles, ctx.budget, ctx.shard = _unbound(tiles), budget, shard
        ctx.save_for_backward(hidden, weight, bias, y, norm, rows, stash, factor)
        values = {"logprobs": merged.logprobs, "lse": merged.lse, **merged.outputs}
        results = tuple(
            values[n].to(tiles.compute).masked_fill_(~scored, 0.0) for n in ("logprobs", *outputs)
        )
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, coef, *_):
        nothing = (None,) * 10
        if coef is None:
            return nothing
        hidden, weight, bias, y, norm, rows, stash, factor = ctx.saved_tensors
        tiles = ctx.tiles(weight, bias)
        grads = differentiate_rows(
            tiles, hidden, y, rows, norm, coef.contiguous(), stash, factor, ctx.budget, ctx.needs
        )
        dhidden = grads.dhidden
        if dhidden is not None:  # 16-bit parts are added up in float32, and the sum is rounded once
            dhidden = scaled_to(dhidden, grads.row_scale.unsqueeze(-1), tiles.compute)
            dist.all_reduce(dhidden, group=ctx.shard.group)
            dhidden = dhidden.to(hidden.dtype)
        return dhidden, *weight_gradients(grads, weight, bias), *nothing[3:]


def _unbound(tiles):
    """A function of weight and bias that makes such tiles again, and holds no tensor."""
    kind, bare, logits_dtype = (
        type(tiles),
        replace(tiles.head, weight=None, bias=None),
        tiles.logits_dtype,
    )
    return lambda weight, bias: kind(replace(bare, weight=weight, bias=bias), logits_dtype)


def _merge(
    found: dict[str, Tensor],
    y: Tensor,
    target: Tensor,
    V: int,
    norm_per_nat: float,
    shard: VocabShard,
) -> _Merged:
    """The whole softmax from every rank's own; target goes along so that ranks with other rows are
    noticed.
    """
    scored = y != IGNORED
    part = {"start": torch.full_like(y, shard.start), "count": torch.full_like(y, V)}
    rows = {"target": target.masked_fill(~scored, IGNORED), **part, **found}
    table = torch.stack([x.to(found["norm"].dtype) for x in rows.values()])
    ranks = table.new_empty(dist.get_world_size(shard.group), *table.shape)
    dist.all_gather(list(ranks.unbind(0)), table, group=shard.group)
    of = dict(zip(rows, ranks.double().unbind(1), strict=True))  # each [R, N]

    held = (of["target"] >= of["start"]) & (of["target"] < of["start"] + of["count"])
    same = (of["target"] == of["target"][0]).all(0)
    joined = (of["start"] == of["count"].cumsum(0) - of["count"]).all(
        0
    )  # rank after rank, without gap or overlap
    good = same & joined & (held.sum(0) == 1)
    if values_visible(target):
        if not bool(joined.all()):
            parts = [
                (int(a), int(a + n))
                for a, n in zip(of["start"][:, 0], of["count"][:, 0], strict=True)
            ]
            raise ValueError(
                f"shard: expected the ranks' rows one after the other, from 0 on, got {parts} (start, stop); "
                "VocabShard.even is for parts of one size"
            )
        _check_targets(target, scored, same, good, held.sum(0))

    def owner(x: Tensor) -> Tensor:
        return torch.where(held, x, 0.0).sum(0)

    lse_r = of["norm"] / norm_per_nat
    # NaN from here on where no rank or several hold the target; ignored rows are cleared at the end
    lse = torch.where(good | ~scored, lse_r.logsumexp(0), float("nan"))
    gap = lse_r.masked_fill(held, -float("inf")).logsumexp(0) - owner(lse_r)
    logprobs = torch.where(
        lse.isnan(), lse, owner(of["logprobs"]) - torch.logaddexp(gap, gap.new_zeros(()))
    )
    share = (lse_r - lse).exp()
    outputs = {}
    if "entropy" in of:
        outputs["entropy"] = (share * (of["entropy"] + lse - lse_r)).sum(0)
    if "mean_logit" in of:
        outputs["mean_logit"] = (of["mean_logit"] * of["count"]).sum(0) / of["count"].sum(0)
    if "log_sum_sq_probs" in of:
        outputs["log_sum_sq_probs"] = (of["log_sum_sq_probs"] + 2.0 * (lse_r - lse)).logsumexp(0)
    return _Merged(logprobs, lse, share[dist.get_rank(shard.group)], outputs)


def _check_targets(
    target: Tensor, scored: Tensor, same: Tensor, good: Tensor, holders: Tensor
) -> None:
    """ValueError on every rank alike, for all have the same numbers."""
    if not bool(same.all()):
        at = int((~same).nonzero()[0])
        raise ValueError(
            f"target: expected the same rows on every rank of the shard's group, got others at row {at}; a weight that "
            "is sharded for data parallelism (FSDP) is to be gathered: weight.full_tensor()"
        )
    bad = scored & ~good
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"target: expected ids that one rank holds, got {target[at].item()} at row {at}, which {int(holders[at])} "
            "ranks hold; see shard.start and the rows of weight on each rank"
        )


def _widen(
    stash: Tensor,
    factor: Tensor,
    r: slice | Tensor,
    found: dict[str, Tensor],
    y: Tensor,
    merged: _Merged,
    tiles,
) -> Tensor:
    """Turn the stash of rows r from this rank's softmax to the whole one, in place; returns its
    factors.
    """
    head, y = tiles.head, y[r]
    lp, norm = found["logprobs"][r].double(), found["norm"][r].double()
    slope = torch.ones_like(lp)
    if head.softcap is not None:
        tanh = (lp + norm / tiles.norm_per_nat) * (head.temperature / head.softcap)
        slope = (1.0 - tanh.square()).clamp_(min=0.0)
    owner, share = y >= 0, merged.share[r]
    share = torch.where(owner, share.clamp(min=torch.finfo(tiles.compute).eps / 256.0), share)
    part = torch.where(owner, merged.logprobs[r].expm1() / share, lp.exp())
    wide = factor.double()
    entry = torch.where(wide == 0.0, 0.0, -head.scale / wide * slope * part)
    stash.scatter_(1, y.clamp(min=0).unsqueeze(-1), entry.unsqueeze(-1).to(stash.dtype))
    return (wide * share).to(factor.dtype)
