"""Whether token rewards hold a signal: how large they are, where they lie, and whom they prefer."""

import math
from collections.abc import Sequence

import numpy as np

from treg.evaluate import auroc
from treg.rewards.signal import WEAK, on_first_tokens, sizes_of
from treg.viz.tokens import PairNumbers, PairView, SideNumbers

DRAWS = 1000  # of the bootstrap
Z95 = 1.959964  # of the normal distribution, two-sided


def signal_of(numbers: Sequence[PairNumbers]) -> dict[str, float | int]:
    """How large token rewards are, and whether they and the implicit rewards know the label.

    Returns:
        mean_abs, rms, median_abs, q99_abs, max_abs: of |rhat| over the tokens; small: the share
        below SMALL; first_mass: the share of sum |rhat| on the first tokens of the responses, and
        first_tokens, their share of the tokens; rewards_right of rewards_told pairs: the mean
        token reward of the chosen response is the higher one (equal means are not told), with
        Wilson's 95 % interval rewards_low, rewards_high; policy_...: the same of the margin. A key
        is absent where its numbers are.
    """
    found: dict[str, float | int] = {}
    rewards = [x.rewards for x in _sides(numbers) if x.rewards is not None and x.tokens]
    if rewards:
        sizes = np.abs(np.concatenate(rewards))
        found |= sizes_of(rewards)
        found["median_abs"] = float(np.median(sizes))
        found["q99_abs"] = float(np.quantile(sizes, 0.99))
        found["max_abs"] = float(sizes.max())
        if not sizes.any():
            del found["first_mass"], found["first_tokens"]
    found |= _told("rewards", numbers, np.mean)
    found |= _told("implicit", numbers, np.sum, name="policy")
    return found


def _sides(numbers: Sequence[PairNumbers]) -> list[SideNumbers]:
    return [side for pair in numbers for side in (pair.chosen, pair.rejected)]


def _told(kind: str, numbers: Sequence[PairNumbers], of, name: str = "") -> dict[str, float | int]:
    """Of how many pairs a number of the chosen response is above that of the rejected one."""
    differences = []
    for pair in numbers:
        chosen, rejected = getattr(pair.chosen, kind), getattr(pair.rejected, kind)
        if chosen is not None and rejected is not None and chosen.size and rejected.size:
            differences.append(float(of(chosen) - of(rejected)))
    right, told = sum(x > 0 for x in differences), sum(x != 0 for x in differences)
    if not told:
        return {}
    low, high = wilson(right, told)
    name = name or kind
    return {f"{name}_right": right, f"{name}_told": told, f"{name}_low": low, f"{name}_high": high}


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, z = successes / trials, Z95
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)


def correlation_interval(numbers: Sequence[PairNumbers]) -> tuple[float, float] | None:
    """A 95 % interval of Pearson's correlation of token rewards and implicit rewards.

    Percentiles of DRAWS bootstrap draws over pairs, since tokens of one response are not
    independent. None with fewer than 5 pairs, or where nothing varies.
    """
    moments = []
    for pair in numbers:
        rewards, implicit = [], []
        for side in (pair.chosen, pair.rejected):
            if pair.compared and side.rewards is not None and side.implicit is not None:
                rewards.append(side.rewards)
                implicit.append(side.implicit)
        if rewards:
            x, y = np.concatenate(rewards), np.concatenate(implicit)
            moments.append([x.size, x.sum(), y.sum(), x @ x, y @ y, x @ y])
    if len(moments) < 5:
        return None
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(moments), np.full(len(moments), 1 / len(moments)), DRAWS)
    n, x, y, xx, yy, xy = (counts @ np.asarray(moments)).T
    spread = np.maximum(xx - x * x / n, 0) * np.maximum(yy - y * y / n, 0)
    known = spread > 0
    if not known.any():
        return None
    drawn = (xy - x * y / n)[known] / np.sqrt(spread[known])
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def detection_of(
    pairs: Sequence[PairView], numbers: Sequence[PairNumbers]
) -> dict[str, float | int]:
    """How well low numbers find the tokens that are marked as wrong, special tokens left out.

    Returns:
        marked, tokens; rewards, implicit: AUROC of minus the number, 0.5 is chance. Empty without
        marks, or where every token or none is marked.
    """
    marks: list[np.ndarray] = []
    scores: dict[str, list[np.ndarray]] = {"rewards": [], "implicit": []}
    for pair, pair_numbers in zip(pairs, numbers, strict=True):
        for side, values in (
            (pair.chosen, pair_numbers.chosen),
            (pair.rejected, pair_numbers.rejected),
        ):
            if side.marked is None:
                continue
            kept = ~np.isin(np.arange(values.tokens), list(side.special))
            marks.append(np.isin(np.arange(values.tokens), list(side.marked))[kept])
            for kind, parts in scores.items():
                known = getattr(values, kind)
                parts.append(np.full(kept.sum(), np.nan) if known is None else -known[kept])
    marked = np.concatenate(marks) if marks else np.empty(0, bool)
    if marked.all() or not marked.any():
        return {}
    found: dict[str, float | int] = {"marked": int(marked.sum()), "tokens": marked.size}
    for kind, parts in scores.items():
        values = np.concatenate(parts)
        if np.isfinite(values).all():
            found[kind] = auroc(values, marked)
    return found


def verdict(signal: dict[str, float | int], alpha: float) -> list[str]:
    """What there is to say of the token rewards, in sentences; the first is the gravest.

    alpha: of the regularizer, which multiplies a token's gradient by 1 + alpha * rhat (chosen) or
    1 - alpha * rhat (rejected).
    """
    if "mean_abs" not in signal:
        return []
    said = []
    change, reach = alpha * signal["rms"], alpha * signal["q99_abs"]
    if alpha > 0 and change < WEAK:
        said.append(
            f"Almost no signal: at alpha {alpha:g} the rewards change the gradient by "
            f"{100 * change:.2g} %, and 99 % of the tokens have a gradient weight between "
            f"{1 - reach:.4f} and {1 + reach:.4f}, so training is close to the plain objective."
        )
    if "rewards_told" in signal:
        share = signal["rewards_right"] / signal["rewards_told"]
        low, high = 100 * signal["rewards_low"], 100 * signal["rewards_high"]
        interval = f"95 % interval {low:.0f} to {high:.0f} %"
        if signal["rewards_low"] <= 0.5 <= signal["rewards_high"]:
            said.append(
                f"The rewards do not tell chosen from rejected: the chosen response has the higher "
                f"mean in {100 * share:.0f} % of the pairs ({interval}; chance is 50 %)."
            )
        elif signal["rewards_high"] < 0.5:
            said.append(
                f"The rewards contradict the labels: the chosen response has the higher mean in "
                f"only {100 * share:.0f} % of the pairs ({interval})."
            )
    if "first_mass" in signal and on_first_tokens(signal["first_mass"], signal["first_tokens"]):
        said.append(
            f"{100 * signal['first_mass']:.0f} % of the total size lies on the first tokens of the "
            f"responses, {100 * signal['first_tokens']:.1f} % of the tokens."
        )
    return said
