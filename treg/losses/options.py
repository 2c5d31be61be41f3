"""The scalars of a preference loss, checked once against what the objective declares."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from treg.checks import (
    check_finite,
    check_number,
    check_shape,
    check_tensor,
    values_visible,
)
from treg.losses.base import ARGUMENTS, Base, Objective, Scalars
from treg.losses.objectives import OBJECTIVES, find_objective
from treg.losses.tokens import Credit, Tokens

WEIGHTINGS = ("gradient", "static")


@dataclass(frozen=True)
class LossOptions:
    """What a preference loss is, checked once.

    Args:
        loss_type: a key of `treg.losses.OBJECTIVES`, or "package.module:NAME" of an `Objective`.
        beta: > 0, reward scale.
        alpha: >= 0, weight of the regularizer; 0 turns it off. None: what the objective has, 0.25,
            or 0 for objectives that are another method of token credit.
        gamma: a margin in rewards, for objectives that take one.
        label_smoothing: in [0, 0.5), for objectives that take it.
        weighting: "gradient", or "static" (w = 1).
        scalars: options that the objective takes beside gamma and label_smoothing, by name, such
            as discopop's tau. What is left out has the objective's default.
    Raises:
        TypeError: scalars is not a mapping. ValueError: any other bad value, by name.
    """

    loss_type: str = "dpo"
    beta: float = 0.1
    alpha: Any = None  # a float once it is made
    gamma: float = 0.0
    label_smoothing: float = 0.0
    weighting: str = "gradient"
    scalars: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        objective = self._check_names()
        if self.alpha is None:
            object.__setattr__(self, "alpha", objective.alpha)
        scalars = {}
        for name, default in objective.options.items():
            if name not in ARGUMENTS:
                scalars[name] = self.scalars.get(name, default)
        object.__setattr__(self, "scalars", scalars)
        # Under torch.compile a number may be symbolic, and a comparison would make it a constant
        # of the graph. The operators call `of` with the true numbers, so that they are checked.
        eager = not torch.compiler.is_compiling()
        if eager:
            self._check_numbers()
        self._check_undeclared(objective)
        if eager:
            self._check_ranges(objective)

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.loss_type]

    @property
    def pair_scalar(self) -> bool:
        """Whether one number a pair is all that is unknown of its gradient before the log-probs.

        Then d loss / d lp_t = -w * s_t, where s_t is known beforehand and w = -d base / d m. With
        alpha > 0 the regularizer enters through w = |d base / d m|, so that the sign of d base / d
        m must be known.
        """
        objective = self.objective
        if not objective.margin_only or objective.nll or objective.credit is not None:
            return False
        if self.alpha == 0:
            return True
        smoothed = self.label_smoothing != 0 and not objective.decreasing_smoothed
        return self.weighting == "gradient" and objective.decreasing and not smoothed

    def base(self, rho_w: Tensor, rho_l: Tensor, pairs: Mapping[str, Tensor] | None = None) -> Base:
        """Value and slopes of the objective at implicit rewards [B], float64.

        pairs: the numbers of each pair that the objective needs, [B] float64, by name.
        """
        found = self.objective.base(rho_w, rho_l, Scalars(self.beta, self.declared(), pairs or {}))
        if not isinstance(found, Base):
            raise TypeError(
                f"{self.loss_type}: expected its formula to return treg.losses.Base, got "
                f"{type(found).__name__}"
            )
        for name, x in zip(Base._fields, found, strict=True):
            if x.shape != rho_w.shape or x.dtype != rho_w.dtype:
                raise ValueError(
                    f"{self.loss_type}: expected {name} {list(rho_w.shape)} {rho_w.dtype}, one a "
                    f"pair, got {list(x.shape)} {x.dtype}"
                )
        return found

    def credit(self, tokens: Tokens) -> Credit:
        """How each token enters the implicit rewards."""
        if self.objective.credit is None:
            return Credit()
        found = self.objective.credit(tokens, Scalars(self.beta, self.declared()))
        if not isinstance(found, Credit):
            raise TypeError(
                f"{self.loss_type}: expected its credit to return treg.losses.Credit, got "
                f"{type(found).__name__}"
            )
        shapes = dict.fromkeys(Credit._fields, tokens.logps.shape) | {"norm": tokens.lengths.shape}
        for name, x in found._asdict().items():
            if x is not None and (x.shape != shapes[name] or x.dtype != tokens.logps.dtype):
                raise ValueError(
                    f"{self.loss_type}: expected {name} of its credit {list(shapes[name])} "
                    f"{tokens.logps.dtype}, got {list(x.shape)} {x.dtype}"
                )
        return found

    def declared(self) -> dict[str, float]:
        """Every option that the objective takes, in the order in which it declares them."""
        found = {}
        for name in self.objective.options:
            found[name] = getattr(self, name) if name in ARGUMENTS else self.scalars[name]
        return found

    @property
    def needed_streams(self) -> tuple[str, ...]:
        """The streams that data must bring: what the objective needs, and rewards for T-REG."""
        needed = [name for name in self.objective.needs if name != "kl"]
        if self.alpha > 0 and "token_rewards" not in needed:
            needed.append("token_rewards")
        return tuple(needed)

    @property
    def with_kl(self) -> bool:
        """Whether the KL divergence of each token is needed, and so a reference that runs."""
        return "kl" in self.objective.needs

    def text(self) -> str:
        """What is fixed in a run: loss_type and weighting."""
        return f"{self.loss_type} {self.weighting}"

    def numbers(self) -> tuple[float, ...]:
        """What a schedule may change: beta, alpha, and the values of `declared`."""
        return (self.beta, self.alpha, *self.declared().values())

    @classmethod
    def of(cls, text: str, numbers: Iterable[float]) -> "LossOptions":
        """The options whose `text` and `numbers` these are."""
        loss_type, _, weighting = text.rpartition(" ")
        beta, alpha, *values = numbers
        scalars = dict(zip(OBJECTIVES[loss_type].options, values, strict=True))
        gamma = scalars.pop("gamma", 0.0)
        label_smoothing = scalars.pop("label_smoothing", 0.0)
        return cls(loss_type, beta, alpha, gamma, label_smoothing, weighting, scalars)

    # -- checks

    def _check_names(self) -> Objective:
        objective = find_objective(self.loss_type)
        if self.weighting not in WEIGHTINGS:
            raise ValueError(
                f"weighting: expected 'gradient' or 'static' (w = 1), got {self.weighting!r}"
            )
        if not isinstance(self.scalars, Mapping):
            raise TypeError(
                "scalars: expected a mapping from names of options to numbers, "
                f"got {type(self.scalars).__name__}"
            )
        for name in self.scalars:
            if name in ARGUMENTS:
                raise ValueError(f"scalars: expected {name} as an argument of its own, got it here")
            if name not in objective.options:
                raise ValueError(
                    f"scalars: expected options of loss_type={self.loss_type!r}, "
                    f"which takes {self._taken()}, got {name!r}; they are loss_scalars of a trainer"
                )
        return objective

    def _check_numbers(self) -> None:
        for name in ("beta", "alpha", "gamma", "label_smoothing"):
            check_number(name, getattr(self, name), positive=name == "beta")
        for name, value in self.scalars.items():
            check_number(name, value)

    def _check_undeclared(self, objective: Objective) -> None:
        """An option that the formula would ignore is refused."""
        # A lookup in the mapping itself would make torch.compile 2.11 take its values for inputs.
        taken = tuple(objective.options)
        for name in ARGUMENTS:
            if name not in taken and getattr(self, name) != 0:
                raise ValueError(
                    f"{name}: expected 0 for loss_type={self.loss_type!r}, "
                    f"which takes {self._taken()}, got {getattr(self, name)}"
                )

    def _check_ranges(self, objective: Objective) -> None:
        if self.alpha < 0:
            raise ValueError(
                f"alpha: expected a number >= 0, got {self.alpha}; 0 turns the regularizer off"
            )
        if self.alpha > 0 and not objective.regularized:
            raise ValueError(
                f"alpha: expected 0 for loss_type={self.loss_type!r}, on which T-REG cannot stand, "
                f"got {self.alpha}"
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing: expected 0 <= value < 0.5, got {self.label_smoothing}"
            )
        declared = self.declared()
        for name in objective.positive:
            if not declared[name] > 0:
                raise ValueError(
                    f"{name}: expected a number > 0 for loss_type={self.loss_type!r}, "
                    f"got {declared[name]}"
                )
        if objective.check is not None:
            objective.check(declared)

    def _taken(self) -> str:
        return ", ".join(self.objective.options) or "no options"


def check_reference(
    options: LossOptions, ref_logps: Tensor | None, *, per_token: bool, weighted: bool
) -> None:
    """Raise ValueError where ref_logps and the objective do not go together."""
    objective = options.objective
    if objective.reference_free and ref_logps is None:
        return
    name = f"loss_type={options.loss_type!r}"
    if objective.reference_free:
        raise ValueError(f"ref_logps: expected None for the reference-free {name}, got a tensor")
    if ref_logps is None:
        raise ValueError(f"ref_logps: expected a tensor for {name}, got None")
    if (weighted or objective.reference_per_token) and not per_token:
        beside = "beside token_weights" if weighted else f"for {name}"
        raise ValueError(f"ref_logps: expected per-token log-probs {beside}, got per-sequence sums")


def check_needs(options: LossOptions, given: object) -> None:
    """Raise ValueError where the objective needs something of its tokens or pairs that is not
    given, or does not take what is.

    given: has token_rewards, token_weights, kl, kl_weights, and pair_values (its names), None where
    there is none.
    """
    for what in options.objective.needs:
        if getattr(given, what) is None:
            raise ValueError(
                f"{what}: expected a tensor for loss_type={options.loss_type!r}, got None"
            )
    if not options.with_kl:
        for what in ("kl", "kl_weights"):
            if getattr(given, what) is not None:
                raise ValueError(
                    f"{what}: expected None for loss_type={options.loss_type!r}, which takes none, "
                    "got one"
                )


def pair_table(
    options: LossOptions, values: Mapping[str, Tensor] | None, like: Tensor, pairs: int
) -> Tensor | None:
    """The numbers of the pairs as an operator takes them: [K, B] float64 in the order of the
    objective's pair_columns, on the device of like; None where it needs none.

    Raises:
        TypeError: values is no mapping of tensors. ValueError: a name that is missing or not
            needed, a shape that is not [B]. Their values are checked where the operator runs.
    """
    names = options.objective.pair_columns
    if values is not None and not isinstance(values, Mapping):
        raise TypeError(
            f"pair_values: expected a mapping from names to tensors, got {type(values).__name__}"
        )
    given = values or {}
    if set(given) != set(names):
        raise ValueError(
            f"pair_values: expected {', '.join(names) or 'none'} for "
            f"loss_type={options.loss_type!r}, got {', '.join(map(str, given)) or 'none'}"
        )
    if not names:
        return None
    for name in names:
        check_tensor(f"pair_values[{name!r}]", given[name])
        check_shape(f"pair_values[{name!r}]", given[name], (pairs,), "B")
    return torch.stack([given[name].detach().to(like.device, torch.float64) for name in names])


def check_pair_table(options: LossOptions, values: Tensor | None) -> None:
    """ValueError for numbers of pairs that are not finite, or not what the objective takes."""
    if values is None or not values_visible(values):
        return
    objective = options.objective
    for name, x in zip(objective.pair_columns, values.unbind(), strict=True):
        check_finite(f"pair_values[{name!r}]", x)
        bad = (x != 0) & (x != 1)
        if objective.binary_pairs and bool(bad.any()):
            raise ValueError(
                f"pair_values[{name!r}]: expected 0 or 1 for loss_type={options.loss_type!r}, got "
                f"{x[bad][0].item()}"
            )
