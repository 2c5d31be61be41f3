"""A response as pieces of text, one a token, with the numbers of each; and how far two signals
agree.

Per response token t: rhat_t, the token reward, in [-0.5, 0.5], and i_t = beta * (log pi_t - log
pi_ref,t), the implicit reward. T-REG asks the second to follow the first.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treg.data.pieces import token_pieces
from treg.evaluate import ranks

REWARD_LIMIT, IMPLICIT_LIMIT = (
    0.5,
    0.2,
)  # where the colours end: fixed, so that two pages can be compared
LARGE = 0.1  # |rhat| of a clear opinion is above it
# Controls, bidi overrides and other characters without a shape, shown as symbols. Means the same in
# Python and JS.
HIDDEN = r"[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufff9-\ufffb]"
SYMBOLS = {
    "\n": "↵\n",
    "\t": "⇥\t",
    "\r": "↤",
}  # found in most fonts; the others are shown as code points


@dataclass(frozen=True)
class Side:
    """One response: a piece of text per token and, where known, the numbers of each token."""

    pieces: list[str]
    rewards: list[float] | None = None  # rhat_t
    implicit: list[float] | None = None  # beta * (log pi_t - log pi_ref,t)
    special: Sequence[int] = ()  # positions of special tokens, shown as chips

    @classmethod
    def from_ids(cls, ids: Sequence[int], tokenizer: Any, rewards=None, implicit=None) -> "Side":
        """The side of these token ids, its pieces from `token_pieces` and its special tokens from
        the tokenizer.
        """
        added = getattr(tokenizer, "added_tokens_decoder", {}).items()
        special = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
        return cls(
            token_pieces(ids, tokenizer),
            rewards,
            implicit,
            [t for t, i in enumerate(ids) if int(i) in special],
        )


@dataclass(frozen=True)
class PairView:
    """A preference pair to show."""

    where: str  # file:line
    prompt: str
    chosen: Side
    rejected: Side


def agreement(pairs: Sequence[PairView]) -> dict[str, float | int]:
    """How token rewards and implicit rewards go together, over all tokens of all pairs.

    Returns:
        pairs, tokens; agree, disagree, ties: tokens by whether sign(rhat) == sign(implicit), a zero
        in either is a tie; sign_agreement = agree / (agree + disagree); pearson, spearman (ties
        share their mean rank); mean_reward_chosen, mean_reward_rejected; large_rewards, the share
        of |rhat| > 0.1. A key is absent where its numbers are (no rewards, no implicit rewards, a
        constant under a correlation).
    Raises:
        ValueError: no pair; numbers that are not finite or not one per piece, by pair and token.
    """
    return agreement_of(numbers_of(pairs))


def agreement_of(numbers: list[list[dict[str, np.ndarray]]]) -> dict[str, float | int]:
    sides = [side for pair in numbers for side in pair]
    out: dict[str, float | int] = {
        "pairs": len(numbers),
        "tokens": sum(side["tokens"].size for side in sides),
    }
    both = [side for side in sides if "rewards" in side and "implicit" in side]
    if both:
        r, i = (np.concatenate([side[name] for side in both]) for name in ("rewards", "implicit"))
        signs = np.sign(r) * np.sign(i)
        agree, disagree = int((signs > 0).sum()), int((signs < 0).sum())
        out |= {"agree": agree, "disagree": disagree, "ties": signs.size - agree - disagree}
        if agree + disagree:
            out["sign_agreement"] = agree / (agree + disagree)
        for name, x, y in (("pearson", r, i), ("spearman", ranks(r), ranks(i))):
            if x.size and np.ptp(x) > 0 and np.ptp(y) > 0:
                x, y = x - x.mean(), y - y.mean()
                out[name] = float(x @ y / np.sqrt((x @ x) * (y @ y)))
    chosen, rejected = (
        np.concatenate([[], *(s["rewards"] for s in sides[k::2] if "rewards" in s)]) for k in (0, 1)
    )
    large = np.abs(np.concatenate([chosen, rejected])) > LARGE
    means = (
        ("mean_reward_chosen", chosen),
        ("mean_reward_rejected", rejected),
        ("large_rewards", large),
    )
    return out | {name: float(x.mean()) for name, x in means if x.size}


def numbers_of(pairs: Sequence[PairView]) -> list[list[dict[str, np.ndarray]]]:
    """For each pair, of both sides: "tokens" 0..T-1, and of "rewards" and "implicit" those there
    are; each [T].
    """
    if not pairs:
        raise ValueError("pairs: expected at least one, got none")

    def checked(label: str, side: Side) -> dict[str, np.ndarray]:
        out: dict[str, np.ndarray] = {"tokens": (at := np.arange(len(side.pieces)))}
        for name, values in (("rewards", side.rewards), ("implicit", side.implicit)):
            if values is not None:
                out[name] = x = np.asarray(values, dtype=np.float64)
                if x.shape != at.shape:
                    raise ValueError(
                        f"{label}.{name}: expected {at.size} numbers, one per piece, got {list(x.shape)}"
                    )
                for t in at[~np.isfinite(x)]:
                    raise ValueError(
                        f"{label}.{name}: got {x[t]} at token {t}, {side.pieces[t]!r}; expected a number"
                    )
        return out

    return [
        [
            checked(f"pairs[{n}] ({p.where}): {name}", getattr(p, name))
            for name in ("chosen", "rejected")
        ]
        for n, p in enumerate(pairs)
    ]


def pair_data(pair: PairView, numbers: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """What the page shows of a pair; a key is absent where its numbers are."""
    data: dict[str, Any] = {"where": pair.where, "prompt": pair.prompt}
    for name, side, x in zip(
        ("chosen", "rejected"), (pair.chosen, pair.rejected), numbers, strict=True
    ):
        data[name] = shown = {"pieces": side.pieces, "special": list(side.special)}
        for key in list(x)[1:]:  # all but "tokens"
            shown |= {key: [float(f"{v:.5g}") for v in x[key]], f"sum_{key}": float(x[key].sum())}
        if "sum_rewards" in shown:
            data[f"sum_{name}"] = shown["sum_rewards"]
            lowest = min(zip(x["rewards"].tolist(), side.pieces, strict=True), default=None)
            data["lowest"] = min(filter(None, (lowest, data.get("lowest"))), default=None)
        if shown.keys() >= {"rewards", "implicit"} and side.pieces:
            shown |= {"mean_product": float((x["rewards"] * x["implicit"]).mean())} | agreement_of(
                [[x]]
            )
    if all("sum_implicit" in data[name] for name in ("chosen", "rejected")):
        data["margin"] = data["chosen"]["sum_implicit"] - data["rejected"]["sum_implicit"]
    return data | {"agreement": agreement_of([numbers]).get("sign_agreement")}


def visible(text: str) -> str:
    """Text in which every character without a shape is a symbol; line breaks and tabs stay beside
    theirs.
    """
    return re.sub(HIDDEN, lambda match: SYMBOLS.get(match[0], f"⟨U+{ord(match[0]):04X}⟩"), text)
