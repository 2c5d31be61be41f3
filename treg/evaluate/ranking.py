"""AUROC and average precision of one score under many weightings of the documents.

With a weight w_d for each document, tokens i that are wrong and j that are not, and what finds
wrong tokens s (minus the reward):

    AUROC = sum_i sum_j w_i w_j ( [s_j < s_i] + [s_j = s_i] / 2 ) / ( sum_i w_i * sum_j w_j )

    AP    = sum_i w_i P_i / sum_i w_i        P_i = the share of wrong tokens, by weight, among those
                                                   that are found with the threshold s_i

These are scikit-learn's roc_auc_score and average_precision_score with sample_weight. The tokens
are sorted once; then a weighting takes one cumulative sum over the tokens that are not wrong.
"""

from collections.abc import Sequence

import numpy as np


class Ranking:
    """The order of the tokens by one score.

    Args:
        finds: [N] floating, what finds wrong tokens: minus the rewards.
        wrong: [N] bool.
        document: [N] int64, the number of each token's document.
        labels: the numbers of the tokens of each error type, all of them wrong.
    """

    def __init__(
        self,
        finds: np.ndarray,
        wrong: np.ndarray,
        document: np.ndarray,
        labels: Sequence[np.ndarray] = (),
    ):
        others = finds[~wrong]
        order = np.argsort(others, kind="stable")
        self.document_of_others = document[~wrong][order]
        others = others[order]
        numbers = np.flatnonzero(wrong)
        numbers = numbers[np.argsort(-finds[numbers], kind="stable")]
        found = finds[numbers]  # the highest first
        self.document_of_wrong = document[numbers]
        self.below = np.searchsorted(others, found, side="left")
        self.up_to = np.searchsorted(others, found, side="right")
        # of each wrong token, how many wrong ones its threshold finds, less one
        self.last_alike = np.searchsorted(-found, -found, side="right") - 1
        place = np.full(len(finds), -1)
        place[numbers] = np.arange(len(numbers))
        self.labels = len(labels)
        places = [np.empty(0, np.int64), *(place[label] for label in labels)]
        self.labelled = np.concatenate(places)
        self.label_of = np.repeat(np.arange(self.labels), [len(label) for label in labels])

    def __call__(self, weights: np.ndarray) -> tuple[float, float, np.ndarray]:
        """AUROC, average precision, and the AUROC of each error type against the tokens that are
        not wrong. NaN where one of the two kinds has no weight.

        Args:
            weights: [D] float64, >= 0, of the documents.
        """
        wrong = weights[self.document_of_wrong]
        others = np.zeros(len(self.document_of_others) + 1)
        np.cumsum(weights[self.document_of_others], out=others[1:])
        all_wrong, all_others = wrong.sum(), others[-1]
        undefined = np.full(self.labels, np.nan)
        if not all_wrong:
            return np.nan, np.nan, undefined
        below = others[self.below]
        ordered = wrong * (below + others[self.up_to]) * 0.5
        found = np.cumsum(wrong)[self.last_alike]
        # a token without weight may be alone at the top: 0 of 0
        precision = found / np.maximum(found + (all_others - below), np.finfo(float).tiny)
        average = float(wrong @ precision) / all_wrong
        if not all_others:
            return np.nan, average, undefined
        of_label = undefined
        if self.labels:
            pairs = np.bincount(self.label_of, ordered[self.labelled], self.labels)
            weight = np.bincount(self.label_of, wrong[self.labelled], self.labels) * all_others
            of_label = np.divide(pairs, weight, out=undefined, where=weight > 0)
        return float(ordered.sum()) / (all_wrong * all_others), average, of_label
