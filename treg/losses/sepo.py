"""SePO: only the tokens count that an oracle finds good in the chosen answer, bad in the other."""

from collections.abc import Mapping

import torch

from treg.losses.base import Objective, Scalars
from treg.losses.pairwise import simpo
from treg.losses.tokens import Credit, Tokens


def credit(tokens: Tokens, scalars: Scalars) -> Credit:
    """u_t = 1 for the share `keep` of the chosen tokens with the highest reward and of the rejected
    ones with the lowest, else 0; norm_s = the number of tokens kept.

    k = ceil(keep * n) of n tokens are kept, the earlier of equal ones. The loss is `simpo` at
    rho_s = beta / k_s * sum_t u_t lp_t, without a reference.

    Paper: SePO, arXiv 2408.13518, where the rewards are an oracle's: log pi_oracle - log pi_sft of
    two small models (the source `implicit`), and keep = 0.3.
    Differs: the paper divides by keep * n and not by the whole number of tokens kept; its code has
    beta = 1 and no gamma.
    """
    # the highest rewards of the chosen, the lowest of the rejected come first
    places = tokens.places(-tokens.sign * tokens.rewards)
    # a product that is a whole number but for its rounding is that number
    kept = torch.ceil(scalars["keep"] * tokens.lengths - 1e-9).clamp(min=1)
    return Credit((places < tokens.spread(kept)).double(), norm=kept)


def check(options: Mapping[str, float]) -> None:
    if not options["keep"] <= 1:
        raise ValueError(f"keep: expected a share of tokens, at most 1, got {options['keep']}")


SEPO = Objective(
    simpo,
    "SePO, arXiv 2408.13518",
    decreasing=True,
    reference_free=True,
    options={"keep": 0.3, "gamma": 0.0, "label_smoothing": 0.0},
    positive=("keep",),
    check=check,
    credit=credit,
    needs=("token_rewards",),
    alpha=0.0,
)
