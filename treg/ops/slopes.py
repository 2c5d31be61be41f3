"""d base / d rho of every objective in closed form: `treg.losses.reward_gradient` where autograd is
off.

Inside an operator under torch.compile neither torch.autograd nor torch.func can differentiate.
m = rho_w - rho_l - gamma (0 but for simpo); eps is the label smoothing. In Triton:
`treg_kernels.bases`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, sigmoid

from treg.losses import LossOptions
from treg.losses.objectives import DISCOPOP_TAU


def slopes(rho_w: Tensor, rho_l: Tensor, o: LossOptions) -> tuple[Tensor, Tensor]:
    """d base / d rho_w and d base / d rho_l, each [B], of float64 implicit rewards [B]."""
    if o.loss_type in OF_REWARDS:
        return OF_REWARDS[o.loss_type](rho_w, rho_l, o)
    slope = OF_MARGIN[o.loss_type](rho_w - rho_l - o.gamma, o)
    return slope, -slope


def _bell(x: Tensor) -> Tensor:
    """d sigmoid(x) / d x."""
    return sigmoid(x) * sigmoid(-x)


def _dpo(m: Tensor, o: LossOptions) -> Tensor:
    return o.label_smoothing * sigmoid(m) - (1 - o.label_smoothing) * sigmoid(-m)


def _ipo(m: Tensor, o: LossOptions) -> Tensor:
    return (2 * m - 1) / o.beta**2


def _hinge(m: Tensor, o: LossOptions) -> Tensor:
    return -(~(m >= 1)).to(m.dtype)


def _robust(m: Tensor, o: LossOptions) -> Tensor:
    eps = o.label_smoothing
    return -((1 - eps) * sigmoid(-m) + eps * sigmoid(m)) / (1 - 2 * eps)


def _exo_pair(m: Tensor, o: LossOptions) -> Tensor:
    return _bell(m) * (m - math.log1p(-o.label_smoothing) + math.log(o.label_smoothing))


def _discopop(m: Tensor, o: LossOptions) -> Tensor:
    x = m / DISCOPOP_TAU
    first = sigmoid(-x) * sigmoid(-m) - _bell(x) * F.logsigmoid(m) / DISCOPOP_TAU
    return torch.exp(F.logsigmoid(x) - m) * (sigmoid(-x) / DISCOPOP_TAU - 1) - first


def _nca_pair(rho_w: Tensor, rho_l: Tensor, o: LossOptions) -> tuple[Tensor, Tensor]:
    return 0.5 * sigmoid(rho_w) - sigmoid(-rho_w), 0.5 * sigmoid(rho_l)


def _bco_pair(rho_w: Tensor, rho_l: Tensor, o: LossOptions) -> tuple[Tensor, Tensor]:
    return -sigmoid(-rho_w), sigmoid(rho_l)


def _apo_zero(rho_w: Tensor, rho_l: Tensor, o: LossOptions) -> tuple[Tensor, Tensor]:
    return -_bell(rho_w), _bell(rho_l)


def _apo_down(rho_w: Tensor, rho_l: Tensor, o: LossOptions) -> tuple[Tensor, Tensor]:
    slope_l = _bell(rho_w - rho_l)
    return _bell(rho_w) - slope_l, slope_l


def _sppo_hard(rho_w: Tensor, rho_l: Tensor, o: LossOptions) -> tuple[Tensor, Tensor]:
    return (2 * rho_w - 1) / o.beta**2, (2 * rho_l + 1) / o.beta**2


def _orpo(rho_w: Tensor, rho_l: Tensor, o: LossOptions) -> tuple[Tensor, Tensor]:
    """odds(x) = x - log(1 - exp x), clamped at x = -1e-12; d odds / d x = 1 / (1 - exp x), 0
    beyond.
    """
    x_w, x_l = (rho / o.beta for rho in (rho_w, rho_l))
    odds_w, odds_l = (
        x - torch.log(-torch.expm1(x)) for x in (x_w.clamp(max=-1e-12), x_l.clamp(max=-1e-12))
    )
    rate_w, rate_l = (torch.where(x > -1e-12, 0.0, -1 / torch.expm1(x)) for x in (x_w, x_l))
    wrong = sigmoid(odds_l - odds_w)
    return -wrong * rate_w, wrong * rate_l


OF_MARGIN = {
    **dict.fromkeys(("dpo", "sigmoid", "simpo", "cpo"), _dpo),
    "ipo": _ipo,
    "hinge": _hinge,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "discopop": _discopop,
}
OF_REWARDS = {
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "sppo_hard": _sppo_hard,
    "orpo": _orpo,
}
