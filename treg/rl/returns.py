"""What follows a token: discounted sums of rewards, and advantages over a value function."""

from typing import NamedTuple

import torch
from torch import Tensor

from treg.checks import check_fraction
from treg.rl.layout import Layout
from treg.rl.steps import one_to_the_left, sums_from_right


class GAE(NamedTuple):
    """Advantages and returns, both like the rewards that they are of; 0 where none is scored."""

    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def discounted_returns(
    rewards: Tensor,
    *,
    gamma: float = 1.0,
    units: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The discounted sum of the rewards from each token on.

        G_k = sum_{m >= k} gamma^(m - k) R_m
        R_m = the sum of the rewards of the tokens of step m

    A step is a token or, with units, a unit; all tokens of a unit get the G_k of their unit.
    Paper: GRPO, arXiv 2402.03300, section 4.1.3, for gamma = 1 and rewards that are normalised.

    Args:
        rewards: [B, T], or [N] with cu_seqlens, floating.
        gamma: in [0, 1].
        units: like rewards, int64, the number of each token's unit, non-decreasing in a sequence
            (`treg.rl.units_from_starts`, ...). None: every token is a unit.
        mask: [B, T] bool, True where a token is scored; holes are skipped. What is elsewhere is
            not read. None: every token is scored.
        cu_seqlens: [B + 1] int32 or int64, where packed sequences begin and end; not with mask.
    Returns:
        Like rewards, in its dtype; computed in float64. 0 where no token is scored.
    Raises:
        TypeError: an argument that must be a tensor is none. ValueError: shapes, dtypes or devices
            that do not fit; both mask and cu_seqlens; gamma outside [0, 1]; a reward of a scored
            token that is not finite; units that decrease (values are checked on a CPU, or under
            `treg.set_debug(True)`).
    """
    check_fraction("gamma", gamma)
    layout = Layout.of("rewards", rewards, mask, cu_seqlens)
    steps = layout.steps(units)
    sums = sums_from_right(steps.sums(layout.take("rewards", rewards)), gamma)
    return layout.back(steps.spread(sums), rewards.dtype)


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    units: Tensor | None = None,
    last_values: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> GAE:
    """Generalised advantage estimation over tokens, or over units of tokens.

        delta_k = R_k + gamma * V_{k+1} - V_k
        A_k     = delta_k + gamma * lam * A_{k+1}           returns_k = A_k + V_k
        R_k     = the sum of the rewards of step k          V_k = the mean of its tokens' values

    V after the last step is 0, or last_values where a sequence was cut. Tokens of a unit share its
    advantage and its return. lam = 1: A_k is the discounted return less V_k. Units of one token
    are tokens.
    Paper: GAE, arXiv 1506.02438, Eq. 16. Over units: MA-RLHF, arXiv 2410.02743, with its default
    weights 1 / (tokens of the unit) of the values.
    Differs: the released code of MA-RLHF weighs the rewards of a unit like its values, so that a
    penalty counts less in a longer unit; here they are summed, as in the paper. It also cuts the
    last token of a sequence off as a unit of its own; here units are what the caller says.

    Args:
        rewards: [B, T], or [N] with cu_seqlens, floating.
        values: like rewards, floating: the value function before each token.
        gamma: in [0, 1].
        lam: in [0, 1].
        units: like rewards, int64, the number of each token's unit, non-decreasing in a sequence.
            None: every token is a unit.
        last_values: [B] floating, the value after the last scored token; 0 of a sequence that has
            ended. None: all have.
        mask: [B, T] bool, True where a token is scored; holes are skipped. What is elsewhere is
            not read. None: every token is scored.
        cu_seqlens: [B + 1] int32 or int64, where packed sequences begin and end; not with mask.
    Returns:
        `GAE(advantages, returns)`, both like rewards, in its dtype; computed in float64. 0 where no
        token is scored.
    Raises:
        TypeError: an argument that must be a tensor is none. ValueError: shapes, dtypes or devices
            that do not fit; both mask and cu_seqlens; gamma or lam outside [0, 1]; a number of a
            scored token that is not finite; units that decrease (values are checked on a CPU, or
            under `treg.set_debug(True)`).
    """
    check_fraction("gamma", gamma)
    check_fraction("lam", lam)
    layout = Layout.of("rewards", rewards, mask, cu_seqlens)
    steps = layout.steps(units)
    R = steps.sums(layout.take("rewards", rewards))
    V = steps.sums(layout.take("values", values)) / steps.tokens.clamp(min=1)
    after = one_to_the_left(V)
    if last_values is not None:
        last = layout.take_sequences("last_values", last_values)
        after = torch.where(steps.last, last[:, None], after)
    A = sums_from_right(R + gamma * after - V, gamma * lam)
    return GAE(*(layout.back(steps.spread(x), rewards.dtype) for x in (A, A + V)))
