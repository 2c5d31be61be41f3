"""Every objective by its name. A new one is a file with its formula, and a row here."""

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
