"""TIS-DPO: importance weights of tokens, from the ranks of their rewards."""

from collections.abc import Mapping

import torch

from treg.losses.base import Objective, Scalars, check_at_least
from treg.losses.pairwise import dpo
from treg.losses.tokens import Credit, Tokens


def credit(tokens: Tokens, scalars: Scalars) -> Credit:
    """u_t = T(rhat_t) on chosen tokens, T(-rhat_t) on rejected ones.

        clamp = 0   T maps the rank of the token in its answer, 0 to n - 1, to [low, high]; equal
                    rewards share their mean rank, and the only token of an answer has the middle
        clamp > 0   T maps the reward itself from [-clamp, clamp], beyond which it is cut, to
                    [low, high]

    The loss is `dpo` at rho_s = beta * sum_t u_t (lp_t - ref_t).

    Paper: TIS-DPO, arXiv 2410.04350, where rhat_t = (log pi+ - log pi-)(y_t): the source `implicit`
    with two models. The ranks in [0.7, 1.3] are those of the authors' code; clamp = 1.5 is its
    other transform.
    Differs: the weighted KL term of the paper's general form is left out, as in the authors'
    runs.
    """
    low, high, clamp = scalars["low"], scalars["high"], scalars["clamp"]
    score = tokens.sign * tokens.rewards
    last = tokens.spread(tokens.lengths) - 1
    share = torch.where(last > 0, tokens.ranks(score) / last.clamp(min=1), 0.5)
    if clamp > 0:
        share = (score.clamp(-clamp, clamp) / clamp + 1) / 2
    return Credit(low + (high - low) * share)


def check(options: Mapping[str, float]) -> None:
    check_at_least(options, 0, "low", "clamp")
    if options["low"] > options["high"]:
        raise ValueError(
            f"low: expected at most high, which is {options['high']}, got {options['low']}"
        )


TIS_DPO = Objective(
    dpo,
    "TIS-DPO, arXiv 2410.04350",
    decreasing=True,
    options={"low": 0.7, "high": 1.3, "clamp": 0.0, "label_smoothing": 0.0},
    check=check,
    credit=credit,
    needs=("token_rewards",),
    alpha=0.0,
)
