"""Which word, or which sentence, each token of a response is in."""

import re
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from treg.rewards.response import Response

Unit = Literal["token", "word", "sentence"]
# where a word begins, and where a sentence does: after . ! ? and what closes it, or on a new line
WORD = re.compile(r"(?<!\S)(?=\S)")
SENTENCE = re.compile(
    r"""(?:(?:\A|\n)\s* | [.!?…]["'”’)\]]*\s+ | [。！？]["'”’)\]]*\s*)(?=\S)""", re.VERBOSE
)


def unit_numbers(response: Response, unit: Unit) -> Tensor:
    """The number, from 0, of the unit that each token of what a response says is in.

    A word is a run of characters between blanks. A token is in the unit of its first character that
    is no blank. One without such a character goes with the token that follows, such as part of a
    character that is not complete; at the end, with the one before. No unit goes beyond a message
    of several.

    Returns:
        [n] int64, for the tokens of `Response.judged`.
    """
    if unit == "token":
        return torch.arange(len(response.judged))
    beginning = WORD if unit == "word" else SENTENCE

    def number(places: Tensor) -> Tensor:
        return torch.tensor(numbers_of([response.pieces[i] for i in places], beginning))

    return response.numbered(number)


def numbers_of(pieces: list[str], beginning: re.Pattern) -> list[int]:
    """For each piece of a text the number of the unit that it is in.

    beginning: matches up to where a unit begins.
    """
    text = "".join(pieces)
    begins = {match.end() for match in beginning.finditer(text)}
    number = list(accumulate((i in begins for i in range(len(text))), initial=0))[1:]
    bounds = list(accumulate(map(len, pieces), initial=0))
    found = []
    for start, end in pairwise(bounds):
        first = next((i for i in range(start, end) if not text[i].isspace()), None)
        found.append(-1 if first is None else number[first] - 1)
    following = max(found, default=0)
    for i in reversed(range(len(found))):
        if found[i] < 0:
            found[i] = max(following, 0)
        following = found[i]
    return found
