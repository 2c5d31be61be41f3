"""Adaptive message-wise DPO: segments train only where their reward agrees with the label."""

import torch

from treg.losses.base import Objective, Scalars
from treg.losses.pairwise import dpo
from treg.losses.tokens import Credit, Tokens


def credit(tokens: Tokens, scalars: Scalars) -> Credit:
    """u_t = 1 where rhat_t > baseline on chosen tokens, where rhat_t < baseline on rejected ones,
    else 0.

    The loss is `dpo` at rho_s = beta * sum_t u_t (lp_t - ref_t): policy and reference are masked
    alike. An answer of which no token is kept has rho_s = 0 and no gradient; `PairLoss.kept` says
    how many are.

    Pivots are the places where rhat_t - baseline changes its sign, and a segment lies between two
    of them: all of its tokens are on one side, and so is their mean. The rule for tokens is
    therefore the rule for segments. The source `messagewise` gives each token the mean of its
    segment and merges segments that are too short.

    Paper: Adaptive message-wise RLHF, arXiv 2411.00809. Inferred: its equations were not to be had;
    masks by the sign of the token reward on both sums are those of the code beside a sibling paper
    by the same authors, arXiv 2502.11555 (its ADPO).
    """
    above, below = tokens.rewards > scalars["baseline"], tokens.rewards < scalars["baseline"]
    return Credit(torch.where(tokens.chosen, above, below).double())


MESSAGEWISE = Objective(
    dpo,
    "Adaptive message-wise RLHF, arXiv 2411.00809",
    decreasing=True,
    options={"baseline": 0.0, "label_smoothing": 0.0},
    credit=credit,
    needs=("token_rewards",),
    alpha=0.0,
)
