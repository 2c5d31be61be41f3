"""Online training with token credit: token rewards -> advantages -> the loss of a policy.

Pure functions of tensors. They know neither a model nor a trainer.
"""

from treg.rl.fused import fused_policy_loss
from treg.rl.kl import KL_ESTIMATORS
from treg.rl.policy import PolicyLoss, policy_loss
from treg.rl.policy_options import LOSS_TYPES, REDUCTIONS, PolicyOptions
from treg.rl.surrogates import RATIO_LEVELS, SURROGATES

__all__ = [
    "KL_ESTIMATORS",
    "LOSS_TYPES",
    "RATIO_LEVELS",
    "REDUCTIONS",
    "SURROGATES",
    "PolicyLoss",
    "PolicyOptions",
    "fused_policy_loss",
    "policy_loss",
]
