"""Along rows of tokens, or of the steps that units of tokens make."""

from dataclasses import dataclass

import torch
from torch import Tensor


def sums_from_right(x: Tensor, factor: float, runs: Tensor | None = None) -> Tensor:
    """y_t = x_t + factor * y_{t+1} in every row, by doubling:

        S_1(t) = x_t        S_2k(t) = S_k(t) + factor^k * S_k(t + k)

    Args:
        x: [B, W] float64, 0 beyond the end of a row's sequence. factor: in [0, 1].
        runs: [B, W] int64, non-decreasing in a row: sums end where the number changes.
    """
    k = 1
    while k < x.shape[1] and factor**k > 0:
        far = x[:, k:]
        if runs is not None:
            far = torch.where(runs[:, k:] == runs[:, :-k], far, 0.0)
        x = torch.cat([x[:, :-k] + factor**k * far, x[:, -k:]], 1)
        k *= 2
    return x


def row_sums(x: Tensor) -> Tensor:
    """[B, W] -> [B]. As no other sum does, it has the same bits whatever W is."""
    return sums_from_right(x, 1.0)[:, 0]


def one_to_the_left(x: Tensor) -> Tensor:
    """[B, W] -> [B, W]: at each column what the next one holds, 0 at the last."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)


def one_to_the_right(x: Tensor) -> Tensor:
    """[B, W] -> [B, W]: at each column what the one before holds; the first keeps its own."""
    return torch.cat([x[:, :1], x[:, :-1]], 1)


@dataclass(frozen=True, eq=False)
class Steps:
    """What advantages are taken over: units of tokens, or tokens. Column k is step k.

    Attributes:
        there: [B, W] bool, whether a sequence has so many steps.
        tokens: [B, W] float64, the tokens of each step; 0 where there is none.
        units: of each token's place in the rows the step (W where there is no token), and whether
            it begins one; None: every token is a step.
    """

    there: Tensor
    tokens: Tensor
    units: tuple[Tensor, Tensor] | None

    def sums(self, x: Tensor) -> Tensor:
        """[B, W] float64 of tokens -> of steps: the sums over their tokens."""
        if self.units is None:
            return x
        index, begins = self.units
        width = x.shape[1]
        sums = sums_from_right(x, 1.0, index)
        out = x.new_zeros(len(x), width + 1)
        out.scatter_(1, torch.where(begins, index, width), torch.where(begins, sums, 0.0))
        return out[:, :width]

    def lasts(self, x: Tensor) -> Tensor:
        """[B, W] float64 of tokens -> of steps: what the last token of each has."""
        if self.units is None:
            return x
        index, _ = self.units
        ends = torch.ones_like(index, dtype=torch.bool)
        ends[:, :-1] = index[:, 1:] != index[:, :-1]
        return self.sums(torch.where(ends, x, 0.0))

    def spread(self, x: Tensor) -> Tensor:
        """[B, W] of steps -> of tokens: each token has what its step has."""
        if self.units is None:
            return x
        return torch.cat([x, torch.zeros_like(x[:, :1])], 1).gather(1, self.units[0])

    @property
    def last(self) -> Tensor:
        """[B, W] bool: the last step of each sequence."""
        return self.there & ~one_to_the_left(self.there)
