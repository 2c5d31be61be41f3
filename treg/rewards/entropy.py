"""The rewards of another source, spread over segments that the reference's entropy cuts.

    H_t    = - sum_v pi_ref(v | x, y_<t) log pi_ref(v | x, y_<t)     nats: before token t is known
    token t ends a segment where H_(t+1) > threshold, and at the response's end
    r'_t   = sum of r over the segment of token t / its number of tokens

so that the sum of a response stays. Where the model is sure of what follows, the text goes on with
what it has begun; where it is not, something new begins. A segment does not go beyond a message of
several: words of the template and turns of others are in none. What ends a response belongs to its
last segment, up to the last token that the other source rewards; after that, and if it rewards no
such token, it gets 0.

Paper: segment rewards, arXiv 2501.02790: the entropy is that of the next token after t, with the
threshold 1.75 (Phi-3) or 2.0 (Llama); each token of a segment gets the segment's reward over its
length.
Differs: the paper trains a reward model on segments, reads it at their ends and normalizes by
their place in the response. Here the reward of a segment is the sum of another source's token
rewards. By default that is `surprise`: the same forward pass gives its log-probs and the entropies,
and it was the better detector on small models; `of` names another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from treg.data import RowProblem
from treg.rewards.base import Context, check_number
from treg.rewards.nested import NestedOptions, NestedSource
from treg.rewards.response import Response
from treg.rewards.shaping import means_over, rewarded


def entropy_segments(entropy: Tensor, threshold: float) -> Tensor:
    """The number, from 0, of the segment that each token is in.

    Args:
        entropy: [n] floating, nats: of the distribution from which each token comes. Token t - 1
            ends a segment where that of token t is above the threshold.
    Returns:
        [n] int64.
    """
    begins = entropy > threshold
    begins[:1] = False  # the first token begins a segment in any case
    return begins.cumsum(0)


@dataclass(frozen=True)
class EntropyOptions(NestedOptions):
    """threshold: nats; 0 makes nearly every token a segment, a very large one the response."""

    asks_reference: ClassVar[bool] = True

    of: str = field(
        default="surprise", metadata={"help": "The source whose token rewards are summed."}
    )
    threshold: float = field(
        default=2.0, metadata={"help": "Nats of entropy above which a segment has ended."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_number("threshold", self.threshold)
        if self.threshold < 0:
            raise ValueError(f"threshold: expected a number >= 0, got {self.threshold!r}")


class EntropySource(NestedSource):
    """Mean rewards of segments that end where the reference does not know what follows."""

    Options: ClassVar[type] = EntropyOptions
    streams: ClassVar[tuple[str, ...]] = ("token_rewards",)

    def __init__(self, options: EntropyOptions, context: Context):
        super().__init__(options, context)
        self.threshold = options.threshold
        context.want("entropy")

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"threshold": self.threshold}

    def check(self, response: Response) -> RowProblem | None:
        return super().check(response) or self.context.too_long(response)

    def score(self, responses: Sequence[Response]) -> list[dict[str, Tensor]]:
        said = self.context.reference(responses)
        each = zip(responses, self.rewards(responses), said, strict=True)
        return [{"token_rewards": self._of(x, r, of_x["entropy"])} for x, r, of_x in each]

    def _of(self, response: Response, rewards: Tensor, entropy: Tensor) -> Tensor:
        """The rewards of a response as means over its segments, [T]."""
        number = response.numbered(lambda places: entropy_segments(entropy[places], self.threshold))
        places = rewarded(response, rewards)
        ends = len(places) - len(number)
        last = torch.full((ends,), int(number[-1]) if len(number) else 0)
        means = means_over(rewards[places], torch.cat([number, last]))
        return torch.zeros_like(rewards).index_copy(0, places, means)
