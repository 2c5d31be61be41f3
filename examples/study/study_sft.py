"""What the study adds to the library: training on chosen answers alone, and their likelihood beside
a preference loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from treg.data import RowProblem
from treg.losses.base import Base, Objective, Scalars
from treg.rewards import Context, Response


def sft(rho_w: Tensor, rho_l: Tensor, scalars: Scalars) -> Base:
    """-rho_w, which is minus beta times the mean log-likelihood of the chosen answer's tokens. What
    the rejected one is worth has no part in it.
    """
    ones = torch.ones_like(rho_w)
    return Base(-rho_w, -ones, torch.zeros_like(rho_l))


SFT = Objective(
    sft,
    "supervised fine-tuning on the chosen answers",
    margin_only=False,
    length_normalised=True,
    reference_free=True,
    alpha=0.0,
)


@dataclass(frozen=True)
class LikelihoodOptions:
    """beta: that of the loss, by which the regularizer multiplies its rewards."""

    beta: float = field(default=0.1, metadata={"help": "That of the loss."})


class LikelihoodSource:
    """r_t = 1 / (beta |y|) in chosen answers, 0 in rejected ones.

    With weighting="static" T-REG's regularizer is then -alpha / |y_w| sum_t log pi(y_t), the mean
    log-likelihood of the chosen answer (T-REG, arXiv 2412.02685, Table 2, "DPO + SFT").
    """

    Options: ClassVar[type] = LikelihoodOptions
    streams: ClassVar[tuple[str, ...]] = ("token_rewards",)

    def __init__(self, options: LikelihoodOptions, context: Context):
        self.options = options

    def settings(self) -> dict[str, Any]:
        return {"beta": self.options.beta}

    def check(self, response: Response) -> RowProblem | None:
        return None

    def score(self, responses: Sequence[Response]) -> list[dict[str, Tensor]]:
        found = []
        for response in responses:
            count = len(response.ids)
            value = 1 / (self.options.beta * count) if response.side == "chosen" else 0.0
            found.append({"token_rewards": torch.full((count,), value)})
        return found
