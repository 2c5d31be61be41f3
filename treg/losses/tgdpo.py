"""TGDPO: the margin's own tokens are weighed by token rewards."""

from treg.losses.base import Objective, Scalars
from treg.losses.pairwise import dpo
from treg.losses.tokens import Credit, Tokens


def credit(tokens: Tokens, scalars: Scalars) -> Credit:
    """u_t = 1 + strength * rhat_t on chosen tokens, 1 - strength * rhat_t on rejected ones.

    The loss is `dpo` at rho_s = beta * sum_t u_t (lp_t - ref_t).

    Paper: TGDPO, arXiv 2506.14574, where rhat_t = beta * (log pi_dpo - log pi_ref)(y_t): the token
    reward of a policy that DPO has trained (the source `implicit`), and strength = 0.5.
    Differs: any token rewards are taken. T-REG puts the same weights into the gradient, but its
    sigmoid sees the margin without them; the two agree where sum_t rhat_t (lp_t - ref_t) is 0 in
    both answers.
    """
    return Credit(1 + scalars["strength"] * tokens.sign * tokens.rewards)


TGDPO = Objective(
    dpo,
    "TGDPO, arXiv 2506.14574",
    decreasing=True,
    options={"strength": 0.5, "label_smoothing": 0.0},
    credit=credit,
    needs=("token_rewards",),
    alpha=0.0,
)
