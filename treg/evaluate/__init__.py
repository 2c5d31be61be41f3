"""How good a per-token signal is."""

from treg.evaluate.measures import auroc, ranks

__all__ = ["auroc", "ranks"]
