"""Now `treg.losses.regularizer`."""

from treg.losses.regularizer import token_regularizer

__all__ = ["token_regularizer"]
