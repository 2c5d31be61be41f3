"""The preference loss of log-probs from any source, as one operator.

B pairs are S = 2B sequences, chosen first. rho_s is the implicit reward of sequence s:

    rho_s = beta * sum_t u_t * (lp_t - ref_t)            u_t = 1 unless token_weights are given
    rho_s = beta * mean_t u_t * (lp_t - ref_t)           length-normalised objectives
    m     = rho_w - rho_l

The operator `treg::pair_objective` computes the loss of each pair and its derivative in each
log-prob, the coefficients. `treg::pair_objective_grad`, its backward, multiplies them.
"""

from typing import Any

import torch
from torch import Tensor

from treg import checks
from treg.losses.options import LossOptions
from treg.losses.pairs import (
    PairOutputs,
    TokenInputs,
    check_pairs,
    evaluate_pairs,
    pair_loss,
    row_starts,
    sequence_of_row,
)
from treg.operators import Operator, scalars
from treg.results import PairLoss

DEFAULTS = LossOptions()


def treg_loss(
    logps: Tensor,
    token_rewards: Tensor | None,
    ref_logps: Tensor | None = None,
    options: LossOptions = DEFAULTS,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    impl: str | None = None,
) -> PairLoss:
    """T-REG over any objective, from log-probs that the caller already has; unreduced.

        L     = base(rho_w, rho_l) [+ nll(y_w)] + alpha * ( w_w L_reg(y_w) + w_l L_reg(y_l) )
        L_reg = - sum_t beta * rhat_t * lp_t           (a mean for length-normalised objectives)
        w_s   = | d base / d rho_s |, detached         (dpo: both sigmoid(-m)); 1 if "static"

    Paper: T-REG, arXiv 2412.02685, Eq. 1 (L_reg, without the part of the reference, constant in the
    policy), Eq. 2 (L), Eq. 3 (rhat).
    Differs: the paper prints w for DPO only; w_s for the other objectives, and L_reg as a mean for
    the length-normalised ones, are the extension under which T-REG's gradient stays the base
    gradient times 1 +- alpha * rhat_t. The likelihood term of orpo and cpo has no part in w.

    beta, alpha and the objective's own options may change from step to step: under torch.compile
    they neither break the graph nor compile it again.

    Args:
        logps: [2B, T], or [N] with cu_seqlens; floating, nats; chosen sequences first.
        token_rewards: like logps; rhat_t, in [-0.5, 0.5] for contrastive rewards. May be None when
            alpha is 0.
        ref_logps: [2B] sums, or like logps (needed with token_weights); None for reference-free
            objectives.
        options: loss type and its scalars.
        cu_seqlens: [2B+1] integer offsets of packed sequences. On logps' device they cost no copy,
            as a CUDA graph needs it.
        mask: like logps, bool; True where a token is scored. None: all are.
        token_weights: like logps, u_t >= 0 in the margin.
        impl: "triton" (a GPU), "torch" (any device), None: "triton" on a GPU. A name never falls
            back; an objective without a Triton form is computed in PyTorch under either.
    Returns:
        PairLoss, in logps' dtype (computed in float64); loss [B] carries the gradient in logps,
        first derivatives only.
    Raises:
        TypeError: an argument that must be a tensor is none. ValueError: any other bad input, by
            name. RuntimeError: a second or a forward-mode derivative, or a transform of
            torch.func, is asked for.
    """
    checks.check_tensor("logps", logps)
    others = {
        "token_rewards": token_rewards,
        "ref_logps": ref_logps,
        "token_weights": token_weights,
        "mask": mask,
        "cu_seqlens": cu_seqlens,
    }
    for name, x in others.items():
        checks.check_tensor(name, x, optional=True)
    checks.check_transforms(logps=logps, **others)
    if not isinstance(options, LossOptions):
        raise TypeError(f"options: expected a LossOptions, got {type(options).__name__}")
    impl = checks.resolve_impl(impl, logps)
    loss, stats, _ = _pair_objective(
        logps,
        token_rewards,
        ref_logps,
        token_weights,
        mask,
        cu_seqlens,
        scalars(*options.numbers()),
        f"{impl} {options.text()}",
    )
    return pair_loss(loss, stats, options)


def _losses(
    logps: Tensor,
    token_rewards: Tensor | None,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scalars: Tensor,
    call: str,
) -> list[Tensor]:
    """loss [B], stats [len(STATS), B], coef like logps. Checked here, where values are known."""
    impl, _, text = call.partition(" ")
    options = LossOptions.of(text, scalars.tolist())
    checks.check_floating("logps", logps)
    if mask is not None:
        checks.check_mask(mask, logps)
    name = "logps" if mask is None else "mask"
    check_pairs(name, logps, mask, token_rewards, ref_logps, token_weights, cu_seqlens, options)

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().reshape(-1).contiguous()

    rows = logps.detach().reshape(-1).contiguous()
    inputs = TokenInputs(
        target=flat(mask),
        token_rewards=flat(token_rewards),
        ref_logps=flat(ref_logps),
        token_weights=flat(token_weights),
        starts=row_starts(logps, cu_seqlens).contiguous(),
    )
    outputs = PairOutputs.empty(_pairs_of(logps, cu_seqlens), rows)
    evaluate_pairs(impl, rows, inputs, options, outputs)
    return [outputs.loss, outputs.stats, outputs.coef.view(logps.shape)]


def _pairs_of(logps: Tensor, cu_seqlens: Tensor | None) -> int:
    sequences = logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sequences // 2


def _losses_fake(
    logps: Tensor,
    token_rewards: Tensor | None,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scalars: Tensor,
    call: str,
) -> list[Tensor]:
    coef = torch.empty_like(logps, memory_format=torch.contiguous_format)
    outputs = PairOutputs.empty(_pairs_of(logps, cu_seqlens), coef)
    return [outputs.loss, outputs.stats, outputs.coef]


def _multiply(
    upstream: Tensor,
    coef: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    logps: Tensor,
) -> list[Tensor]:
    """coef times upstream [B] of the token's pair, like logps; 0 where a token is not scored.

    logps is here so that a second derivative reaches this operator.
    """
    of_sequence = upstream.repeat(2)
    if cu_seqlens is None:
        of_token = of_sequence.unsqueeze(1)
    else:
        rows = sequence_of_row(row_starts(coef, cu_seqlens), coef.shape[0])
        of_token = of_sequence[rows]
    found = coef * of_token
    # 0 times an infinite upstream would be NaN
    return [found if mask is None else torch.where(mask, found, 0.0)]


def _multiply_fake(
    upstream: Tensor,
    coef: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    logps: Tensor,
) -> list[Tensor]:
    return [torch.empty_like(coef)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    logps, _, _, _, mask, cu_seqlens, _, _ = inputs
    _, stats, coef = output
    ctx.mark_non_differentiable(stats, coef)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(coef, mask, cu_seqlens, logps)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    upstream, _, _ = grads
    gradient = None
    if upstream is not None:
        (gradient,) = _gradient(upstream, *ctx.saved_tensors)
    return gradient, None, None, None, None, None, None, None


_TENSORS = (
    "Tensor logps, Tensor? token_rewards, Tensor? ref_logps, Tensor? token_weights, "
    "Tensor? mask, Tensor? cu_seqlens"
)
_pair_objective = Operator(
    f"pair_objective({_TENSORS}, Tensor scalars, str call) -> Tensor[]", _losses, _losses_fake
)
_pair_objective.differentiable(_save, _backward)

_gradient = Operator(
    "pair_objective_grad(Tensor upstream, Tensor coef, Tensor? mask, Tensor? cu_seqlens, "
    "Tensor logps) -> Tensor[]",
    _multiply,
    _multiply_fake,
)
_gradient.first_derivatives_only()
