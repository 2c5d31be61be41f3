"""Readers of marked answers, one file a format: a file -> `MarkedAnswer`s.

A reader is a class with Options, a frozen dataclass whose fields have a help text, and the methods
`rows` and `answers` of `treg.evaluate.readers.base.Reader`.
"""

import importlib
import os
from collections import UserDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from treg.data.report import Report, RowProblem
from treg.evaluate.documents import MarkedAnswer
from treg.evaluate.readers.base import Reader
from treg.rewards.names import nearest
from treg.rewards.options import check_types

__all__ = ["READERS", "Reader", "read_marked", "reader_options"]


class _Readers(UserDict):
    """Classes by the name of their format; one is imported when it is asked for."""

    def __getitem__(self, name: str) -> type[Reader]:
        module, _, attribute = self.data[name].partition(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


READERS = _Readers(
    {
        "finegrained": "finegrained:FineGrainedReader",
        "spans": "spans:SpansReader",
        "tags": "tags:TagsReader",
        "steps": "steps:StepsReader",
        "pairs": "pairs:PairsReader",
        "mqm": "mqm:MqmReader",
    }
)


def reader_options(form: str, given: Mapping[str, Any] | None = None) -> Any:
    """The Options of a format's reader, from values by name.

    Raises:
        ValueError: no such format; an option that it does not have; a value that it refuses.
    """
    if form not in READERS:
        raise ValueError(
            f"format: expected one of {', '.join(READERS)}, got {form!r}{nearest(form, READERS)}"
        )
    kind = READERS[form].Options
    known = [x.name for x in fields(kind)]
    for name in given or {}:
        if name not in known:
            raise ValueError(
                f"format.{name}: the format {form!r} has no such option{nearest(name, known)}; it "
                f"has {', '.join(known)}"
            )
    check_types(kind, given or {}, "format")
    return kind(**given or {})


def read_marked(
    source: Any,
    form: str,
    options: Mapping[str, Any] | None = None,
    *,
    split: str = "train",
    limit: int | None = None,
    strict: bool = False,
) -> tuple[list[MarkedAnswer], Report]:
    """Every marked answer of a source, and what became of the other rows.

    Args:
        source: a path, several of them in a list, or what else `treg.data.read_rows` reads.
        form: the format, a key of READERS. options: values of its Options by name.
        split: of a folder or a name on the hub. limit: >= 1, only so many rows are looked at.
        strict: raise RowProblem at the first row that cannot be used, instead of counting it.
    Raises:
        ValueError: an option is refused; the source cannot be read, or has no usable row.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected a positive number of rows, got {limit}")
    made = reader_options(form, options)
    reader = READERS[form](made)
    report, answers, folders = Report(strict), [], _folders(source)
    for index, (where, row) in enumerate(_rows(reader, source, split)):
        if index == limit:
            break
        report.seen += 1
        reader.taken_notes()  # those of a row that was refused are said of none
        try:
            if isinstance(row, RowProblem):
                raise row
            found = reader.answers(row, where, index)
        except RowProblem as problem:
            # what reads rows for other commands too names their option
            detail = problem.detail.replace("--columns ", "--format.columns ")
            report.problem(RowProblem(problem.reason, detail, where))
            continue
        report.kept += 1
        for note in reader.taken_notes():
            report.note(RowProblem(note.reason, note.detail, where))
        answers += [replace(x, document=_without_folder(x.document, folders)) for x in found]
    reader.check_all(answers)
    if not report.seen:
        raise ValueError("data: expected rows with marked answers, found none: there is no row")
    if not answers:
        raise ValueError(f"data: expected at least one marked answer, found none: {report}")
    return answers, report


def _folders(source: Any) -> list[str]:
    """The folders in which the files of a source lie, the deepest first. None where two files have
    one name, which only their folders tell apart.
    """
    given = source if isinstance(source, (list, tuple)) else [source]
    paths = [Path(x) for x in given if isinstance(x, (str, Path))]
    names = {path.name for path in paths if path.is_file()}
    folders = {path if path.is_dir() else path.parent for path in paths}
    if len(names) < len(paths) > 1:
        return []
    return sorted((f"{x}{os.sep}" for x in folders), key=len, reverse=True)


def _without_folder(document: str, folders: Sequence[str]) -> str:
    """A document's name without the folder of its file: it is in the same half of the data
    (`treg.evaluate.scored.in_half`) wherever the file lies and however its path is written.
    """
    folder = next((x for x in folders if document.startswith(x)), "")
    return document.removeprefix(folder)


def _rows(reader: Reader, source: Any, split: str) -> Iterable[tuple[str, Any]]:
    """The rows of a source, or of several paths one after the other."""
    several = isinstance(source, (list, tuple)) and bool(source)
    if several and all(isinstance(x, (str, Path)) for x in source):
        for path in source:
            yield from reader.rows(path, split)
    else:
        yield from reader.rows(source, split)
