"""The preference loss of pairs by autograd, in float64: what the closed forms are tested against.

Of an objective it takes the value, and how tokens enter the rewards (`treg.losses.Credit`, which
`treg.ops.reference` judges). Slopes, weights and coefficients are autograd's.
"""

import torch
from torch import Tensor

from treg.losses import Credit, LossOptions
from treg.losses.pairs import Given, TokenInputs, _tokens, spans_of
from treg.losses.segments import segment_sum
from treg.results import PairLoss


def reward_gradient(
    rho_w: Tensor, rho_l: Tensor, options: LossOptions, pairs: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """d base / d rho_w and d base / d rho_l, each [B], detached."""
    w, l = (x.detach().clone().requires_grad_() for x in (rho_w, rho_l))
    value = options.base(w, l, pairs).value.sum()
    # FIGA is linear in both
    return torch.autograd.grad(value, (w, l))


def pair_loss(
    logps: Tensor,
    token_rewards: Tensor | None,
    ref_logps: Tensor | None,
    options: LossOptions,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    token_weights: Tensor | None,
    pair_values: dict[str, Tensor] | None = None,
) -> PairLoss:
    """`treg.losses.treg_loss` without KL; only `loss` carries a gradient."""
    objective = options.objective
    given = Given(token_rewards, ref_logps, token_weights).flat()
    flat_mask = None if mask is None else mask.reshape(-1)
    inputs = TokenInputs(flat_mask, given, spans_of(logps, cu_seqlens))
    credit = Credit()
    if objective.credit is not None:
        credit = options.credit(_tokens(logps.detach().reshape(-1), inputs))
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
    weights = torch.ones_like(logps) if token_weights is None else token_weights
    if credit.weights is not None:
        weights = weights * credit.weights.view(logps.shape).to(logps.dtype)
    rho = total(ratio * weights)
    if ref_logps is not None and not per_token:
        rho = rho - ref_logps
    norm = count if objective.length_normalised else 1.0
    if credit.norm is not None:
        norm = credit.norm.to(logps.dtype)
    rho_w, rho_l = (options.beta * rho / norm).chunk(2)
    sums_w, sums_l = sums.chunk(2)

    token_weights_used = weights != 0
    if options.weighting == "static":
        weights = torch.ones_like(rho_w) if objective.margin_only else torch.ones_like(rho)
        per_sequence = torch.ones_like(rho)
    else:
        grad_w, grad_l = reward_gradient(rho_w, rho_l, options, pair_values)
        per_sequence = torch.cat([grad_w, grad_l]).abs()
        weights = grad_w.abs() if objective.margin_only else per_sequence

    loss = options.base(rho_w, rho_l, pair_values).value
    if objective.nll:
        loss = loss - sums_w / count.chunk(2)[0]
    reg = torch.zeros_like(rho)
    if token_rewards is not None:
        reg = -options.beta * total(token_rewards * logps) / norm
    if options.alpha:
        loss = loss + options.alpha * sum((per_sequence * reg).chunk(2))
    used = token_weights_used if mask is None else token_weights_used & mask
    kept = total(used.to(logps.dtype))
    rest = (sums_w, sums_l, rho_w, rho_l, sum(reg.chunk(2)), weights, kept)
    return PairLoss(loss, *(x.detach() for x in rest))
