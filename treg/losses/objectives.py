"""Every objective by its name. A new one is a file with its formula, and a row here.

Without a row, "package.module:NAME" is an `Objective` of anybody's that Python can import.
"""

import importlib
from difflib import SequenceMatcher
from typing import Any

from treg.losses import pairwise
from treg.losses.base import Objective
from treg.losses.bfpo import BFPO
from treg.losses.confpo import CONFPO
from treg.losses.d2po import D2PO
from treg.losses.figa import FIGA
from treg.losses.messagewise import MESSAGEWISE
from treg.losses.sepo import SEPO
from treg.losses.sparsepo import SPARSEPO
from treg.losses.tdpo import TDPO1, TDPO2
from treg.losses.tgdpo import TGDPO
from treg.losses.tis_dpo import TIS_DPO

ALIKE = 0.6  # share of equal letters from which a name may have been meant for another

OBJECTIVES: dict[str, Objective] = {
    "dpo": pairwise.DPO,
    "sigmoid": pairwise.DPO,
    "simpo": pairwise.SIMPO,
    "ipo": pairwise.IPO,
    "hinge": pairwise.HINGE,
    "robust": pairwise.ROBUST,
    "exo_pair": pairwise.EXO_PAIR,
    "nca_pair": pairwise.NCA_PAIR,
    "bco_pair": pairwise.BCO_PAIR,
    "apo_zero": pairwise.APO_ZERO,
    "apo_down": pairwise.APO_DOWN,
    "sppo_hard": pairwise.SPPO_HARD,
    "discopop": pairwise.DISCOPOP,
    "orpo": pairwise.ORPO,
    "cpo": pairwise.CPO,
    "tgdpo": TGDPO,
    "tis_dpo": TIS_DPO,
    "sepo": SEPO,
    "d2po": D2PO,
    "confpo": CONFPO,
    "messagewise": MESSAGEWISE,
    "figa": FIGA,
    "bfpo": BFPO,
    "tdpo1": TDPO1,
    "tdpo2": TDPO2,
    "sparsepo": SPARSEPO,
}


def find_objective(name: Any) -> Objective:
    """The objective of a loss_type. One that was imported is a row of OBJECTIVES from then on.

    Raises:
        ValueError: no such row, nothing that can be imported, or no Objective.
    """
    if isinstance(name, str) and name in OBJECTIVES:
        return OBJECTIVES[name]
    module, colon, attribute = str(name).partition(":")
    if not isinstance(name, str) or not colon:
        likeness = {x: SequenceMatcher(None, x, str(name)).ratio() for x in OBJECTIVES}
        most = max(likeness.values())
        near = [repr(x) for x, ratio in likeness.items() if ratio == most >= ALIKE]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"loss_type: expected one of {sorted(OBJECTIVES)}, or package.module:NAME, got {name!r}"
            f"{hint}"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"loss_type: expected an objective that Python can import as {name!r}, got: {error}; "
            "its folder must be in PYTHONPATH"
        ) from error
    if not isinstance(found, Objective):
        raise ValueError(
            f"loss_type: expected a treg.losses.Objective at {name!r}, got {type(found).__name__}"
        )
    OBJECTIVES[name] = found
    return found
