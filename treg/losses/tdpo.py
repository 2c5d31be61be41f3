"""TDPO: the KL divergence of each token beside its log-ratio.

kl_t = KL( pi_ref(. | x, y_<t) || pi(. | x, y_<t) ), a sum over the whole vocabulary.
"""

import torch

from treg.losses.base import Objective, Scalars
from treg.losses.pairwise import dpo
from treg.losses.tokens import Credit, Tokens


def whole(tokens: Tokens, scalars: Scalars) -> Credit:
    """rho_s = beta * sum_t ( lp_t - ref_t + kl_t ), so that
    m = beta * ( (M_w - M_l) - (K_l - K_w) ), M = sum_t (lp_t - ref_t), K = sum_t kl_t.

    Paper: TDPO, arXiv 2404.11999, TDPO1.
    """
    return Credit(kl=torch.ones_like(tokens.logps))


def half_detached(tokens: Tokens, scalars: Scalars) -> Credit:
    """rho_s = beta * sum_t ( lp_t - ref_t + kl_weight * kl_t ), where the chosen answer's kl_t is a
    constant: m = beta * ( (M_w - M_l) - kl_weight * (K_l - sg(K_w)) ).

    Paper: TDPO, arXiv 2404.11999, TDPO2; kl_weight = 0.5 is the authors' alpha.
    """
    weight = torch.full_like(tokens.logps, scalars["kl_weight"])
    return Credit(kl=weight, kl_slope=torch.where(tokens.chosen, 0.0, weight))


TDPO1 = Objective(
    dpo,
    "TDPO, arXiv 2404.11999, TDPO1",
    decreasing=True,
    options={"label_smoothing": 0.0},
    credit=whole,
    needs=("kl",),
    alpha=0.0,
)
TDPO2 = Objective(
    dpo,
    "TDPO, arXiv 2404.11999, TDPO2",
    decreasing=True,
    options={"kl_weight": 0.5, "label_smoothing": 0.0},
    credit=half_detached,
    needs=("kl",),
    alpha=0.0,
)
