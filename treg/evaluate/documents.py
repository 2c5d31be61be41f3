"""Answers in which people marked characters as wrong: what every reader of such files returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Span = tuple[int, int]  # characters [start, end)


@dataclass(frozen=True)
class Mark:
    """Characters of an answer that somebody judged.

    start, end: characters (Unicode code points) of the answer's text, end not included.
    label: the kind of error, as the file has it, such as "Wrong-Grounding"; "" where it has none.
    wrong: False for characters that were marked as right.
    """

    start: int
    end: int
    label: str = ""
    wrong: bool = True


@dataclass(frozen=True)
class MarkedAnswer:
    """An answer with its marks.

    where: the row, as `treg.data.read_rows` names it, for errors.
    document: answers with the same name are drawn together by the bootstrap, such as both answers
        of a pair.
    prompt: text or messages; "" where a sentence stands alone.
    marks: empty where the answer was judged and nothing in it is wrong.
    steps: the characters [start, end) of the steps of a solution, in order; empty where there are
        none.
    first_wrong: number of the first wrong step, from 0; None where no step is wrong.
    pair: a name that both answers of a pair have, and no other.
    preferred: whether it is the better answer of its pair.
    index: number of the row in its source, from 0, by which a row of an annotated file is found.
    side: "chosen" or "rejected" where the row is a preference pair.
    judged: False: nobody looked for wrong tokens in this answer. It has no marks, and counts as one
        of its pair alone.
    unjudged: characters [start, end) that nobody judged, such as the steps after the first wrong
        one: their tokens are neither wrong nor right. They still belong to their steps.
    row: the other columns of the row, for sources that read some.
    tools, template_kwargs: what goes on to the chat template beside the messages.
    """

    where: str
    document: str
    prompt: str | list[dict[str, Any]]
    answer: str
    marks: tuple[Mark, ...] = ()
    steps: tuple[Span, ...] = ()
    first_wrong: int | None = None
    pair: str | None = None
    preferred: bool | None = None
    index: int | None = None
    side: str | None = None
    judged: bool = True
    unjudged: tuple[Span, ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    tools: list[Any] | None = field(default=None, repr=False)
    template_kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)
