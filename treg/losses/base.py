"""What an objective is: a function of a pair's implicit rewards, and what callers must know of it.

rho_w and rho_l are the implicit rewards of the chosen and the rejected answer, m = rho_w - rho_l.
How they follow from log-probs: `treg.losses.treg_loss`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

# These two are arguments of their own in every public function.
ARGUMENTS = ("gamma", "label_smoothing")


class Base(NamedTuple):
    """An objective of B pairs and its derivatives in the implicit rewards, float64."""

    value: Tensor  # [B]
    slope_w: Tensor  # [B], d value / d rho_w
    slope_l: Tensor  # [B], d value / d rho_l


def base_of_margin(value: Tensor, slope: Tensor) -> Base:
    """The base of an objective that depends on m alone. value, slope = d value / d m: [B]."""
    return Base(value, slope, -slope)


@dataclass(frozen=True)
class Scalars:
    """The numbers that a formula sees: beta, and the objective's own options by name."""

    beta: float
    options: Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        return self.options[name]


@dataclass(frozen=True, eq=False)
class Objective:
    """An objective and what a caller must know about it.

    Args:
        base: the formula. It takes rho_w and rho_l, [B] float64, and Scalars. It returns the value
            and both slopes in closed form, because autograd does not run inside an operator.
        paper: name, arXiv number and equation.
        margin_only: the value depends on m alone, so that a pair has one weight.
        decreasing: d value / d m <= 0 at every m, with label_smoothing at 0.
        decreasing_smoothed: the same at every label_smoothing that is accepted.
        length_normalised: rho is a mean over tokens.
        reference_free: there is no reference model.
        nll: the chosen answer's mean negative log-likelihood is added to the value.
        options: the scalars that the formula takes beside beta, with their defaults. gamma and
            label_smoothing are arguments of their own, whose default is 0 for every objective.
        positive: those of the options that must be above 0.
    """

    base: Callable[[Tensor, Tensor, Scalars], Base]
    paper: str = ""
    margin_only: bool = True
    decreasing: bool = False
    decreasing_smoothed: bool = False
    length_normalised: bool = False
    reference_free: bool = False
    nll: bool = False
    options: Mapping[str, float] = field(default_factory=dict)
    positive: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ARGUMENTS:
            default = self.options.get(name, 0.0)
            if default != 0.0:
                raise ValueError(f"options: expected {name} to be 0 by default, got {default}")
        for name in self.positive:
            if name not in self.options:
                raise ValueError(f"positive: expected names among options, got {name!r}")
