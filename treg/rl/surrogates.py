"""What is minimized for each token in place of the expected reward, and the ratio that enters it.

B sequences, T tokens. At a token that is not scored everything is 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treg.rl.kl import ratio_of

# Log-ratios of VESPO are held within these, as its authors' code has it.
VESPO_LOWEST, VESPO_HIGHEST = math.log(1e-8), 20.0


@dataclass(frozen=True)
class Tokens:
    """A batch, float64."""

    logprobs: Tensor  # [B, T] of the policy
    log_ratio: Tensor  # [B, T] policy to the one that sampled
    ratio: Tensor  # [B, T], or [B, 1] for a whole sequence
    advantages: Tensor  # [B, T] or [B, 1], detached
    weights: Tensor | None  # [B, T] or [B, 1], detached: `ratio_weights`
    scored: Tensor  # [B, T] bool


class Surrogate(NamedTuple):
    """[B, T], or [B, 1] where it is the same at each token."""

    loss: Tensor
    low: Tensor | None = None  # bool: clipped from below; None for those that do not clip
    high: Tensor | None = None
    weighted: bool = False  # whether `Tokens.weights` are in it already


def clip(x: Tokens, options: Any) -> Surrogate:
    """-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A), with r <= delta in the first."""
    low, high = 1.0 - options.epsilon_low, 1.0 + options.epsilon_high
    ratio, clipped = x.ratio, x.ratio.clamp(low, high)
    if options.delta is not None:
        ratio = ratio.clamp(max=options.delta)
    loss = -torch.minimum(ratio * x.advantages, clipped * x.advantages)
    below = (ratio < low) & (x.advantages < 0)
    return Surrogate(loss, below, (ratio > high) & (x.advantages > 0))


def cispo(x: Tokens, options: Any) -> Surrogate:
    """-sg[min(r, epsilon_high)] A lp, where sg stops the gradient: no token loses its gradient."""
    held = x.ratio.detach().clamp(max=options.epsilon_high)
    high = (x.ratio > options.epsilon_high) & (x.advantages > 0)
    return Surrogate(-held * x.advantages * x.logprobs, torch.zeros_like(high), high)


def sapo(x: Tokens, options: Any) -> Surrogate:
    """-4/tau sigmoid(tau (r - 1)) A, with tau = sapo_temperature_pos where A > 0, else _neg."""
    good = x.advantages > 0
    tau = _choose(good, options.sapo_temperature_pos, options.sapo_temperature_neg, x)
    return Surrogate(-torch.sigmoid(tau * (x.ratio - 1.0)) * 4.0 / tau * x.advantages)


def vespo(x: Tokens, options: Any) -> Surrogate:
    """-sg[phi(w)] A lp, phi(w) = w^k exp(lam (1 - w)), w the ratio of the whole sequence.

    w is exp of the sum of log-ratios, with those of `ratio_weights`; k and lam are vespo_k_pos and
    vespo_lambda_pos where A >= 0, else vespo_k_neg and vespo_lambda_neg.
    """
    log_w = x.log_ratio.detach().clamp(-VESPO_HIGHEST, VESPO_HIGHEST).sum(1, keepdim=True)
    if x.weights is not None:
        logs = x.weights.log().clamp(VESPO_LOWEST, VESPO_HIGHEST)
        if logs.shape == x.scored.shape:
            logs = torch.where(x.scored, logs, 0.0)
        log_w = log_w + logs.sum(1, keepdim=True)
    log_w = log_w.clamp(VESPO_LOWEST, VESPO_HIGHEST)
    good = x.advantages >= 0
    k = _choose(good, options.vespo_k_pos, options.vespo_k_neg, x)
    lam = _choose(good, options.vespo_lambda_pos, options.vespo_lambda_neg, x)
    phi = torch.exp(lam + k * log_w - lam * log_w.exp())
    return Surrogate(-phi * x.advantages * x.logprobs, weighted=True)


def _choose(condition: Tensor, yes: float, no: float, x: Tokens) -> Tensor:
    return torch.full_like(x.advantages, no).masked_fill(condition, yes)


SURROGATES: dict[str, Callable[[Tokens, Any], Surrogate]] = {
    "clip": clip,
    "cispo": cispo,
    "sapo": sapo,
    "vespo": vespo,
}


def token_level(log_ratio: Tensor, logprobs: Tensor, lengths: Tensor) -> Tensor:
    """Of each token."""
    return log_ratio


def sequence_mean(log_ratio: Tensor, logprobs: Tensor, lengths: Tensor) -> Tensor:
    """The mean over the sequence."""
    return log_ratio.sum(1, keepdim=True) / lengths.clamp(min=1.0)


def sequence_sum(log_ratio: Tensor, logprobs: Tensor, lengths: Tensor) -> Tensor:
    """Of the whole sequence."""
    return log_ratio.sum(1, keepdim=True)


def sequence_token(log_ratio: Tensor, logprobs: Tensor, lengths: Tensor) -> Tensor:
    """The mean over the sequence in value, and the token's own log-prob in the gradient."""
    mean = sequence_mean(log_ratio, logprobs, lengths).detach()
    return mean + (logprobs - logprobs.detach())


# (log-ratio [B, T], log-probs [B, T], lengths [B, 1]) -> log of the ratio, [B, T] or [B, 1]
RATIO_LEVELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "token": token_level,  # PPO
    "sequence": sequence_mean,  # GSPO, 2507.18071 Eq. 7
    "sequence_sum": sequence_sum,  # RLOO, 2402.14740
    "sequence_token": sequence_token,  # GSPO-token, 2507.18071 Eq. 14
}


def ratio_at(level: str, log_ratio: Tensor, logprobs: Tensor, lengths: Tensor) -> Tensor:
    """The importance ratio at a level of `RATIO_LEVELS`."""
    return ratio_of(RATIO_LEVELS[level](log_ratio, logprobs, lengths))
