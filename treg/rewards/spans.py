"""Marks that people made: spans of characters of an answer, from columns of its row.

    r_t = the value of the span that token t overlaps, else `outside`

Of several spans that overlap a token the one whose value has the largest magnitude counts, and of
two as large the lower. What ends a response gets 0.

A column holds a list, or the same as a string of JSON, of

    [start, end]                         the value is `inside`
    [start, end, number]                 the value
    [start, end, "label"]                the value is what `values` says of the label
    {"start": s, "end": e, ...}          likewise: a number under "value", or a label under "label",
                                         "severity", "type", "error_type", "error type" or
                                         "category"; other keys are passed over

start and end count characters (Unicode code points) of the answer's text, end not included, as the
row has it, also where the answer is cut at max_length. Messages of an answer count as joined by
newlines; of a row of whole dialogues the text is that of the last turn without blanks around it.
A label that `values` does not have is refused, unless it has "*", which stands for any other.

Differs: no paper; FineGrainedRLHF (arXiv 2306.01693) and MQM keep marks of this kind.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from treg.data import RowProblem, text_of
from treg.rewards.base import Context, check_number
from treg.rewards.columns import columns_fingerprint, side_column
from treg.rewards.options import numbers_by_name
from treg.rewards.response import Response, differs
from treg.rewards.span_forms import check_bounds, span_fields, span_list

ANY_LABEL = "*"
CHARACTER_TOKENS = 4  # that a character has at most: one a byte
Span = tuple[int, int, float]  # start, end, value


@dataclass(frozen=True)
class SpansOptions:
    """column: of the spans, with {side} for chosen and rejected. values: the number of every label,
    as "label=number", a list of them, or by name; "*" is any label that is not named. inside: the
    value of a span without a value and without a label. outside: of tokens in no span.
    """

    column: str = field(
        default="{side}_spans",
        metadata={"help": "Column of the spans; {side} stands for chosen and rejected."},
    )
    values: list[str] | dict[str, float] | str | None = field(
        default=None,
        metadata={"help": "The value of each label, LABEL=NUMBER; '*=NUMBER' for all others."},
    )
    inside: float = field(
        default=-0.5, metadata={"help": "The value of a span without value and label."}
    )
    outside: float = field(default=0.0, metadata={"help": "The reward of tokens in no span."})

    def __post_init__(self):
        if "{side}" not in self.column:
            raise ValueError(f"column: expected a name with {{side}} in it, got {self.column!r}")
        check_number("inside", self.inside)
        check_number("outside", self.outside)
        _ = self.by_label

    @cached_property
    def by_label(self) -> dict[str, float]:
        return numbers_by_name("values", self.values, "LABEL=NUMBER")


class SpansSource:
    """Token rewards from marked characters."""

    Options: ClassVar[type] = SpansOptions
    streams: ClassVar[tuple[str, ...]] = ("token_rewards",)

    def __init__(self, options: SpansOptions, context: Context):
        self.options = options
        self.context = context

    def settings(self) -> dict[str, Any]:
        """The options, and a fingerprint of the columns: other marks make another file."""
        return {
            "column": self.options.column,
            "values": self.options.by_label,
            "inside": self.options.inside,
            "outside": self.options.outside,
            "rows": columns_fingerprint(self.context.pairs, self.options.column),
        }

    def check(self, response: Response) -> RowProblem | None:
        try:
            self.spans(response)
        except RowProblem as problem:
            return problem
        if characters_of_tokens(response) is None:
            detail = f"{response.side}: {differs(response)}"
            return RowProblem("spans cannot be placed", detail, response.where)
        return None

    def score(self, responses: Sequence[Response]) -> list[dict[str, Tensor]]:
        return [{"token_rewards": self._of(response)} for response in responses]

    def spans(self, response: Response) -> list[Span]:
        """The spans of a response, as its row has them.

        Raises:
            RowProblem: no such column, or what is no span of the answer.
        """
        column, given = side_column(response, self.options.column)
        length = len(row_text(response))
        found = []
        for i, item in enumerate(span_list(column, given, response.where)):
            try:
                found.append(self._span(item, length))
            except RowProblem as problem:
                detail = f"{column}[{i}]: {problem.detail}, got {item!r}"
                raise RowProblem(problem.reason, detail, response.where) from None
        return found

    def _span(self, item: Any, length: int) -> Span:
        start, end, value, label = span_fields(item)
        check_bounds(start, end, length)
        if value is not None:
            try:
                check_number("value", value)
            except ValueError:
                raise RowProblem("bad span", "expected a finite number as its value") from None
            return start, end, float(value)
        if label is None:
            return start, end, self.options.inside
        known = self.options.by_label
        number = known.get(label, known.get(ANY_LABEL))
        if number is None:
            detail = f"expected one of {', '.join(known) or 'none'} as its label"
            fix = f"{shlex.quote(label)}=NUMBER, or '{ANY_LABEL}=NUMBER' for all others,"
            raise RowProblem("unknown label", f"{detail}; add {fix} to --rewards.values")
        return start, end, number

    def _of(self, response: Response) -> Tensor:
        places = characters_of_tokens(response)
        if places is None:
            raise ValueError(f"{response.where}: {response.side}: expected a checked response")
        values = np.full(len(response.ids), self.options.outside, dtype=np.float32)
        lead = leading_blanks(response)
        # what counts most comes last
        for start, end, value in sorted(self.spans(response), key=lambda x: (abs(x[2]), -x[2])):
            overlaps = (places[:, 0] < end - lead) & (places[:, 1] > start - lead)
            values[overlaps & (places[:, 0] < places[:, 1])] = value
        values[response.content :] = 0.0
        return torch.from_numpy(values)


def row_text(response: Response) -> str:
    """The answer's text as the row has it."""
    if response.row_text is not None:
        return response.row_text
    return text_of(response.completion)


def leading_blanks(response: Response) -> int:
    """Characters at the beginning of the row's text that the answer leaves out."""
    text = response.row_text or ""
    return len(text) - len(text.lstrip())


def characters_of_tokens(response: Response) -> np.ndarray | None:
    """[T, 2] int32: the characters of the completion's text that each token holds, whether or not
    it was cut; None where they cannot be found.

    A token that holds a part of a character counts with the whole of it.
    """
    whole, places = text_of(response.completion), response.spans
    if places is None or not whole.startswith(response.text.rstrip("\ufffd")):
        return None
    begun = _begun(response).astype(np.int32)
    return places + np.stack([np.zeros_like(begun), begun], 1)


def _begun(response: Response) -> np.ndarray:
    """[T] bool: the tokens whose last bytes are of a character that a later token completes."""
    pieces, ids = response.pieces, response.ids
    found = np.array([piece == "" for piece in pieces], dtype=bool)
    for i in np.flatnonzero(~found[:-1]):
        # only characters of several bytes are shared, and only by tokens that follow one another
        if pieces[i + 1].isascii() and pieces[i + 1]:
            continue
        last = ids[max(0, i + 1 - CHARACTER_TOKENS) : i + 1].tolist()
        said = response.tokenizer.decode(
            last, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        found[i] = said.endswith("\ufffd") and not pieces[i].endswith("\ufffd")
    return found
