"""Now `treg.rewards.annotate`."""

from treg.rewards.annotate import AnnotateOptions, annotate

__all__ = ["AnnotateOptions", "annotate"]
