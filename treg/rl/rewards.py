"""Rewards of tokens, as online methods put them together from scores and log-probs.

Where rewards of one kind are already at the tokens, adding them is adding tensors; these are the
sums that have a paper.
"""

import torch
from torch import Tensor

from treg.checks import (
    check_device,
    check_finite,
    check_floating,
    check_fraction,
    check_not_negative,
    check_number,
    check_tensor,
)
from treg.rl.layout import Layout


@torch.no_grad()
def at_end(
    scores: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """A score of each answer as the reward of its last scored token; the others have 0.

    Args:
        scores: [B] floating.
        mask: [B, T] bool, True where a token is scored.
        cu_seqlens: [B + 1] int32 or int64, where packed sequences begin and end. One of both must
            be given.
    Returns:
        [B, T] or [N], scores' dtype. The score of a sequence without a scored token is nowhere.
    Raises:
        TypeError: an argument that must be a tensor is none. ValueError: shapes, dtypes or devices
            that do not fit; both mask and cu_seqlens, or none; a score of a sequence with a scored
            token that is not finite (values are checked on a CPU, or under
            `treg.set_debug(True)`).
    """
    layout = Layout.where(mask, cu_seqlens)
    return layout.back(_at_end(layout, scores), scores.dtype)


@torch.no_grad()
def with_kl(
    rewards: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    coef: float,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Rewards less the price of leaving the reference model.

        r_t - coef * (lp_t - lp_ref_t)

    Paper: RED, arXiv 2411.08302, Eq. 8, which calls coef beta.

    Args:
        rewards: [B, T], or [N] with cu_seqlens, floating.
        logprobs: like rewards, nats: of the policy that drew the tokens.
        ref_logprobs: like rewards, nats: of the reference model.
        coef: >= 0.
        mask: [B, T] bool, True where a token is scored. What is elsewhere is not read. None: every
            token is scored.
        cu_seqlens: [B + 1] int32 or int64, where packed sequences begin and end; not with mask.
    Returns:
        Like rewards, in its dtype; computed in float64. 0 where no token is scored.
    Raises:
        TypeError: an argument that must be a tensor is none. ValueError: shapes, dtypes or devices
            that do not fit; both mask and cu_seqlens; coef below 0; a number of a scored token that
            is not finite (values are checked on a CPU, or under `treg.set_debug(True)`).
    """
    check_not_negative("coef", coef)
    layout = Layout.of("rewards", rewards, mask, cu_seqlens)
    r = layout.take("rewards", rewards)
    ratios = _log_ratios(layout, logprobs=logprobs, ref_logprobs=ref_logprobs)
    return layout.back(r - coef * ratios, rewards.dtype)


@torch.no_grad()
def red_rewards(
    token_rewards: Tensor,
    scores: Tensor,
    beta_c: float = 1.0,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Rewards of tokens mixed with the score of the whole answer.

        beta_c * r_t + (1 - beta_c) * score at the last token (0 before it)

    Paper: RED, arXiv 2411.08302, Eq. 7. There r_t is how much a reward model's score of the answer
    rises by token t (Eq. 6), so that the rewards of either kind add up to the score but for what
    the prompt alone gets.

    Args:
        token_rewards: [B, T], or [N] with cu_seqlens, floating.
        scores: [B] floating.
        beta_c: in [0, 1].
        mask: [B, T] bool, True where a token is scored. What is elsewhere is not read. None: every
            token is scored.
        cu_seqlens: [B + 1] int32 or int64, where packed sequences begin and end; not with mask.
    Returns:
        Like token_rewards, in its dtype; computed in float64. 0 where no token is scored.
    Raises:
        As `with_kl`; ValueError: beta_c outside [0, 1].
    """
    check_fraction("beta_c", beta_c)
    layout = Layout.of("token_rewards", token_rewards, mask, cu_seqlens)
    r = layout.take("token_rewards", token_rewards)
    mixed = beta_c * r + (1 - beta_c) * _at_end(layout, scores)
    return layout.back(mixed, token_rewards.dtype)


@torch.no_grad()
def rto_rewards(
    dpo_logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor | None = None,
    *,
    scale: float = 0.05,
    limit: float | None = 0.05,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The implicit rewards of a model that DPO trained, and the score of the whole answer.

        clamp(scale * (lp_dpo_t - lp_ref_t), -limit, limit) + score at the last token (0 before it)

    Paper: RTO, arXiv 2404.18922; scale is its beta_1. Its penalty beta_2 is `with_kl`; the weight
    beta_3 of the score is the caller's.
    Differs: the limit is the released code's, which also clamps the score to [-10, 10].

    Args:
        dpo_logprobs: [B, T], or [N] with cu_seqlens, floating, nats: of the model after DPO.
        ref_logprobs: like dpo_logprobs, nats: of the model before it.
        scores: [B] floating; None: no score.
        scale: any number.
        limit: > 0; None: no limit.
        mask: [B, T] bool, True where a token is scored. What is elsewhere is not read. None: every
            token is scored.
        cu_seqlens: [B + 1] int32 or int64, where packed sequences begin and end; not with mask.
    Returns:
        Like dpo_logprobs, in its dtype; computed in float64. 0 where no token is scored.
    Raises:
        As `with_kl`; ValueError: a limit that is not above 0.
    """
    check_number("scale", scale)
    check_number("limit", limit, positive=True, optional=True)
    layout = Layout.of("dpo_logprobs", dpo_logprobs, mask, cu_seqlens)
    r = scale * _log_ratios(layout, dpo_logprobs=dpo_logprobs, ref_logprobs=ref_logprobs)
    if limit is not None:
        r = r.clamp(-limit, limit)
    if scores is not None:
        r = r + _at_end(layout, scores)
    return layout.back(r, dpo_logprobs.dtype)


@torch.no_grad()
def contrastive_offset(scores: Tensor, base_scores: Tensor) -> Tensor:
    """Scores less what the starting model gets on the same prompts.

        S_i - mean_j S_base_ij

    Paper: contrastive rewards, arXiv 2403.07708.

    Args:
        scores: [B] floating, of the policy's answers.
        base_scores: [B, k] floating, k >= 1: of k answers of the starting model to each prompt.
    Returns:
        [B] in scores' dtype; computed in float64.
    Raises:
        TypeError: an argument is no tensor. ValueError: shapes, dtypes or devices that do not fit;
            a score that is not finite (values are checked on a CPU, or under
            `treg.set_debug(True)`).
    """
    for name, x, form in (("scores", scores, "[B]"), ("base_scores", base_scores, "[B, k]")):
        check_tensor(name, x)
        check_floating(name, x)
        check_device(name, x, scores)
        if x.ndim != form.count(",") + 1 or len(x) != len(scores) or 0 in x.shape[1:]:
            raise ValueError(f"{name}: expected {form}, one row per sequence, got {list(x.shape)}")
        check_finite(name, x)
    return (scores.double() - base_scores.double().mean(1)).to(scores.dtype)


def _at_end(layout: Layout, scores: Tensor) -> Tensor:
    """[B, W] float64."""
    last = layout.steps(None).last
    return torch.where(last, layout.take_sequences("scores", scores)[:, None], 0.0)


def _log_ratios(layout: Layout, **logprobs: Tensor) -> Tensor:
    """[B, W] float64: the first of two named log-probs less the second."""
    ours, theirs = (layout.take(name, x) for name, x in logprobs.items())
    return ours - theirs
