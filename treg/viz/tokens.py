"""A response as pieces of text, one a token, with the numbers of each; and how far two signals
agree.

Per response token t: rhat_t, the token reward, in [-0.5, 0.5], and i_t = beta * (log pi_t - log
pi_ref,t), the implicit reward. T-REG asks the second to follow the first.
"""

import bisect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from treg.data.pieces import token_pieces
from treg.evaluate import ranks

TOKEN_REWARDS = "token_rewards"
LARGE_REWARD = 0.1  # |rhat| of a clear opinion is above it
# Colours end at a quantile of |x| over the tokens: one far number does not make all others pale.
COLOUR_QUANTILE = 0.95

# Controls, bidi overrides and other characters without a shape, shown as symbols. Means the same in
# Python and JS.
HIDDEN = (
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069"
    r"\ud800-\udfff\ufeff\ufff9-\ufffb]"
)
# found in most fonts; the others are shown as code points
SYMBOLS = {"\n": "↵\n", "\t": "⇥\t", "\r": "↤"}


def visible(text: str) -> str:
    """Text in which every character without a shape is a symbol; line breaks and tabs stay beside
    theirs.
    """

    def symbol(match: re.Match) -> str:
        character = match[0]
        return SYMBOLS.get(character, f"⟨U+{ord(character):04X}⟩")

    return re.sub(HIDDEN, symbol, text)


@dataclass(frozen=True)
class Side:
    """One response: a piece of text per scored token and, where known, the numbers of each.

    others: by the position of a token, what stands before it and is not scored, such as turns of
    others; behind the last one at the number of tokens. It has no numbers and is in no statistics.
    """

    pieces: list[str]
    rewards: list[float] | None = None  # rhat_t, or another stream of the pair
    implicit: list[float] | None = None  # beta * (log pi_t - log pi_ref,t)
    special: Sequence[int] = ()  # positions of special tokens, shown as chips
    marked: Sequence[int] | None = None  # positions that are known to be wrong; None: unknown
    others: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def from_ids(
        cls, ids: Sequence[int], tokenizer: Any, rewards=None, implicit=None, scored=None
    ) -> "Side":
        """The side of these token ids, its pieces from `token_pieces` and its special tokens from
        the tokenizer.

        Args:
            rewards, implicit: one number a token, or None. scored: [T] bool, or None: all.
        """
        special_ids = set(tokenizer.all_special_ids)
        for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
            if token.special:
                special_ids.add(token_id)
        pieces = token_pieces(ids, tokenizer)
        own = range(len(ids)) if scored is None else np.flatnonzero(scored).tolist()
        others: dict[int, str] = {}
        for t in sorted(set(range(len(ids))) - set(own)):
            place = bisect.bisect(own, t)
            others[place] = others.get(place, "") + pieces[t]
        rewards, implicit = (x if x is None else [x[t] for t in own] for x in (rewards, implicit))
        special = [place for place, t in enumerate(own) if int(ids[t]) in special_ids]
        return cls([pieces[t] for t in own], rewards, implicit, special, others=others)


@dataclass(frozen=True)
class PairView:
    """A preference pair to show. stream: what `rewards` of its sides are.

    template: texts that the chat template writes around the messages of a prompt; a page folds
    them.
    """

    where: str  # file:line
    prompt: str
    chosen: Side
    rejected: Side
    stream: str = TOKEN_REWARDS
    template: Sequence[str] = ()


@dataclass(frozen=True)
class SideNumbers:
    """The numbers of a response, checked. None: there are none."""

    tokens: int
    rewards: np.ndarray | None = None  # [T] float64
    implicit: np.ndarray | None = None  # [T] float64

    def product(self, compared: bool) -> np.ndarray | None:
        """[T] rhat_t * i_t; None where one of them is missing or they are not compared."""
        if not compared or self.rewards is None or self.implicit is None:
            return None
        return self.rewards * self.implicit


@dataclass(frozen=True)
class PairNumbers:
    """The numbers of a pair. compared: whether they are token rewards, which the implicit rewards
    are to follow.
    """

    chosen: SideNumbers
    rejected: SideNumbers
    compared: bool = True


def numbers_of(pairs: Sequence[PairView]) -> list[PairNumbers]:
    """The numbers of each pair. ValueError: no pair; numbers that are not finite or not one per
    piece, by pair and token.
    """
    if not pairs:
        raise ValueError("pairs: expected at least one, got none")
    numbers = []
    for n, pair in enumerate(pairs):
        label = f"pairs[{n}] ({pair.where})"
        chosen = _side_numbers(f"{label}: chosen", pair.chosen)
        rejected = _side_numbers(f"{label}: rejected", pair.rejected)
        numbers.append(PairNumbers(chosen, rejected, pair.stream == TOKEN_REWARDS))
    return numbers


def _side_numbers(label: str, side: Side) -> SideNumbers:
    rewards = _checked(f"{label}.rewards", side.rewards, side.pieces)
    implicit = _checked(f"{label}.implicit", side.implicit, side.pieces)
    return SideNumbers(len(side.pieces), rewards, implicit)


def _checked(label: str, values: list[float] | None, pieces: list[str]) -> np.ndarray | None:
    """Values as an array [T] of finite numbers."""
    if values is None:
        return None
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.shape != (len(pieces),):
        raise ValueError(
            f"{label}: expected {len(pieces)} numbers, one per piece, got {list(numbers.shape)}"
        )
    not_finite = np.flatnonzero(~np.isfinite(numbers))
    if not_finite.size:
        t = not_finite[0]
        raise ValueError(
            f"{label}: got {numbers[t]} at token {t}, {pieces[t]!r}; expected a number"
        )
    return numbers


def agreement(pairs: Sequence[PairView]) -> dict[str, float | int]:
    """How token rewards and implicit rewards go together, over all tokens of all pairs.

    Returns:
        pairs, tokens; agree, disagree, ties: tokens by whether sign(rhat) == sign(implicit), a zero
        in either is a tie; sign_agreement = agree / (agree + disagree); pearson, spearman (ties
        share their mean rank); mean_reward_chosen, mean_reward_rejected; large_rewards, the share
        of |rhat| > 0.1. A key is absent where its numbers are (no rewards, no implicit rewards, a
        constant under a correlation); of another stream there are the means alone.
    Raises:
        ValueError: no pair; numbers that are not finite or not one per piece, by pair and token.
    """
    return agreement_of(numbers_of(pairs))


def agreement_of(numbers: Sequence[PairNumbers]) -> dict[str, float | int]:
    """`agreement` of numbers that are checked."""
    sides = []
    for pair in numbers:
        sides += [pair.chosen, pair.rejected]
    found: dict[str, float | int] = {
        "pairs": len(numbers),
        "tokens": sum(side.tokens for side in sides),
    }

    compared = all(pair.compared for pair in numbers)
    both = [s for s in sides if s.rewards is not None and s.implicit is not None]
    if both and compared:
        rewards = np.concatenate([side.rewards for side in both])
        implicit = np.concatenate([side.implicit for side in both])
        found |= _sign_agreement(rewards, implicit)
        found |= _correlation("pearson", rewards, implicit)
        found |= _correlation("spearman", ranks(rewards), ranks(implicit))

    chosen = _all_rewards([pair.chosen for pair in numbers])
    rejected = _all_rewards([pair.rejected for pair in numbers])
    if chosen.size:
        found["mean_reward_chosen"] = float(chosen.mean())
    if rejected.size:
        found["mean_reward_rejected"] = float(rejected.mean())
    if compared and (chosen.size or rejected.size):
        large = np.abs(np.concatenate([chosen, rejected])) > LARGE_REWARD
        found["large_rewards"] = float(large.mean())
    return found


def _sign_agreement(x: np.ndarray, y: np.ndarray) -> dict[str, float | int]:
    signs = np.sign(x) * np.sign(y)
    agree, disagree = int((signs > 0).sum()), int((signs < 0).sum())
    ties = signs.size - agree - disagree
    found: dict[str, float | int] = {"agree": agree, "disagree": disagree, "ties": ties}
    if agree + disagree:
        found["sign_agreement"] = agree / (agree + disagree)
    return found


def _correlation(name: str, x: np.ndarray, y: np.ndarray) -> dict[str, float | int]:
    """Pearson's correlation under a name; empty where one of them is constant."""
    if not x.size or np.ptp(x) == 0 or np.ptp(y) == 0:
        return {}
    x, y = x - x.mean(), y - y.mean()
    return {name: float(x @ y / np.sqrt((x @ x) * (y @ y)))}


def _all_rewards(sides: Sequence[SideNumbers]) -> np.ndarray:
    known = [side.rewards for side in sides if side.rewards is not None]
    return np.concatenate(known) if known else np.empty(0)


def limit_of(arrays: Sequence[np.ndarray], quantile: float = COLOUR_QUANTILE) -> float:
    """Where a scale of these numbers ends: a quantile of |x| over those that are not 0, rounded up
    to two digits; 1 where all are 0.
    """
    sizes = np.abs(np.concatenate([np.empty(0), *arrays]))
    sizes = sizes[sizes > 0]
    if not sizes.size:
        return 1.0
    value = float(np.quantile(sizes, quantile))
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.2g}")


def arrays_of(numbers: Sequence[PairNumbers], kind: str) -> list[np.ndarray]:
    """One kind of number ("rewards", "implicit" or their "product") of every response that has it,
    the chosen one of a pair first.
    """
    found = []
    for pair in numbers:
        for side in (pair.chosen, pair.rejected):
            values = side.product(pair.compared) if kind == "product" else getattr(side, kind)
            if values is not None:
                found.append(values)
    return found


def pair_data(pair: PairView, numbers: PairNumbers) -> dict[str, Any]:
    """What the page and the terminal show of a pair; a key is absent where its numbers are.

    Returns:
        where; chosen, rejected: see `_side_data`; tokens: of both; mean_chosen, mean_rejected: of
        token rewards; gap: the first less the second; margin: the difference of the sums of
        implicit rewards; agreement: the share of tokens whose signs agree.
    """
    data: dict[str, Any] = {"where": pair.where}
    for name, side, side_numbers in (
        ("chosen", pair.chosen, numbers.chosen),
        ("rejected", pair.rejected, numbers.rejected),
    ):
        data[name] = _side_data(side, side_numbers, numbers.compared)
        if side_numbers.rewards is not None and side_numbers.tokens:
            data[f"mean_{name}"] = float(side_numbers.rewards.mean())
    data["tokens"] = numbers.chosen.tokens + numbers.rejected.tokens
    if "mean_chosen" in data and "mean_rejected" in data:
        data["gap"] = data["mean_chosen"] - data["mean_rejected"]
    if numbers.chosen.implicit is not None and numbers.rejected.implicit is not None:
        data["margin"] = data["chosen"]["sum_implicit"] - data["rejected"]["sum_implicit"]
    agreed = agreement_of([numbers]).get("sign_agreement")
    if agreed is not None:
        data["agreement"] = agreed
    return data


def _side_data(side: Side, numbers: SideNumbers, compared: bool) -> dict[str, Any]:
    """pieces, special, marked, others; rewards, implicit and their sums; mean_product of the two
    and their `agreement` in this response, if they are compared.
    """
    data: dict[str, Any] = {"pieces": side.pieces, "special": [int(t) for t in side.special]}
    if side.others:
        data["others"] = {int(t): text for t, text in side.others.items()}
    if side.marked is not None:
        data["marked"] = [int(t) for t in side.marked]
    for name, values in (("rewards", numbers.rewards), ("implicit", numbers.implicit)):
        if values is not None:
            data[name] = [float(f"{value:.5g}") for value in values]
            data[f"sum_{name}"] = float(values.sum())
    product = numbers.product(compared)
    if side.pieces and product is not None:
        data["mean_product"] = float(product.mean())
        data |= agreement_of([PairNumbers(chosen=numbers, rejected=SideNumbers(tokens=0))])
    return data
