"""The T-REG regularizer on top of any loss of per-token log-probs, for trainers that keep their own
objective.
"""

import torch
from torch import Tensor

from treg.checks import check_finite, check_number


def token_regularizer(base: Tensor, logps: Tensor, token_rewards: Tensor, alpha: float) -> Tensor:
    """What is added to a preference loss so that it becomes T-REG.

        R   = - alpha * sum_t c_t rhat_t lp_t          c_t = | d base / d lp_t |, detached
        d (base + R) / d lp_t = c_t * ( sign_t - alpha * rhat_t ),   sign_t = the sign of d base / d lp_t

    For DPO, whose |d base / d lp_t| is beta * w / B, this is T-REG, arXiv 2412.02685, Eq. 2: alpha
    * w * L_reg, a mean over the B pairs; the gradient of chosen tokens is scaled by 1 + alpha *
    rhat_t, that of rejected ones by 1 - alpha * rhat_t. `treg.losses.treg_loss` agrees where base
    is a function of plain sums or means of log-probs; it leaves the likelihood terms of orpo and
    cpo out of w.
    Differs: the paper defines DPO's w only.

    Args:
        base: scalar; the loss, already reduced. It must have been computed from this very logps
            tensor.
        logps: any shape, floating, nats, requires grad.
        token_rewards: like logps, rhat_t; 0 where there is none, as at tokens that are not scored.
        alpha: >= 0.
    Returns:
        R, a scalar in logps' dtype; its gradient goes through logps alone.
    Raises:
        ValueError: shapes that differ, rewards that are not finite, a base without a gradient in
            logps.
    """
    if token_rewards.shape != logps.shape:
        raise ValueError(
            f"token_rewards: expected the shape of logps {list(logps.shape)}, got {list(token_rewards.shape)}; of rows "
            "that are not shifted take token_rewards[:, 1:]"
        )
    check_number("alpha", alpha)
    if alpha < 0:
        raise ValueError(f"alpha: expected a number >= 0 (0: no regularizer), got {alpha!r}")
    check_finite("token_rewards", token_rewards)
    if not (base.requires_grad and logps.requires_grad):
        fix = "compute both outside torch.no_grad(), base from logps"
        raise ValueError(
            f"base: expected a loss that is differentiable in logps, got one that is not; {fix}"
        )
    try:
        (slope,) = torch.autograd.grad(base, logps, retain_graph=True)
    except RuntimeError as error:
        fix = "compute base from this very tensor"
        raise ValueError(f"base: expected a scalar function of logps ({error}); {fix}") from error
    return -(alpha * slope.abs() * token_rewards.detach().to(logps.dtype) * logps).sum()
