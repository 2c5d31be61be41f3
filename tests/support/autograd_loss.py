"""The preference loss of pairs by autograd, in float64: what the closed forms are tested against.

Of an objective it takes the value alone. Slopes, weights and coefficients are autograd's.
"""

import torch
from torch import Tensor

from treg.losses import LossOptions
from treg.losses.segments import segment_sum
from treg.results import PairLoss


def reward_gradient(rho_w: Tensor, rho_l: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """d base / d rho_w and d base / d rho_l, each [B], detached."""
    w, l = (x.detach().clone().requires_grad_() for x in (rho_w, rho_l))
    return torch.autograd.grad(options.base(w, l).value.sum(), (w, l))


def pair_loss(
    logps: Tensor,
    token_rewards: Tensor | None,
    ref_logps: Tensor | None,
    options: LossOptions,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    token_weights: Tensor | None,
) -> PairLoss:
    """`treg.losses.treg_loss`; only `loss` carries a gradient."""
    objective = options.objective
    per_token = ref_logps is not None and ref_logps.shape == logps.shape
    if mask is None:
        count = segment_sum(torch.ones_like(logps), cu_seqlens)
    else:
        count = segment_sum(mask.to(logps.dtype), cu_seqlens)
        # cleaned before any product: the gradient of where(mask, x * nan, 0) would be nan
        logps, token_rewards, token_weights = (
            None if x is None else torch.where(mask, x, 0.0)
            for x in (logps, token_rewards, token_weights)
        )
        ref_logps = torch.where(mask, ref_logps, 0.0) if per_token else ref_logps

    def total(x: Tensor) -> Tensor:
        return segment_sum(x, cu_seqlens)

    sums = total(logps)
    ratio = logps
    if per_token:
        ratio = ratio - ref_logps
    if token_weights is not None:
        ratio = ratio * token_weights
    rho = total(ratio)
    if ref_logps is not None and not per_token:
        rho = rho - ref_logps
    norm = count if objective.length_normalised else 1.0
    rho_w, rho_l = (options.beta * rho / norm).chunk(2)
    sums_w, sums_l = sums.chunk(2)

    if options.weighting == "static":
        weights = torch.ones_like(rho_w) if objective.margin_only else torch.ones_like(rho)
        per_sequence = torch.ones_like(rho)
    else:
        grad_w, grad_l = reward_gradient(rho_w, rho_l, options)
        per_sequence = torch.cat([grad_w, grad_l]).abs()
        weights = grad_w.abs() if objective.margin_only else per_sequence

    loss = options.base(rho_w, rho_l).value
    if objective.nll:
        loss = loss - sums_w / count.chunk(2)[0]
    reg = torch.zeros_like(rho)
    if token_rewards is not None:
        reg = -options.beta * total(token_rewards * logps) / norm
    if options.alpha:
        loss = loss + options.alpha * sum((per_sequence * reg).chunk(2))
    rest = (sums_w, sums_l, rho_w, rho_l, sum(reg.chunk(2)), weights)
    return PairLoss(loss, *(x.detach() for x in rest))
