"""How likely the reference finds each token.

    r_t = log pi_ref(y_t | x, y_<t)

It is low where the model is surprised. It costs no forward pass beside that of the reference
log-probs, and is the baseline that every other source must beat: on models up to 0.5B parameters it
found marked tokens better than contrastive prompts did.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from treg.data import RowProblem
from treg.rewards.base import Context
from treg.rewards.response import Response
from treg.rewards.units import unit_numbers

UNITS = ("token", "word")


@dataclass(frozen=True)
class SurpriseOptions:
    """unit: "token", or "word": each token gets the lowest reward of its word's tokens."""

    asks_reference: ClassVar[bool] = True

    unit: Literal["token", "word"] = field(
        default="token",
        metadata={"help": "token, or word: each token gets the lowest reward of its word."},
    )

    def __post_init__(self):
        if self.unit not in UNITS:
            raise ValueError(f"unit: expected one of {', '.join(UNITS)}, got {self.unit!r}")


class SurpriseSource:
    """Log-probs by the reference as token rewards, in nats, at most 0."""

    Options: ClassVar[type] = SurpriseOptions
    streams: ClassVar[tuple[str, ...]] = ("token_rewards",)

    def __init__(self, options: SurpriseOptions, context: Context):
        self.unit = options.unit
        self.context = context

    def settings(self) -> dict[str, Any]:
        return {"unit": self.unit}

    def check(self, response: Response) -> RowProblem | None:
        return self.context.too_long(response)

    def score(self, responses: Sequence[Response]) -> list[dict[str, Tensor]]:
        said = self.context.reference(responses)
        return [
            {"token_rewards": surprise_rewards(response, found["logprobs"], self.unit)}
            for response, found in zip(responses, said, strict=True)
        ]


def surprise_rewards(response: Response, logprobs: Tensor, unit: str) -> Tensor:
    """The log-probs of what a response says, 0 for other tokens.

    Args:
        logprobs: [T] floating, nats. unit: one of UNITS.
    Returns:
        [T], logprobs' dtype.
    """
    judged = response.judged
    values = logprobs[judged]
    if unit == "word" and len(judged):
        number = unit_numbers(response, "word")
        words = values.new_zeros(int(number.max()) + 1)
        values = words.scatter_reduce(0, number, values, "amin", include_self=False)[number]
    return torch.zeros_like(logprobs).index_copy(0, judged, values)
