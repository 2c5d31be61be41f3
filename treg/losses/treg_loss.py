"""The preference loss of log-probs from any source, as one operator.

B pairs are S = 2B sequences, chosen first. rho_s is the implicit reward of sequence s:

    rho_s = beta * sum_t u_t * (lp_t - ref_t)            u_t = 1 unless token_weights are given
    rho_s = beta * mean_t u_t * (lp_t - ref_t)           length-normalised objectives
    m     = rho_w - rho_l

Objectives that give tokens credit of their own have other u_t, and perhaps a KL term: see
`treg.losses.tokens.Credit`.

The operator `treg::pair_objective` computes the loss of each pair and its derivative in each
log-prob, the coefficients. `treg::pair_objective_grad`, its backward, multiplies them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from treg import checks
from treg.losses.options import LossOptions, pair_table
from treg.losses.pairs import (
    OTHER_SLOPES,
    Given,
    PairOutputs,
    TokenInputs,
    check_pairs,
    evaluate_pairs,
    pair_loss,
    row_starts,
    spans_of,
)
from treg.losses.tokens import sequence_of_row
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
    kl: Tensor | None = None,
    kl_weights: Tensor | None = None,
    pair_values: Mapping[str, Tensor] | None = None,
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
    gradient times 1 +- alpha * rhat_t. The likelihood term of orpo and cpo has no part in w. Where
    tokens have weights u_t, given or the objective's own, L_reg has none: its sum runs over all
    scored tokens, and is divided by what rho is divided by.

    beta, alpha and the objective's own options may change from step to step: under torch.compile
    they neither break the graph nor compile it again.

    Args:
        logps: [2B, T], or [N] with cu_seqlens; floating, nats; chosen sequences first.
        token_rewards: like logps; rhat_t, in [-0.5, 0.5] for contrastive rewards. May be None when
            alpha is 0.
        ref_logps: [2B] sums, or like logps (needed with token_weights, and by objectives that
            weigh tokens); None for reference-free objectives.
        options: loss type and its scalars.
        cu_seqlens: [2B+1] integer offsets of packed sequences. On logps' device they cost no copy,
            as a CUDA graph needs it.
        mask: like logps, bool; True where a token is scored. None: all are.
        token_weights: like logps, u_t >= 0 in the margin; they multiply those of the objective.
        kl: like logps, nats; for objectives with a KL term, as `treg.ops.linear_kl` gives it.
        kl_weights: like logps, >= 0, weights of kl; None: token_weights.
        pair_values: numbers of each pair by name, [B] each, for objectives that need them:
            `OBJECTIVES[name].pair_columns`.
        impl: "triton" (a GPU), "torch" (any device), None: "triton" on a GPU. A name never falls
            back; an objective without a Triton form is computed in PyTorch under either.
    Returns:
        PairLoss, in logps' dtype (computed in float64); loss [B] carries the gradient in logps, kl,
        token_weights and kl_weights, first derivatives only. T-REG's w is a constant in all of
        them, and so is what an objective makes of log-probs and rewards.
    Raises:
        TypeError: an argument that must be a tensor is none. ValueError: any other bad input, by
            name. RuntimeError: a second or a forward-mode derivative, or a transform of
            torch.func, is asked for.
    """
    checks.check_tensor("logps", logps)
    if not isinstance(options, LossOptions):
        raise TypeError(f"options: expected a LossOptions, got {type(options).__name__}")
    others = {
        "token_rewards": token_rewards,
        "ref_logps": ref_logps,
        "token_weights": token_weights,
        "kl": kl,
        "kl_weights": kl_weights,
        "mask": mask,
        "cu_seqlens": cu_seqlens,
    }
    for name, x in others.items():
        checks.check_tensor(name, x, optional=True)
    checks.check_transforms(logps=logps, **others)
    pairs = pair_table(options, pair_values, logps, _pairs_of(logps, cu_seqlens))
    impl = checks.resolve_impl(impl, logps)
    grad = torch.is_grad_enabled()
    asked = [grad and x is not None and x.requires_grad for x in (token_weights, kl, kl_weights)]
    slopes = "".join("1" if x else "0" for x in asked)
    loss, stats, *_ = _pair_objective(
        logps,
        token_rewards,
        ref_logps,
        token_weights,
        kl,
        kl_weights,
        pairs,
        mask,
        cu_seqlens,
        scalars(*options.numbers()),
        f"{impl} {slopes} {options.text()}",
    )
    return pair_loss(loss, stats, options)


def _read(call: str) -> tuple[str, tuple[str, ...], str]:
    """impl, which of OTHER_SLOPES are asked for, and the text of the options."""
    impl, slopes, text = call.split(" ", 2)
    asked = [name for name, flag in zip(OTHER_SLOPES, slopes, strict=True) if flag == "1"]
    return impl, tuple(asked), text


def _losses(logps: Tensor, *others: Any) -> list[Tensor]:
    """loss [B], stats [len(STATS), B], coef like logps, and the other slopes that are asked for.

    Checked here, where values are known.
    """
    *tensors, mask, cu_seqlens, scalars, call = others
    impl, asked, text = _read(call)
    options = LossOptions.of(text, scalars.tolist())
    checks.check_floating("logps", logps)
    if mask is not None:
        checks.check_mask(mask, logps)
    name = "logps" if mask is None else "mask"
    given = Given(*tensors)
    check_pairs(name, logps, mask, given, cu_seqlens, options)
    rows = logps.detach().reshape(-1).contiguous()
    inputs = TokenInputs(
        target=None if mask is None else mask.reshape(-1).contiguous(),
        given=given.flat(),
        spans=spans_of(logps, cu_seqlens),
    )
    outputs = PairOutputs.empty(_pairs_of(logps, cu_seqlens), rows, asked)
    evaluate_pairs(impl, rows, inputs, options, outputs)
    slopes = [outputs.coef, *outputs.others.values()]
    return [outputs.loss, outputs.stats, *(x.view(logps.shape) for x in slopes)]


def _pairs_of(logps: Tensor, cu_seqlens: Tensor | None) -> int:
    # of a tensor without dimensions, which is refused later, none
    sequences = logps.shape[:1].numel() if cu_seqlens is None else cu_seqlens.shape[:1].numel() - 1
    return sequences // 2


def _losses_fake(logps: Tensor, *others: Any) -> list[Tensor]:
    *_, cu_seqlens, _, call = others
    _, asked, _ = _read(call)
    coef = torch.empty_like(logps, memory_format=torch.contiguous_format)
    outputs = PairOutputs.empty(_pairs_of(logps, cu_seqlens), coef, asked)
    return [outputs.loss, outputs.stats, outputs.coef, *outputs.others.values()]


def _multiply(
    upstream: Tensor,
    slopes: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    logps: Tensor,
) -> list[Tensor]:
    """slopes, each like logps, times upstream [B] of the token's pair; 0 where a token is not
    scored.

    logps is here so that a second derivative reaches this operator.
    """
    of_sequence = upstream.repeat(2)
    if cu_seqlens is None:
        of_token = of_sequence.unsqueeze(1)
    else:
        rows = sequence_of_row(row_starts(logps, cu_seqlens), logps.shape[0])
        of_token = of_sequence[rows]
    found = [x * of_token for x in slopes]
    # 0 times an infinite upstream would be NaN
    return found if mask is None else [torch.where(mask, x, 0.0) for x in found]


def _multiply_fake(
    upstream: Tensor,
    slopes: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    logps: Tensor,
) -> list[Tensor]:
    return [torch.empty_like(x) for x in slopes]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    logps, _, _, token_weights, kl, kl_weights, _, mask, cu_seqlens, _, call = inputs
    _, *others = output
    _, ctx.asked, _ = _read(call)
    others_given = {"token_weights": token_weights, "kl": kl, "kl_weights": kl_weights}
    ctx.dtypes = {name: others_given[name].dtype for name in ctx.asked}
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mask, cu_seqlens, logps, *output[2:])


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    upstream = grads[0]
    found: dict[str, Tensor] = {}
    if upstream is not None:
        mask, cu_seqlens, logps, *slopes = ctx.saved_tensors
        gradients = _gradient(upstream, slopes, mask, cu_seqlens, logps)
        found = dict(zip(("logps", *ctx.asked), gradients, strict=True))
        for name, dtype in ctx.dtypes.items():
            found[name] = found[name].to(dtype)
    names = ("logps", "", "", "token_weights", "kl", "kl_weights")
    return *(found.get(name) for name in names), None, None, None, None, None


_TENSORS = (
    "Tensor logps, Tensor? token_rewards, Tensor? ref_logps, Tensor? token_weights, Tensor? kl, "
    "Tensor? kl_weights, Tensor? pairs, Tensor? mask, Tensor? cu_seqlens"
)
_pair_objective = Operator(
    f"pair_objective({_TENSORS}, Tensor scalars, str call) -> Tensor[]", _losses, _losses_fake
)
_pair_objective.differentiable(_save, _backward)

_gradient = Operator(
    "pair_objective_grad(Tensor upstream, Tensor[] slopes, Tensor? mask, Tensor? cu_seqlens, "
    "Tensor logps) -> Tensor[]",
    _multiply,
    _multiply_fake,
)
_gradient.first_derivatives_only()
