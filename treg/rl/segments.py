"""Rewards of tokens from the scores of segments."""

from typing import NamedTuple

import torch
from torch import Tensor

from treg.checks import check_number, values_visible
from treg.rl.layout import Layout
from treg.rl.steps import Steps


class SegmentNormaliser(NamedTuple):
    """How the scores of segments are distributed, by where in an answer a segment ends.

        mean(p) = w_mu * log p + b_mu       std(p) = w_sigma * log p + b_sigma

    p = k / K of the k-th of K segments, from 1. The numbers are fitted to scores of answers, for
    each reward model and each way to cut.
    """

    w_mu: float
    b_mu: float
    w_sigma: float
    b_sigma: float


@torch.no_grad()
def segment_rewards(
    scores: Tensor,
    units: Tensor | None,
    *,
    normaliser: SegmentNormaliser | None = None,
    limit: float | None = 10.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The scores of segments, shared out evenly among their tokens.

        s_k = the score at the last token of segment k
        r_t = clamp( (s_k - mean(p_k)) / std(p_k) / |segment k|, -limit, limit )
        p_k = k / K, k from 1; mean and std as `SegmentNormaliser` says, or 0 and 1 without one

    Paper: arXiv 2501.02790, segment-level rewards with location-aware normalisation and
    interpolation within segments. The limit is the released code's.
    Differs: every scored token is in a segment; the released code leaves the last one out.

    Args:
        scores: [B, T], or [N] with cu_seqlens, floating. What a reward model says after each token;
            of a segment only the last one is used.
        units: like scores, int64, the number of each token's segment, non-decreasing in a sequence.
            None: every token is a segment.
        normaliser: four numbers, std(p) > 0 wherever a segment ends.
        limit: > 0; None: no limit.
        mask: [B, T] bool, True where a token is scored; holes are skipped. What is elsewhere is
            not read. None: every token is scored.
        cu_seqlens: [B + 1] int32 or int64, where packed sequences begin and end; not with mask.
    Returns:
        Like scores, in its dtype; computed in float64. 0 where no token is scored.
    Raises:
        As `with_kl`; ValueError: units that decrease, a limit that is not above 0, a standard
            deviation that is not above 0.
    """
    check_number("limit", limit, positive=True, optional=True)
    layout = Layout.of("scores", scores, mask, cu_seqlens)
    steps = layout.steps(units)
    s = steps.lasts(layout.take("scores", scores))
    if normaliser is not None:
        s = _normalised(s, steps, normaliser)
    shares = steps.spread(s / steps.tokens.clamp(min=1))
    if limit is not None:
        shares = shares.clamp(-limit, limit)
    return layout.back(shares, scores.dtype)


def _normalised(scores: Tensor, steps: Steps, normaliser: SegmentNormaliser) -> Tensor:
    if len(normaliser) != 4:
        raise ValueError(
            "normaliser: expected (w_mu, b_mu, w_sigma, b_sigma) or None, got "
            f"{len(normaliser)} numbers"
        )
    for name, x in zip(SegmentNormaliser._fields, normaliser, strict=True):
        check_number(f"normaliser: {name}", x)
    w_mu, b_mu, w_sigma, b_sigma = normaliser
    k = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=torch.float64)
    count = steps.there.sum(1, keepdim=True)
    p = torch.where(steps.there, k / count.clamp(min=1), 1.0)
    std = w_sigma * p.log() + b_sigma
    if values_visible(std) and bool((std <= 0).any()):
        at = std.argmin()
        raise ValueError(
            "normaliser: expected a standard deviation > 0 at every segment, got "
            f"{std.flatten()[at].item():.4g} at p = {p.flatten()[at].item():.4g}; fit it to "
            "answers of so many segments"
        )
    return torch.where(steps.there, (scores - w_mu * p.log() - b_mu) / std, 0.0)
