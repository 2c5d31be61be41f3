"""Marked answers as token ids, as `treg annotate` makes them, and which tokens the marks reach."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treg.data import EncodeOptions, Messages, RowProblem
from treg.data.messages import hh_messages
from treg.data.prompted import AnswerEncoder, Prompted, PromptedIds
from treg.data.rows import as_turns
from treg.evaluate.documents import MarkedAnswer, Span
from treg.evaluate.scored import NO_STEP
from treg.rewards import Response
from treg.rewards.response import differs
from treg.rewards.spans import characters_of_tokens, leading_blanks

DEFAULTS = EncodeOptions()
ANSWERS_TOGETHER = 256  # whose texts are tokenized in one call


@dataclass(frozen=True, eq=False)
class TokenMarks:
    """What the marks say of the T tokens of a response.

    content: [T] bool: tokens that hold characters of the answer.
    judged: [T] bool, of these, the ones that somebody judged: they count as wrong or as not wrong.
    wrong, right: [T] bool, of the judged, those that a mark of this kind reaches. A token that both
        kinds reach is wrong.
    labels: by label of the marks that reach wrong tokens, [T] bool.
    steps: [T] int64: the step that each token of content is in, from 0; NO_STEP: in none. A token
        that two steps share is the first one's.
    """

    content: np.ndarray
    judged: np.ndarray
    wrong: np.ndarray
    right: np.ndarray
    labels: dict[str, np.ndarray]
    steps: np.ndarray


def responses(
    answers: Sequence[MarkedAnswer],
    tokenizer: Any,
    options: EncodeOptions = DEFAULTS,
    *,
    on_answers: Callable[[int], Any] = lambda answers: None,
) -> list[Response | RowProblem]:
    """The response of each answer, or why there is none.

    The ids are those that `treg annotate` makes of the same prompt and answer with the same
    options. Both answers of a pair with one prompt are encoded together, as there, since where the
    prompt's tokens end depends on both. A sentence without a prompt is plain text after the token
    that begins sequences (or ends them, where the tokenizer has no other), whatever the template.

    Args:
        options: max_length, chat, date and turns. Columns have no part in it.
        on_answers: is told how many answers more were encoded.
    Raises:
        ValueError: the tokenizer cannot serve such answers.
    """
    encoder = AnswerEncoder(tokenizer, options.dated(tokenizer))
    found: list[Any] = [None] * len(answers)
    for groups in _parts(_pairs(answers), ANSWERS_TOGETHER):
        rows = [_prompted([answers[i] for i in group], tokenizer, options) for group in groups]
        encoded = _encoded(encoder, rows)
        for group, row, ids in zip(groups, rows, encoded, strict=True):
            alone = len(group) > 1 and isinstance(ids, RowProblem)
            for i in group:
                if alone:  # one of two may be refused, and the other not
                    row = _prompted([answers[i]], tokenizer, options)
                    (ids,) = _encoded(encoder, [row])
                found[i] = _response(answers[i], row, ids, encoder)
            on_answers(len(group))
    return found


def token_marks(response: Response, answer: MarkedAnswer) -> TokenMarks:
    """What the marks of an answer say of the tokens of its response, also where that was cut.

    A token that holds a part of a marked character, or one marked character of several, is reached.

    Raises:
        RowProblem: the answer's text cannot be found in what the tokens say.
    """
    if not answer.judged and response.says is not None:
        return _unjudged(response.says)  # where its characters lie takes time, and is not asked
    places = characters_of_tokens(response)
    if places is None:
        raise RowProblem("marks cannot be placed", differs(response), answer.where)
    held = places[:, 0] < places[:, 1]
    if response.says is not None:
        held &= response.says
    content = held & (np.arange(len(held)) < response.content)
    starts, ends = (places + leading_blanks(response)).T

    def reached(spans: Iterable[Span]) -> np.ndarray:
        found = np.zeros(len(content), dtype=bool)
        for start, end in spans:
            found |= (starts < end) & (ends > start)
        return found & content

    wrong_marks = [mark for mark in answer.marks if mark.wrong]
    wrong = reached((mark.start, mark.end) for mark in wrong_marks)
    right = reached((mark.start, mark.end) for mark in answer.marks if not mark.wrong) & ~wrong
    by_label: dict[str, list[Span]] = {}
    for mark in wrong_marks:
        by_label.setdefault(mark.label, []).append((mark.start, mark.end))
    steps = np.full(len(content), NO_STEP, dtype=np.int64)
    for number, span in reversed(list(enumerate(answer.steps))):
        steps[reached([span])] = number
    judged = content & (wrong | right | ~reached(answer.unjudged))
    return TokenMarks(
        content,
        judged,
        wrong,
        right,
        {label: reached(spans) for label, spans in by_label.items()},
        steps,
    )


def _unjudged(says: np.ndarray) -> TokenMarks:
    """Of an answer that nobody judged: its tokens alone."""
    none = np.zeros(len(says), dtype=bool)
    return TokenMarks(says, none, none, none, {}, np.full(len(says), NO_STEP, dtype=np.int64))


def _pairs(answers: Sequence[MarkedAnswer]) -> list[list[int]]:
    """The numbers of answers, those of a pair with one prompt together, in the order of the first
    of each.
    """
    groups: list[list[int]] = []
    open_pairs: dict[str, list[int]] = {}
    for i, answer in enumerate(answers):
        other = open_pairs.get(answer.pair) if answer.pair is not None else None
        if other is not None and _fit(answers[other[0]], answer):
            other.append(i)
            del open_pairs[str(answer.pair)]
            continue
        groups.append([i])
        if answer.pair is not None:
            open_pairs[answer.pair] = groups[-1]
    return groups


def _fit(one: MarkedAnswer, other: MarkedAnswer) -> bool:
    """Whether two answers of a pair can be encoded together."""
    return one.prompt == other.prompt and _side(one) != _side(other)


def _side(answer: MarkedAnswer) -> str:
    if answer.side is not None:
        return answer.side
    return "rejected" if answer.preferred is False else "chosen"


def _prompted(group: Sequence[MarkedAnswer], tokenizer: Any, options: EncodeOptions) -> Prompted:
    """Answers after their one prompt, as the tokenizer takes them."""
    first = group[0]
    prompt: Messages | str = first.prompt
    texts: list[Any] = [answer.answer for answer in group]
    chat = tokenizer.chat_template is not None if options.chat is None else options.chat
    text = isinstance(prompt, str)
    if isinstance(prompt, str) and prompt and chat:
        prompt, texts = as_turns(prompt, *texts)
    elif not isinstance(prompt, str):
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    return Prompted(
        prompt,
        {_side(answer): text for answer, text in zip(group, texts, strict=True)},
        first.where,
        first.tools,
        dict(first.template_kwargs),
        bare=True,
        text=text,
    )


def _encoded(encoder: AnswerEncoder, rows: Sequence[Prompted]) -> list[PromptedIds | RowProblem]:
    """The ids of rows, or why there are none."""
    problems: list[RowProblem | None] = []
    for row in rows:
        try:
            encoder.check_not_rendered(row)
            problems.append(None)
        except RowProblem as problem:
            problems.append(problem)
    fine = [row for row, problem in zip(rows, problems, strict=True) if problem is None]
    done = iter(encoder.encoded(fine))
    return [next(done) if x is None else x for x in problems]


def _response(
    answer: MarkedAnswer, row: Prompted, ids: PromptedIds | RowProblem, encoder: AnswerEncoder
) -> Response | RowProblem:
    if isinstance(ids, RowProblem):
        return RowProblem(ids.reason, ids.detail, answer.where)
    side = _side(answer)
    text = isinstance(answer.prompt, str) and row.chat and hh_messages(answer.prompt) is not None
    return Response.of_ids(
        ids,
        side,
        encoder.tokenizer,
        prompt=row.prompt,
        completion=row.answers[side],
        where=answer.where,
        row=answer.row,
        # of an HH dialogue the blanks around an answer are left out
        row_text=answer.answer if text and answer.answer != answer.answer.strip() else None,
        tools=row.tools,
        template_kwargs=row.template_kwargs,
        date=encoder.options.day,
    )


def _parts(items: Sequence[list[int]], size: int) -> Iterator[Sequence[list[int]]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
