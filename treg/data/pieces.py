"""What each token adds to the text of a response."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from treg.data.messages import Messages, common_prefix, probe

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


def text_places(pieces: Sequence[str], text: str) -> list[tuple[int, int]] | None:
    """The characters [start, end) of a text that each token holds.

    Blanks need not agree: a tokenizer may drop or merge those of the text, and its decoder may
    write some of its own, or leave out the first.

    Args:
        pieces: of T tokens, from `token_pieces`.
    Returns:
        T places. A token that holds nothing has an empty one where it stands, but a blank of the
        decoder's own that of the blank before it. None if the tokens say another text.
    """
    places, end = [], 0
    for piece in pieces:
        if text.startswith(piece, end):
            place = end, end + len(piece)
        else:
            at = _place_of(piece, text, end)
            if at is None:
                return None
            place = at
        places.append(place)
        end = place[1]
    return None if text[end:].strip() else places


def _place_of(piece: str, text: str, end: int) -> tuple[int, int] | None:
    """Where a piece lies from a place of a text on, if only blanks differ."""
    start = None
    for char in piece:
        if not char.isspace():
            while text[end : end + 1].isspace():
                end += 1
            if text[end : end + 1] != char:
                return None
        elif not text[end : end + 1].isspace():
            continue
        start = end if start is None else start
        end += 1
    if start is None:
        # blanks of the decoder's own: a second one for the text's, if one precedes
        return end - int(text[max(0, end - 1) : end].isspace()), end
    return start, end


def content_places(
    render: Callable[..., Any], whole: Any, prompt: Messages, answer: Messages
) -> list[list[int]]:
    """Where in a rendered conversation the content of each message of the answer may begin, the
    likelier place first: where the same conversation with another content differs; and where what
    precedes the message ends, which is earlier if a template writes a part of a content, such as
    thoughts, in a form of its own.

    Args:
        render: gives messages (and add_generation_prompt) as a text or as token ids.
        whole: [*prompt, *answer] as render gives it.
    Returns:
        For each message of the answer, places of whole. A template that raises tells none.
    """

    def agree(messages: Messages, **more: Any) -> list[int]:
        try:
            return [common_prefix(render(messages, **more), whole)]
        except Exception:  # a template is a program: it raises anything
            return []

    found = []
    for i, message in enumerate(answer):
        before = [*prompt, *answer[:i]]
        other = agree([*before, {**message, "content": probe(message)}, *answer[i + 1 :]])
        assistants = message["role"] == "assistant"
        found.append([*other, *agree(before, add_generation_prompt=assistants)])
    return found


def text_spans(
    pieces: Sequence[str], parts: Sequence[str], places: Sequence[Sequence[int]] | None = None
) -> np.ndarray | None:
    """Which characters of a text each token holds.

    What the tokens hold beside the text, such as the markers of a chat template, takes no part.

    Args:
        pieces: of T tokens, from `token_pieces`.
        parts: the text is "\\n".join(parts); each part, or what is left of it without the blanks
            around it, must lie in the decoded text as it is, one after the other.
        places: for each part, places of the decoded text. The part is looked for from the first of
            them on; if it is not found, from the next. None: from where the part before ends.
    Returns:
        [T, 2] int32: the first character, and the one after the last. A character that several
        tokens share belongs to the one that completes it; a token that holds nothing of the text
        has an empty span, which lies where the token stands. None where a part is not found.
    """
    decoded = "".join(pieces)
    # characters of the text that precede each place of the decoded text
    before = np.zeros(len(decoded) + 1, dtype=np.int32)
    cursor = start = 0
    for i, part in enumerate(parts):
        begins = places[i] if places else [cursor]
        tried = (_found(decoded, part, max(cursor, place)) for place in begins)
        found = next((x for x in tried if x is not None), None)
        if found is None:
            return None
        place, skipped, length = found
        before[place:] = start + skipped + length
        before[place : place + length] = start + skipped + np.arange(length)
        cursor = place + length
        start += len(part) + 1
    ends = list(accumulate(map(len, pieces), initial=0))
    return np.stack([before[ends[:-1]], before[ends[1:]]], 1)


def _found(decoded: str, part: str, cursor: int) -> tuple[int, int, int] | None:
    """Where a part lies in the decoded text from a place on: place, characters of the part that are
    left out at its beginning, and length.
    """
    stripped = part.strip()
    for text, skipped in ((part, 0), (stripped, len(part) - len(part.lstrip()))):
        place = decoded.find(text, cursor)
        if place >= 0:
            return place, skipped, len(text)
    return None
