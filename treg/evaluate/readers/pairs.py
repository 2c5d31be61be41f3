"""Minimal pairs: a good sentence and a bad one that differ in a few words (BLiMP, TACL 2020).

    {"sentence_good": "The cats run.", "sentence_bad": "The cats runs.", "UID": "agreement"}

The source is a file, a folder of .jsonl files or a .zip file of these, all of which are read. Words
of the bad sentence that the good one does not have in their place are marked as wrong, the good
one's as right. A word is a run of letters and digits, with apostrophes, hyphens and points within
it; any other character that is no blank is a word of its own. Where the bad sentence only lacks a
word, nothing in it is another word: the one after the gap is marked, or the last one. The label is
the row's value in `label`. A prompt is read if there is one.
"""

import difflib
import re
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treg.data.reading import Located, read_rows
from treg.data.report import RowProblem
from treg.evaluate.documents import Mark, MarkedAnswer, Span
from treg.evaluate.readers.base import Reader, text_column

WORD = re.compile(r"\w+(?:['’\-.]\w+)*|[^\w\s]")
SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json")


@dataclass(frozen=True)
class PairsOptions:
    """good, bad: columns of the sentences. label: column of the kind of error; a row without it has
    none. prompt: column of a text before both; a row without it has none.
    """

    good: str = field(default="sentence_good", metadata={"help": "Column of the good sentence."})
    bad: str = field(default="sentence_bad", metadata={"help": "Column of the bad sentence."})
    label: str = field(default="UID", metadata={"help": "Column of the kind of error."})
    prompt: str = field(default="prompt", metadata={"help": "Column of what precedes both."})


class PairsReader(Reader):
    """Rows of a good and a bad sentence."""

    Options = PairsOptions

    def rows(self, source: Any, split: str) -> Iterator[Located]:
        path = Path(source) if isinstance(source, (str, Path)) else None
        if path is not None and path.suffix == ".zip" and path.is_file():
            yield from _rows_of_zip(path)
        elif path is not None and path.is_dir():
            for file in _files(path):
                yield from read_rows(file)
        else:
            yield from read_rows(source, split)

    def answers(self, row: Mapping[str, Any], where: str, index: int) -> list[MarkedAnswer]:
        options = self.options
        good = text_column(row, options.good, "good")
        bad = text_column(row, options.bad, "bad")
        if good == bad:
            raise RowProblem("identical sentences", f"{options.good} and {options.bad}")
        prompt = row.get(options.prompt)
        if prompt is not None and not isinstance(prompt, (str, list)):
            raise RowProblem("mixed types", f"{options.prompt}: expected text or messages")
        label = row.get(options.label)
        label = "" if label is None else str(label)
        right, wrong = different_words(good, bad)
        if not wrong:
            raise RowProblem(
                "same words", f"{options.good} and {options.bad} differ in blanks alone"
            )
        found = []
        for text, spans, better in ((good, right, True), (bad, wrong, False)):
            found.append(
                MarkedAnswer(
                    where,
                    where,
                    prompt or "",
                    text,
                    tuple(Mark(*span, label, wrong=not better) for span in spans),
                    pair=where,
                    preferred=better,
                    index=index,
                    row=row,
                )
            )
        return found


def different_words(good: str, bad: str) -> tuple[list[Span], list[Span]]:
    """The characters of the words in which two sentences differ: those of the good one, and those
    of the bad one.
    """
    of_good, of_bad = _words(good), _words(bad)
    words = [[text[a:b] for a, b in spans] for text, spans in ((good, of_good), (bad, of_bad))]
    right, wrong, gaps = [], [], []
    matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
    for what, a, b, c, d in matcher.get_opcodes():
        if what != "equal":
            right += of_good[a:b]
            wrong += of_bad[c:d]
            gaps.append(c)
    if not wrong and of_bad and gaps:
        wrong = [of_bad[min(at, _last_word(bad, of_bad))] for at in gaps]
    return right, wrong


def _words(text: str) -> list[Span]:
    """The characters of each word. Accents and vowel signs that are characters of their own belong
    to their letters, which `re` does not say of them.
    """
    letters = ("x" if unicodedata.category(char)[0] == "M" else char for char in text)
    return [x.span() for x in WORD.finditer("".join(letters))]


def _last_word(text: str, spans: Sequence[Span]) -> int:
    """The number of the last word that is no punctuation."""
    words = [i for i, (a, _) in enumerate(spans) if text[a].isalnum()]
    return words[-1] if words else len(spans) - 1


def _files(folder: Path) -> list[Path]:
    files = sorted(x for x in folder.iterdir() if x.is_file() and x.name.endswith(SUFFIXES))
    if not files:
        raise ValueError(
            f"data: expected files ending in {', '.join(SUFFIXES)} in {folder}, found none"
        )
    return files


def _rows_of_zip(path: Path) -> Iterator[Located]:
    """The rows of every data file in a zip file, in the order of names; where each is begins with
    the name of the zip file.
    """
    try:
        with zipfile.ZipFile(path) as file, tempfile.TemporaryDirectory() as folder:
            names = sorted(
                x for x in file.namelist() if x.endswith(SUFFIXES) and not x.startswith("__MACOSX/")
            )
            if not names:
                raise ValueError(
                    f"{path}: expected files ending in {', '.join(SUFFIXES)}, found none"
                )
            for i, name in enumerate(names):
                member = Path(folder, f"{i}-{Path(name).name}")
                member.write_bytes(file.read(name))
                for where, row in read_rows(member):
                    yield f"{path}/{name}{where.removeprefix(str(member))}", row
                member.unlink()
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{path}: expected a zip file, got: {error}") from error
