"""The tokens of preference pairs as an objective sees them, and what it may say of them.

Most objectives are functions of sums over tokens. Those that give tokens credit say in a `Credit`
how each token enters the sum. Everything here is float64, without autograd, and waits for no
device.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from treg.losses.segments import segment_sum


class Credit(NamedTuple):
    """How the tokens of each sequence enter its implicit reward.

        rho_s = beta / norm_s * sum_t ( u_t * (lp_t - ref_t) + v_t * kl_t )

    A token weight that the data give multiplies u_t. A KL weight that the data give, or else the
    token weight, multiplies v_t.
    """

    weights: Tensor | None = None  # [N], u_t, of any sign; None: 1
    norm: Tensor | None = None  # [2B], > 0; None: 1, or the length for length-normalised objectives
    kl: Tensor | None = None  # [N], v_t; None: the objective has no KL term
    kl_slope: Tensor | None = None  # [N], v_t in the gradient, where a part of it is detached


@dataclass(frozen=True)
class Tokens:
    """N tokens of 2B sequences, chosen sequences first; 0 where a token is not scored, whatever
    stands there.
    """

    scored: Tensor  # [N] bool
    logps: Tensor  # [N], nats
    ref_logps: Tensor | None  # [N], nats; None where only sums are known, or nothing
    rewards: Tensor  # [N], rhat_t; 0 if none are given
    weights: Tensor  # [N], given u_t; 1 if none are given
    kl: Tensor | None  # [N], KL of the whole vocabulary, nats
    kl_weights: Tensor  # [N], given v_t, or else weights
    starts: Tensor  # [2B+1] integer, the first token of each sequence

    @cached_property
    def sequence(self) -> Tensor:
        """[N] int64: the sequence of each token."""
        return sequence_of_row(self.starts, self.logps.shape[0])

    @cached_property
    def chosen(self) -> Tensor:
        """[N] bool: whether a token is one of a chosen answer."""
        return self.sequence < (self.starts.shape[0] - 1) // 2

    @cached_property
    def sign(self) -> Tensor:
        """[N]: 1 at tokens of chosen answers, -1 at those of rejected ones."""
        return self.chosen.double() * 2 - 1

    @cached_property
    def lengths(self) -> Tensor:
        """[2B]: scored tokens of each sequence."""
        return self.total(self.scored.double())

    @cached_property
    def position(self) -> Tensor:
        """[N]: scored tokens of the sequence up to this one, it included: 1 at the first."""
        counts = self.scored.double().cumsum(0)
        before = torch.cat([counts.new_zeros(1), counts])[self.starts.long()]
        return counts - before[self.sequence]

    def total(self, x: Tensor) -> Tensor:
        """[2B]: sums of x [N] over each sequence."""
        return segment_sum(x, self.starts)

    def spread(self, x: Tensor) -> Tensor:
        """[N]: x [2B] at every token of the sequence."""
        return x[self.sequence]

    def pair_total(self, x: Tensor) -> Tensor:
        """[2B]: sums of x [N] over both sequences of each pair, at each of the two."""
        return self.total(x).view(2, -1).sum(0).repeat(2)

    def places(self, x: Tensor) -> Tensor:
        """[N]: how many scored tokens of the sequence precede each one in the order of x [N], the
        smallest first; equal ones in the order of their places.
        """
        x = torch.where(self.scored, x, torch.inf)
        by_value = torch.argsort(x, stable=True)
        order = by_value[torch.argsort(self.sequence[by_value], stable=True)]
        places = torch.empty_like(order)
        places[order] = torch.arange(order.shape[0], device=order.device)
        return (places - self.starts.long()[self.sequence]).double()

    def ranks(self, x: Tensor) -> Tensor:
        """[N]: the same from 0 for the smallest to n - 1; equal ones share their mean rank."""
        last = self.spread(self.lengths) - 1
        return (self.places(x) + last - self.places(-x)) / 2


def sequence_of_row(starts: Tensor, rows: int) -> Tensor:
    """The sequence that each of so many rows belongs to, [rows] int64."""
    ends = starts[1:].long()
    return torch.searchsorted(ends, torch.arange(rows, device=starts.device), right=True)
