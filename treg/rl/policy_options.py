"""Which loss of a policy: tables of loss types and reductions, and the options of one, checked."""

from dataclasses import dataclass
from typing import Any

from treg import checks
from treg.rl.kl import KL_ESTIMATORS
from treg.rl.surrogates import RATIO_LEVELS, SURROGATES


@dataclass(frozen=True)
class Reduction:
    """From losses of tokens to one number: sums over each sequence are added up and divided."""

    by: str  # what the total is divided by: "sequences", "scored sequences", "tokens" or "nothing"
    own_length: bool = False  # each sequence's sum is divided by its number of scored tokens
    longest: bool = False  # the total is divided by `max_length` as well
    over_step: bool = False  # `num_items` may say how many there are in the whole step


# "sequences" counts those without a scored token too, as TRL does, "scored sequences" does not.
REDUCTIONS = {
    "sequence_mean": Reduction("sequences", own_length=True),
    "sequence_sum": Reduction("sequences"),
    "constant": Reduction("sequences", longest=True),
    "token_mean": Reduction("tokens"),
    "items": Reduction("tokens", over_step=True),
    # verl's names (loss_agg_mode). Its 0.8 does not divide by sequences in the fourth: that is
    # num_items=1.
    "token-mean": Reduction("tokens", over_step=True),
    "token-sum": Reduction("nothing"),
    "seq-mean-token-sum": Reduction("scored sequences", over_step=True),
    "seq-mean-token-sum-norm": Reduction("scored sequences", longest=True, over_step=True),
    "seq-mean-token-mean": Reduction("scored sequences", own_length=True, over_step=True),
}


@dataclass(frozen=True)
class LossType:
    """A row: names of `SURROGATES`, `REDUCTIONS` and `RATIO_LEVELS`, and where it is from."""

    surrogate: str
    reduction: str
    level: str = "token"
    paper: str = ""


LOSS_TYPES = {
    "ppo": LossType("clip", "token_mean", paper="PPO, arXiv 1707.06347 Eq. 7"),
    "grpo": LossType("clip", "sequence_mean", paper="GRPO, arXiv 2402.03300 Eq. 3"),
    "bnpo": LossType("clip", "token_mean", paper="TRL: GRPO over the tokens of the batch"),
    "dr_grpo": LossType("clip", "constant", paper="Dr. GRPO, arXiv 2503.20783"),
    "dapo": LossType("clip", "items", paper="DAPO, arXiv 2503.14476 Eq. 8"),
    "gspo": LossType("clip", "sequence_mean", "sequence", "GSPO, arXiv 2507.18071 Eq. 5"),
    "luspo": LossType("clip", "sequence_sum", "sequence", "LUSPO, arXiv 2602.05261"),
    "rloo": LossType("clip", "sequence_mean", "sequence_sum", "RLOO, arXiv 2402.14740"),
    "cispo": LossType("cispo", "items", paper="MiniMax-M1, arXiv 2506.13585 Eq. 4"),
    "sapo": LossType("sapo", "sequence_mean", paper="SAPO, arXiv 2511.20347"),
    "vespo": LossType("vespo", "items", paper="VESPO, arXiv 2602.10693"),
}

# number -> bounds: the least value, whether it itself is allowed, the largest
POSITIVE, NOT_NEGATIVE = (0.0, False, None), (0.0, True, None)
BOUNDS: dict[str, tuple[float, bool, float | None]] = {
    "epsilon_low": NOT_NEGATIVE,
    "epsilon_high": NOT_NEGATIVE,
    "delta": POSITIVE,
    "beta": NOT_NEGATIVE,
    "entropy_coef": NOT_NEGATIVE,
    "top_entropy_quantile": (0.0, True, 1.0),
    "off_policy_mask_threshold": POSITIVE,
    "max_length": POSITIVE,
    "sapo_temperature_pos": POSITIVE,
    "sapo_temperature_neg": POSITIVE,
    "vespo_k_pos": NOT_NEGATIVE,
    "vespo_lambda_pos": POSITIVE,
    "vespo_k_neg": NOT_NEGATIVE,
    "vespo_lambda_neg": POSITIVE,
}
OPTIONAL = ("delta", "off_policy_mask_threshold", "max_length")


@dataclass(frozen=True)
class PolicyOptions:
    """The options of `policy_loss`, checked once. Names and defaults are those of TRL's GRPOConfig
    where it has them; its epsilon is epsilon_low.

    Args:
        loss_type: a key of `LOSS_TYPES`.
        reduction: a key of `REDUCTIONS`. None: the loss type's.
        importance_sampling_level: a key of `RATIO_LEVELS`. None: the loss type's. Differs: TRL's
            default is "token", for luspo too.
        epsilon_low, epsilon_high: >= 0, how far a ratio may be below and above 1. epsilon_high
            None: epsilon_low. With cispo epsilon_high is the largest ratio itself (5.0 is usual).
        delta: > 0, the largest ratio of a token with a negative advantage. None: any.
        beta: >= 0, weight of the divergence from the reference.
        kl_estimator: a key of `treg.rl.kl.KL_ESTIMATORS`.
        use_bias_correction_kl: whether the divergence has the ratio as a factor.
        entropy_coef: >= 0; entropy_coef times the mean entropy is subtracted.
        top_entropy_quantile: in [0, 1], the share of tokens of highest entropy whose surrogate
            counts (and whose entropy the bonus takes); 1 is all.
        off_policy_mask_threshold: > 0, nats: tokens with a negative advantage are left out where
            the mean of log p_sampling - log p of their sequence is above it. None: never.
        max_length: > 0, tokens, for reductions that divide by it. None: T of padded tensors.
        sapo_temperature_pos, sapo_temperature_neg: > 0. vespo_k_pos, vespo_k_neg: >= 0.
            vespo_lambda_pos, vespo_lambda_neg: > 0.
    Raises:
        ValueError: any bad value, by name.
    """

    loss_type: str = "dapo"
    reduction: Any = None  # a name once it is made
    importance_sampling_level: Any = None  # a name once it is made
    epsilon_low: float = 0.2
    epsilon_high: Any = None  # a float once it is made
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    use_bias_correction_kl: bool = True
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float | None = None
    max_length: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self):
        _check_name("loss_type", self.loss_type, LOSS_TYPES)
        row = LOSS_TYPES[self.loss_type]
        defaults = {
            "reduction": row.reduction,
            "importance_sampling_level": row.level,
            "epsilon_high": self.epsilon_low,
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        _check_name("reduction", self.reduction, REDUCTIONS)
        _check_name("importance_sampling_level", self.importance_sampling_level, RATIO_LEVELS)
        _check_name("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        if not isinstance(self.use_bias_correction_kl, bool):
            raise ValueError(
                f"use_bias_correction_kl: expected a bool, got {self.use_bias_correction_kl!r}"
            )
        for name, bounds in BOUNDS.items():
            _check_bounds(name, getattr(self, name), *bounds)

    @property
    def surrogate(self):
        """The function that gives the losses of tokens."""
        return SURROGATES[LOSS_TYPES[self.loss_type].surrogate]

    @property
    def over_step(self) -> bool:
        """Whether `num_items` of a whole step may be given to `policy_loss`."""
        return REDUCTIONS[self.reduction].over_step

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss depends on entropies."""
        return self.entropy_coef != 0.0 or self.top_entropy_quantile < 1.0


def _check_name(name: str, value: Any, table: dict) -> None:
    if not isinstance(value, str) or value not in table:
        raise ValueError(f"{name}: expected one of {', '.join(table)}, got {value!r}")


def _check_bounds(name: str, value: Any, least: float, allowed: bool, most: float | None) -> None:
    checks.check_number(name, value, optional=name in OPTIONAL)
    if value is None:
        return
    small = value < least or (value == least and not allowed)
    if small or (most is not None and value > most):
        above = f"{'>=' if allowed else '>'} {least}"
        both = above if most is None else f"{above} and <= {most}"
        raise ValueError(f"{name}: expected a number {both}, got {value!r}")
