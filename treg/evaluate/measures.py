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
