"""What each token adds to the text of a response."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from treg.data.rows import common_prefix

WINDOW = 64  # tokens decoded together
REACH = 8  # tokens on either side of a window that settle its first and last characters


def token_pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """One string per token, such that "".join(pieces) is the decoded text, special tokens kept.

    A piece is what its token adds to the decoded text of the tokens before it, so nothing is
    assumed of the vocabulary. A character whose bytes span several tokens stands whole at the token
    that completes it and the others are ""; bytes that are no UTF-8 show as the decoder's U+FFFD,
    at the first token of an ill-formed sequence.
    """
    ids = [int(i) for i in ids]

    def decode(part: list[int]) -> str:
        if not part:
            return ""
        return tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # Windows make the cost linear. They fail where a decoder looks far, as over a long run of byte
    # tokens: then the whole is decoded again for each token.
    pieces = []
    for start in range(0, len(ids), WINDOW):
        pieces += _window_pieces(ids, start, start + WINDOW, REACH, decode)
    if "".join(pieces) == decode(ids):
        return pieces
    return _window_pieces(ids, 0, len(ids), 0, decode)


def _window_pieces(
    ids: list[int], start: int, end: int, reach: int, decode: Callable[[list[int]], str]
) -> list[str]:
    """Pieces of ids[start:end]; `reach` tokens on either side settle leading spaces and characters
    cut in two.
    """
    low = max(0, start - reach)
    end = min(end, len(ids))
    text = decode(ids[low : end + reach])
    bounds = [0]
    for stop in range(start, end + 1):
        part = decode(ids[low:stop])
        # an unfinished character decodes to U+FFFD, which the finished text does not have at that
        # place
        bounds.append(max(bounds[-1], common_prefix(part, text)))
    return [text[a:b] for a, b in pairwise(bounds[1:])]
