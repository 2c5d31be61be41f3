"""Whether per-token signals say anything: their statistics, and what they change in a loss.

Token rewards rhat_t enter T-REG, arXiv 2412.02685, Eq. 2, through the coefficient of each log-prob.
With token weights u_t, 1 where there are none, alpha, and the weight w of a pair,

    d L / d lp_t = -beta * w * ( u_t + alpha * rhat_t )      on chosen tokens
    d L / d lp_t = +beta * w * ( u_t - alpha * rhat_t )      on rejected tokens

so that the objective's own part is beta * w * u_t in size, and the regularizer's beta * w * alpha *
|rhat_t|. Before the first step of DPO all margins are 0 and all w are alike. The ratio of the two
gradients in the log-probs is then

    ratio = alpha * sqrt( sum_t rhat_t^2 ) / sqrt( sum_t u_t^2 )          over all tokens

and with length_normalised (simpo, ipo, orpo) both sums are of numbers divided by the tokens of
their response. In the weights of a model the ratio is another, of the same order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SIDES = ("chosen", "rejected")
SMALL = 0.01  # of |rhat|, whose largest value is 0.5
WEAK = 0.01  # a ratio of gradients below which runs with and without rewards are alike
FIRST = 0.2  # share of the mass on first tokens above which it is worth a word
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True)
class RewardSignal:
    """Statistics of token rewards; shares are in [0, 1].

    tokens, responses: how many; only tokens that are scored count. mean_abs: the mean of |rhat_t|,
    rms: the root of the mean of its square. small: share of tokens whose
    |rhat_t| is below SMALL. zero: share whose rhat_t is 0. quantiles: of rhat_t, at QUANTILES.
    first_mass: sum of |rhat_t| over the first tokens of responses, of that over all; first_tokens:
    share of first tokens among all. chosen_positive, rejected_negative: share of the chosen
    (rejected) tokens with a reward other than 0 whose reward is above (below) 0, the sign that the
    label wants; None where there are none. weights: 1st and 99th percentile of the factors
    u_t + alpha * rhat_t (chosen) and u_t - alpha * rhat_t (rejected). ratio: see the module.
    """

    tokens: int
    responses: int
    mean_abs: float
    rms: float
    small: float
    zero: float
    quantiles: tuple[float, ...]
    first_mass: float
    first_tokens: float
    chosen_positive: float | None
    rejected_negative: float | None
    weights: tuple[float, float]
    ratio: float


@dataclass(frozen=True)
class WeightSignal:
    """Statistics of token weights u_t >= 0, masks among them.

    tokens: how many. mean: of u_t. zero: share of tokens that are left out. quantiles: at
    QUANTILES. change: sqrt( mean( (u_t - mean)^2 ) ) / mean, which is 0 where all tokens count
    alike: the size of what the weights change in the gradient, of the gradient's.
    """

    tokens: int
    mean: float
    zero: float
    quantiles: tuple[float, ...]
    change: float


def sizes_of(rewards: Sequence[np.ndarray]) -> dict[str, float]:
    """How large rewards are and where they lie, of arrays one a response: mean_abs, rms, small,
    first_mass and first_tokens of `RewardSignal`.
    """
    size = np.abs(np.concatenate(rewards))
    total = float(size.sum())
    first = sum(abs(float(x[0])) for x in rewards)
    return {
        "mean_abs": float(size.mean()),
        "rms": float(np.sqrt((size**2).mean())),
        "small": float((size < SMALL).mean()),
        "first_mass": first / total if total else 0.0,
        "first_tokens": len(rewards) / len(size),
    }


def reward_signal(
    examples: Sequence[Mapping[str, Any]], alpha: float, *, length_normalised: bool = False
) -> RewardSignal:
    """The statistics of chosen_token_rewards and rejected_token_rewards.

    Args:
        examples: at least one pair, as `treg.data.annotated.read_annotated` gives them; where they
            have token_weights, those are u_t.
        alpha: > 0, of the regularizer.
    """
    rewards, signs, weights, lengths = [], [], [], []
    for example in examples:
        for side, sign in zip(SIDES, (1.0, -1.0), strict=True):
            r = _scored(example, side, "token_rewards")
            u = np.ones(len(r))
            if f"{side}_token_weights" in example:
                u = _scored(example, side, "token_weights")
            rewards.append(r)
            signs.append(np.full(len(r), sign))
            weights.append(u)
            lengths.append(np.full(len(r), len(r)))
    sizes = sizes_of(rewards)
    r, sign, u, n = (np.concatenate(x) for x in (rewards, signs, weights, lengths))
    norm = n if length_normalised else 1.0
    chosen, rejected = r[(sign > 0) & (r != 0)], r[(sign < 0) & (r != 0)]
    low, high = np.quantile(u + alpha * sign * r, (0.01, 0.99))
    base = np.linalg.norm(u / norm)
    return RewardSignal(
        tokens=len(r),
        responses=len(rewards),
        zero=float((r == 0).mean()),
        quantiles=tuple(map(float, np.quantile(r, QUANTILES))),
        **sizes,
        chosen_positive=float((chosen > 0).mean()) if len(chosen) else None,
        rejected_negative=float((rejected < 0).mean()) if len(rejected) else None,
        weights=(float(low), float(high)),
        ratio=float(alpha * np.linalg.norm(r / norm) / base) if base else float("inf"),
    )


def _scored(example: Mapping[str, Any], side: str, stream: str) -> np.ndarray:
    """A stream's numbers of the tokens that are scored."""
    values = np.asarray(example[f"{side}_{stream}"], np.float64)
    mask = example.get(f"{side}_scored")
    return values if mask is None else values[np.asarray(mask, dtype=bool)]


def weight_signal(examples: Sequence[Mapping[str, Any]], stream: str) -> WeightSignal:
    """The statistics of a stream of weights, such as token_weights or kl_weights."""
    u = np.concatenate([_scored(x, side, stream) for x in examples for side in SIDES])
    mean = u.mean()
    return WeightSignal(
        tokens=len(u),
        mean=float(mean),
        zero=float((u == 0).mean()),
        quantiles=tuple(map(float, np.quantile(u, QUANTILES))),
        change=float(u.std() / mean) if mean else 0.0,
    )


def signal_lines(
    examples: Sequence[Mapping[str, Any]],
    streams: Sequence[str],
    alpha: float,
    *,
    length_normalised: bool = False,
) -> list[str]:
    """What a person should know of each stream, with a warning where it says nothing.

    Args:
        streams: their names. alpha: of the regularizer; 0: no word on what rewards would change.
    """
    lines = []
    for stream in streams:
        if stream == "token_rewards":
            found = reward_signal(examples, alpha, length_normalised=length_normalised)
            lines += _of_rewards(found, alpha)
        else:
            lines += _of_weights(stream, weight_signal(examples, stream))
    return lines


def _of_rewards(found: RewardSignal, alpha: float) -> list[str]:
    signs = [
        f"{side} tokens: {100 * share:.0f} % {sign}"
        for side, share, sign in (
            ("chosen", found.chosen_positive, "above 0"),
            ("rejected", found.rejected_negative, "below 0"),
        )
        if share is not None
    ]
    lines = [
        f"token_rewards: {found.tokens} tokens of {found.responses} responses; mean size "
        f"{found.mean_abs:.2g}, {100 * found.small:.0f} % below {SMALL:g}, "
        f"{100 * found.zero:.0f} % are 0",
        f"  quantiles {_quantiles(found.quantiles)}",
        f"  the sign that the label wants, of those not 0: {', '.join(signs) or 'none'}",
        f"  first tokens hold {100 * found.first_mass:.0f} % of the sizes, and are "
        f"{100 * found.first_tokens:.1f} % of the tokens",
    ]
    if alpha > 0:
        low, high = found.weights
        lines.append(
            f"  at alpha={alpha:g} 98 % of the tokens weigh {low:.3f} to {high:.3f}; the "
            f"regularizer's gradient is {100 * found.ratio:.2g} % of the objective's"
        )
    return lines + _warnings(found, alpha)


def _warnings(found: RewardSignal, alpha: float) -> list[str]:
    """What a person must not overlook."""
    lines = []
    if found.zero == 1:
        return ["WARNING: every token reward is 0: training with them is the plain objective"]
    if alpha > 0 and found.ratio < WEAK:
        lines.append(
            f"WARNING: these rewards change the gradient by {100 * found.ratio:.2g} %: this is the "
            "plain objective (DPO). A stronger model, another source (--rewards) or --shape "
            "standardise=F gives rewards of a size that counts"
        )
    if on_first_tokens(found.first_mass, found.first_tokens):
        lines.append(
            f"WARNING: {100 * found.first_mass:.0f} % of the sizes of the rewards lie on the first "
            "token of a response; --shape skip=1 leaves it out"
        )
    chosen, rejected = found.chosen_positive, found.rejected_negative
    if chosen is not None and rejected is not None and chosen + rejected <= 1:
        lines.append(
            f"WARNING: the rewards do not prefer the chosen answers: {100 * chosen:.0f} % of their "
            f"tokens are above 0, of the rejected ones' {100 * (1 - rejected):.0f} %"
        )
    return lines


def on_first_tokens(mass: float, tokens: float) -> bool:
    """Whether first_mass, beside first_tokens, is worth a word."""
    return mass > FIRST and tokens < FIRST / 2


def _of_weights(stream: str, found: WeightSignal) -> list[str]:
    lines = [
        f"{stream}: {found.tokens} tokens; mean {found.mean:.3g}, {100 * found.zero:.0f} % are 0",
        f"  quantiles {_quantiles(found.quantiles)}",
        f"  they change the gradient by {100 * found.change:.2g} % of what equal weights give",
    ]
    if found.mean == 0:
        lines.append(f"WARNING: every number of {stream} is 0: nothing is learnt from them")
    elif found.change < WEAK:
        lines.append(
            f"WARNING: the numbers of {stream} are alike: they only scale the plain objective"
        )
    return lines


def _quantiles(values: Sequence[float]) -> str:
    named = zip(QUANTILES, values, strict=True)
    return ", ".join(f"{100 * q:.0f} %: {x:.3g}" for q, x in named)
