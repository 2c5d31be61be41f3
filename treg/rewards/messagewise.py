"""Segments of a response that agree with its label, by the token rewards of another source.

    pivots     where sign(r_t - b) is another than sign(r_t-1 - b), b the baseline
    segments   the runs between pivots; one shorter than min_tokens joins the one before it, see
               `treg.rewards.shaping.segments`; none goes beyond a message of several
    R_t        the mean of r over the segment of token t       token_rewards
    m_t        1 where R_t > b in a chosen answer, or R_t < b in a rejected one, else 0
                                                               token_weights

The mask m goes into the implicit rewards, rho = beta * sum_t m_t (lp_t - ref_t), policy and
reference: only segments whose reward agrees with the label of their sequence are trained on. What
ends a response keeps the reward that the other source gives it, and has the weight of the last
segment up to the last token with a reward; the weight 0 after that, and if there is none.

Paper: adaptive message-wise RLHF, arXiv 2411.00809. It says that segments are cut at pivots, where
the token reward changes, and that only those are kept whose reward agrees with the sequence's.
Differs: the paper's equations were not available. The rule of signs is that of the same authors'
Equilibrate RLHF, arXiv 2502.11555, whose released code masks single tokens by 1[r_t > b] (chosen)
and 1[r_t < b] (rejected) with b = 0; that segments are the runs between changes of sign, that their
reward is the mean, and min_tokens are inferred. A reward equal to b agrees with neither label.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from treg.data import SIDES
from treg.rewards.base import Context, check_number
from treg.rewards.nested import NestedOptions, NestedSource
from treg.rewards.response import Response
from treg.rewards.shaping import means_over, segments

EMPTY = ("zero", "whole")


@dataclass(frozen=True)
class MessagewiseOptions(NestedOptions):
    """baseline: b. min_tokens: of a segment.

    empty: what becomes of a response of which no segment agrees. "zero": all its weights are 0, it
        has rho = 0 and no gradient; `treg annotate` says how many there are. "whole": all weights
        of its content are 1.
    """

    baseline: float = field(
        default=0.0, metadata={"help": "The reward between those that agree and the others."}
    )
    min_tokens: int = field(
        default=1, metadata={"help": "Shorter segments join the one before them."}
    )
    empty: Literal["zero", "whole"] = field(
        default="zero",
        metadata={"help": "Weights of a response without a segment that agrees: zero, or whole."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_number("baseline", self.baseline)
        segments(torch.zeros(1), 0.0, self.min_tokens)
        if self.empty not in EMPTY:
            raise ValueError(f"empty: expected one of {', '.join(EMPTY)}, got {self.empty!r}")


class MessagewiseSource(NestedSource):
    """Mean rewards of segments, and a mask of those that agree with the response's label."""

    Options: ClassVar[type] = MessagewiseOptions
    streams: ClassVar[tuple[str, ...]] = ("token_rewards", "token_weights")

    def __init__(self, options: MessagewiseOptions, context: Context):
        super().__init__(options, context)
        self.options = options

    def settings(self) -> dict[str, Any]:
        own = ("baseline", "min_tokens", "empty")
        return super().settings() | {name: getattr(self.options, name) for name in own}

    def score(self, responses: Sequence[Response]) -> list[dict[str, Tensor]]:
        return [
            self._of(response, rewards)
            for response, rewards in zip(responses, self.rewards(responses), strict=True)
        ]

    def _of(self, response: Response, rewards: Tensor) -> dict[str, Tensor]:
        options, judged = self.options, response.judged
        number = response.numbered(
            lambda places: segments(rewards[places], options.baseline, options.min_tokens)
        )
        means = means_over(rewards[judged], number)
        above = means - options.baseline
        agrees = above > 0 if response.side == SIDES[0] else above < 0
        if options.empty == "whole" and not agrees.any():
            agrees = torch.ones_like(agrees)
        shaped, weights = rewards.clone(), torch.zeros_like(rewards)
        shaped[judged], weights[judged] = means, agrees.float()
        if len(judged):
            weights[response.ends(rewards)] = float(agrees[-1])
        return {"token_rewards": shaped, "token_weights": weights}
