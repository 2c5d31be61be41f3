"""Texts as token ids, and the characters of the text that each token holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from treg.data.cuts import CutTexts, cutting_tokens
from treg.data.pieces import text_places, token_pieces
from treg.data.report import RowProblem

UNPLACED = RowProblem("tokens unplaced", "the tokenizer's tokens do not give the text back")


@dataclass(frozen=True)
class Ids:
    """A text's token ids, and the characters [start, end) of the text that each holds."""

    ids: list[int]
    places: list[tuple[int, int]]


def texts_as_ids(
    tokenizer: Any, groups: Sequence[Sequence[str]], plain: bool
) -> list[list[Ids | RowProblem]]:
    """The ids of texts, all in one call; a RowProblem for one that its tokens do not give back.

    Args:
        groups: texts of rows, of each two or more, of which the first is the beginning of the
            others.
        plain: with the tokenizer's special tokens, which hold no characters: (0, 0).
    """
    if not getattr(tokenizer, "is_fast", False):
        found = iter(_by_pieces(tokenizer, [x for group in groups for x in group], plain))
    else:
        cut = CutTexts(groups, () if plain else cutting_tokens(tokenizer))
        got = _call(tokenizer, cut.pieces, plain, return_offsets_mapping=True)
        joined = cut.joined(got["input_ids"], got["offset_mapping"])
        found = iter([Ids(*x) for x in joined])
    return [[next(found) for _ in group] for group in groups]


def _by_pieces(tokenizer: Any, texts: list[str], plain: bool) -> list[Ids | RowProblem]:
    """The same with a tokenizer that does not tell places, from what each token adds to the decoded
    text.
    """
    ids = _call(tokenizer, texts, plain)["input_ids"]
    bare = _call(tokenizer, texts, False)["input_ids"] if plain else ids
    found: list[Ids | RowProblem] = []
    for whole, own, text in zip(ids, bare, texts, strict=True):
        places = _places(whole, own, tokenizer, text)
        found.append(UNPLACED if places is None else Ids(whole, places))
    return found


def _call(tokenizer: Any, texts: list[str], special: bool, **more: Any) -> Any:
    # verbose=False: no warning about lengths, which max_length sees to later
    return tokenizer(texts, add_special_tokens=special, verbose=False, **more)


def _places(
    ids: Sequence[int], own: Sequence[int], tokenizer: Any, text: str
) -> list[tuple[int, int]] | None:
    """The characters of a text that each token holds, by what it adds to the decoded text; (0, 0)
    of special tokens that the tokenizer adds. None if the decoded text is another one.

    own: the text's ids without those special tokens.
    """
    before = (i for i in range(len(ids) - len(own) + 1) if ids[i : i + len(own)] == own)
    start = next(before, None)
    places = text_places(token_pieces(own, tokenizer), text)
    if start is None or places is None:
        return None
    return [(0, 0)] * start + places + [(0, 0)] * (len(ids) - start - len(own))
