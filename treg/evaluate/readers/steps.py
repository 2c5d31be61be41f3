"""Solutions in steps, of which people said which are right, or which is the first wrong one.

    {"problem": ..., "steps": [text, ...], "label": 2}          the number of the first wrong step,
                                                                from 0; -1: all are right (as in
                                                                ProcessBench, arXiv 2412.06559)
    {"problem": ..., "steps": [text, ...], "ratings": [1, -1]}  a rating of each step, null where it
                                                                has none; or under "labels"
    {"problem": ..., "steps": [{"text": ..., "rating": 1}]}     likewise
    {"question": {"problem": ...}, "label": {"steps": [...]}}   PRM800K (arXiv 2305.20050): of each
                                                                step the completion that was chosen,
                                                                else a person's, else the first

The answer is the steps, joined by `separator`. The first wrong step is marked as wrong, and the
steps before it as right. Of "label" nobody judged the steps after it. Of ratings, a step below
`threshold` is wrong, one above it right, and one at it neither; True and "+" are above, False and
"-" below. What joins a step that nobody judged to the step before it was judged by nobody either.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from treg.data.answer_rows import parse_answer
from treg.data.report import RowProblem, described
from treg.evaluate.documents import Mark, MarkedAnswer, Span
from treg.evaluate.readers.base import Reader, RowOptions, document_of
from treg.rewards.base import check_number

SIGNS = {True: math.inf, False: -math.inf, "+": math.inf, "-": -math.inf}
RATINGS = ("ratings", "labels", "rating")
ABOUT_SOLUTION = ("answer", "final_answer_correct", "generator")


@dataclass(frozen=True)
class StepsOptions(RowOptions):
    """separator: between two steps. steps: column of the steps. label: column of the number of the
    first wrong step. threshold: the rating that is neither right nor wrong.
    """

    separator: str = field(default="\n\n", metadata={"help": "What joins two steps."})
    steps: str = field(default="steps", metadata={"help": "Column of the steps."})
    label: str = field(
        default="label", metadata={"help": "Column of the first wrong step's number, -1 for none."}
    )
    threshold: float = field(
        default=0.0, metadata={"help": "Steps rated below it are wrong, above it right."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_number("format.threshold", self.threshold)


class StepsReader(Reader):
    """ProcessBench, PRM800K, and rows like these."""

    Options = StepsOptions

    def __init__(self, options: StepsOptions):
        super().__init__(options)
        self._rated: set = set()  # all ratings, to see what scale they have

    def answers(self, row: Mapping[str, Any], where: str, index: int) -> list[MarkedAnswer]:
        document = document_of(row, where, self.options.document)
        row = _plain(row)
        texts, ratings = self._steps(row)
        for i, text in enumerate(texts):
            if not text.strip():
                raise RowProblem("empty text", f"{self.options.steps}[{i}]")
        answer = self.options.separator.join(texts)
        spans = _spans(texts, len(self.options.separator))
        given = parse_answer(*self._asked(row, answer), (self.options.document,))
        first, marks, unjudged = self._marks(row, spans, ratings)
        return [
            MarkedAnswer(
                where,
                document,
                given.prompt,
                answer,
                marks,
                spans,
                first,
                index=index,
                unjudged=unjudged,
                row=given.columns,
                tools=given.tools,
                template_kwargs=given.template_kwargs,
            )
        ]

    def _asked(self, row: Mapping[str, Any], answer: str) -> tuple[dict, dict[str, str]]:
        """The row without what is read here, with the answer in one text; and its columns."""
        taken = (self.options.steps, self.options.label, *RATINGS, *ABOUT_SOLUTION)
        others = {name: x for name, x in row.items() if name not in taken}
        renamed = dict(self.options.renamed)
        if others.get("problem") is not None and not {"prompt", "problem"} & renamed.keys():
            renamed["prompt"] = "problem"
        return others | {"answer": answer}, renamed

    def _steps(self, row: Mapping[str, Any]) -> tuple[list[str], list | None]:
        """The texts of the steps, and their ratings; None where the row has none."""
        name = self.options.steps
        given = row.get(name)
        if given is None:
            there = ", ".join(map(str, row)) or "none"
            raise RowProblem(
                f"no column {name!r}", f"the columns are {there}; name it with --format.steps"
            )
        if not isinstance(given, list) or not given:
            raise RowProblem(
                "no steps", f"{name}: expected a list of texts, got {described(given)}"
            )
        if all(isinstance(x, Mapping) for x in given):
            texts = [x.get("text") for x in given]
            ratings: Any = None
            if any(k in x for x in given for k in RATINGS):
                ratings = [next((x[k] for k in RATINGS if k in x), None) for x in given]
        else:
            texts = given
            ratings = next((row[k] for k in RATINGS if row.get(k) is not None), None)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise RowProblem("no steps", f"{name}[{i}]: expected text, got {described(text)}")
        if ratings is not None and (not isinstance(ratings, list) or len(ratings) != len(texts)):
            detail = f"expected one for each of the {len(texts)} steps, got {described(ratings)}"
            raise RowProblem("no ratings", detail)
        return texts, ratings

    def _marks(
        self, row: Mapping[str, Any], spans: Sequence[Span], ratings: list | None
    ) -> tuple[int | None, tuple[Mark, ...], tuple[Span, ...]]:
        """The first wrong step, the marks, and what nobody judged."""
        label = row.get(self.options.label)
        if ratings is not None:
            return self._of_ratings(spans, ratings)
        if not isinstance(label, int) or isinstance(label, bool) or not -1 <= label < len(spans):
            raise RowProblem(
                "no label",
                f"{self.options.label}: expected the number of the first wrong step, from 0 to "
                f"{len(spans) - 1}, or -1 where all are right, got {described(label)}",
            )
        first = None if label == -1 else label
        right = spans if first is None else spans[:first]
        marks = [Mark(*span, wrong=False) for span in right]
        if first is None:
            return None, tuple(marks), ()
        after = tuple(_with_gap(spans, i) for i in range(first + 1, len(spans)))
        return first, (*marks, Mark(*spans[first])), after

    def _of_ratings(
        self, spans: Sequence[Span], ratings: list
    ) -> tuple[int | None, tuple[Mark, ...], tuple[Span, ...]]:
        first, marks, unjudged = None, [], []
        for i, (span, rating) in enumerate(zip(spans, ratings, strict=True)):
            if rating is None:
                unjudged.append(_with_gap(spans, i))
                continue
            number = _number(rating, i) - self.options.threshold
            self._rated.add(rating)
            if number < 0 and first is None:
                first = i
            if number:
                marks.append(Mark(*span, wrong=number < 0))
        return first, tuple(marks), tuple(unjudged)

    def check_all(self, answers: Collection[MarkedAnswer]) -> None:
        # what is written 0 and 1 is wrong and right, more often than neither and right
        numbers = not {type(x) for x in self._rated} & {bool, str}
        binary = numbers and 0 in self._rated <= {0, 1}
        if binary and self.options.threshold == 0:
            raise ValueError(
                f"data: expected a rating below 0 in one of the {len(answers)} solutions, the "
                "option threshold, found 0 and 1 alone; where 0 says that a step is wrong, set "
                "threshold to 0.5, else read more rows"
            )


def _spans(texts: Sequence[str], between: int) -> tuple[Span, ...]:
    found, start = [], 0
    for text in texts:
        found.append((start, start + len(text)))
        start += len(text) + between
    return tuple(found)


def _with_gap(spans: Sequence[Span], i: int) -> Span:
    """A step, and what joins it to the one before."""
    return (spans[i - 1][1] if i else 0), spans[i][1]


def _number(rating: Any, i: int) -> float:
    if isinstance(rating, (bool, str)) and rating in SIGNS:
        return SIGNS[rating]
    if isinstance(rating, (int, float)) and math.isfinite(rating):
        return float(rating)
    raise RowProblem(
        "no ratings",
        f"step {i}: expected a number, True or False, + or -, or null, got {described(rating)}",
    )


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of PRM800K as one of steps with ratings; any other as it is."""
    question, label = row.get("question"), row.get("label")
    if not isinstance(question, Mapping) or not isinstance(label, Mapping):
        return dict(row)
    steps = label.get("steps")
    if not isinstance(steps, list) or not isinstance(question.get("problem"), str):
        raise RowProblem("no steps", "expected question.problem and label.steps, as PRM800K has")
    return {
        "problem": question["problem"],
        "steps": [_chosen(step, i) for i, step in enumerate(steps)],
    }


def _chosen(step: Any, i: int) -> Any:
    """Of a step of PRM800K the completion that the solution goes on from."""
    found = step.get("completions") if isinstance(step, Mapping) else None
    if isinstance(step, Mapping) and step.get("chosen_completion") is None:
        person = step.get("human_completion")
        if isinstance(person, Mapping):
            written = person.get("rating")
            return {"text": person.get("text"), "rating": 1 if written is None else written}
    number = (step.get("chosen_completion") or 0) if isinstance(step, Mapping) else 0
    if not isinstance(found, list) or not 0 <= number < len(found):
        raise RowProblem(
            "no steps", f"label.steps[{i}]: expected completions and which one was chosen"
        )
    return found[number]
