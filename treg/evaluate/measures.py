"""Measures of a signal against marks: the area under the ROC curve, and the ranks behind it."""

import numpy as np


def ranks(x: np.ndarray) -> np.ndarray:
    """1 for the smallest; equal numbers share their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive scores above a negative, ties counting half.

    Args:
        scores: [N].
        positive: [N] bool, with both values in it.
    """
    positives = int(positive.sum())
    negatives = len(scores) - positives
    # Mann and Whitney's U: the sum of the positives' ranks above the least that it can be counts
    # the pairs of a positive and a negative in the right order
    ordered_pairs = ranks(scores)[positive].sum() - positives * (positives + 1) / 2
    return float(ordered_pairs / (positives * negatives))


def auroc_by_group(
    scores: np.ndarray, positive: np.ndarray, group: np.ndarray, groups: int
) -> np.ndarray:
    """The `auroc` of each group by itself.

    Args:
        scores, positive: as in `auroc`. group: [N] int64, >= 0 and below groups.
    Returns:
        [groups] float64; NaN for a group that lacks one of the two kinds.
    """
    positives = np.bincount(group, positive, groups)
    sizes = np.bincount(group, minlength=groups)
    negatives = sizes - positives
    order = np.lexsort((scores, group))
    ordered, ordered_group = scores[order], group[order]
    begins = np.ones(len(scores), dtype=bool)  # of numbers that are equal, in one group
    begins[1:] = (ordered[1:] != ordered[:-1]) | (ordered_group[1:] != ordered_group[:-1])
    run = np.cumsum(begins) - 1
    counts = np.bincount(run)
    mean_place = np.cumsum(counts) - (counts - 1) / 2  # from 1, over all groups
    before = np.cumsum(sizes) - sizes
    rank = mean_place[run] - before[ordered_group]
    sums = np.bincount(ordered_group, rank * positive[order], groups)
    ordered_pairs = sums - positives * (positives + 1) / 2
    pairs = positives * negatives
    return np.divide(ordered_pairs, pairs, out=np.full(groups, np.nan), where=pairs > 0)
