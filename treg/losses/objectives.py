"""Every objective by its name. A new one is a file with its formula, and a row here."""

from treg.losses import pairwise
from treg.losses.base import Objective

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
}
