"""Marked answers through sources of token rewards, in batches: every score of every token.

An answer that one of the columns refuses is left out for all, so that the scores are compared on
the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from treg.data import Report, RowProblem
from treg.evaluate.columns import Columns
from treg.evaluate.documents import MarkedAnswer
from treg.evaluate.scored import NO_STEP, ScoredAnswer
from treg.rewards import Context, NoReference, Response
from treg.rewards.cutting import part_tokens
from treg.rewards.progress import Progress

MOST_ANSWERS = 64  # of a part
LEAST_PARTS = 8  # as far as there are so many answers: the bar moves early
NO_MODEL = 65536  # tokens of a part where no model runs


@dataclass(frozen=True, eq=False)
class Placed:
    """An answer, its tokens, and what the marks say of them (`treg.evaluate.place`)."""

    answer: MarkedAnswer
    response: Response
    marks: Any

    @property
    def tokens(self) -> int:
        """With the prompt."""
        return len(self.response.prompt_ids) + len(self.response.ids)


def progress(shown: bool) -> Progress:
    """A bar over answers."""
    return Progress(shown, "evaluate", "answers", lambda item: item.tokens)


def score_answers(
    placed: Sequence[Placed],
    columns: Sequence[Columns],
    context: Context,
    *,
    bar: Progress | None = None,
    strict: bool = False,
) -> tuple[list[ScoredAnswer], Report]:
    """The scores of all columns, of each answer that none of them refuses, in the answers' order.

    Args:
        columns: with names that are all different.
        context: the one that the columns' sources have.
        bar: shows how far it is; its `tokens` is the context's `on_tokens`.
        strict: raise the first refusal instead of counting it.
    Returns:
        Also what became of the answers: how many were refused, by reason.
    Raises:
        ValueError: no answer is left.
    """
    report = Report(strict=strict, seen=len(placed))
    kept: list[int] = []
    for i, item in enumerate(placed):
        problem = _problem(item, columns, context)
        if problem is None:
            kept.append(i)
        else:
            report.problem(problem)
    report.kept = len(kept)
    if not kept:
        raise ValueError(f"data: expected an answer that can be scored, found none: {report}")
    found: dict[int, ScoredAnswer] = {}
    parts = cut(kept, placed, _part_tokens(context))
    bar = bar or progress(False)
    with bar.over([[placed[i] for i in part] for part in parts]), torch.inference_mode():
        for part in parts:
            given = [(placed[i].answer, placed[i].response) for i in part]
            scored = [column.score(given) for column in columns]
            for i, *of_answer in zip(part, *scored, strict=True):
                values: dict[str, np.ndarray] = {}
                for by_name in of_answer:
                    values |= {name: x.float().numpy() for name, x in by_name.items()}
                found[i] = scored_answer(placed[i], values)
            bar.part_done()
    return [found[i] for i in kept], report


def _problem(item: Placed, columns: Sequence[Columns], context: Context) -> RowProblem | None:
    """Why an answer is left out: the first of what the model and the columns say of it."""
    if not item.marks.content.any():
        return RowProblem("no token", "the answer says nothing", item.answer.where)
    runs = not isinstance(context.model, NoReference)
    problem = context.unknown_token(item.response) if runs else None
    for column in columns:
        if problem is None:
            problem = column.check(item.answer, item.response)
    return problem


def _part_tokens(context: Context) -> int:
    if isinstance(context.model, NoReference):
        return NO_MODEL
    return part_tokens(context.model)


def cut(numbers: Sequence[int], placed: Sequence[Placed], most_tokens: int) -> list[list[int]]:
    """Numbers of answers in parts of at most most_tokens and MOST_ANSWERS, the longest first.

    Answers of one document follow one another: what they begin with, as both answers of a pair
    their prompt, is run once.
    """
    longest: dict[str, int] = {}
    for i in numbers:
        document = placed[i].answer.document
        longest[document] = max(longest.get(document, 0), placed[i].tokens)
    first = {document: k for k, document in enumerate(longest)}

    def place(i: int) -> tuple[int, int, int]:
        document = placed[i].answer.document
        return -longest[document], first[document], i

    most = min(MOST_ANSWERS, max(2, -(-len(numbers) // LEAST_PARTS)))
    parts: list[list[int]] = []
    tokens = 0
    for i in sorted(numbers, key=place):
        own = placed[i].tokens
        if not parts or len(parts[-1]) >= most or tokens + own > most_tokens:
            parts.append([])
            tokens = 0
        parts[-1].append(i)
        tokens += own
    return parts


def scored_answer(item: Placed, values: dict[str, np.ndarray]) -> ScoredAnswer:
    """What the tokens of an answer get, and what the marks say of them.

    values: [T] by score, of all tokens of the response.
    """
    answer, marks = item.answer, item.marks
    said = marks.content
    steps, judged = marks.steps[said], marks.judged[said]
    return ScoredAnswer(
        document=answer.document,
        scores={name: x[said].astype(np.float64) for name, x in values.items()},
        wrong=marks.wrong[said],
        right=marks.right[said],
        labels={name: mask[said] for name, mask in marks.labels.items()},
        steps=None if (steps == NO_STEP).all() else steps,
        first_wrong=answer.first_wrong,
        pair=answer.pair,
        preferred=answer.preferred,
        ends={name: float(x[~said].sum()) for name, x in values.items()},
        judged=None if judged.all() else judged,
    )
