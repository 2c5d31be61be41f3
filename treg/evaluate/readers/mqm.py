"""Translations with MQM marks, as the WMT metrics task keeps them (TACL 2021, arXiv 2104.14478).

A file of columns between tabs, the first line their names, a line an error:

    system  doc  doc_id  seg_id  rater  source  target  category  severity

with <v> and </v> around the error in the target. Lines of one system, document and segment are one
answer; a segment without an error has one line of the category No-error. The marks of all raters
count, or those of one. The label of a mark is severity/category, as the file has them. An error
without a mark in the target, as an omission has in the source, is counted and left out.

Differs: the prompt is not in such files. It is `prompt`, with {source} in the place of the source.
"""

import gzip
import io
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treg.data.reading import Located
from treg.data.report import RowProblem, described
from treg.evaluate.documents import Mark, MarkedAnswer
from treg.evaluate.readers.base import LabelOptions, Reader
from treg.evaluate.readers.tags import TagsOptions, untagged

NEEDED = ("system", "doc", "rater", "source", "target", "category", "severity")
SEGMENTS = ("seg_id", "globalSegId", "docSegId")
ALL = "all"
NO_ERROR = "no-error"
DOCUMENTS = ("segment", "doc")
TAGS = TagsOptions(tags=["v"])


@dataclass(frozen=True)
class MqmOptions(LabelOptions):
    """rater: whose marks count, "all" or a name of the file. severities: those that count as wrong;
    marks of another are left out, and what they reach counts as judged by nobody. prompt: what is
    asked. document: what the bootstrap draws, "segment" or "doc".
    """

    rater: str = field(default=ALL, metadata={"help": "The rater whose marks count, or all."})
    severities: list[str] = field(
        default_factory=lambda: ["Critical", "Major", "Minor"],
        metadata={"help": "Severities that count, in any case of letters."},
    )
    prompt: str = field(
        default="Translate:\n{source}\n", metadata={"help": "The prompt, with {source} in it."}
    )
    document: str = field(
        default="segment", metadata={"help": f"What is drawn together: {', '.join(DOCUMENTS)}."}
    )

    def __post_init__(self):
        if "{source}" not in self.prompt:
            raise ValueError(
                f"format.prompt: expected a text with {{source}} in it, got {self.prompt!r}"
            )
        if self.document not in DOCUMENTS:
            raise ValueError(
                f"format.document: expected one of {', '.join(DOCUMENTS)}, got {self.document!r}"
            )


class MqmReader(Reader):
    """Lines of one translation -> one answer."""

    Options = MqmOptions

    def rows(self, source: Any, split: str) -> Iterator[Located]:
        """Of each translation {"lines": [...]}, in the order of their first lines."""
        if not isinstance(source, (str, Path)):
            raise TypeError(f"data: expected the path of a file, got {type(source).__name__}")
        groups: dict[Any, tuple[str, Any]] = {}
        for where, line in _lines(Path(source)):
            if isinstance(line, RowProblem):
                groups[where] = where, line
                continue
            key = tuple(line[x] for x in ("system", "doc", "segment"))
            groups.setdefault(key, (where, {"lines": []}))[1]["lines"].append(line)
        yield from groups.values()

    def answers(self, row: Mapping[str, Any], where: str, index: int) -> list[MarkedAnswer]:
        lines, rater = row["lines"], self.options.rater
        if rater != ALL:
            lines = [line for line in lines if line["rater"] == rater]
            if not lines:
                raise RowProblem("another rater", f"none of its lines is by {described(rater)}")
        first, text, found = lines[0], "", []
        for line in lines:
            target, marks, empty = untagged(line["target"], TAGS)
            text = text or target
            if target != text:
                raise RowProblem(
                    "texts differ",
                    f"expected one target in all lines of a segment, got {described(target)} in "
                    f"line {line['line']}",
                )
            found += self._marks(line, marks, empty)
        if not text.strip():
            raise RowProblem("empty answer", "target")
        kept, unjudged = self.options.marks(found)
        counted = [x.casefold() for x in self.options.severities]
        skipped = [x for x in kept if x.label.partition("/")[0].casefold() not in counted]
        unjudged = (*unjudged, *((x.start, x.end) for x in skipped if x.wrong))
        kept = tuple(x for x in kept if x not in skipped or not x.wrong)
        file = where.rpartition(":")[0]
        document = f"{file}#{first['doc']}"
        if self.options.document == "segment":
            document += f"#{first['segment']}"
        prompt = self.options.prompt.replace("{source}", _source(first["source"]))
        return [MarkedAnswer(where, document, prompt, text, kept, index=index, unjudged=unjudged)]

    def _marks(self, line: Mapping[str, Any], marks: list[Mark], empty: int) -> list[Mark]:
        """The marks of a line, with its label."""
        if line["category"].strip().casefold() == NO_ERROR:
            return []
        label = f"{line['severity'].strip()}/{line['category'].strip()}"
        if not marks:
            what = "around nothing" if empty else "missing"
            detail = f"line {line['line']}, {label}: the tags in the target are {what}"
            self.note("an error without marked characters", detail)
        return [Mark(x.start, x.end, label) for x in marks]


def _source(text: str) -> str:
    """A source without the tags of an error in it."""
    return text.replace("<v>", "").replace("</v>", "")


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | RowProblem]]:
    """The lines of a file by the names of their columns, with "segment" and "line"."""
    try:
        with _opened(path) as file:
            names = _values(file.readline())
            segment = next((x for x in SEGMENTS if x in names), None)
            missing = [x for x in NEEDED if x not in names]
            if missing or segment is None:
                missing += [] if segment else [" or ".join(SEGMENTS)]
                raise ValueError(
                    f"{path}: expected columns between tabs, with their names in the first line, "
                    f"found none of the name {', '.join(missing)}; there are {', '.join(names)}"
                )
            for number, text in enumerate(file, 2):
                where, values = f"{path}:{number}", _values(text)
                if not any(values):
                    continue
                if len(values) != len(names):
                    detail = f"expected {len(names)}, as in the first line, got {len(values)}"
                    yield where, RowProblem("number of columns", detail, where)
                    continue
                line: dict[str, Any] = dict(zip(names, values, strict=True))
                yield where, line | {"segment": line[segment], "line": number}
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as columns between tabs: {error}") from error


def _values(line: str) -> list[str]:
    return line.rstrip("\r\n").split("\t")


def _opened(path: Path) -> io.TextIOBase:
    if not path.is_file():
        raise FileNotFoundError(f"data: no such file: {path}")
    opened = gzip.open if path.name.endswith(".gz") else open
    return opened(path, "rt", encoding="utf-8-sig", newline="\n")  # type: ignore[return-value]
