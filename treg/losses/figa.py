"""FIGA: likelihood of what a revision added, unlikelihood of what it removed."""

from collections.abc import Mapping

import torch
from torch import Tensor

from treg.losses.base import Base, Objective, Scalars, check_at_least
from treg.losses.tokens import Credit, Tokens


def credit(tokens: Tokens, scalars: Scalars) -> Credit:
    """u_t = added * max(rhat_t, 0) on chosen tokens; -removed * max(-rhat_t, 0) on rejected tokens
    with -lp_t <= gate, on which the policy is sure; else 0. norm = how many of the pair's u_t are
    not 0.

    The chosen answer is the revision and the rejected one the original; rewards are 1 at tokens
    that were added, -1 at those that were removed (the source `edits`).

    Paper: FIGA, arXiv 2311.04072; removed = 0.5 and the gate 0.6 are those of the authors' code.
    Differs: a mean over the tokens of each pair and not of a batch; the gate sees the policy as it
    is, as a constant.
    """
    added = scalars["added"] * tokens.rewards.clamp(min=0)
    removed = scalars["removed"] * tokens.rewards.clamp(max=0)
    sure = -tokens.logps <= scalars["gate"]
    weights = torch.where(tokens.chosen, added, torch.where(sure, removed, 0.0))
    weights = weights * tokens.scored
    return Credit(weights, norm=tokens.pair_total((weights != 0).double()).clamp(min=1))


def figa(rho_w: Tensor, rho_l: Tensor, scalars: Scalars) -> Base:
    """-(rho_w + rho_l) / beta = -sum_t u_t lp_t / norm, over the tokens of both answers."""
    slope = torch.full_like(rho_w, -1 / scalars.beta)
    return Base(-(rho_w + rho_l) / scalars.beta, slope, slope)


def check(options: Mapping[str, float]) -> None:
    check_at_least(options, 0, "added", "removed", "gate")


FIGA = Objective(
    figa,
    "FIGA, arXiv 2311.04072",
    margin_only=False,
    reference_free=True,
    options={"added": 1.0, "removed": 0.5, "gate": 0.6},
    check=check,
    credit=credit,
    needs=("token_rewards",),
    alpha=0.0,
    regularized=False,
)
