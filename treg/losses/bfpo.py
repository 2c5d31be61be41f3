"""BFPO: helpfulness and safety in one squared loss."""

from torch import Tensor

from treg.losses.base import Base, Objective, Scalars, base_of_margin


def bfpo(rho_w: Tensor, rho_l: Tensor, scalars: Scalars) -> Base:
    """BFPO: IPO's squared loss at a target that the safety of both answers sets.

        h             m / beta = sum_t (lp_t - ref_t) of the chosen minus that of the rejected
        target        (1.5 safe_w - 0.5 safe_l - shift) / tau
        value         (h - target)^2
        d value / dm  2 (h - target) / beta

    The chosen answer is the more helpful one; safe_w and safe_l are 1 for a safe answer and 0 for
    one that is not: the columns chosen_safe and rejected_safe.

    Paper: BFPO, arXiv 2408.15313; shift = 0.5 and tau = 0.01 are those of the authors' code, whose
    general form has 3/2 and 1/2 at B1 = 3. It weighs whole answers, not tokens.
    """
    safe_w, safe_l = scalars.pairs["chosen_safe"], scalars.pairs["rejected_safe"]
    target = (1.5 * safe_w - 0.5 * safe_l - scalars["shift"]) / scalars["tau"]
    rest = (rho_w - rho_l) / scalars.beta - target
    return base_of_margin(rest**2, 2 * rest / scalars.beta)


BFPO = Objective(
    bfpo,
    "BFPO, arXiv 2408.15313",
    options={"shift": 0.5, "tau": 0.01},
    positive=("tau",),
    pair_columns=("chosen_safe", "rejected_safe"),
    binary_pairs=True,
    alpha=0.0,
)
