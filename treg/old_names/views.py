"""Now `treg.viz.views`."""

from treg.viz.views import pair_views

__all__ = ["pair_views"]
