"""The numbers of annotated pairs by the text of the token, and the tokens that stand out."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from treg.viz.tokens import PairNumbers, PairView

MOST_TEXTS = 1000  # rows of the table
MOST_TOKENS = 40  # of each list of tokens that stand out


def token_table(pairs: Sequence[PairView], numbers: Sequence[PairNumbers]) -> dict[str, Any]:
    """Means by the text of a token, special tokens left out.

    Returns:
        texts: how many different ones there are; columns: lists by name, of the MOST_TEXTS
        commonest, the commonest first (ties by text): piece; count; chosen and rejected, how often
        in either; mean_chosen, mean_rejected, of token rewards; mean_implicit; opposite, the share
        of tokens whose token reward and implicit reward have opposite signs. None where there
        is no number; a column without any number is left out.
    """
    ids: dict[str, int] = {}
    rows: list[np.ndarray] = []  # [id, rejected, reward, implicit, opposite] of each token
    for pair, pair_numbers in zip(pairs, numbers, strict=True):
        for rejected, side, values in (
            (0, pair.chosen, pair_numbers.chosen),
            (1, pair.rejected, pair_numbers.rejected),
        ):
            tokens = np.full((values.tokens, 5), np.nan)
            tokens[:, 0] = [ids.setdefault(piece, len(ids)) for piece in side.pieces]
            tokens[:, 1] = rejected
            for column, known in ((2, values.rewards), (3, values.implicit)):
                if known is not None:
                    tokens[:, column] = known
            product = values.product(pair_numbers.compared)
            if product is not None:
                tokens[:, 4] = product < 0
            rows.append(np.delete(tokens, [int(t) for t in side.special], axis=0))
    which, rejected, reward, implicit, opposite = np.concatenate(rows).T
    which = which.astype(int)
    count = np.bincount(which, minlength=len(ids))
    texts = list(ids)
    order = sorted(np.flatnonzero(count).tolist(), key=lambda i: (-count[i], texts[i]))
    kept = order[:MOST_TEXTS]

    def means(values: np.ndarray, where: np.ndarray | bool = True) -> list[float | None]:
        known = np.isfinite(values) & where
        sums = np.bincount(which[known], values[known], len(ids))
        counts = np.bincount(which[known], minlength=len(ids))
        return [float(f"{sums[i] / counts[i]:.5g}") if counts[i] else None for i in kept]

    in_rejected = np.bincount(which, rejected, len(ids)).astype(int)
    columns: dict[str, list] = {
        "piece": [texts[i] for i in kept],
        "count": [int(count[i]) for i in kept],
        "chosen": [int(count[i] - in_rejected[i]) for i in kept],
        "rejected": [int(in_rejected[i]) for i in kept],
        "mean_chosen": means(reward, rejected == 0),
        "mean_rejected": means(reward, rejected == 1),
        "mean_implicit": means(implicit),
        "opposite": means(opposite),
    }
    shown = {name: x for name, x in columns.items() if any(value is not None for value in x)}
    return {"texts": len(order), "columns": shown}


def standing_out(numbers: Sequence[PairNumbers], rms: dict[str, float]) -> dict[str, list]:
    """The tokens that stand out, the farthest first, as [pair, 0 chosen or 1 rejected, token].

    Returns:
        disagree: by `disagreement`, those above 0 alone; highest, lowest: by token reward, those
        above and below 0. At most MOST_TOKENS each; a list that has none is left out.
    """
    places, rewards, apart = [], [], []
    for n, pair in enumerate(numbers):
        for s, side in enumerate((pair.chosen, pair.rejected)):
            if side.rewards is None:
                continue
            t = np.arange(side.tokens)
            places.append(np.stack([np.full_like(t, n), np.full_like(t, s), t], 1))
            rewards.append(side.rewards)
            product = side.product(pair.compared)
            apart.append(np.zeros(side.tokens) if product is None else disagreement(product, rms))
    if not places:
        return {}
    at, reward = np.concatenate(places), np.concatenate(rewards)
    found = {}
    for name, score in (
        ("disagree", np.concatenate(apart)),
        ("highest", reward),
        ("lowest", -reward),
    ):
        order = np.argsort(-score, kind="stable")[:MOST_TOKENS]
        found[name] = at[order[score[order] > 0]].tolist()
    return {name: listed for name, listed in found.items() if listed}


def disagreement(product: np.ndarray, rms: dict[str, float]) -> np.ndarray:
    """max(0, -rhat_t * i_t) / (rms(rhat) rms(i)): how far two rewards of opposite signs are apart,
    in units of both signals' root mean square; 0 where the signs agree.

    product: [T] rhat_t * i_t.
    """
    return np.maximum(-product, 0) / (rms["rewards"] * rms["implicit"])


def rms_of(arrays: Sequence[np.ndarray]) -> float:
    """The root mean square of all numbers; 1 where there are none but zeros."""
    values = np.concatenate([np.empty(0), *arrays])
    return float(np.sqrt((values**2).mean())) if values.any() else 1.0
