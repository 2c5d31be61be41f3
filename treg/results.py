"""What the ops return: named tuples, the same for every implementation and for the reference."""

from typing import NamedTuple

from torch import Tensor


class LinearLogprobs(NamedTuple):
    """Per-token outputs of `linear_logprobs`, each of target's shape, float32, 0 (False) where
    ignored.
    """

    logprobs: Tensor  # [...] nats; differentiable
    lse: Tensor | None = None  # [...] logsumexp_v z_v, nats; detached
    entropy: Tensor | None = None  # [...] -sum_v p_v log p_v, nats; detached
    mean_logit: Tensor | None = None  # [...] mean_v z_v; detached
    is_top1: Tensor | None = (
        None  # [...] bool: no z_v is above the target's (a tie counts); detached
    )
    log_sum_sq_probs: Tensor | None = None  # [...] log sum_v p_v^2, nats; detached


class LinearKL(NamedTuple):
    """Per-token outputs of `linear_kl`, each of hidden's shape without D, float32 (float64 of
    float64), nats, 0 where ignored.
    """

    kl: Tensor  # [...] >= 0; differentiable
    logprobs: Tensor | None = None  # [...] of the targets, where there are any; differentiable
    ref_logprobs: Tensor | None = None  # [...] of the targets under the reference; detached


class PairLoss(NamedTuple):
    """Unreduced losses of B pairs, in the log-probs' dtype. Only `loss` carries a gradient."""

    loss: Tensor  # [B]
    chosen_logps: Tensor  # [B] plain sums of log-probs, nats
    rejected_logps: Tensor  # [B]
    chosen_rewards: Tensor  # [B] rho, the implicit rewards
    rejected_rewards: Tensor  # [B]
    reg_loss: Tensor  # [B] L_reg(chosen) + L_reg(rejected), before alpha and w
    weights: Tensor  # w: [B] for objectives of the margin alone, else [2B]
    kept: Tensor  # [2B] scored tokens that enter rho with a weight other than 0


class TRegLoss(NamedTuple):
    """What `fused_treg_loss` returns. Only `loss` carries a gradient."""

    loss: Tensor  # scalar, or [B] with reduction="none"
    chosen_logps: Tensor  # [B] plain sums of log-probs, nats
    rejected_logps: Tensor  # [B]
    chosen_rewards: Tensor  # [B] rho
    rejected_rewards: Tensor  # [B]
    reg_loss: Tensor  # [B]
    weights: Tensor  # [B] or [2B]
    kept: Tensor  # [2B]
    token_logps: Tensor  # like target, nats, 0 where ignored
    lse: Tensor | None = None  # like target; these five where asked for, as in LinearLogprobs
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    kl: Tensor | None = None  # like target, nats; for loss types with a KL term
