"""Now `treg.rewards.annotate`."""

from treg.old_names import moved
from treg.rewards.annotate import AnnotateOptions, annotate

__all__ = ["AnnotateOptions", "annotate"]
moved(__name__, "treg.rewards.annotate")
