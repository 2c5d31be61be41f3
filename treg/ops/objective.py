"""The preference loss of pairs and its coefficients, d sum_b loss_b / d lp_t, in one Triton launch
or in plain PyTorch.

The formulas stand in `treg_kernels.objective`; both implementations compute in float64, without
autograd. Inputs have been checked by the caller.
"""

from dataclasses import asdict

import torch
from torch import Tensor

from treg.losses import LossOptions
from treg.losses.segments import segment_sum
from treg.ops.head import on_device
from treg.ops.slopes import slopes
from treg.results import PairLoss

# the rows of `stats`
STATS = (
    *("chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards", "reg_loss"),
    *("chosen_weight", "rejected_weight", "chosen_slope", "rejected_slope"),
)


def write_objective(
    impl: str,
    logps: Tensor,
    target: Tensor | None,
    token_rewards: Tensor | None,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    starts: Tensor,
    first: int,
    count: int,
    options: LossOptions,
    loss: Tensor,
    stats: Tensor,
    coef: Tensor,
    ignore_index: int = -100,
) -> None:
    """Write what belongs to pairs first..first+count-1 of B; nothing else is changed, and nothing
    waits for the device.

    Args:
        logps, token_rewards, token_weights: [N] floating, contiguous, or None. ref_logps: [N] or
            [2B], or None.
        target: [N] integer (scored where not ignore_index), bool (scored where True), or None.
            Log-probs of pairs that are not asked for need not be there yet.
        starts: [2B+1] on logps' device, see `row_starts`.
        loss, stats: [B] and [len(STATS), B], see `empty_results`. coef: [N].
    """
    if impl == "torch":
        _write_torch(
            logps,
            target,
            token_rewards,
            ref_logps,
            token_weights,
            starts,
            first,
            count,
            options,
            loss,
            stats,
            coef,
            ignore_index,
        )
        return
    from treg_kernels.objective import pair_objective as launch

    with on_device(logps):
        launch(
            logps,
            target,
            token_rewards,
            ref_logps,
            token_weights,
            starts,
            first,
            count,
            loss,
            stats,
            coef,
            **asdict(options),
            length_normalised=options.objective.length_normalised,
            nll=options.objective.nll,
            ignore_index=ignore_index,
        )


def row_starts(logps: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[2B+1] on logps' device: the first row of each sequence of logps.reshape(-1); padded if
    cu_seqlens is None.
    """
    if cu_seqlens is not None:
        return cu_seqlens.to(logps.device, non_blocking=True)
    sequences, length = logps.shape
    return torch.arange(sequences + 1, device=logps.device) * length


def empty_results(pairs: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """loss [B] and stats [len(STATS), B] for `write_objective`, in like's dtype."""
    return like.new_empty(pairs), like.new_empty(len(STATS), pairs)


def results(loss: Tensor, stats: Tensor, options: LossOptions) -> PairLoss:
    """The fields of a PairLoss as views."""
    weights = stats[5] if options.objective.margin_only else stats[5:7].reshape(-1)
    return PairLoss(loss, *stats[:5].unbind(), weights)


def new_objective(
    logps,
    token_rewards,
    ref_logps,
    token_weights,
    target,
    cu_seqlens,
    options,
    impl,
    ignore_index=-100,
):
    """loss, stats and coef of padded or packed tensors with any strides."""
    starts = row_starts(logps, cu_seqlens)
    loss, stats = empty_results(pairs_of(logps, cu_seqlens), logps)
    coef = torch.empty_like(logps, memory_format=torch.contiguous_format)
    flat = [
        None if x is None else x.detach().reshape(-1).contiguous()
        for x in (logps, target, token_rewards, ref_logps, token_weights)
    ]
    write_objective(
        impl,
        *flat,
        starts.contiguous(),
        0,
        loss.shape[0],
        options,
        loss,
        stats,
        coef.view(-1),
        ignore_index,
    )
    return loss, stats, coef


def pairs_of(logps: Tensor, cu_seqlens: Tensor | None) -> int:
    return (logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1) // 2


def sequence_of_row(starts: Tensor, rows: int) -> Tensor:
    """[rows] int64."""
    return torch.searchsorted(
        starts[1:].long(), torch.arange(rows, device=starts.device), right=True
    )


def _write_torch(
    logps,
    target,
    token_rewards,
    ref_logps,
    token_weights,
    starts,
    first,
    count,
    options,
    loss,
    stats,
    coef,
    ignore_index,
) -> None:
    """The kernel in PyTorch: computes all pairs, keeps those asked for."""
    objective, beta, alpha = options.objective, options.beta, options.alpha
    if target is None:
        scored = torch.ones_like(logps, dtype=torch.bool)
    else:
        scored = target if target.dtype == torch.bool else target != ignore_index

    def clean(x: Tensor) -> Tensor:
        return torch.where(scored, x.double(), 0.0)

    def total(x: Tensor) -> Tensor:
        return segment_sum(x, starts)

    lp, u, n = clean(logps), clean(torch.ones_like(logps)), total(scored.double())
    rhat = torch.zeros_like(lp) if token_rewards is None else clean(token_rewards)
    per_token = ref_logps is not None and ref_logps.shape == logps.shape
    ratio = lp - clean(ref_logps) if per_token else lp
    if token_weights is not None:
        u = clean(token_weights)
        ratio = ratio * u
    scale = beta / n if objective.length_normalised else torch.full_like(n, beta)
    rho = total(ratio) if ref_logps is None or per_token else total(ratio) - ref_logps.double()
    rho = scale * rho
    reg = -scale * total(rhat * lp)

    slope = torch.cat(slopes(*rho.chunk(2), options))
    weight = torch.ones_like(slope) if options.weighting == "static" else slope.abs()
    sums = total(lp)
    value = objective.fn(*rho.chunk(2), options)
    constant = torch.zeros_like(n)
    if alpha:
        value = value + alpha * sum((weight * reg).chunk(2))
    if objective.nll:
        constant[: n.shape[0] // 2] = -1 / n[: n.shape[0] // 2]
        value = value + (constant * sums).chunk(2)[0]

    last, pairs = first + count, loss.shape[0]
    loss[first:last] = value[first:last]
    parts = (*sums.chunk(2), *rho.chunk(2), sum(reg.chunk(2)), *weight.chunk(2), *slope.chunk(2))
    stats[:, first:last] = torch.stack(parts)[:, first:last]
    s = sequence_of_row(starts, logps.shape[0])
    found = (scale * slope)[s] * u + constant[s]
    if alpha:
        found = found - (alpha * scale * weight)[s] * rhat
    inside = (s % pairs >= first) & (s % pairs < last)
    coef.copy_(torch.where(inside, torch.where(scored, found, 0.0).to(coef.dtype), coef))
