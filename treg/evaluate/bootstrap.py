"""The percentile bootstrap over documents, for all scores at once.

A draw takes as many documents as there are, with replacement. Every score sees the same draws, so
that differences of scores have intervals as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from treg.evaluate.ranking import Ranking
from treg.evaluate.shares import Shares

LEVEL = 0.95
MOST_UNDEFINED = 0.05  # share of draws that lack a kind of tokens, above which there is no interval
Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Draws:
    """What B draws give for one score; NaN where a draw lacks what a measure needs.

    auroc, average_precision: [B]. labels: [B, L] AUROC of each error type. shares: [B, K].
    """

    auroc: np.ndarray
    average_precision: np.ndarray
    labels: np.ndarray
    shares: np.ndarray


def bootstrap(
    scores: Sequence[tuple[Ranking, Shares]],
    documents: int,
    *,
    draws: int,
    seed: int,
    on_draw: Callable[[], object] = lambda: None,
) -> list[Draws]:
    """Measures of each score under many draws of the documents.

    Args:
        scores: of each score how it orders the tokens, and its measures that are shares.
        documents: how many there are, D.
        draws: how many, B. seed: of the draws.
        on_draw: is called after each draw.
    """
    rng = np.random.default_rng(seed)
    found = [
        Draws(
            np.empty(draws),
            np.empty(draws),
            np.empty((draws, ranking.labels)),
            np.empty((draws, len(shares.names))),
        )
        for ranking, shares in scores
    ]
    for b in range(draws):
        drawn = rng.integers(0, documents, documents)
        weights = np.bincount(drawn, minlength=documents).astype(np.float64)
        for (ranking, shares), to in zip(scores, found, strict=True):
            to.auroc[b], to.average_precision[b], to.labels[b] = ranking(weights)
            to.shares[b] = shares(weights)
        on_draw()
    return found


def interval(draws: np.ndarray, documents: int) -> Interval | None:
    """The 95 % percentile interval of a measure. None where there is none: with one document, with
    no draws, and where more than MOST_UNDEFINED of the draws lack what the measure needs.

    Args:
        draws: [B] floating.
    """
    known = draws[np.isfinite(draws)]
    if documents < 2 or len(known) < (1 - MOST_UNDEFINED) * len(draws) or not len(known):
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
