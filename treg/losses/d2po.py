"""D2PO: earlier tokens count more."""

from treg.losses.base import Objective, Scalars
from treg.losses.pairwise import dpo
from treg.losses.tokens import Credit, Tokens


def credit(tokens: Tokens, scalars: Scalars) -> Credit:
    """u_t = decay^t, t = 1 at the first scored token of an answer.

    The loss is `dpo` at rho_s = beta * sum_t u_t (lp_t - ref_t): the reference is weighed alike.

    Paper: D2PO, arXiv 2502.14340; decay 0.98, t from 1 as in the authors' code.
    """
    return Credit(scalars["decay"] ** tokens.position)


D2PO = Objective(
    dpo,
    "D2PO, arXiv 2502.14340",
    decreasing=True,
    options={"decay": 0.98, "label_smoothing": 0.0},
    positive=("decay",),
    credit=credit,
    alpha=0.0,
)
