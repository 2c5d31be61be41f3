"""Online training with token credit: token rewards -> advantages -> the loss of a policy.

Pure functions of tensors. They know neither a model nor a trainer.
"""

from treg.rl.baselines import BASELINES, group_advantages, token_advantages
from treg.rl.returns import GAE, discounted_returns, gae
from treg.rl.rewards import at_end, contrastive_offset, red_rewards, rto_rewards, with_kl
from treg.rl.scales import SCALES
from treg.rl.segments import SegmentNormaliser, segment_rewards
from treg.rl.units import ngram_units, perplexity_units, random_ngram_units, units_from_starts

__all__ = [
    "BASELINES",
    "GAE",
    "SCALES",
    "SegmentNormaliser",
    "at_end",
    "contrastive_offset",
    "discounted_returns",
    "gae",
    "group_advantages",
    "ngram_units",
    "perplexity_units",
    "random_ngram_units",
    "red_rewards",
    "rto_rewards",
    "segment_rewards",
    "token_advantages",
    "units_from_starts",
    "with_kl",
]
