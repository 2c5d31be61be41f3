"""Online training with token credit: token rewards -> advantages -> the loss of a policy.

Pure functions of tensors. They know neither a model nor a trainer.
"""

from treg.rl.baselines import BASELINES, group_advantages, token_advantages
from treg.rl.fused import fused_policy_loss
from treg.rl.kl import KL_ESTIMATORS
from treg.rl.policy import PolicyLoss, policy_loss
from treg.rl.policy_options import LOSS_TYPES, REDUCTIONS, PolicyOptions
from treg.rl.returns import GAE, discounted_returns, gae
from treg.rl.rewards import at_end, contrastive_offset, red_rewards, rto_rewards, with_kl
from treg.rl.scales import SCALES
from treg.rl.segments import SegmentNormaliser, segment_rewards
from treg.rl.surrogates import RATIO_LEVELS, SURROGATES
from treg.rl.units import ngram_units, perplexity_units, random_ngram_units, units_from_starts

__all__ = [
    "BASELINES",
    "GAE",
    "KL_ESTIMATORS",
    "LOSS_TYPES",
    "RATIO_LEVELS",
    "REDUCTIONS",
    "SCALES",
    "SURROGATES",
    "PolicyLoss",
    "PolicyOptions",
    "SegmentNormaliser",
    "at_end",
    "contrastive_offset",
    "discounted_returns",
    "fused_policy_loss",
    "gae",
    "group_advantages",
    "ngram_units",
    "perplexity_units",
    "policy_loss",
    "random_ngram_units",
    "red_rewards",
    "rto_rewards",
    "segment_rewards",
    "token_advantages",
    "units_from_starts",
    "with_kl",
]
