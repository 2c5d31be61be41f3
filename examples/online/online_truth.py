"""Token rewards that are the truth about an answer: a source of one's own for `token_rewards`.

    +1   shared by the tokens of a right value
    -1   shared by the tokens of a wrong value
    -1   shared by the tokens of a sentence that is no fact about the town, or says one again
     0   everywhere else

The sum over an answer is what it is worth: right facts, less wrong ones and other sentences.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from treg.data import RowProblem
from treg.demo import world
from treg.rewards import Context, Response

ATTRIBUTE_OF = {
    value: name for name, attribute in world.ATTRIBUTES.items() for value in attribute.values
}
Mark = tuple[int, int, float]  # start, end (characters of the answer), what they are worth


def marks(question: str, text: str) -> list[Mark]:
    """What each sentence of an answer is worth, and the characters that it is worth that for."""
    found: list[Mark] = []
    said: set[str] = set()
    start = len(text) - len(text.lstrip())
    for sentence in re.split(r"(?<=\.) ", text.strip()):
        fact = _fact(question, sentence)
        if fact is None or fact[0] in said:
            found.append((start, start + len(sentence), -1.0))
        else:
            attribute, first, last, worth = fact
            said.add(attribute)
            found.append((start + first, start + last, worth))
        start += len(sentence) + 1
    return found


def _fact(question: str, sentence: str) -> tuple[str, int, int, float] | None:
    """Attribute, where its value stands in the sentence, +1 or -1; None: no fact of the town."""
    check = world.check(question, sentence)
    if check.malformed:
        return None
    for word in re.finditer(r"\w+", sentence):
        if word[0] in ATTRIBUTE_OF:
            return ATTRIBUTE_OF[word[0]], *word.span(), float(check.right - check.wrong)
    return None


def worth(question: str, text: str) -> float:
    """Right facts of an answer, less wrong ones and sentences that are no new fact."""
    return sum(number for _, _, number in marks(question, text))


@dataclass(frozen=True)
class TruthOptions:
    """It has none."""


class TruthSource:
    """Token rewards from the table of towns, for answers to questions about one."""

    Options: ClassVar[type] = TruthOptions
    streams: ClassVar[tuple[str, ...]] = ("token_rewards",)

    def __init__(self, options: TruthOptions, context: Context):
        pass

    def settings(self) -> dict[str, Any]:
        return {}

    def check(self, response: Response) -> RowProblem | None:
        if response.spans is None:
            return RowProblem("answer not found", "the tokens do not say its text", response.where)
        return None

    def score(self, responses: Sequence[Response]) -> list[dict[str, Tensor]]:
        return [{"token_rewards": self._of(response)} for response in responses]

    def _of(self, response: Response) -> Tensor:
        prompt: Any = response.prompt
        spans: Any = response.spans
        rewards = torch.zeros(len(response.ids))
        for start, end, number in marks(prompt[-1]["content"], response.text):
            inside = np.flatnonzero((spans[:, 0] < end) & (spans[:, 1] > start))
            # an empty answer has no token of its own
            places = inside if len(inside) else np.array([response.end])
            rewards[torch.from_numpy(places)] += number / len(places)
        return rewards
