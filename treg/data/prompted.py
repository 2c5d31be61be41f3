"""A prompt and its answers as token ids: rendered, split into prompt and answers, truncated.

The answers start where the tokens of prompt and answer cease to agree with those of the prompt
alone. Which of their tokens are an answer's is known from the text (`treg.data.answers`) and the
characters that each token holds.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from treg.data.answers import RenderedAnswer, render_answer, render_prompt
from treg.data.messages import PROBE, Messages, common_prefix
from treg.data.pair import AnswerTokens, EncodeOptions
from treg.data.rendering import Renderer, default_template
from treg.data.report import RowProblem, described
from treg.data.tokenizing import Ids, texts_as_ids


@dataclass(frozen=True)
class Prompted:
    """A prompt and one or more answers by name, all of messages or all of plain text.

    bare: whether plain answers may stand without a prompt. They follow the token that begins
        sequences, or where the tokenizer has none the one that ends them.
    text: whether the prompt was text, which became messages.
    """

    prompt: Messages | str
    answers: Mapping[str, Messages | str]
    where: str = ""
    tools: list | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    bare: bool = False
    text: bool = False

    @property
    def chat(self) -> bool:
        return not isinstance(self.prompt, str)


@dataclass(frozen=True)
class PromptedIds:
    """Token ids of a prompt and of its answers, int32.

    ids, answers: by name. cut: the names of those that max_length cut. notes: what a person should
    know.
    """

    prompt_ids: np.ndarray
    ids: dict[str, np.ndarray]
    answers: dict[str, AnswerTokens]
    cut: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Texts:
    """A row as texts. alone: the prompt; answers: by name."""

    row: Prompted
    alone: str
    answers: dict[str, RenderedAnswer]


class AnswerEncoder:
    """Prompts with answers -> token ids, many at a time."""

    def __init__(self, tokenizer: Any, options: EncodeOptions):
        self.tokenizer = tokenizer
        self.options = options

    def encoded(self, rows: Sequence[Prompted]) -> list[PromptedIds | RowProblem]:
        """For each row its ids, or why it cannot be used.

        Raises:
            ValueError: the tokenizer cannot serve such rows.
        """
        found: list[Any] = []
        texts = []
        for row in rows:
            try:
                texts.append(self.texts(row))
                found.append(None)
            except RowProblem as problem:
                found.append(problem)
        done = iter(self.tokenized(texts))
        return [next(done) if x is None else x for x in found]

    # -- texts

    def texts(self, row: Prompted) -> Texts:
        """A row as texts.

        Raises:
            RowProblem: the row cannot be used. ValueError: the tokenizer cannot serve such rows.
        """
        try:
            return self._chat_texts(row) if row.chat else self._plain_texts(row)
        except RowProblem as problem:
            raise RowProblem(problem.reason, problem.detail, row.where) from None

    def _chat_texts(self, row: Prompted) -> Texts:
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
        for name, answer in row.answers.items():
            try:
                answers[name] = render_answer(
                    render, prompt, alone, _messages(answer), all_turns=all_turns
                )
            except RowProblem as problem:
                raise RowProblem(problem.reason, f"{name}: {problem.detail}") from None
        return Texts(row, alone, answers)

    def _plain_texts(self, row: Prompted) -> Texts:
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "tokenizer: expected one with an end-of-sequence token for rows of plain text, got "
                "none"
            )
        prompt = _text(row.prompt)
        self._check_short(prompt)
        answers = {}
        for name, answer in row.answers.items():
            text = _text(answer)
            content = len(text.removesuffix(self.tokenizer.eos_token))
            # the end-of-sequence token has the place after the text
            scored = ((0, len(text) + 1),)
            answers[name] = RenderedAnswer(prompt, text, scored, ((0, content),))
        return Texts(row, prompt, answers)

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

    def check_not_rendered(self, row: Any) -> None:
        """RowProblem for plain text that a chat template has written already.

        row: a `Prompted` or a `Preference`.
        """
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

    def tokenized(self, rows: Sequence[Texts]) -> list[PromptedIds | RowProblem]:
        """For each row its ids, or its RowProblem. The texts of all rows go through the tokenizer
        together.
        """
        problems: dict[int, RowProblem] = {}
        wanted: list[tuple[bool, list[str]]] = []
        for k, texts in enumerate(rows):
            try:
                wanted.append((not texts.row.chat, self._wanted(texts)))
            except UnicodeEncodeError as error:
                problems[k] = RowProblem("broken text", str(error), texts.row.where)
        ids = iter(self._ids(wanted))
        found: list[Any] = []
        for k, texts in enumerate(rows):
            if k in problems:
                found.append(problems[k])
                continue
            try:
                found.append(self._split(texts, _all_placed(next(ids))))
            except RowProblem as problem:
                found.append(RowProblem(problem.reason, problem.detail, texts.row.where))
        return found

    def _wanted(self, texts: Texts) -> list[str]:
        """The prompt, and all that begins with it.

        Raises:
            UnicodeEncodeError: a text holds half of a surrogate pair, of which tokenizers say
                nothing of use.
        """
        # what lies far beyond max_length need not be tokenized
        bound = None if self._characters is None else 2 * self._characters
        wholes = [(x.prompt + x.answer)[:bound] for x in texts.answers.values()]
        for text in (texts.alone, *wholes):
            text.encode()
        return [texts.alone, *wholes]

    def _ids(self, wanted: Sequence[tuple[bool, list[str]]]) -> list[list[Ids | RowProblem]]:
        """Ids and places of the texts of rows, those of plain text with the tokenizer's special
        tokens.
        """
        found: list[Any] = [None] * len(wanted)
        for plain in (False, True):
            at = [i for i, (kind, _) in enumerate(wanted) if kind == plain]
            if not at:
                continue
            groups = [wanted[i][1] for i in at]
            for i, ids in zip(at, texts_as_ids(self.tokenizer, groups, plain), strict=True):
                found[i] = ids
        return found

    def _split(self, texts: Texts, tokens: list[Ids]) -> PromptedIds:
        """Ids of the prompt alone and of all that begins with it, split where the answers begin."""
        max_length = self.options.max_length
        if not texts.row.chat:
            tokens = [self._one_beginning(x, texts.alone) for x in tokens]
        alone, *wholes = tokens
        if not texts.row.chat:
            ended = zip(wholes, texts.answers.values(), strict=True)
            wholes = [self._ended(x, answer) for x, answer in ended]
        if texts.row.bare and not texts.alone:
            alone, wholes = self._begun(alone, wholes)
            start = min(common_prefix(alone.ids, x.ids) for x in wholes)
        else:
            start = _start(texts, alone, wholes)
        if start == 0:
            raise RowProblem("empty prompt", "the prompt and the completions share no token")
        if max_length is not None and start >= max_length:
            raise RowProblem("prompt too long", f"{start} tokens, max_length is {max_length}")
        ids, answers, cut = {}, {}, []
        for (name, answer), whole in zip(texts.answers.items(), wholes, strict=True):
            if max_length is not None and len(whole.ids) > max_length:
                cut.append(name)
            own = whole.ids[start:max_length]
            answers[name] = _answer_tokens(answer, whole.places[start:max_length])
            if not own or not answers[name].scored.any():
                raise RowProblem("empty completion", "no token after the prompt")
            ids[name] = np.asarray(own, dtype=np.int32)
        return PromptedIds(
            np.asarray(wholes[0].ids[:start], dtype=np.int32),
            ids,
            answers,
            tuple(cut),
            tuple(dict.fromkeys(note for x in texts.answers.values() for note in x.notes)),
        )

    def _begun(self, alone: Ids, wholes: list[Ids]) -> tuple[Ids, list[Ids]]:
        """Ids of answers without a prompt, after the token that begins sequences."""
        if alone.ids and all(common_prefix(alone.ids, x.ids) for x in wholes):
            return alone, wholes  # the tokenizer writes it by itself
        first = self.tokenizer.bos_token_id
        first = self.tokenizer.eos_token_id if first is None else first
        alone, *wholes = [Ids([first, *x.ids], [(0, 0), *x.places]) for x in (alone, *wholes)]
        return alone, wholes

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


def _all_placed(tokens: list[Ids | RowProblem]) -> list[Ids]:
    """Ids of texts; the RowProblem of one that has none is raised."""
    found = []
    for x in tokens:
        if isinstance(x, RowProblem):
            raise x
        found.append(x)
    return found


def _start(texts: Texts, alone: Ids, wholes: list[Ids]) -> int:
    """How many tokens are the prompt's."""
    start = min(common_prefix(alone.ids, x.ids) for x in wholes)
    for answer, tokens in zip(texts.answers.values(), wholes, strict=True):
        # an answer may begin with a token that also follows in the prompt alone
        end = len(answer.prompt)
        own = (i for i, (place, _) in enumerate(tokens.places[:start]) if place >= end)
        start = next(own, start)
    return start


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
