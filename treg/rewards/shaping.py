"""Shaping: what is done to the numbers of one response before a loss sees them.

The functions take the rewards r [n] of one response's tokens, a 1-D floating tensor, and return as
many in its dtype. A step is a name with its values:

    scale=F        F * r_t
    clip=F         r_t within [-F, F]
    centre         r_t - mean(r)
    standardise=F  F * (r_t - mean(r)) / std(r), of the population; 0 where all r_t are equal
    rank=LO,HI     LO + (HI - LO) * (rank of r_t, from 0) / (n - 1); equal ones share their mean
                   rank; the middle where n = 1
    smooth=W       the mean of r over the W tokens around t, W odd, of those that are there
    skip=K         0 for the first K tokens

The steps see what a response says (`Response.judged`) and, if a source rewards what ends it, the
tokens up to the last one that has a reward (`rewarded`): numbers of two kinds in one response would
mean nothing. They see these tokens one after the other: words of the template and turns of others
in between are left out, take no part and keep their 0.

`segments` and `pivots` cut a response where its rewards change sides.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from treg.data.batches import MARKS, WEIGHT_STREAMS
from treg.rewards.base import TokenRewardSource, check_finite, of_the_answer, score_checked
from treg.rewards.names import nearest
from treg.rewards.response import Response


def scale(rewards: Tensor, factor: float) -> Tensor:
    return rewards * factor


def clip(rewards: Tensor, limit: float) -> Tensor:
    return rewards.clamp(-limit, limit)


def centre(rewards: Tensor) -> Tensor:
    return rewards - rewards.mean()


def standardise(rewards: Tensor, spread: float) -> Tensor:
    """Mean 0 and standard deviation `spread`."""
    if bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    centred = centre(rewards)
    return centred * (spread / centred.square().mean().sqrt())


def rank(rewards: Tensor, low: float, high: float) -> Tensor:
    """The ranks of the rewards, mapped linearly to [low, high].

    Paper: TIS-DPO, arXiv 2410.04350, whose released code weighs tokens so, with [0.7, 1.3].
    Differs: equal rewards share their mean rank.
    """
    _, place, counts = rewards.unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0) - (counts.double() + 1) / 2  # the mean of those that are equal
    share = (ranks / (len(rewards) - 1))[place] if len(rewards) > 1 else ranks + 0.5
    return (low + (high - low) * share).to(rewards.dtype)


def smooth(rewards: Tensor, width: float) -> Tensor:
    """Moving average over an odd number of tokens; at the ends, over those that are there."""
    width = int(width)
    found = F.avg_pool1d(rewards[None], width, 1, width // 2, count_include_pad=False)
    return found[0]


def skip(rewards: Tensor, count: float) -> Tensor:
    kept = rewards.clone()
    kept[: int(count)] = 0.0
    return kept


@dataclass(frozen=True)
class _Kind:
    """A kind of step: its function, how it is written, and what its values must be."""

    function: Callable[..., Tensor]
    form: str
    needs: str
    values: int = 0
    allowed: Callable[..., bool] = lambda *values: True


STEPS = {
    "scale": _Kind(scale, "scale=F", "F a number", 1),
    "clip": _Kind(clip, "clip=F", "F > 0", 1, lambda limit: limit > 0),
    "centre": _Kind(centre, "centre", "no value"),
    "standardise": _Kind(standardise, "standardise=F", "F > 0", 1, lambda spread: spread > 0),
    "rank": _Kind(rank, "rank=LO,HI", "LO < HI", 2, lambda low, high: low < high),
    "smooth": _Kind(smooth, "smooth=W", "W odd", 1, lambda width: width > 0 and width % 2 == 1),
    "skip": _Kind(skip, "skip=K", "K >= 1 whole", 1, lambda k: k >= 1 and k % 1 == 0),
}


@dataclass(frozen=True)
class Step:
    """A step of shaping, such as clip=0.5: a function of the rewards of a response."""

    name: str
    values: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: Any) -> "Step":
        """From NAME or NAME=VALUE,VALUE.

        Raises:
            ValueError: no such step, or values that it cannot have.
        """
        name, equals, values = str(text).partition("=")
        if name not in STEPS:
            raise ValueError(
                f"shape: expected one of {', '.join(STEPS)}, got {name!r}{nearest(name, STEPS)}"
            )
        kind = STEPS[name]
        try:
            numbers = tuple(float(x) for x in values.split(",")) if equals else ()
        except ValueError:
            numbers = (math.nan,)
        fits = len(numbers) == kind.values and all(map(math.isfinite, numbers))
        if not fits or not kind.allowed(*numbers):
            raise ValueError(f"shape: expected {kind.form} with {kind.needs}, got {text!r}")
        return cls(name, numbers)

    def __call__(self, rewards: Tensor) -> Tensor:
        return STEPS[self.name].function(rewards, *self.values)

    def __str__(self) -> str:
        values = ",".join(repr(x).removesuffix(".0") for x in self.values)
        return f"{self.name}={values}" if values else self.name


def parse_steps(given: Sequence[str] | str | None) -> tuple[Step, ...]:
    """The steps of a list such as ["centre", "clip=0.5"], or of one step."""
    if given is None:
        return ()
    return tuple(Step.parse(text) for text in ([given] if isinstance(given, str) else given))


def rewarded(response: Response, rewards: Tensor) -> Tensor:
    """Places of the tokens that take part where the rewards of a response are changed together:
    what it says, and what ends it up to the last token with a reward other than 0.

    Args:
        rewards: [T] floating.
    Returns:
        [n] int64.
    """
    return torch.cat([response.judged, response.ends(rewards)])


def shape(rewards: Tensor, places: Tensor, steps: Sequence[Step]) -> Tensor:
    """The rewards of a response after some steps, one after the other.

    Args:
        rewards: [T] floating.
        places: [n] int64, the tokens that the steps see, such as those of `rewarded`. All others
            get 0.
    Returns:
        [T], rewards' dtype; computed in float64.
    """
    if not steps:
        return rewards
    shaped = rewards[places].double()
    for step in steps if len(places) else ():
        shaped = step(shaped)
    return rewards.new_zeros(len(rewards)).index_copy(0, places, shaped.to(rewards.dtype))


def shaped_streams(streams: Iterable[str]) -> list[str]:
    """Those that steps apply to: all but weights, which must not become negative, and marks, whose
    0 says that a token is not marked.
    """
    return [stream for stream in streams if stream not in (*WEIGHT_STREAMS, MARKS)]


def score_shaped(
    source: TokenRewardSource, responses: Sequence[Response], steps: Sequence[Step]
) -> list[dict[str, Tensor]]:
    """`score_checked(source, responses)` after some steps."""
    found = score_checked(source, responses)
    for response, streams in zip(responses, found, strict=True):
        for stream in shaped_streams(streams):
            shaped = shape(streams[stream], rewarded(response, streams[stream]), steps)
            streams[stream] = of_the_answer(response, stream, shaped)
            check_finite(streams[stream], f"shape: {response.where}: {response.side}", stream)
    return found


# -- runs of tokens on one side of a baseline


def pivots(rewards: Tensor, baseline: float = 0.0) -> Tensor:
    """Where the sign (-, 0 or +) of r_t - baseline is another than that of the token before.

    Args:
        rewards: [n] floating: token rewards, or advantages.
    Returns:
        [pivots] int64: the first token of each run but the first run.
    """
    sides = torch.sign(rewards - baseline)
    return (sides[1:] != sides[:-1]).nonzero()[:, 0] + 1


def segments(rewards: Tensor, baseline: float = 0.0, min_tokens: int = 1) -> Tensor:
    """The number, from 0, of the segment that each token is in.

    Segments are the runs between pivots. A run of fewer than min_tokens tokens joins the segment
    before it; what begins the response grows until it has min_tokens.

    Args:
        rewards: [n] floating.
    Returns:
        [n] int64.
    """
    if isinstance(min_tokens, bool) or not isinstance(min_tokens, int) or min_tokens < 1:
        raise ValueError(f"min_tokens: expected a whole number >= 1, got {min_tokens!r}")
    bounds = [*pivots(rewards, baseline).tolist(), len(rewards)]
    starts = [0]
    for start, end in itertools.pairwise(bounds):
        if end - start >= min_tokens and start - starts[-1] >= min_tokens:
            starts.append(start)
    number = torch.zeros(len(rewards), dtype=torch.int64)
    number[starts[1:]] = 1
    return number.cumsum(0)


def means_over(rewards: Tensor, number: Tensor) -> Tensor:
    """For each token the mean over the tokens of the same number.

    Args:
        rewards: [n] floating. number: [n] int64, >= 0: of the segment, word or sentence.
    """
    if not len(rewards):
        return rewards
    sums = torch.zeros(int(number.max()) + 1, dtype=torch.float64)
    sums.index_add_(0, number, rewards.double())
    return (sums / number.bincount().clamp(min=1))[number].to(rewards.dtype)
