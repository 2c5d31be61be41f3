"""What advantages are divided by."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from treg.rl.groups import means, totals
from treg.rl.steps import Steps, row_sums


@dataclass(frozen=True, eq=False)
class Batch:
    """What baselines and scales see: rows of steps.

    Attributes:
        rewards: [B, W] float64, of the steps. group: [B] int64, in [0, B): the number of a group.
    """

    rewards: Tensor
    steps: Steps
    group: Tensor
    gamma: float
    lam: float

    @property
    def shares(self) -> Tensor:
        """[B, W] float64: of the tokens of a sequence the part that a step has."""
        tokens = self.steps.tokens
        return tokens / tokens.sum(1, keepdim=True).clamp(min=1)


class Centred(NamedTuple):
    """Advantages, and what their scale is the size of.

    Fields: advantages [B, W]; residuals [B, W]; level [B], what was taken off the rewards to get
    the residuals; weights [B, W], what each residual counts.
    """

    advantages: Tensor
    residuals: Tensor
    level: Tensor
    weights: Tensor


def _spread(centred: Centred, group: Tensor) -> Tensor:
    """[B]: the standard deviation over a group, around the mean of what was taken off."""
    w = centred.weights
    middle = means(centred.level[:, None].expand_as(w), w, group)
    squares = w * (centred.residuals + (centred.level - middle)[:, None]).square()
    squares, counts = (totals(row_sums(x), group) for x in (squares, w))
    return (squares / (counts - 1).clamp(min=1)).sqrt()


def _of_groups(centred: Centred, batch: Batch) -> Tensor:
    return _spread(centred, batch.group)


def _of_batch(centred: Centred, batch: Batch) -> Tensor:
    return _spread(centred, torch.zeros_like(batch.group))


def _of_tokens(centred: Centred, batch: Batch) -> Tensor:
    level = torch.zeros_like(centred.level)
    everyone = torch.zeros_like(batch.group)
    w = batch.steps.tokens
    middle = means(centred.advantages, w, everyone)
    return _spread(
        Centred(centred.advantages, centred.advantages - middle[:, None], level, w), everyone
    )


# None: no division. A new one is a function and a row.
SCALES: dict[str, Callable[[Centred, Batch], Tensor] | None] = {
    "group": _of_groups,
    "batch": _of_batch,
    "tokens": _of_tokens,
    "none": None,
}
