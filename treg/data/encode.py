"""Preferences as token ids: the rows of a source as pairs. `treg.data.prompted` makes the ids."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from treg.data.annotated import is_annotated
from treg.data.batches import SIDES
from treg.data.pair import EncodeOptions, EncodeWork, Pair
from treg.data.prompted import AnswerEncoder, Prompted, PromptedIds
from treg.data.reading import read_rows
from treg.data.report import Report, RowProblem
from treg.data.row_cache import RowCache, row_cache
from treg.data.rows import Preference, parse_row
from treg.data.workers import in_order

DEFAULTS = EncodeOptions()
ONE_PROCESS = EncodeWork()
ROWS_TOGETHER = 256  # rows whose texts are tokenized in one call, which uses all cores


def load_pairs(
    source: Any,
    tokenizer: Any,
    options: EncodeOptions = DEFAULTS,
    *,
    split: str = "train",
    strict: bool = False,
    limit: int | None = None,
    known: Collection[str] = (),
    on_rows: Callable[[int], Any] = lambda rows: None,
    work: EncodeWork = ONE_PROCESS,
) -> tuple[list[Pair], Report]:
    """Every usable pair of a source, and what became of the other rows.

    Args:
        source, split: see `read_rows`. limit: only so many rows are looked at.
        strict: raise RowProblem at the first row that cannot be used, instead of counting it.
        known: names of columns of text that somebody reads, see `treg.data.names`.
        on_rows: is told how many rows more were looked at.
        work: how many processes encode, and where encoded rows are kept for the next time.
    Raises:
        ValueError: the source cannot be read, or holds no usable row; the message says what became
            of the rows.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected a positive number of rows, got {limit}")
    if is_annotated(source):
        raise ValueError(
            f"data: expected rows of text or messages, got {source}, which is annotated already"
        )
    report = Report(strict)
    pairs: list[Pair] = []
    options = options.dated(tokenizer)
    rows = enumerate(itertools.islice(read_rows(source, split), limit))
    encoder = _Encoder(tokenizer, options, known)
    with row_cache(work, source, split, tokenizer, options) as cache:
        for part in encoder.parts(_parts(rows, ROWS_TOGETHER), cache, work.num_proc):
            for found in part:
                report.seen += 1
                if isinstance(found, RowProblem):
                    report.problem(found)
                    continue
                pair, notes = found
                report.kept += 1
                report.truncated += pair.truncated
                for note in notes:
                    report.note(RowProblem(note, "", pair.row.where))
                pairs.append(pair)
            on_rows(len(part))
        cache.read_to_end = limit is None
    if not pairs:
        raise ValueError(f"data: expected at least one usable row, found none: {report}")
    return pairs, report


def _parts(items: Iterable, size: int) -> Iterator[list]:
    """Items in lists of at most so many."""
    items = iter(items)
    while part := list(itertools.islice(items, size)):
        yield part


def encode(
    row: Preference,
    tokenizer: Any,
    max_length: int | None = None,
    index: int = 0,
    options: EncodeOptions = DEFAULTS,
) -> Pair:
    """The token ids of a row.

    Messages go through the chat template, whose text is tokenized as a whole: prompt, and prompt
    with completion. The completion starts where both cease to agree, so that no token is shared
    between a prompt and a completion. Plain text gets the tokenizer's special tokens, and its
    end-of-sequence token at the end.

    Args:
        max_length: as in `EncodeOptions`. index: of the row in its source, kept in the pair.
        options: of everything else.
    Raises:
        RowProblem: the row cannot be used. ValueError: the tokenizer cannot serve such rows.
    """
    encoder = _Encoder(tokenizer, dataclasses.replace(options, max_length=max_length), ())
    (found,) = encoder.encoded([(index, row)])
    if isinstance(found, RowProblem):
        raise found
    return found[0]


class _Encoder:
    """Rows -> pairs, many at a time."""

    def __init__(self, tokenizer: Any, options: EncodeOptions, known: Collection[str]):
        self.answers = AnswerEncoder(tokenizer, options)
        self.options = options
        self.known = known
        self.chat = options.chat
        if self.chat is None:
            self.chat = tokenizer.chat_template is not None

    def parts(self, parts: Iterable[list], cache: RowCache, num_proc: int) -> Iterator[list]:
        """For each part of (index, (where, row)) what becomes of its rows: a pair with its notes,
        from the cache where it is there, or a RowProblem.
        """
        missing = (self._missing(part, cache) for part in parts)
        for (rows, found), encoded in in_order(self.encoded, missing, num_proc):
            new = iter(encoded)
            done = []
            for row, x in zip(rows, found, strict=True):
                x = next(new) if x is None else x
                if not isinstance(x, RowProblem) and x[0].row is not row:
                    x = (x[0].of_row(row), x[1])
                    cache.add(x)
                done.append(x)
            yield done

    def _missing(self, part: list, cache: RowCache) -> tuple[tuple[list, list], list]:
        """((rows, what is known of each), (index, row) of those of which nothing is)."""
        rows, found, missing = [], [], []
        for index, (where, given) in part:
            row = x = None
            try:
                row = self._parsed(given, where)
                x = cache.find(row, index)
            except RowProblem as problem:
                x = problem
            rows.append(row)
            found.append(x)
            if row is not None and x is None:
                # what is not encoded may be large, and stays here
                missing.append((index, dataclasses.replace(row, columns={}, given={})))
        return (rows, found), missing

    def _parsed(self, row: Any, where: str) -> Preference:
        if isinstance(row, RowProblem):
            raise row
        parsed = parse_row(
            row, where, chat=bool(self.chat), columns=self.options.columns, known=self.known
        )
        self.answers.check_not_rendered(parsed)
        return parsed

    def encoded(self, rows: Sequence[tuple[int, Preference]]) -> list:
        """For each (index, row) a pair with its notes, or its RowProblem."""
        encoded = self.answers.encoded([_prompted(row) for _, row in rows])
        found: list[Any] = []
        for (index, row), ids in zip(rows, encoded, strict=True):
            if isinstance(ids, RowProblem):
                found.append(ids)
                continue
            try:
                found.append((_pair(index, row, ids, self.options), list(ids.notes)))
            except RowProblem as problem:
                found.append(problem)
        return found


def _prompted(row: Preference) -> Prompted:
    return Prompted(
        row.prompt,
        {side: getattr(row, side) for side in SIDES},
        row.where,
        row.tools,
        row.template_kwargs,
        text=row.text,
    )


def _pair(index: int, row: Preference, found: PromptedIds, options: EncodeOptions) -> Pair:
    """The pair of a row. RowProblem: both answers are one."""
    chosen, rejected = (found.ids[side] for side in SIDES)
    if np.array_equal(chosen, rejected):
        detail = "after truncation" if found.cut else ""
        raise RowProblem("identical completions", detail, row.where)
    return Pair(
        found.prompt_ids,
        chosen,
        rejected,
        row=row,
        index=index,
        cut=found.cut,
        answers=found.answers,
        date=options.day,
    )
