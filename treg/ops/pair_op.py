"""The preference loss of log-probs from any source, as one operator: eager, under torch.compile, in
a CUDA graph.
"""

import torch
from torch import Tensor

from treg import checks
from treg.losses import LossOptions, check_reference
from treg.losses.segments import segment_sum
from treg.ops.objective import (
    empty_results,
    new_objective,
    pairs_of,
    results,
    row_starts,
    sequence_of_row,
)
from treg.results import PairLoss


def fused_pair_loss(
    logps: Tensor,
    token_rewards: Tensor | None,
    ref_logps: Tensor | None,
    options: LossOptions,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    impl: str | None = None,
) -> PairLoss:
    """`treg.losses.treg_loss` as one operator, `treg::pair_objective`.

    Args:
        logps, token_rewards, ref_logps, options, mask, token_weights: as in `treg_loss`.
        cu_seqlens: as in `treg_loss`; on logps' device it costs no copy, as a CUDA graph needs it.
        impl: "triton" (a GPU), "torch" (any device), None: "triton" on a GPU. A name never falls
            back.
    Returns:
        PairLoss, in logps' dtype; `loss` [B] carries the gradient in logps, first derivatives only.
    Raises:
        TypeError: an argument that must be a tensor is none. ValueError: any other bad input, by
            name.
        RuntimeError: a second derivative is asked for.
    """
    checks.check_tensor("logps", logps)
    for name, x in (
        ("token_rewards", token_rewards),
        ("ref_logps", ref_logps),
        ("token_weights", token_weights),
        ("mask", mask),
        ("cu_seqlens", cu_seqlens),
    ):
        checks.check_tensor(name, x, optional=True)
    if not isinstance(options, LossOptions):
        raise TypeError(f"options: expected a LossOptions, got {type(options).__name__}")
    o = options
    loss, stats, _ = _pair_objective(
        logps,
        token_rewards,
        ref_logps,
        token_weights,
        mask,
        cu_seqlens,
        o.loss_type,
        float(o.beta),
        float(o.alpha),
        float(o.gamma),
        float(o.label_smoothing),
        o.weighting,
        impl,
    )
    return results(loss, stats, options)


@torch.library.custom_op("treg::pair_objective", mutates_args=())
def _pair_objective(
    logps: Tensor,
    token_rewards: Tensor | None,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    loss_type: str,
    beta: float,
    alpha: float,
    gamma: float,
    label_smoothing: float,
    weighting: str,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss [B], stats [len(STATS), B] and coef like logps; inputs are checked here, where their
    values are known.
    """
    options = LossOptions(loss_type, beta, alpha, gamma, label_smoothing, weighting)
    impl = checks.resolve_impl(impl, logps)
    checks.check_floating("logps", logps)
    count = checks.check_sequences("logps", logps, 2, cu_seqlens)
    if mask is not None:
        checks.check_shape("mask", mask, logps.shape, "one per token")
        checks.check_device("mask", mask, logps)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask: expected torch.bool, got {mask.dtype}")
    checks.check_pair_inputs(logps, mask, token_rewards, ref_logps, token_weights, count, alpha)
    per_token = ref_logps is not None and ref_logps.shape == logps.shape
    check_reference(options, ref_logps, per_token=per_token, weighted=token_weights is not None)
    if checks.values_visible(logps):
        scored = torch.ones_like(logps) if mask is None else mask.to(logps.dtype)
        checks.check_lengths(
            "logps" if mask is None else "mask", segment_sum(scored, cu_seqlens).tolist()
        )
    return new_objective(
        logps, token_rewards, ref_logps, token_weights, mask, cu_seqlens, options, impl
    )


@_pair_objective.register_fake
def _(logps, token_rewards, ref_logps, token_weights, mask, cu_seqlens, *options):
    loss, stats = empty_results(pairs_of(logps, cu_seqlens), logps)
    return loss, stats, torch.empty_like(logps, memory_format=torch.contiguous_format)


@torch.library.custom_op("treg::pair_objective_grad", mutates_args=())
def _pair_objective_grad(
    upstream: Tensor, coef: Tensor, cu_seqlens: Tensor | None, logps: Tensor
) -> Tensor:
    """coef * upstream of the token's pair. logps is here so that a second derivative reaches this
    operator.
    """
    per_sequence = upstream.repeat(2)
    if cu_seqlens is None:
        return coef * per_sequence.unsqueeze(1)
    return coef * per_sequence[sequence_of_row(row_starts(coef, cu_seqlens), coef.shape[0])]


@_pair_objective_grad.register_fake
def _(upstream, coef, cu_seqlens, logps):
    return torch.empty_like(coef)


def _setup(ctx, inputs, output):
    logps, cu_seqlens, (_, stats, coef) = inputs[0], inputs[5], output
    ctx.mark_non_differentiable(stats, coef)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(coef, cu_seqlens, logps)


def _backward(ctx, upstream, *_):
    nothing = (None,) * 12
    return (
        None if upstream is None else _pair_objective_grad(upstream, *ctx.saved_tensors),
        *nothing,
    )


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        "fused_pair_loss: second derivatives are not computed; use treg.losses.treg_loss"
    )


_pair_objective.register_autograd(_backward, setup_context=_setup)
_pair_objective_grad.register_autograd(_no_second_derivative)
