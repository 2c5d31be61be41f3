"""Advantages of single tokens for verl: its own GRPO and RLOO sum the rewards of a response first.

B responses of a batch, R tokens of the longest.
"""

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treg.checks import check_count, check_not_negative
from treg.integrations.verl.modules import imported, replaced_everywhere, version
from treg.rl import (
    BASELINES,
    SCALES,
    discounted_returns,
    gae,
    ngram_units,
    perplexity_units,
    random_ngram_units,
    token_advantages,
)

CORE, TRAINER = "verl.trainer.ppo.core_algos", "verl.trainer.ppo.ray_trainer"
MACROS = ("ngram", "random", "perplexity")
# whose macro actions: of the reference first, as MA-RLHF has it, then of the policy
LOGPROBS = ("ref_log_prob", "old_log_probs", "rollout_log_probs")
Estimate = Callable[..., tuple[Tensor, Tensor]]

# the batch that verl makes advantages of: it hands estimators of others neither values nor
# log-probs
_batch: ContextVar[Mapping[str, Tensor] | None] = ContextVar("batch", default=None)


class Estimator(NamedTuple):
    """What a name means where algorithm.treg does not say otherwise.

    Fields: baseline, scale: as of `treg.rl.token_advantages`; None: it takes a critic's values.
    macro: what its steps are, None: tokens.
    """

    baseline: str | None
    scale: str | None
    macro: str | None = None


ESTIMATORS = {
    "treg_grpo": Estimator("group", "group"),
    "treg_rloo": Estimator("rloo", "none"),
    "treg_process": Estimator("process", "group"),
    "treg_returns": Estimator("tokens", "tokens"),
    "treg_gae": Estimator(None, None),
    "treg_macro": Estimator(None, None, macro="ngram"),
}


@dataclass(frozen=True)
class AdvantageOptions:
    """What stands under algorithm.treg in verl's configuration.

    baseline: a key of `treg.rl.BASELINES`. scale: a key of `treg.rl.SCALES`. None: the estimator's.
    eps: >= 0, what is added to the scale; verl's is 1e-6.
    macro: steps of several tokens, which then share their advantage: "ngram", macro_length tokens;
        "random", 2, 3, 5 or 10 tokens, drawn anew each time; "perplexity", which begins a step
        where a token is less likely than the one before, by the reference's log-probs where there
        are any. None: the estimator's.
    macro_length: >= 1, tokens of an "ngram".
    """

    baseline: str | None = None
    scale: str | None = None
    eps: float = 1e-6
    macro: str | None = None
    macro_length: int = 5

    def __post_init__(self):
        for name, known in (("baseline", BASELINES), ("scale", SCALES), ("macro", MACROS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(
                    f"algorithm.treg.{name}: expected one of {', '.join(known)}, got {value!r}"
                )
        check_not_negative("algorithm.treg.eps", self.eps)
        check_count("algorithm.treg.macro_length", self.macro_length)

    @classmethod
    def of(cls, config: Any) -> "AdvantageOptions":
        """From verl's algorithm configuration."""
        given = dict(config.get("treg", None) or {})
        known = [x.name for x in fields(cls)]
        if unknown := given.keys() - set(known):
            raise ValueError(f"algorithm.treg: expected keys among {known}, got {sorted(unknown)}")
        return cls(**given)


def install_advantages() -> None:
    """Register advantages of tokens with verl, as values of algorithm.adv_estimator.

        treg_grpo     returns less the mean of the group's sums, by the group's scale; with
                      norm_adv_by_std_in_grpo=False not divided
        treg_rloo     returns less the mean of the sums of the others of the group
        treg_process  returns of rewards less their mean over all steps of the group, by their
                      standard deviation: GRPO's process supervision, arXiv 2402.03300, section
                      4.1.3; with norm_adv_by_std_in_grpo=False not divided
        treg_returns  returns less the mean over all tokens of the batch, by their standard
                      deviation: REINFORCE++
        treg_gae      GAE over a critic's values, whitened as verl's is
        treg_macro    the same over macro actions of 5 tokens: MA-RLHF, arXiv 2410.02743

    They are `treg.rl.token_advantages` and `treg.rl.gae` of the rewards of tokens, with
    algorithm.gamma and algorithm.lam (where there is no critic the papers have lam=1), and what
    `AdvantageOptions` say. Under treg_grpo and treg_rloo every token bears the whole mean, also the
    last ones, which have little left to earn: where rewards stand all along, as RED's do,
    treg_process compares like with like.

    Where a response has its only reward at its last token and gamma = lam = 1, treg_grpo and
    treg_rloo are verl's grpo and rloo. treg_returns with lam=1 is its reinforce_plus_plus, and
    treg_gae its gae, for any rewards. Differs: the only response of a prompt has the advantage 0
    under treg_grpo, where verl takes its score; holes of the mask, such as what tools say, are
    skipped by all of them.

    The last two need critic.enable=True: verl asks for a critic by itself for its own gae alone. So
    that a critic's values and the log-probs of "perplexity" reach them, verl's compute_advantage is
    wrapped. That runs in the process of the trainer, which must have called this.

    Raises:
        ImportError: verl is not installed. RuntimeError: a version without these functions.
    """
    core, trainer = imported(CORE), imported(TRAINER)
    register = getattr(core, "register_adv_est", None)
    original = getattr(trainer, "compute_advantage", None)
    if register is None or original is None:
        raise RuntimeError(
            f"verl: expected {CORE}.register_adv_est and {TRAINER}.compute_advantage, as of verl "
            f"0.9, got version {version()}"
        )
    for name, estimated in _ESTIMATES.items():
        register(name)(estimated)
    if hasattr(original, "_treg"):
        return

    @functools.wraps(original)
    def compute_advantage(data: Any, *args: Any, **kwargs: Any) -> Any:
        token = _batch.set(data.batch)
        try:
            return original(data, *args, **kwargs)
        finally:
            _batch.reset(token)

    setattr(compute_advantage, "_treg", True)  # noqa: B010
    replaced_everywhere("compute_advantage", original, compute_advantage)


def estimate(
    name: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    index: Any = None,
    values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns by one of `ESTIMATORS`.

    Args:
        token_level_rewards: [B, R] floating. response_mask: [B, R], not 0 where the policy wrote.
        config: verl's algorithm configuration: gamma, lam, norm_adv_by_std_in_grpo, treg.
        index: [B], equal where responses answer one prompt.
        values: [B, R] floating, of a critic.
    Returns:
        Both [B, R] in the dtype of the rewards, 0 where the mask is.
    Raises:
        ValueError: options; no index or no values where they are needed; what
            `treg.rl.token_advantages` refuses.
    """
    config = {} if config is None else config
    options, kind = AdvantageOptions.of(config), ESTIMATORS[name]
    mask = response_mask.bool()
    over = {
        "gamma": float(config.get("gamma", 1.0)),
        "units": _units(options, kind, mask),
        "mask": mask,
    }
    lam = float(config.get("lam", 1.0))
    if kind.baseline is None:
        values = _values(name, options, values)
        found = gae(token_level_rewards, values, lam=lam, **over)
        return _whitened(found.advantages, mask), found.returns
    scale = options.scale or kind.scale
    if kind.scale == "group" and not config.get("norm_adv_by_std_in_grpo", True):
        scale = options.scale or "none"
    advantages = token_advantages(
        token_level_rewards,
        _groups(name, index, mask),
        lam=lam,
        baseline=options.baseline or kind.baseline,
        scale=scale,
        eps=options.eps,
        **over,
    )
    return advantages, discounted_returns(token_level_rewards, **over)


def _estimate_as(name: str) -> Estimate:
    """What verl's registry has under a name."""

    def estimated(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        config: Any = None,
        index: Any = None,
        values: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        return estimate(name, token_level_rewards, response_mask, config, index, values)

    estimated.__name__ = estimated.__qualname__ = name
    return estimated


_ESTIMATES = {name: _estimate_as(name) for name in ESTIMATORS}


def _groups(name: str, index: Any, mask: Tensor) -> Tensor:
    """[B] int64: equal where the uids are."""
    if index is None or len(index) != len(mask):
        got = "none" if index is None else len(index)
        raise ValueError(
            f"index: expected the uid of each of the {len(mask)} responses for {name}, got {got}"
        )
    numbers: dict[Any, int] = {}
    found = [numbers.setdefault(uid, len(numbers)) for uid in index]
    return torch.tensor(found, device=mask.device)


def _values(name: str, options: AdvantageOptions, values: Tensor | None) -> Tensor:
    if options.baseline is not None or options.scale is not None:
        raise ValueError(
            f"algorithm.treg: expected no baseline and no scale with {name}, whose baseline is a "
            f"critic, got baseline={options.baseline!r} and scale={options.scale!r}"
        )
    values = _given("values") if values is None else values
    if values is None:
        raise ValueError(
            f"values: expected those of a critic for {name}, got none; set critic.enable=True, and "
            "call install_advantages in the process of the trainer"
        )
    return values


def _given(name: str) -> Tensor | None:
    """What the batch has under a name."""
    batch = _batch.get()
    return None if batch is None else batch.get(name, None)


def _units(options: AdvantageOptions, kind: Estimator, mask: Tensor) -> Tensor | None:
    macro = options.macro or kind.macro
    if macro is None:
        return None
    if macro == "ngram":
        return ngram_units(options.macro_length, mask=mask)
    if macro == "random":
        return random_ngram_units(mask=mask)
    found = (_given(name) for name in LOGPROBS)
    logprobs = next((x for x in found if x is not None), None)
    if logprobs is None:
        raise ValueError(
            "algorithm.treg.macro: expected log-probs in the batch for 'perplexity', got none of "
            f"{', '.join(LOGPROBS)}; call install_advantages in the process of the trainer"
        )
    return perplexity_units(logprobs, mask=mask)


def _whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """Less their mean over all tokens, by their standard deviation, as verl does with GAE's."""
    exact = torch.where(mask, advantages.double(), 0.0)
    count = mask.sum()
    centred = torch.where(mask, exact - exact.sum() / count.clamp(min=1), 0.0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    return (centred * (variance + 1e-8).rsqrt()).to(advantages.dtype)
