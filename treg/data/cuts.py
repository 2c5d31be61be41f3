"""Texts of a row cut where they may be, so that what they begin with is tokenized once.

A fast tokenizer takes its added tokens out of a text before anything else, and what stands on one
side of them never changes the tokens of the other. A prompt and its two answers are therefore cut
at the last of the template's added tokens that they share. Each piece keeps that token, so that the
beginning of a text is no other place than it was.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from treg.data.messages import PROBE, common_prefix, turn
from treg.data.rendering import Renderer, default_template
from treg.data.report import RowProblem

# what may stand beside an added token; in the probe of a tokenizer both pieces begin or end so
BESIDE = ("a b", " a", "\n\na ", "1.", "é東🙂", "'s", "")
Place = tuple[int, int]


class CutTexts:
    """Texts whose beginnings are shared, as pieces that are tokenized alone.

    Args:
        groups: texts that may begin alike, as a prompt and its answers.
        tokens: added tokens at which they may be cut, as `cutting_tokens` gives them.
    """

    def __init__(self, groups: Sequence[Sequence[str]], tokens: Sequence[str]):
        self.pieces: list[str] = []
        # of each text: the piece that it shares (None: none), its own, and where that begins
        self.texts: list[tuple[int | None, int, int]] = []
        for group in groups:
            place, token = _last_shared(group, tokens)
            shared = None
            if token:
                shared = len(self.pieces)
                self.pieces.append(group[0][:place] + token)
            for text in group:
                self.texts.append((shared, len(self.pieces), place))
                self.pieces.append(text[place:])

    def joined(
        self, ids: Sequence[list[int]], places: Sequence[list[Place]]
    ) -> Iterator[tuple[list[int], list[Place]]]:
        """For each text its ids, and the characters that each holds, from those of the pieces."""
        for shared, own, place in self.texts:
            if shared is None:
                yield ids[own], places[own]
                continue
            # both pieces hold the token at which they were cut
            moved = [(a + place, b + place) for a, b in places[own][1:]]
            yield ids[shared] + ids[own][1:], places[shared] + moved


def _last_shared(group: Sequence[str], tokens: Sequence[str]) -> tuple[int, str]:
    """Where the last token begins that all texts have at the same place; (0, ""): nowhere."""
    first, *others = group
    shared = min(common_prefix(first, x) for x in others) if tokens else 0
    found = max(((first.rfind(x, 0, shared), x) for x in tokens), default=(0, ""))
    return found if found[0] > 0 else (0, "")


def cutting_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Added tokens that a chat template writes and at which texts may be cut; () for a tokenizer
    that is not fast, or has no template for conversations without tools.
    """
    template = default_template(tokenizer) if getattr(tokenizer, "is_fast", False) else None
    if template is None:
        return ()
    return _cutting_tokens(tokenizer, template, len(tokenizer), tokenizer.split_special_tokens)


@functools.lru_cache(maxsize=16)
def _cutting_tokens(tokenizer: Any, template: str, vocabulary: int, split: bool) -> tuple[str, ...]:
    """What may have changed since: vocabulary, its size; split, whether special tokens are split
    like other text.
    """
    try:
        text = Renderer(tokenizer)([turn("user", PROBE), turn("assistant", PROBE)])
    except RowProblem:
        return ()
    every = [str(x) for x in tokenizer.added_tokens_decoder.values()]
    found = []
    for token in tokenizer.added_tokens_decoder.values():
        name = str(token)
        alone = not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        apart = not any(_overlaps(name, x) for x in every if x != name)
        if alone and apart and name in text and _cuts(tokenizer, name):
            found.append(name)
    return tuple(found)


def _overlaps(token: str, other: str) -> bool:
    """Whether there is a text in which two tokens share characters."""
    if token in other or other in token:
        return True
    shorter = min(len(token), len(other))
    return any(
        token.endswith(other[:i]) or other.endswith(token[:i]) for i in range(1, shorter + 1)
    )


def _cuts(tokenizer: Any, token: str) -> bool:
    """Whether texts may be cut at a token: cut or whole, they have the same tokens."""
    wholes = [f"{a}{token}{b}" for a in BESIDE[:-1] for b in BESIDE]
    groups = [(x, x) for x in wholes]
    cut = CutTexts(groups, (token,))
    options = {"add_special_tokens": False, "return_offsets_mapping": True}
    got, pieces = tokenizer(wholes, **options), tokenizer(cut.pieces, **options)
    expected = zip(got["input_ids"], got["offset_mapping"], strict=True)
    joined = list(cut.joined(pieces["input_ids"], pieces["offset_mapping"]))[::2]
    return joined == list(expected)
