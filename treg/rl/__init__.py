"""Online training with token credit: token rewards -> advantages -> the loss of a policy.

Pure functions of tensors. They know neither a model nor a trainer.
"""

from treg.rl.baselines import BASELINES, SCALES, group_advantages, token_advantages
from treg.rl.returns import GAE, discounted_returns, gae

__all__ = [
    "BASELINES",
    "GAE",
    "SCALES",
    "discounted_returns",
    "gae",
    "group_advantages",
    "token_advantages",
]
