"""Measures that are shares: sums over documents, one divided by the other.

Of each measure a document has a numerator and a denominator, so that a weighting of the documents
takes two products:

    value(w) = sum_d w_d numerator_d / sum_d w_d denominator_d
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from treg.evaluate.measures import auroc_by_group
from treg.evaluate.scored import NO_STEP, Scored, ScoredAnswer

BINS = 10  # of the calibration
STEP_SCORES: Mapping[str, Callable[[np.ndarray], float]] = {
    "min": np.min,
    "mean": np.mean,
    "sum": np.sum,
}


@dataclass(frozen=True, eq=False)
class Shares:
    """K measures of D documents.

    names: [K]. above, below: [D, K] float64, the numerators and the denominators.
    """

    names: tuple[str, ...]
    above: np.ndarray
    below: np.ndarray

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """[K] float64; NaN where a denominator is 0. weights: [D] float64."""
        above, below = weights @ self.above, weights @ self.below
        return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)

    @classmethod
    def joined(cls, columns: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> "Shares":
        """From the numerators and denominators [D] of each measure."""
        above, below = zip(*columns.values(), strict=True)
        return cls(
            tuple(columns),
            np.stack(above, 1).astype(np.float64),
            np.stack(below, 1).astype(np.float64),
        )


@dataclass(frozen=True)
class Calibration:
    """The bins of a score: low and high are the smallest and the largest score of each, [bins]."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    tokens: tuple[int, ...]


def shares_of(scored: Scored, name: str, step_score: str = "min") -> tuple[Shares, Calibration]:
    """The measures of a score that are shares: those that the data can give.

    wrong_negative, other_positive: of wrong tokens those with a score below 0, of others those
        above 0. The others are the tokens that are marked as right, where any is; else all that are
        not wrong.
    zeros: tokens with a score of 0.
    within_document: the mean AUROC of the documents that have both kinds of tokens.
    pair_accuracy, pair_accuracy_by_mean: pairs whose preferred answer has the larger sum (mean) of
        scores; equal ones count half.
    first_error: answers whose lowest step is the first wrong one, see `first_error`.
    chance: of first_error, one step drawn at random.
    bin0, bin1, ...: of the tokens of each bin of the calibration, those that are wrong.

    Args:
        step_score: what a step's score is of its tokens', a key of STEP_SCORES.
    """
    if step_score not in STEP_SCORES:
        raise ValueError(
            f"step_score: expected one of {', '.join(STEP_SCORES)}, got {step_score!r}"
        )
    values, wrong = scored.of(name), scored.wrong
    others = scored.right if scored.right.any() else ~wrong
    count = len(scored.documents)

    def tokens(mask: np.ndarray) -> np.ndarray:
        return np.bincount(scored.document[mask], minlength=count)

    columns = {
        "wrong_negative": (tokens(wrong & (values < 0)), tokens(wrong)),
        "other_positive": (tokens(others & (values > 0)), tokens(others)),
        "zeros": (tokens(values == 0), tokens(np.ones_like(wrong))),
    }
    within = auroc_by_group(-values, wrong, scored.document, count)
    known = np.isfinite(within)
    columns["within_document"] = (np.where(known, within, 0.0), known)
    columns |= _pairs(scored, name)
    columns |= _first_errors(scored, name, STEP_SCORES[step_score])
    bins, calibration = _bins(values)
    for k in range(len(calibration.tokens)):
        columns[f"bin{k}"] = (tokens(wrong & (bins == k)), tokens(bins == k))
    return Shares.joined(columns), calibration


Columns = dict[str, tuple[np.ndarray, np.ndarray]]


def _pairs(scored: Scored, name: str) -> Columns:
    """Pairs of which both answers are there, one of them preferred and with tokens."""
    sides: dict[str, dict[bool, tuple[int, float, float]]] = {}
    for i, answer in enumerate(scored.answers):
        values = answer.scores[name].astype(np.float64)
        if answer.pair is not None and answer.preferred is not None and len(values):
            document = int(scored.document_of_answer[i])
            total = float(values.sum()) + answer.ends.get(name, 0.0)
            both = sides.setdefault(answer.pair, {})
            both[answer.preferred] = document, total, float(values.mean())
    count = len(scored.documents)
    pairs = np.zeros(count)
    right = {"pair_accuracy": np.zeros(count), "pair_accuracy_by_mean": np.zeros(count)}
    for both in sides.values():
        if len(both) < 2:
            continue
        (document, *better), (_, *worse) = both[True], both[False]
        pairs[document] += 1
        for points, a, b in zip(right.values(), better, worse, strict=True):
            points[document] += _wins(a, b)
    return {measure: (points, pairs) for measure, points in right.items()}


def _wins(better: float, worse: float) -> float:
    return 0.5 * (float(better > worse) + float(better >= worse))


def _first_errors(scored: Scored, name: str, of: Callable[[np.ndarray], float]) -> Columns:
    count = len(scored.documents)
    found, chance, asked = (np.zeros(count) for _ in range(3))
    for document, answer in zip(scored.document_of_answer, scored.answers, strict=True):
        said = first_error(answer, name, of)
        if said is not None:
            found[document] += said[0]
            chance[document] += said[1]
            asked[document] += 1
    return {"first_error": (found, asked), "chance": (chance, asked)}


def first_error(
    answer: ScoredAnswer, name: str, of: Callable[[np.ndarray], float] = np.min
) -> tuple[float, float] | None:
    """Whether the lowest step of an answer is the first wrong one: 1, 0, or a part where several
    are equally low; and the chance of a step drawn at random.

    Steps without a token, as in an answer that was cut, are not there. None for an answer without
    steps, without a wrong one, or whose first wrong one is not there.

    Args:
        of: the score of a step, from those of its tokens.
    """
    if answer.steps is None or answer.first_wrong is None:
        return None
    there = np.unique(answer.steps[answer.steps != NO_STEP])
    if answer.first_wrong not in there:
        return None
    values = answer.scores[name].astype(np.float64)
    by_step = np.array([of(values[answer.steps == step]) for step in there])
    lowest = there[by_step == by_step.min()]
    return float(answer.first_wrong in lowest) / len(lowest), 1 / len(there)


def _bins(values: np.ndarray) -> tuple[np.ndarray, Calibration]:
    """Which of at most BINS bins of about equally many tokens each score is in; equal scores are in
    one bin.
    """
    if not len(values):
        return np.empty(0, np.int64), Calibration((), (), ())
    inner = np.quantile(values, np.arange(1, BINS) / BINS, method="higher")
    # a bin begins with its lowest score
    begins = np.unique(np.concatenate([values.min(keepdims=True), inner]))
    number = np.searchsorted(begins, values, side="right") - 1
    order = np.argsort(number, kind="stable")
    bounds = np.searchsorted(number[order], np.arange(len(begins) + 1))
    parts = [values[order[a:b]] for a, b in pairwise(bounds)]
    return number, Calibration(
        tuple(float(x.min()) for x in parts),
        tuple(float(x.max()) for x in parts),
        tuple(len(x) for x in parts),
    )
