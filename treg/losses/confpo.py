"""ConfPO: only the tokens count of which the policy itself is less sure than on average."""

from treg.losses.base import Objective, Scalars
from treg.losses.pairwise import simpo
from treg.losses.tokens import Credit, Tokens


def credit(tokens: Tokens, scalars: Scalars) -> Credit:
    """u_t = 1 where p_t <= mean_t p_t, else 0, with p_t = exp(lp_t) of the policy as it is, a
    constant in the gradient; norm_s = the number of tokens kept.

    The loss is `simpo` at rho_s = beta / k_s * sum_t u_t lp_t, without a reference.

    Paper: ConfPO, arXiv 2506.08712. Inferred: its text was not to be had; the rule and SimPO's form
    on the kept tokens are those of summaries of it.
    """
    p = tokens.logps.exp() * tokens.scored
    mean = tokens.total(p) / tokens.lengths
    # The mean is rounded: of equal probabilities none may seem to be above it.
    unsure = tokens.scored & (p <= tokens.spread(mean) * (1 + 1e-12))
    return Credit(unsure.double(), norm=tokens.total(unsure.double()).clamp(min=1))


CONFPO = Objective(
    simpo,
    "ConfPO, arXiv 2506.08712",
    decreasing=True,
    reference_free=True,
    options={"gamma": 0.0, "label_smoothing": 0.0},
    credit=credit,
    alpha=0.0,
)
