"""Token rewards beside implicit rewards, for people: a page of pairs, a terminal view and training
curves.
"""

from treg.viz.curves import plot_curves
from treg.viz.page import write_page
from treg.viz.terminal import print_pairs
from treg.viz.tokens import PairView, Side, agreement, token_pieces

__all__ = [
    "PairView",
    "Side",
    "agreement",
    "plot_curves",
    "print_pairs",
    "token_pieces",
    "write_page",
]
