"""What readers of marked answers have in common: rows, documents, and marks that are checked."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

from treg.data.names import parse_columns
from treg.data.reading import Located, read_rows
from treg.data.report import RowProblem, described
from treg.evaluate.documents import Mark, Span

FILE_OF = ":"  # ends the name of the file in where a row is: "file:line", "file:row i"


@dataclass(frozen=True)
class RowOptions:
    """columns: new names of columns, as `treg.data.names` has them. document: the column of which
    rows with one value are one document; a row without it is a document of its own.
    """

    columns: list[str] | dict[str, str] | str = field(
        default_factory=list,
        metadata={"help": "Columns by other names, NEW=OLD; NAME= leaves one out."},
    )
    document: str = field(
        default="id", metadata={"help": "Column of which rows with one value are one document."}
    )

    def __post_init__(self):
        _ = self.renamed

    @cached_property
    def renamed(self) -> dict[str, str]:
        return parse_columns(self.columns)


@dataclass(frozen=True)
class LabelOptions:
    """right: labels of marks that say that characters are right. skip: labels of marks that say
    neither: what they alone reach counts as judged by nobody.
    """

    right: list[str] = field(
        default_factory=list, metadata={"help": "Labels that mark characters as right."}
    )
    skip: list[str] = field(
        default_factory=list,
        metadata={"help": "Labels whose characters count as judged by nobody."},
    )

    def marks(self, found: Iterable[Mark]) -> tuple[tuple[Mark, ...], tuple[Span, ...]]:
        """Marks by what their labels say, and the characters that nobody judged."""
        kept, unjudged = [], []
        for mark in found:
            if mark.label in self.skip:
                unjudged.append((mark.start, mark.end))
            elif mark.label in self.right:
                kept.append(Mark(mark.start, mark.end, mark.label, wrong=False))
            else:
                kept.append(mark)
        return tuple(kept), tuple(unjudged)


class Reader:
    """Rows of one format -> marked answers."""

    Options: ClassVar[type]

    def __init__(self, options: Any):
        self.options = options
        self._notes: list[RowProblem] = []

    def rows(self, source: Any, split: str) -> Iterator[Located]:
        """Every row of a source, with where it is."""
        return read_rows(source, split)

    def answers(self, row: Mapping[str, Any], where: str, index: int) -> list:
        """The marked answers of a row.

        Args:
            index: number of the row in the whole source.
        Raises:
            RowProblem: the row cannot be used.
        """
        raise NotImplementedError

    def check_all(self, answers: Collection) -> None:
        """ValueError for answers that together cannot be what the file means."""

    def note(self, reason: str, detail: str) -> None:
        """Something to say of a row that is used all the same."""
        self._notes.append(RowProblem(reason, detail))

    def taken_notes(self) -> list[RowProblem]:
        """The notes of the row that was read last."""
        notes, self._notes = self._notes, []
        return notes


def text_column(row: Mapping[str, Any], name: str, option: str | None = None) -> str:
    """A column of text that says something. option: of the format, that names the column.

    Raises:
        RowProblem: there is none.
    """
    value = row.get(name)
    if value is None:
        there = ", ".join(map(str, row)) or "none"
        mend = f"; name it with --format.{option}" if option else ""
        raise RowProblem(f"no column {name!r}", f"the columns are {there}{mend}")
    if not isinstance(value, str):
        raise RowProblem("mixed types", f"{name}: expected text, got {described(value)}")
    if not value.strip():
        raise RowProblem("empty text", name)
    return value


def document_of(row: Mapping[str, Any], where: str, column: str) -> str:
    """The name of a row's document: its file and its value in a column, or where it is."""
    value = row.get(column)
    missing = value is None or value == "" or value != value  # NaN is what pandas has for none
    if isinstance(value, (list, dict)) or missing:
        return where
    return f"{where.rpartition(FILE_OF)[0]}#{value}"


class Offsets:
    """Offsets of a text as a file counts them -> numbers of characters.

    Args:
        unit: "characters" (Unicode code points), "bytes" of UTF-8, or "utf16", the units in which
            JavaScript and Java count.
    """

    def __init__(self, text: str, unit: str):
        sizes = (_SIZES[unit](char) for char in text)
        bounds = accumulate(sizes, initial=0)
        self.unit = unit
        self.length = len(text)
        self._characters = {at: i for i, at in enumerate(bounds)}

    @property
    def last(self) -> int:
        """The offset of the text's end."""
        return max(self._characters)

    def character(self, offset: int) -> int:
        """RowProblem for an offset within a character."""
        if offset not in self._characters:
            raise RowProblem(
                "bad span", f"expected an offset between two characters, got {offset} {self.unit}"
            )
        return self._characters[offset]


_SIZES = {
    "characters": lambda char: 1,
    "bytes": lambda char: len(char.encode("utf-8", "surrogatepass")),
    "utf16": lambda char: 1 + (ord(char) > 0xFFFF),
}
UNITS = tuple(_SIZES)
