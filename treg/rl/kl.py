"""Estimates of KL(policy || reference) from the log-probs of sampled tokens alone."""

from collections.abc import Callable

import torch
from torch import Tensor

# Beyond e^80 a ratio of two probabilities is held, so that no exponential overflows.
LARGEST_LOG = 80.0


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), held at e^80: there its gradient is 0 and not NaN."""
    return log_ratio.clamp(max=LARGEST_LOG).exp()


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """lp - ref. Its mean is the divergence; the mean of its own gradient is 0, so that as a term of
    a loss it needs the ratio as a factor.
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(lp - ref)^2 / 2. Its gradient is on the average that of the divergence; its mean is not."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(ref - lp) - (ref - lp) - 1 >= 0. Its mean is the divergence."""
    below = ref_logprobs - logprobs
    return ratio_of(below) - below - 1.0


# (lp, ref) -> an estimate for each token, nats; http://joschu.net/blog/kl-approx.html
KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def off_policy_kl(logprobs: Tensor, sampling_logprobs: Tensor) -> Tensor:
    """sampling - lp, detached; 0 where the engine that sampled gave no log-prob (NaN)."""
    found = sampling_logprobs - logprobs.detach()
    return torch.where(found.isnan(), 0.0, found)
