"""Now `treg.losses.regularizer`."""

from treg.losses.regularizer import token_regularizer
from treg.old_names import moved

__all__ = ["token_regularizer"]
moved(__name__, "treg.losses.regularizer")
