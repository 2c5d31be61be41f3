"""Answers with marked characters beside them, under names of one's own.

    {"prompt": ..., "answer": ..., "spans": [...]}
    {"prompt": ..., "chosen": ..., "rejected": ..., "chosen_spans": [...], "rejected_spans": [...]}

A row of the second kind is a preference, read as `treg annotate` reads it. A side without a column
of spans was judged by nobody, and counts in the comparison of pairs alone. The prompt may be text
or messages, and may be missing, where a text stands alone.

A list of spans, or the same as a string of JSON, holds

    [start, end]                     characters that are wrong
    [start, end, "label"]            likewise, with the kind of error
    [start, end, number]             wrong for a number below 0, right for one above
    {"start": s, "end": e, ...}      likewise: a label under "label", "severity", "type",
                                     "error_type", "error type" or "category", or a number under
                                     "value"; under "text", if it is there, the marked text, which
                                     is compared with the answer's
    {"text": ..., ...}               the one place where the answer has this text

start and end count characters of the answer as the file has it, from 0, end not included, unless
`offsets` and `inclusive` say otherwise. Marks may overlap. A mark of no characters is left out and
counted.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from treg.data.answer_rows import answer_text, parse_answer
from treg.data.names import ALIASES, parse_columns
from treg.data.report import RowProblem, described
from treg.data.rows import Preference, parse_row
from treg.evaluate.documents import Mark, MarkedAnswer
from treg.evaluate.readers.base import (
    UNITS,
    LabelOptions,
    Offsets,
    Reader,
    RowOptions,
    document_of,
)
from treg.rewards.span_forms import LABELS, check_bounds, span_fields, span_list

SIDES = ("chosen", "rejected")
NULLS = ("refuse", "right", "unjudged")
KEYS = ("start", "end", "label", "value", "text")
TEXT_KEY = "text"


@dataclass(frozen=True)
class SpansOptions(LabelOptions, RowOptions):
    """column: of the spans of one answer. side_column: of a preference, with {side} for chosen and
    rejected. keys: other names of start, end, label, value and text in a span, NEW=OLD. offsets:
    what start and end count. inclusive: whether end is the last character. nulls: what a null in
    the place of a list is: a mistake, an answer without a wrong token, or one that nobody judged.
    """

    column: str = field(default="spans", metadata={"help": "Column of the spans."})
    side_column: str = field(
        default="{side}_spans", metadata={"help": "The same of a preference, with {side}."}
    )
    keys: list[str] | dict[str, str] | str = field(
        default_factory=list,
        metadata={"help": "Keys of a span by other names, such as start=begin."},
    )
    offsets: str = field(
        default="characters", metadata={"help": f"What offsets count: {', '.join(UNITS)}."}
    )
    inclusive: bool = field(
        default=False, metadata={"help": "Whether end is the last marked character."}
    )
    nulls: str = field(
        default="refuse",
        metadata={"help": f"What a null instead of a list means: {', '.join(NULLS)}."},
    )

    def __post_init__(self):
        super().__post_init__()
        if "{side}" not in self.side_column:
            raise ValueError(
                f"format.side_column: expected a name with {{side}} in it, got {self.side_column!r}"
            )
        for name, known in (("offsets", UNITS), ("nulls", NULLS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"format.{name}: expected one of {', '.join(known)}, got "
                    f"{getattr(self, name)!r}"
                )
        unknown = [key for key in self.by_key if key not in KEYS]
        if unknown:
            raise ValueError(
                f"format.keys: expected new names among {', '.join(KEYS)}, got {unknown[0]!r}"
            )

    @cached_property
    def by_key(self) -> dict[str, str]:
        return parse_columns(self.keys)


class SpansReader(Reader):
    """The generic format of marks."""

    Options = SpansOptions

    def answers(self, row: Mapping[str, Any], where: str, index: int) -> list[MarkedAnswer]:
        renamed = self.options.renamed
        document = document_of(row, where, self.options.document)
        if any(renamed.get(x, x) in row for x in ALIASES["rejected"]):
            return self._pair(row, where, index, document)
        column = self.options.column
        given = parse_answer(row, renamed, (column, self.options.document))
        if column not in given.columns:
            there = ", ".join(map(str, given.columns)) or "none"
            raise RowProblem(
                f"no column {column!r}",
                f"the other columns are {there}; name it with --format.column, and give [] where "
                "nothing is wrong",
            )
        marks = self.marks(column, given.columns[column], Counted(given.answer))
        return [
            MarkedAnswer(
                where,
                document,
                given.prompt,
                given.answer,
                index=index,
                row=given.columns,
                tools=given.tools,
                template_kwargs=given.template_kwargs,
                **marks,
            )
        ]

    def _pair(
        self, row: Mapping[str, Any], where: str, index: int, document: str
    ) -> list[MarkedAnswer]:
        columns = {side: self.options.side_column.replace("{side}", side) for side in SIDES}
        known = (*columns.values(), self.options.document)
        given, texts = preference(row, self.options.renamed, known)
        if not any(column in given.columns for column in columns.values()):
            there = ", ".join(map(str, given.columns)) or "none"
            raise RowProblem(
                f"no column {columns['rejected']!r}",
                f"nor {columns['chosen']!r}; the other columns are {there}; name them with "
                "--format.side_column, such as {side}_marks",
            )
        found = []
        for side, column in columns.items():
            marks: dict[str, Any] = {"judged": False}
            if column in given.columns:
                marks = self.marks(column, given.columns[column], texts[side])
            made = answer_of_side(given, side, where, document, index)
            found.append(replace(made, **marks))
        return found

    def marks(self, column: str, given: Any, counted: "Counted") -> dict[str, Any]:
        """The fields marks, unjudged and judged of an answer with this column of spans."""
        if given is None:
            if self.options.nulls == "refuse":
                raise RowProblem(
                    "no spans",
                    f"{column}: expected a list, [] where nothing is wrong, got null; say what a "
                    "null means with --format.nulls, right or unjudged",
                )
            return {"judged": self.options.nulls == "right"}
        offsets = Offsets(counted.text, self.options.offsets)
        found = []
        for i, item in enumerate(span_list(column, given, "")):
            try:
                mark = self._mark(item, counted.text, offsets)
            except RowProblem as problem:
                detail = f"{column}[{i}]: {problem.detail}, got {described(item)}"
                raise RowProblem(problem.reason, detail) from None
            if mark is None:
                self.note("a mark of nothing", f"{column}[{i}] has no characters, or value 0")
                continue
            found.append(counted.placed(mark))
        marks, unjudged = self.options.marks(found)
        return {"marks": marks, "unjudged": unjudged}

    def _mark(self, item: Any, text: str, offsets: Offsets) -> Mark | None:
        """A span as a mark; None for one of no characters, or of the value 0."""
        item = self._renamed(item)
        start, end, value, label = span_fields(item)
        marked = item.get(TEXT_KEY) if isinstance(item, Mapping) else None
        if marked is not None and not isinstance(marked, str):
            raise RowProblem("bad span", "expected text as the marked text")
        if start is None and end is None and marked:
            start, end = _only_place(marked, text)
        else:
            start, end = self._bounds(start, end, offsets)
            if marked is not None and marked != text[start:end]:
                found = described(text[start:end])
                raise RowProblem(
                    "other text marked",
                    f"expected the text at [{start}, {end}), {found}{_hint(marked, text, item)}",
                )
        if value is not None and not _is_number(value):
            raise RowProblem("bad span", "expected a finite number as its value")
        if start == end or value == 0:
            return None
        return Mark(start, end, label or "", wrong=value is None or value < 0)

    def _renamed(self, item: Any) -> Any:
        keys = self.options.by_key
        if not keys or not isinstance(item, Mapping):
            return item
        hidden = {*keys, *keys.values(), *(LABELS if "label" in keys else ())}
        found = {key: value for key, value in item.items() if key not in hidden}
        return found | {new: item.get(old) for new, old in keys.items() if old}

    def _bounds(self, start: Any, end: Any, offsets: Offsets) -> tuple[int, int]:
        inclusive = self.options.inclusive and isinstance(end, int) and not isinstance(end, bool)
        end = end + 1 if inclusive else end
        check_bounds(start, end, offsets.last, shortest=0)
        return offsets.character(start), offsets.character(end)


@dataclass(frozen=True)
class Counted:
    """The text whose characters a file counts, and by how many they are moved in the answer."""

    text: str
    moved: int = 0
    length: int | None = None  # of the answer, where blanks of the text are no part of it

    def placed(self, mark: Mark) -> Mark:
        last = self.length if self.length is not None else len(self.text) + self.moved
        start, end = (min(max(x + self.moved, 0), last) for x in (mark.start, mark.end))
        return replace(mark, start=start, end=end)


def answer_of_side(
    given: Preference, side: str, where: str, document: str, index: int
) -> MarkedAnswer:
    """One answer of a pair, without marks yet."""
    return MarkedAnswer(
        where,
        document,
        given.prompt,
        answer_text(side, getattr(given, side)),
        pair=where,
        preferred=side == SIDES[0],
        index=index,
        side=side,
        row=given.columns,
        tools=given.tools,
        template_kwargs=given.template_kwargs,
    )


def preference(
    row: Mapping[str, Any], columns: Mapping[str, str], known: Collection[str]
) -> tuple[Preference, dict[str, Counted]]:
    """A row of preferences, text as text, and of each side the text that its marks count.

    Turns of other columns before a prompt of text make messages of it.
    """
    try:
        given = parse_row(dict(row), chat=False, columns=columns, known=known)
    except RowProblem as problem:
        if problem.reason != "turns beside plain text":
            raise
        given = parse_row(dict(row), chat=True, columns=columns, known=known)
    texts = {}
    for side in SIDES:
        text = answer_text(side, getattr(given, side))
        own = given.given.get(side, text)
        if given.prompt and any(
            isinstance(x, str) and x == f"{given.prompt}{text}" for x in row.values()
        ):
            # a whole dialogue, whose last turn counts without the blanks around it
            texts[side] = Counted(text.strip(), _lead(text))
        elif own != text:
            texts[side] = Counted(own, -_lead(own), len(text))
        else:
            texts[side] = Counted(text)
    return given, texts


def _lead(text: str) -> int:
    return len(text) - len(text.lstrip())


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _only_place(marked: str, text: str) -> tuple[int, int]:
    """Where a text lies that an answer has once."""
    start = text.find(marked)
    if start < 0:
        raise RowProblem("bad span", "expected start and end, or a text that the answer has")
    if text.find(marked, start + 1) >= 0:
        raise RowProblem("bad span", "expected start and end of a text that the answer has twice")
    return start, start + len(marked)


def _hint(marked: str, text: str, item: Mapping[str, Any]) -> str:
    """How offsets may be meant that mark another text."""
    start, end = item["start"], item["end"]
    if text[start : end + 1] == marked:
        return "; set --format.inclusive, as end is the last character"
    for unit in UNITS:
        try:
            offsets = Offsets(text, unit)
            if text[offsets.character(start) : offsets.character(end)] == marked:
                return f"; set --format.offsets to {unit}"
        except RowProblem:
            continue
    return ""
