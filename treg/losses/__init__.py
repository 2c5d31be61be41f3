"""What the loss of a preference pair is."""

from treg.losses.objectives import (
    OBJECTIVES,
    LossOptions,
    Objective,
    check_reference,
    pair_loss,
    reward_gradient,
    treg_loss,
)
from treg.losses.regularizer import token_regularizer

__all__ = [
    "OBJECTIVES",
    "LossOptions",
    "Objective",
    "check_reference",
    "pair_loss",
    "reward_gradient",
    "token_regularizer",
    "treg_loss",
]
