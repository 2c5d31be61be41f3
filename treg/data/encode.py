"""Preferences as token ids: rendered, split into prompt and completions, truncated.

The completions start where the tokens of prompt and completion cease to agree with those of the
prompt alone. Which of their tokens are an answer's is known from the text (`treg.data.answers`)
and the characters that each token holds.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treg.data.annotated import is_annotated
from treg.data.answers import RenderedAnswer, render_answer, render_prompt
from treg.data.batches import SIDES
from treg.data.messages import PROBE, Messages, common_prefix
from treg.data.pair import AnswerTokens, EncodeOptions, EncodeWork, Pair
from treg.data.reading import read_rows
from treg.data.rendering import Renderer, default_template
from treg.data.report import Report, RowProblem, described
from treg.data.row_cache import RowCache, row_cache
from treg.data.rows import Preference, parse_row
from treg.data.tokenizing import Ids, texts_as_ids
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
    (found,) = encoder.tokenized([(index, encoder.texts(row))])
    if isinstance(found, RowProblem):
        raise found
    return found[0]


@dataclass(frozen=True)
class _Texts:
    """A row as texts. alone: the prompt; answers: by side."""

    row: Preference
    alone: str
    answers: dict[str, RenderedAnswer]


class _Encoder:
    """Rows -> pairs, many at a time."""

    def __init__(self, tokenizer: Any, options: EncodeOptions, known: Collection[str]):
        self.tokenizer = tokenizer
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
        self._check_not_rendered(parsed)
        return parsed

    def encoded(self, rows: Sequence[tuple[int, Preference]]) -> list:
        """For each (index, row) a pair with its notes, or its RowProblem."""
        found: list[Any] = []
        texts = []
        for index, row in rows:
            try:
                texts.append((index, self.texts(row)))
                found.append(None)
            except RowProblem as problem:
                found.append(problem)
        done = iter(self.tokenized(texts))
        return [next(done) if x is None else x for x in found]

    def texts(self, row: Preference) -> _Texts:
        """A row as texts.

        Raises:
            RowProblem: the row cannot be used. ValueError: the tokenizer cannot serve such rows.
        """
        try:
            return self._chat_texts(row) if row.chat else self._plain_texts(row)
        except RowProblem as problem:
            raise RowProblem(problem.reason, problem.detail, row.where) from None

    def _chat_texts(self, row: Preference) -> _Texts:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"chat_template: {row.where} holds messages, and the tokenizer has no chat "
                "template to render them; give one with chat_template, or use a tokenizer of a "
                "chat model"
            )
        render = Renderer(self.tokenizer, row.tools, row.template_kwargs, self.options.day)
        prompt = _messages(row.prompt)
        alone = render_prompt(render, prompt)
        self._check_short(alone)
        all_turns = self.options.turns == "all"
        answers = {}
        for side in SIDES:
            try:
                answers[side] = render_answer(
                    render, prompt, alone, _messages(getattr(row, side)), all_turns=all_turns
                )
            except RowProblem as problem:
                raise RowProblem(problem.reason, f"{side}: {problem.detail}") from None
        return _Texts(row, alone, answers)

    def _plain_texts(self, row: Preference) -> _Texts:
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "tokenizer: expected one with an end-of-sequence token for rows of plain text, got "
                "none"
            )
        prompt = _text(row.prompt)
        self._check_short(prompt)
        answers = {}
        for side in SIDES:
            text = _text(getattr(row, side))
            content = len(text.removesuffix(self.tokenizer.eos_token))
            # the end-of-sequence token has the place after the text
            scored = ((0, len(text) + 1),)
            answers[side] = RenderedAnswer(prompt, text, scored, ((0, content),))
        return _Texts(row, prompt, answers)

    def _check_short(self, prompt: str) -> None:
        """RowProblem for a prompt of more characters than max_length of the longest tokens hold.

        Differs: so is one that would fit because its tokenizer drops characters, or has one token
        for many that it does not know.
        """
        limit = self._characters
        if limit is not None and len(prompt) > limit:
            raise RowProblem(
                "prompt too long",
                f"{len(prompt)} characters, max_length is {self.options.max_length} tokens",
            )

    @property
    def _characters(self) -> int | None:
        """Characters that max_length tokens hold at most; None without a bound."""
        if self.options.max_length is None:
            return None
        return (self.options.max_length + 1) * _longest_token(self.tokenizer, len(self.tokenizer))

    def _check_not_rendered(self, row: Preference) -> None:
        """RowProblem for plain text that a chat template has written already."""
        if self.options.chat is not None or not row.chat or not row.text:
            return
        openings = _openings(self.tokenizer)
        texts = [message["content"] for message in row.prompt if isinstance(message, dict)]
        for opening in openings:
            if any(opening in text for text in texts):
                raise RowProblem(
                    "rendered already",
                    f"the prompt holds {described(opening)}, which the chat template writes; take "
                    "the text as it is with --plain_text (EncodeOptions(chat=False))",
                    row.where,
                )

    # -- tokens

    def tokenized(self, rows: Sequence[tuple[int, _Texts]]) -> list:
        """For each (index, texts) a pair with its notes, or its RowProblem. The texts of all rows
        go through the tokenizer together.
        """
        problems: dict[int, RowProblem] = {}
        wanted: list[tuple[bool, str]] = []
        for k, (_, texts) in enumerate(rows):
            try:
                mine = self._wanted(texts)
            except UnicodeEncodeError as error:
                problems[k] = RowProblem("broken text", str(error), texts.row.where)
                continue
            wanted += mine
        ids = iter(self._ids(wanted))
        found: list[Any] = []
        for k, (index, texts) in enumerate(rows):
            if k in problems:
                found.append(problems[k])
                continue
            alone, *sides = next(ids), next(ids), next(ids)
            try:
                for tokens in (alone, *sides):
                    if isinstance(tokens, RowProblem):
                        raise tokens
                pair = self._pair(index, texts, alone, sides)
            except RowProblem as problem:
                found.append(RowProblem(problem.reason, problem.detail, texts.row.where))
                continue
            notes = dict.fromkeys(note for side in SIDES for note in texts.answers[side].notes)
            found.append((pair, list(notes)))
        return found

    def _wanted(self, texts: _Texts) -> list[tuple[bool, str]]:
        """(plain, text) of the prompt and of both sides.

        Raises:
            UnicodeEncodeError: a text holds half of a surrogate pair, of which tokenizers say
                nothing of use.
        """
        plain = not texts.row.chat
        wholes = [x.prompt + x.answer for x in (texts.answers[side] for side in SIDES)]
        # what lies far beyond max_length need not be tokenized
        bound = None if self._characters is None else 2 * self._characters
        found = [(plain, texts.alone), *((plain, whole[:bound]) for whole in wholes)]
        for _, text in found:
            text.encode()
        return found

    def _ids(self, wanted: Sequence[tuple[bool, str]]) -> list[Ids]:
        """Ids and places of texts, those of plain text with the tokenizer's special tokens."""
        found: list[Any] = [None] * len(wanted)
        for plain in (False, True):
            at = [i for i, (kind, _) in enumerate(wanted) if kind == plain]
            if not at:
                continue
            texts = [wanted[i][1] for i in at]
            for i, ids in zip(at, texts_as_ids(self.tokenizer, texts, plain), strict=True):
                found[i] = ids
        return found

    def _pair(self, index: int, texts: _Texts, alone: Ids, sides: Sequence[Ids]) -> Pair:
        row, max_length = texts.row, self.options.max_length
        if not row.chat:
            alone = self._one_beginning(alone, texts.alone)
            sides = [
                self._ended(self._one_beginning(x, texts.alone), texts.answers[side])
                for side, x in zip(SIDES, sides, strict=True)
            ]
        whole = [x.ids for x in sides]
        start = min(common_prefix(alone.ids, ids) for ids in whole)
        for side, tokens in zip(SIDES, sides, strict=True):
            # an answer may begin with a token that also follows in the prompt alone
            end = len(texts.answers[side].prompt)
            own = (i for i, (place, _) in enumerate(tokens.places[:start]) if place >= end)
            start = next(own, start)
        if start == 0:
            raise RowProblem("empty prompt", "the prompt and the completions share no token")
        cut: tuple[str, ...] = ()
        if max_length is not None:
            if start >= max_length:
                raise RowProblem("prompt too long", f"{start} tokens, max_length is {max_length}")
            both = zip(SIDES, whole, strict=True)
            cut = tuple(side for side, ids in both if len(ids) > max_length)
        answers, completions = {}, []
        for side, tokens in zip(SIDES, sides, strict=True):
            ids = tokens.ids[start:max_length]
            places = tokens.places[start:max_length]
            answers[side] = _answer_tokens(texts.answers[side], places)
            if not ids or not answers[side].scored.any():
                raise RowProblem("empty completion", "no token after the prompt")
            completions.append(np.asarray(ids, dtype=np.int32))
        if np.array_equal(*completions):
            raise RowProblem("identical completions", "after truncation" if cut else "")
        prompt = np.asarray(whole[0][:start], dtype=np.int32)
        return Pair(
            prompt,
            *completions,
            row=row,
            index=index,
            cut=cut,
            answers=answers,
            date=self.options.day,
        )

    def _one_beginning(self, tokens: Ids, text: str) -> Ids:
        """Ids of a plain text with one beginning-of-sequence token where the text has its own."""
        bos = self.tokenizer.bos_token_id
        if bos is None or tokens.ids[:2] != [bos, bos]:
            return tokens
        if not text.startswith(self.tokenizer.bos_token) or text.startswith(
            self.tokenizer.bos_token * 2
        ):
            return tokens
        return Ids(tokens.ids[1:], tokens.places[1:])

    def _ended(self, tokens: Ids, answer: RenderedAnswer) -> Ids:
        """Ids with the end-of-sequence token at the end, which some tokenizers add by themselves.
        Its place is that after the text, which no content has.
        """
        eos = self.tokenizer.eos_token_id
        end = len(answer.prompt) + len(answer.answer)
        if tokens.ids[-1:] == [eos]:
            places = tokens.places
            if places[-1] == (0, 0):
                places = [*places[:-1], (end, end + 1)]
            return Ids(tokens.ids, places)
        return Ids([*tokens.ids, eos], [*tokens.places, (end, end + 1)])


def _answer_tokens(answer: RenderedAnswer, places: Sequence[tuple[int, int]]) -> AnswerTokens:
    """What the tokens of a completion are; places: the characters of prompt and answer that each
    holds.
    """
    spans = np.asarray(places, dtype=np.int64).reshape(-1, 2) - len(answer.prompt)
    # a token of no characters of its own counts with the place where it stands
    starts, ends = spans[:, 0], np.maximum(spans[:, 1], spans[:, 0] + 1)

    def held(wanted: Iterable[tuple[int, int]]) -> np.ndarray:
        found = np.zeros(len(spans), dtype=bool)
        for a, b in wanted:
            found |= (starts < b) & (ends > a)
        return found

    scored, content = held(answer.scored), held(answer.content)
    return AnswerTokens(scored, content & scored, answer.said)


@functools.lru_cache(maxsize=16)
def _longest_token(tokenizer: Any, vocabulary: int) -> int:
    """Characters of the longest token. vocabulary: its size, which grows by added tokens."""
    return max(map(len, tokenizer.get_vocab()), default=1)


def _openings(tokenizer: Any) -> tuple[str, ...]:
    template = default_template(tokenizer)
    return () if template is None else _openings_of(tokenizer, template, len(tokenizer))


@functools.lru_cache(maxsize=16)
def _openings_of(tokenizer: Any, template: str, vocabulary: int) -> tuple[str, ...]:
    """Special tokens that a chat template writes before a user's words."""
    try:
        text = Renderer(tokenizer)([{"role": "user", "content": PROBE}])
    except RowProblem:
        return ()
    before = text.partition(PROBE)[0]
    special = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    tokens = [str(x) for x in tokenizer.get_added_vocab()]
    return tuple(x for x in tokens if x in before and x not in special)


def _messages(value: Messages | str) -> Messages:
    if isinstance(value, str):
        raise TypeError("expected messages beside a prompt of messages, got text")
    return value


def _text(value: Messages | str) -> str:
    if not isinstance(value, str):
        raise TypeError("expected text beside a prompt of text, got messages")
    return value
