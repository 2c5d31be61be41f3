"""The feedback of FineGrainedRLHF (arXiv 2306.01693): people marked wrong spans of answers.

A row has a question, passages as [title, sentence, ...], four predictions, the errors that people
marked in the first of them, and six comparisons of two predictions each. The prompt is

    TITLE
    SENTENCE SENTENCE ...

    (the other passages likewise)

    Question: QUESTION
    Answer:

with a newline at the end. "prediction 1" is the judged answer. The other predictions were judged as
a whole alone: those that people found strictly better or worse than the first make pairs with it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from treg.data.report import RowProblem, described
from treg.evaluate.documents import Mark, MarkedAnswer
from treg.evaluate.readers.base import LabelOptions, Reader, text_column
from treg.rewards.span_forms import check_bounds, span_fields

PAIRS = ("none", "first", "all")
OTHERS = (2, 3, 4)  # predictions that are compared with the first, in the order of `preference`
JUDGED = "prediction 1"


@dataclass(frozen=True)
class FineGrainedOptions(LabelOptions):
    """pairs: which comparisons with the first prediction become pairs: none, the first that is
    strict, or all that are. Each pair more is an answer or two more to score.
    """

    pairs: str = field(
        default="first",
        metadata={"help": f"Comparisons of a question that become pairs: {', '.join(PAIRS)}."},
    )

    def __post_init__(self):
        if self.pairs not in PAIRS:
            raise ValueError(
                f"format.pairs: expected one of {', '.join(PAIRS)}, got {self.pairs!r}"
            )


class FineGrainedReader(Reader):
    """Rows of train_feedback.json and dev_feedback.json."""

    Options = FineGrainedOptions

    def answers(self, row: Mapping[str, Any], where: str, index: int) -> list[MarkedAnswer]:
        prompt, text = prompt_of(row), text_column(row, JUDGED)
        found = []
        for i, item in enumerate(_errors(row)):
            try:
                start, end, _, label = span_fields(item)
                check_bounds(start, end, len(text), shortest=0)
            except RowProblem as problem:
                detail = f"feedback.errors[{i}]: {problem.detail}, got {described(item)}"
                raise RowProblem(problem.reason, detail) from None
            if start == end:
                self.note("a mark of nothing", f"feedback.errors[{i}] has no characters")
                continue
            found.append(Mark(start, end, label or ""))
        marks, unjudged = self.options.marks(found)
        compared = list(self._compared(row))
        pair, preferred = (None, None)
        if compared:
            pair, preferred = f"{where} 1:{compared[0][0]}", compared[0][1]
        answers = [
            MarkedAnswer(
                where,
                where,
                prompt,
                text,
                marks,
                pair=pair,
                preferred=preferred,
                index=index,
                unjudged=unjudged,
            )
        ]
        for k, (number, first_is_better) in enumerate(compared):
            sides = [(f"prediction {number}", not first_is_better)]
            if k > 0:  # the first prediction once more: an answer is in one pair
                sides.insert(0, (JUDGED, first_is_better))
            for name, better in sides:
                answers.append(
                    MarkedAnswer(
                        where,
                        where,
                        prompt,
                        text_column(row, name),
                        pair=f"{where} 1:{number}",
                        preferred=better,
                        index=index,
                        judged=False,
                    )
                )
        return answers

    def _compared(self, row: Mapping[str, Any]) -> Iterator[tuple[int, bool]]:
        """The predictions that were compared with the first strictly, and whether that was better;
        none whose text is the same.
        """
        given = row.get("preference")
        if self.options.pairs == "none" or given is None:
            return
        if not isinstance(given, list) or len(given) < len(OTHERS):
            raise RowProblem(
                "no preference", f"expected a list of 6 numbers, got {described(given)}"
            )
        for number, said in zip(OTHERS, given, strict=False):
            if said not in (0, 1, 2):
                raise RowProblem("no preference", f"expected 0, 1 or 2, got {described(said)}")
            other = row.get(f"prediction {number}")
            if said and isinstance(other, str) and other.strip() not in ("", row[JUDGED].strip()):
                yield number, said == 1
                if self.options.pairs == "first":
                    return


def prompt_of(row: Mapping[str, Any]) -> str:
    """The passages and the question as one text."""
    passages = row.get("passages")
    if not isinstance(passages, list):
        raise RowProblem("no passages", f"expected a list of passages, got {described(passages)}")
    parts = []
    for i, passage in enumerate(passages):
        texts = isinstance(passage, list) and all(isinstance(x, str) for x in passage)
        if not texts or not passage:
            raise RowProblem(
                "no passages",
                f"passages[{i}]: expected [title, sentence, ...], got {described(passage)}",
            )
        title, *sentences = passage
        parts.append(f"{title}\n{' '.join(sentences)}\n\n")
    return f"{''.join(parts)}Question: {text_column(row, 'question')}\nAnswer:\n"


def _errors(row: Mapping[str, Any]) -> list:
    feedback = row.get("feedback")
    errors = feedback.get("errors") if isinstance(feedback, Mapping) else None
    if not isinstance(errors, list):
        raise RowProblem(
            "no feedback", f"expected feedback.errors, a list of spans, got {described(feedback)}"
        )
    return errors
