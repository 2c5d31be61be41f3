"""Now `treg.viz.views`."""

from treg.old_names import moved
from treg.viz.views import pair_views

__all__ = ["pair_views"]
moved(__name__, "treg.viz.views")
