"""Advantages from rewards of several answers to one prompt, without a value model."""

from collections.abc import Callable

import torch
from torch import Tensor

from treg.checks import (
    check_finite,
    check_floating,
    check_fraction,
    check_not_negative,
    check_tensor,
)
from treg.rl.groups import group_numbers, means, totals
from treg.rl.layout import Layout
from treg.rl.scales import SCALES, Batch, Centred
from treg.rl.steps import one_to_the_left, row_sums, sums_from_right


@torch.no_grad()
def token_advantages(
    rewards: Tensor,
    groups: Tensor | int,
    *,
    units: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    baseline: str = "group",
    scale: str = "group",
    eps: float = 1e-4,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Advantages of tokens against the other answers to the same prompt.

        A_ik     = sum_{m >= k} (gamma * lam)^(m - k) * delta_im
        delta_im = R_im + gamma * V_{i,m+1} - V_im       V_im = b_i, 0 after the last step
        R_im     = the sum of the rewards of step m of sequence i: a token or, with units, a unit
        S_i      = sum_m R_im

    The result is A / (s + eps), and tokens of a unit share it. With gamma = lam = 1, A_ik is what
    the steps from k on earn, less b_i (of process, less b_i for each of them).

    What `baseline` makes of b_i:

        group    b_i = the mean of S over i's group. GRPO, arXiv 2402.03300, section 4.1.2
        rloo     b_i = the mean of S over the others of the group; 0 where there is none. RLOO,
                 arXiv 2402.14740
        none     b_i = 0
        process  A_ik = sum_{m >= k} (gamma * lam)^(m - k) * (R_im - b_i), b_i = the mean of R over
                 all steps of the group. GRPO, section 4.1.3
        tokens   as none, and then less the mean of A over all tokens of the batch: b_i, for all i.
                 REINFORCE++, arXiv 2501.03262

    What `scale` makes of s:

        group    s^2 = 1 / (n - 1) * sum_i mean_t (A_it + b_i - c)^2, over the n sequences of the
                 group; mean_t is over the tokens of a sequence, c is the mean of b over the group,
                 and n - 1 is at least 1. Of process: the standard deviation of R over all steps of
                 the group
        batch    the same over all of the batch
        tokens   s = the standard deviation of A over all tokens of the batch. REINFORCE++
        none     A as it is

    Where the reward stands at the last token alone, or one unit is a sequence, and gamma = lam = 1,
    A + b is S, for all baselines but process: with baseline group, scale group is the standard
    deviation of the rewards of the group, batch that of all rewards, as in TRL's GRPO. Where all
    rewards are equal the result is then exactly 0. Where only the sums are equal, s is the size of
    what the tokens differ by.
    Differs: GRPO is defined for a reward at the end, and by steps as process; the papers name no
    eps.

    Args:
        rewards: [B, T], or [N] with cu_seqlens, floating.
        groups: [B] int64 or int32, equal numbers are answers to one prompt; or a number G, which
            divides B: every G sequences in a row are a group. A sequence without a scored token is
            in none.
        units: like rewards, int64, the number of each token's unit, non-decreasing in a sequence.
            None: every token is a unit.
        gamma: in [0, 1].
        lam: in [0, 1].
        baseline: a key of `BASELINES`.
        scale: a key of `SCALES`.
        eps: >= 0.
        mask: [B, T] bool, True where a token is scored; holes are skipped. What is elsewhere is
            not read. None: every token is scored.
        cu_seqlens: [B + 1] int32 or int64, where packed sequences begin and end; not with mask.
    Returns:
        Like rewards, in its dtype; computed in float64. 0 where no token is scored.
    Raises:
        TypeError: an argument that must be a tensor is none. ValueError: shapes, dtypes or devices
            that do not fit; both mask and cu_seqlens; an unknown baseline or scale; gamma or lam
            outside [0, 1]; eps below 0; a G that does not divide B; a reward of a scored token that
            is not finite; units that decrease (values are checked on a CPU, or under
            `treg.set_debug(True)`).
    """
    centre = _row("baseline", baseline, BASELINES)
    size = _row("scale", scale, SCALES)
    check_fraction("gamma", gamma)
    check_fraction("lam", lam)
    check_not_negative("eps", eps)
    layout = Layout.of("rewards", rewards, mask, cu_seqlens)
    steps = layout.steps(units)
    R = steps.sums(layout.take("rewards", rewards))
    batch = Batch(R, steps, group_numbers(groups, layout.lengths), gamma, lam)
    centred = centre(batch)
    A = centred.advantages
    if size is not None:
        s = size(centred, batch) + eps
        A = A / torch.where(s > 0, s, 1.0)[:, None]  # where s is 0, A is
    return layout.back(steps.spread(A), rewards.dtype)


@torch.no_grad()
def group_advantages(
    scores: Tensor,
    groups: Tensor | int,
    *,
    baseline: str = "group",
    scale: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    """Advantages of sequences that have one number each: `token_advantages` of one token.

        A_i = (S_i - b_i) / (s + eps)

    The defaults are TRL's GRPO; scale "batch" is its scale_rewards="batch", baseline "rloo" with
    scale "none" its RLOO.
    Differs: TRL gives the only answer of a prompt 0 under rloo; here its baseline is 0.

    Args:
        scores: [B] floating.
        groups: [B] int64 or int32, equal numbers are answers to one prompt; or a number G, which
            divides B: every G sequences in a row are a group.
        baseline: a key of `BASELINES`. scale: a key of `SCALES`. eps: >= 0.
    Returns:
        [B] in scores' dtype; computed in float64.
    Raises:
        As `token_advantages`.
    """
    check_tensor("scores", scores)
    if scores.ndim != 1:
        raise ValueError(f"scores: expected [B], one per sequence, got {list(scores.shape)}")
    check_floating("scores", scores)
    check_finite("scores", scores)
    found = token_advantages(scores[:, None], groups, baseline=baseline, scale=scale, eps=eps)
    return found[:, 0]


def _over_values(batch: Batch, level: Tensor) -> Centred:
    """The advantages where the value of every state is the level of its sequence."""
    V = torch.where(batch.steps.there, level[:, None], 0.0)
    deltas = batch.rewards + batch.gamma * one_to_the_left(V) - V
    A = sums_from_right(deltas, batch.gamma * batch.lam)
    return Centred(A, A, level, batch.shares)


def _group(batch: Batch) -> Centred:
    return _over_values(batch, _group_means(batch)[0])


def _rloo(batch: Batch) -> Centred:
    middle, sums, counts = _group_means(batch)
    others = sums - counts / (counts - 1).clamp(min=1) * (sums - middle)
    return _over_values(batch, torch.where(counts > 1, others, 0.0))


def _none(batch: Batch) -> Centred:
    return _over_values(batch, torch.zeros_like(batch.rewards[:, 0]))


def _process(batch: Batch) -> Centred:
    there = batch.steps.there
    level = means(batch.rewards, there.double(), batch.group)
    residuals = torch.where(there, batch.rewards - level[:, None], 0.0)
    A = sums_from_right(residuals, batch.gamma * batch.lam)
    return Centred(A, residuals, level, there.double())


def _tokens(batch: Batch) -> Centred:
    A = _none(batch).advantages
    level = means(A, batch.steps.tokens, torch.zeros_like(batch.group))
    A = torch.where(batch.steps.there, A - level[:, None], 0.0)
    return Centred(A, A, level, batch.shares)


# A new one is a function and a row.
BASELINES: dict[str, Callable[[Batch], Centred]] = {
    "group": _group,
    "rloo": _rloo,
    "none": _none,
    "process": _process,
    "tokens": _tokens,
}


def _group_means(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """[B] each: the mean of the sums of a group, the sums, and how many sequences they are of."""
    sums = row_sums(batch.rewards)
    scored = batch.steps.there[:, :1].double()
    counts = totals(scored[:, 0], batch.group)
    return means(sums[:, None], scored, batch.group), sums, counts


def _row(argument: str, name: str, rows: dict):
    if name not in rows:
        raise ValueError(f"{argument}: expected one of {', '.join(rows)}, got {name!r}")
    return rows[name]
