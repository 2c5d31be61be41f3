"""What an objective is: a function of a pair's implicit rewards, and what callers must know of it.

rho_w and rho_l are the implicit rewards of the chosen and the rejected answer, m = rho_w - rho_l.
How they follow from log-probs: `treg.losses.treg_loss`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from treg.losses.tokens import Credit, Tokens

# These two are arguments of their own in every public function.
ARGUMENTS = ("gamma", "label_smoothing")
# What an objective may need of each token beside its log-prob.
TOKEN_NEEDS = ("token_rewards", "token_weights", "kl")


class Base(NamedTuple):
    """An objective of B pairs and its derivatives in the implicit rewards, float64."""

    value: Tensor  # [B]
    slope_w: Tensor  # [B], d value / d rho_w
    slope_l: Tensor  # [B], d value / d rho_l


def base_of_margin(value: Tensor, slope: Tensor) -> Base:
    """The base of an objective that depends on m alone. value, slope = d value / d m: [B]."""
    return Base(value, slope, -slope)


def check_at_least(options: Mapping[str, float], least: float, *names: str) -> None:
    """ValueError for one of these options that is less."""
    for name in names:
        if not options[name] >= least:
            raise ValueError(f"{name}: expected a number >= {least:g}, got {options[name]}")


@dataclass(frozen=True)
class Scalars:
    """The numbers that a formula sees: beta, the objective's own options by name, and the numbers
    of each pair that it needs, [B] float64, by the names of their columns.
    """

    beta: float
    options: Mapping[str, float]
    pairs: Mapping[str, Tensor] = field(default_factory=dict)

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
        check: raises ValueError, which names the option, for values of the options that it cannot
            have otherwise.
        credit: how tokens enter rho, from `Tokens` and Scalars; None: all alike. Weights that
            depend on log-probs count as constants in the gradient.
        needs: what it cannot do without, of TOKEN_NEEDS: a stream of the data by its name, or "kl",
            the KL divergence of the reference from the policy at each token.
        pair_columns: names of the numbers of a pair that the formula needs. binary_pairs: whether
            they must be 0 or 1.
        alpha: the weight of T-REG's regularizer where the caller gives none. Objectives that are a
            method of their own have 0.
        regularized: whether T-REG may stand on top of it.
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
    check: Callable[[Mapping[str, float]], None] | None = None
    credit: Callable[[Tokens, Scalars], Credit] | None = None
    needs: tuple[str, ...] = ()
    pair_columns: tuple[str, ...] = ()
    binary_pairs: bool = False
    alpha: float = 0.25
    regularized: bool = True

    def __post_init__(self):
        for name in ARGUMENTS:
            default = self.options.get(name, 0.0)
            if default != 0.0:
                raise ValueError(f"options: expected {name} to be 0 by default, got {default}")
        for name in self.positive:
            if name not in self.options:
                raise ValueError(f"positive: expected names among options, got {name!r}")
        for name in self.needs:
            if name not in TOKEN_NEEDS:
                raise ValueError(f"needs: expected some of {', '.join(TOKEN_NEEDS)}, got {name!r}")
        if "kl" in self.needs and self.credit is None:
            raise ValueError("needs: expected a credit that says how kl enters rho, got none")
        if not self.regularized and self.alpha:
            raise ValueError(f"alpha: expected 0 where regularized is False, got {self.alpha}")

    @property
    def reference_per_token(self) -> bool:
        """Whether the reference's log-prob of each token is needed, and not the sums alone."""
        return self.credit is not None and not self.reference_free
