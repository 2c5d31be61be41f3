"""What the loss of a preference pair is."""

from treg.losses.base import Base, Objective, Scalars
from treg.losses.objectives import OBJECTIVES
from treg.losses.options import LossOptions, check_reference
from treg.losses.regularizer import token_regularizer
from treg.losses.sparsepo import TokenMask
from treg.losses.tokens import Credit, Tokens
from treg.losses.treg_loss import treg_loss

__all__ = [
    "OBJECTIVES",
    "Base",
    "Credit",
    "LossOptions",
    "Objective",
    "Scalars",
    "TokenMask",
    "Tokens",
    "check_reference",
    "token_regularizer",
    "treg_loss",
]
