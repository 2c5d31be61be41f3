"""The T-REG regularizer on top of any loss of per-token log-probs.

For trainers that keep their own objective.
"""

import torch
from torch import Tensor

from treg.checks import (
    check_device,
    check_finite,
    check_floating,
    check_mask,
    check_number,
    check_tensor,
    values_visible,
)


def token_regularizer(
    base: Tensor,
    logps: Tensor,
    token_rewards: Tensor,
    alpha: float,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """What is added to a preference loss so that it becomes T-REG.

        R   = - alpha * sum_t c_t rhat_t lp_t          c_t = | d base / d lp_t |, detached
        d (base + R) / d lp_t = c_t * ( sign_t - alpha * rhat_t )
        sign_t = the sign of d base / d lp_t           both sums over the scored tokens

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
        mask: like logps, bool; True where a token is scored. Elsewhere nothing counts: whatever
            logps, token_rewards and the slope of base are there (NaN even), value and gradient
            are 0. None: every token is scored, and every log-prob must be finite.
    Returns:
        R, a scalar in logps' dtype; its gradient goes through logps alone.
    Raises:
        TypeError: an argument that must be a tensor is none. ValueError: shapes that differ, a mask
            that is not bool; log-probs, rewards or slopes of base that are not finite at a scored
            token (values are checked on a CPU, or under `treg.set_debug(True)`); a base without a
            gradient in logps.
    """
    for name, x in (("base", base), ("logps", logps), ("token_rewards", token_rewards)):
        check_tensor(name, x)
    if token_rewards.shape != logps.shape:
        raise ValueError(
            f"token_rewards: expected the shape of logps {list(logps.shape)}, got "
            f"{list(token_rewards.shape)}; of rows that are not shifted take token_rewards[:, 1:]"
        )
    for name, x in (("logps", logps), ("token_rewards", token_rewards)):
        check_floating(name, x)
        check_device(name, x, logps)
    check_number("alpha", alpha)
    if alpha < 0:
        raise ValueError(f"alpha: expected a number >= 0 (0: no regularizer), got {alpha!r}")
    check_tensor("mask", mask, optional=True)
    if mask is not None:
        check_mask(mask, logps)
    check_finite("token_rewards", token_rewards, mask)
    fix = "pass mask, False where no token is scored"
    if mask is not None:
        fix = "a scored token must have a probability above 0"
    _check_scored("logps: expected finite log-probs", logps, mask, fix)
    slope = _slope(base, logps)
    _check_scored("base: expected finite derivatives in logps", slope, mask, fix)
    coefficients = slope.abs() * token_rewards.detach().to(logps.dtype)
    if mask is not None:
        # The log-probs are cleaned before the product: 0 * inf would be NaN, and so would be the
        # gradient of a product that is replaced afterwards.
        coefficients = torch.where(mask, coefficients, 0.0)
        logps = torch.where(mask, logps, 0.0)
    return -(alpha * coefficients * logps).sum()


def _check_scored(expected: str, x: Tensor, mask: Tensor | None, fix: str) -> None:
    """ValueError for a number of a scored token that is not finite."""
    if not values_visible(x):
        return
    bad = ~torch.isfinite(x.detach())
    if mask is not None:
        bad &= mask
    if not bool(bad.any()):
        return
    at = bad.nonzero()[0].tolist()
    raise ValueError(
        f"{expected}, got {x[tuple(at)].item()} at index {at} ({int(bad.sum())} in all); {fix}"
    )


def _slope(base: Tensor, logps: Tensor) -> Tensor:
    """d base / d logps; the graph of base is kept."""
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
    return slope
