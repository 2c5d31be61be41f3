"""How good scores are: every measure with its interval, the best baseline, and what follows."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from treg.evaluate.bootstrap import Draws, Interval, bootstrap, interval
from treg.evaluate.ranking import Ranking
from treg.evaluate.scored import Scored
from treg.evaluate.shares import Calibration, Shares, shares_of

# the measure that ranks scores: the first of these that the data can give
HEADLINES = ("auroc", "first_error", "pair_accuracy")


@dataclass(frozen=True)
class Measure:
    """A value and its 95 % interval over draws of the documents; None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, bounds: Interval | None) -> "Measure":
        known = bool(np.isfinite(value))
        low, high = bounds if known and bounds is not None else (None, None)
        return cls(float(value) if known else None, low, high)

    def holds(self, number: float) -> bool:
        """Whether the number lies within the interval."""
        return self.low is not None and self.high is not None and self.low <= number <= self.high


@dataclass(frozen=True)
class Bin:
    """Of the calibration: scores from low to high, and the share of wrong tokens among them."""

    low: float
    high: float
    tokens: int
    wrong: Measure


@dataclass(frozen=True)
class Label:
    """An error type: how many tokens are marked with it, in how many documents."""

    tokens: int
    documents: int


@dataclass(frozen=True)
class ScoreResult:
    """One score.

    baseline: whether it is one. measures: auroc, average_precision, sign_agreement and what
        `shares_of` names. labels: the AUROC of each error type.
    over_chance: the headline measure less what chance gives. over_best: less what the best
        baseline gives; None of that baseline, and where there is no baseline.
    """

    name: str
    baseline: bool
    measures: dict[str, Measure]
    labels: dict[str, Measure]
    calibration: list[Bin]
    over_chance: Measure | None = None
    over_best: Measure | None = None


@dataclass(frozen=True)
class Evaluation:
    """All scores of the same tokens.

    headline: the measure that ranks them; None where the data can give none. base_rate: the share
    of wrong tokens. chance: of first_error; None without steps. best: the best baseline. draws: of
    the bootstrap; 0: no interval was asked for.
    """

    results: list[ScoreResult]
    headline: str | None
    best: str | None
    documents: int
    answers: int
    tokens: int
    wrong: int
    right: int
    base_rate: float | None
    chance: float | None
    draws: int
    labels: dict[str, Label] = field(default_factory=dict)

    def stored(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class _Column:
    """What is known of one score. value, drawn: [1] and [B] of each measure; value_of_labels,
    drawn_of_labels: [L] and [B, L]; documents: how many there are.
    """

    name: str
    value: Mapping[str, np.ndarray]
    drawn: Mapping[str, np.ndarray]
    value_of_labels: np.ndarray
    drawn_of_labels: np.ndarray
    calibration: Calibration
    documents: int

    def measure(self, name: str) -> Measure:
        return _measure(self.value[name], self.drawn[name], self.documents)

    def measures(self) -> dict[str, Measure]:
        """All but those of other places: chance is the data's, and bins are the calibration's."""
        names = [x for x in self.value if x != "chance" and not x.startswith("bin")]
        return {name: self.measure(name) for name in names}

    def labels(self, names: Sequence[str]) -> dict[str, Measure]:
        each = zip(self.value_of_labels, self.drawn_of_labels.T, strict=True)
        measures = [_measure(value[None], drawn, self.documents) for value, drawn in each]
        return dict(zip(names, measures, strict=True))

    def bins(self) -> list[Bin]:
        made = self.calibration
        each = enumerate(zip(made.low, made.high, made.tokens, strict=True))
        return [Bin(*bounds, self.measure(f"bin{k}")) for k, bounds in each]

    def over_chance(self, headline: str) -> Measure:
        """The headline measure less chance; that of the first error is another in each draw."""
        value, drawn = self.value[headline] - 0.5, self.drawn[headline] - 0.5
        if headline == "first_error":
            value = self.value[headline] - self.value["chance"]
            drawn = self.drawn[headline] - self.drawn["chance"]
        return _measure(value, drawn, self.documents)

    def over(self, other: "_Column", headline: str) -> Measure:
        """The headline measure less another score's, draw by draw."""
        value = self.value[headline] - other.value[headline]
        return _measure(value, self.drawn[headline] - other.drawn[headline], self.documents)


def evaluate_scores(
    scored: Scored,
    baselines: Collection[str] = (),
    *,
    draws: int = 1000,
    seed: int = 0,
    step_score: str = "min",
    on_draw: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Every measure of every score, with 95 % intervals of a bootstrap over the documents.

    Args:
        baselines: the names of the scores that are baselines.
        draws: of the bootstrap; 0: no intervals. seed: of the draws.
        step_score: what a step's score is of its tokens': min, mean or sum.
        on_draw: is called after each draw.
    Raises:
        ValueError: a baseline that is no score, or draws below 0.
    """
    unknown = [name for name in baselines if name not in scored.names]
    if isinstance(baselines, str) or unknown:
        raise ValueError(
            f"baselines: expected a list of some of {', '.join(scored.names)}, got "
            f"{baselines if isinstance(baselines, str) else unknown[0]!r}"
        )
    if draws < 0:
        raise ValueError(f"draws: expected a whole number >= 0, got {draws}")
    labels = scored.labels
    rankings, shares, calibrations = [], [], []
    for name in scored.names:
        finds = -scored.of(name)
        rankings.append(Ranking(finds, scored.wrong, scored.document, list(labels.values())))
        of_name, calibration = shares_of(scored, name, step_score)
        shares.append(of_name)
        calibrations.append(calibration)
    count = len(scored.documents)
    asked = list(zip(rankings, shares, strict=True))
    drawn = bootstrap(asked, count, draws=draws, seed=seed, on_draw=on_draw)
    columns = []
    for name, (ranking, of_name), found, bins in zip(
        scored.names, asked, drawn, calibrations, strict=True
    ):
        point = _point(scored, name, ranking, of_name)
        names = of_name.names
        value, tried = _by_name(point, names), _by_name(found, names)
        by_label = (point.labels[0], found.labels)
        columns.append(_Column(name, value, tried, *by_label, bins, count))
    headline = next((x for x in HEADLINES if np.isfinite(columns[0].value[x]).all()), None)
    best = _best(columns, baselines, headline)
    chance = float(columns[0].value["chance"][0])
    wrong, tokens = int(scored.wrong.sum()), len(scored.wrong)
    return Evaluation(
        [_result(column, tuple(labels), baselines, headline, best) for column in columns],
        headline,
        None if best is None else best.name,
        documents=count,
        answers=len(scored.answers),
        tokens=tokens,
        wrong=wrong,
        right=int(scored.right.sum()),
        base_rate=wrong / tokens if tokens else None,
        chance=chance if np.isfinite(chance) else None,
        draws=draws,
        labels={
            label: Label(len(numbers), len(np.unique(scored.document[numbers])))
            for label, numbers in labels.items()
        },
    )


def _result(
    column: _Column,
    labels: Sequence[str],
    baselines: Collection[str],
    headline: str | None,
    best: _Column | None,
) -> ScoreResult:
    over_best = None
    if headline is not None and best is not None and best is not column:
        over_best = column.over(best, headline)
    return ScoreResult(
        column.name,
        column.name in baselines,
        column.measures(),
        column.labels(labels),
        column.bins(),
        None if headline is None else column.over_chance(headline),
        over_best,
    )


def _point(scored: Scored, name: str, ranking: Ranking, shares: Shares) -> Draws:
    """The values themselves, as one draw of every document once; AUROC and average precision are
    scikit-learn's.
    """
    ones = np.ones(len(scored.documents))
    finds, wrong = -scored.of(name), scored.wrong
    *_, by_label = ranking(ones)
    area = precision = np.nan
    if wrong.any() and not wrong.all():
        area = float(roc_auc_score(wrong, finds))
    if wrong.any():
        precision = float(average_precision_score(wrong, finds))
    return Draws(np.array([area]), np.array([precision]), by_label[None], shares(ones)[None])


def _by_name(drawn: Draws, names: Sequence[str]) -> dict[str, np.ndarray]:
    """[B] of each measure."""
    found = {"auroc": drawn.auroc, "average_precision": drawn.average_precision}
    shares = dict(zip(names, drawn.shares.T, strict=True))
    found["sign_agreement"] = (shares["wrong_negative"] + shares["other_positive"]) / 2
    return found | shares


def _measure(value: np.ndarray, drawn: np.ndarray, documents: int) -> Measure:
    return Measure.of(float(value[0]), interval(drawn, documents))


def _best(
    columns: Sequence[_Column], baselines: Collection[str], headline: str | None
) -> _Column | None:
    """The baseline with the highest headline measure; the first of equal ones."""
    known = [column for column in columns if column.name in baselines]
    if headline is None or not known:
        return None
    return max(known, key=lambda column: column.value[headline][0])
