"""Measures of a signal against marks: the area under the ROC curve, and the ranks behind it."""

import numpy as np


def ranks(x: np.ndarray) -> np.ndarray:
    """1 for the smallest; equal numbers share their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive scores above a negative, ties counting half. scores [N], positive
    [N] bool.
    """
    p = int(positive.sum())
    return float((ranks(scores)[positive].sum() - p * (p + 1) / 2) / (p * (len(scores) - p)))
