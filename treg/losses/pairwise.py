"""Objectives of two implicit rewards. Each is one function: its value and both slopes.

In every docstring m = rho_w - rho_l, and the slopes are the derivatives of the value.
"""

import math

import torch
from torch import Tensor, sigmoid
from torch.nn.functional import logsigmoid

from treg.losses.base import Base, Objective, Scalars, base_of_margin

DISCOPOP_TAU = 0.05
# ORPO's log-odds of an answer whose mean log-prob is 0 are infinite: they are taken here instead.
ALMOST_CERTAIN = -1e-12


def dpo(rho_w: Tensor, rho_l: Tensor, scalars: Scalars) -> Base:
    """DPO; with label smoothing eps, conservative DPO.

        value         -(1 - eps) log sigmoid(m) - eps log sigmoid(-m)
        d value / dm  eps sigmoid(m) - (1 - eps) sigmoid(-m)

    Paper: DPO, arXiv 2305.18290, Eq. 7.
    """
    m = rho_w - rho_l
    eps = scalars["label_smoothing"]
    value = -(1 - eps) * logsigmoid(m) - eps * logsigmoid(-m)
    return base_of_margin(value, eps * sigmoid(m) - (1 - eps) * sigmoid(-m))


DPO = Objective(
    dpo,
    "DPO, arXiv 2305.18290, Eq. 7",
    decreasing=True,
    options={"label_smoothing": 0.0},
)

# DPO's value without a reference, and the chosen answer's mean negative log-likelihood beside it.
# Differs: the paper takes the likelihood of the whole answer; here it is a mean, as in TRL.
CPO = Objective(
    dpo,
    "CPO, arXiv 2401.08417",
    decreasing=True,
    reference_free=True,
    nll=True,
    options={"label_smoothing": 0.0},
)


def simpo(rho_w: Tensor, rho_l: Tensor, scalars: Scalars) -> Base:
    """SimPO: `dpo` at m - gamma. No reference, and rho is a mean over tokens.

    Paper: SimPO, arXiv 2405.14734, Eq. 6.
    """
    return dpo(rho_w - scalars["gamma"], rho_l, scalars)


SIMPO = Objective(
    simpo,
    "SimPO, arXiv 2405.14734, Eq. 6",
    decreasing=True,
    length_normalised=True,
    reference_free=True,
    options={"gamma": 0.0, "label_smoothing": 0.0},
)


def ipo(rho_w: Tensor, rho_l: Tensor, scalars: Scalars) -> Base:
    """IPO.

        value         (m / beta - 1 / (2 beta))^2
        d value / dm  (2 m - 1) / beta^2

    Paper: IPO, arXiv 2310.12036, Eq. 17. Differs: rho is a mean over tokens, as in TRL.
    """
    m = rho_w - rho_l
    beta = scalars.beta
    return base_of_margin((m / beta - 1 / (2 * beta)) ** 2, (2 * m - 1) / beta**2)


IPO = Objective(ipo, "IPO, arXiv 2310.12036, Eq. 17", length_normalised=True)


def hinge(rho_w: Tensor, rho_l: Tensor, scalars: Scalars) -> Base:
    """The hinge of SLiC on DPO's margin.

        value         max(0, 1 - m)
        d value / dm  -1 where m < 1, else 0

    Paper: SLiC, arXiv 2305.10425.
    """
    m = rho_w - rho_l
    # NaN is not beyond the kink: its slope is -1
    slope = torch.where(m >= 1, 0.0, -torch.ones_like(m))
    return base_of_margin(torch.relu(1 - m), slope)


HINGE = Objective(
    hinge,
    "SLiC, arXiv 2305.10425",
    decreasing=True,
)


def robust(rho_w: Tensor, rho_l: Tensor, scalars: Scalars) -> Base:
    """Robust DPO, eps = label_smoothing.

        value         (-(1 - eps) log sigmoid(m) + eps log sigmoid(-m)) / (1 - 2 eps)
        d value / dm  -((1 - eps) sigmoid(-m) + eps sigmoid(m)) / (1 - 2 eps)

    Paper: Robust DPO, arXiv 2403.00409.
    """
    m = rho_w - rho_l
    eps = scalars["label_smoothing"]
    value = (-(1 - eps) * logsigmoid(m) + eps * logsigmoid(-m)) / (1 - 2 * eps)
    slope = -((1 - eps) * sigmoid(-m) + eps * sigmoid(m)) / (1 - 2 * eps)
    return base_of_margin(value, slope)


ROBUST = Objective(
    robust,
    "Robust DPO, arXiv 2403.00409",
    decreasing=True,
    decreasing_smoothed=True,
    options={"label_smoothing": 0.0},
)


def exo_pair(rho_w: Tensor, rho_l: Tensor, scalars: Scalars) -> Base:
    """EXO: the KL divergence of (p, 1 - p) from (1 - eps, eps), p = sigmoid(m), eps > 0.

        value         p (log p - log(1 - eps)) + (1 - p) (log(1 - p) - log eps)
        d value / dm  p (1 - p) (m - log(1 - eps) + log eps)

    Paper: EXO, arXiv 2402.00856, Eq. 16.
    """
    m = rho_w - rho_l
    eps = scalars["label_smoothing"]
    log_right, log_wrong = math.log1p(-eps), math.log(eps)
    value = sigmoid(m) * (logsigmoid(m) - log_right) + sigmoid(-m) * (logsigmoid(-m) - log_wrong)
    return base_of_margin(value, _sigmoid_slope(m) * (m - log_right + log_wrong))


EXO_PAIR = Objective(
    exo_pair,
    "EXO, arXiv 2402.00856, Eq. 16",
    options={"label_smoothing": 0.0},
    positive=("label_smoothing",),
)


def discopop(rho_w: Tensor, rho_l: Tensor, scalars: Scalars) -> Base:
    """DiscoPOP: a blend of DPO and an exponential loss, g = sigmoid(m / tau).

        value         -(1 - g) log sigmoid(m) + g exp(-m)
        d value / dm  (g (1 - g) log sigmoid(m)) / tau - (1 - g) sigmoid(-m)
                      + g exp(-m) ((1 - g) / tau - 1)

    Paper: DiscoPOP, arXiv 2406.08414, Eq. 5.
    """
    m = rho_w - rho_l
    tau = scalars["tau"]
    closed = sigmoid(-m / tau)  # 1 - g
    # g * exp(-m), where exp(-m) alone would overflow
    exponential = torch.exp(logsigmoid(m / tau) - m)
    value = -closed * logsigmoid(m) + exponential
    logistic_slope = _sigmoid_slope(m / tau) * logsigmoid(m) / tau - closed * sigmoid(-m)
    return base_of_margin(value, logistic_slope + exponential * (closed / tau - 1))


DISCOPOP = Objective(
    discopop,
    "DiscoPOP, arXiv 2406.08414, Eq. 5",
    options={"tau": DISCOPOP_TAU},
    positive=("tau",),
)


def nca_pair(rho_w: Tensor, rho_l: Tensor, scalars: Scalars) -> Base:
    """NCA of a pair.

        value             -log sigmoid(rho_w) - 0.5 log sigmoid(-rho_w) - 0.5 log sigmoid(-rho_l)
        d value / drho_w  0.5 sigmoid(rho_w) - sigmoid(-rho_w)
        d value / drho_l  0.5 sigmoid(rho_l)

    Paper: NCA, arXiv 2402.05369.
    """
    value = -logsigmoid(rho_w) - 0.5 * logsigmoid(-rho_w) - 0.5 * logsigmoid(-rho_l)
    return Base(value, 0.5 * sigmoid(rho_w) - sigmoid(-rho_w), 0.5 * sigmoid(rho_l))


NCA_PAIR = Objective(nca_pair, "NCA, arXiv 2402.05369", margin_only=False)


def bco_pair(rho_w: Tensor, rho_l: Tensor, scalars: Scalars) -> Base:
    """BCO of a pair.

        value             -log sigmoid(rho_w) - log sigmoid(-rho_l)
        d value / drho_w  -sigmoid(-rho_w)
        d value / drho_l  sigmoid(rho_l)

    Paper: BCO, arXiv 2404.04656. Differs: no reward shift, as in TRL.
    """
    return Base(-logsigmoid(rho_w) - logsigmoid(-rho_l), -sigmoid(-rho_w), sigmoid(rho_l))


BCO_PAIR = Objective(bco_pair, "BCO, arXiv 2404.04656", margin_only=False)


def apo_zero(rho_w: Tensor, rho_l: Tensor, scalars: Scalars) -> Base:
    """APO-zero.

        value             1 - sigmoid(rho_w) + sigmoid(rho_l)
        d value / drho_w  -sigmoid(rho_w) sigmoid(-rho_w)
        d value / drho_l  sigmoid(rho_l) sigmoid(-rho_l)

    Paper: APO, arXiv 2408.06266, Eq. 7.
    """
    value = sigmoid(-rho_w) + sigmoid(rho_l)
    return Base(value, -_sigmoid_slope(rho_w), _sigmoid_slope(rho_l))


APO_ZERO = Objective(apo_zero, "APO-zero, arXiv 2408.06266, Eq. 7", margin_only=False)


def apo_down(rho_w: Tensor, rho_l: Tensor, scalars: Scalars) -> Base:
    """APO-down.

        value             sigmoid(rho_w) + 1 - sigmoid(m)
        d value / drho_w  sigmoid(rho_w) sigmoid(-rho_w) - sigmoid(m) sigmoid(-m)
        d value / drho_l  sigmoid(m) sigmoid(-m)

    Paper: APO, arXiv 2408.06266, Eq. 8.
    """
    slope_l = _sigmoid_slope(rho_w - rho_l)
    value = sigmoid(rho_w) + sigmoid(rho_l - rho_w)
    return Base(value, _sigmoid_slope(rho_w) - slope_l, slope_l)


APO_DOWN = Objective(apo_down, "APO-down, arXiv 2408.06266, Eq. 8", margin_only=False)


def sppo_hard(rho_w: Tensor, rho_l: Tensor, scalars: Scalars) -> Base:
    """SPPO with hard labels.

        value             (rho_w / beta - 1 / (2 beta))^2 + (rho_l / beta + 1 / (2 beta))^2
        d value / drho_w  (2 rho_w - 1) / beta^2
        d value / drho_l  (2 rho_l + 1) / beta^2

    Paper: SPPO, arXiv 2405.00675, Eq. 4.7 with P = 1.
    """
    beta = scalars.beta
    half = 1 / (2 * beta)
    value = (rho_w / beta - half) ** 2 + (rho_l / beta + half) ** 2
    return Base(value, (2 * rho_w - 1) / beta**2, (2 * rho_l + 1) / beta**2)


SPPO_HARD = Objective(sppo_hard, "SPPO, arXiv 2405.00675, Eq. 4.7", margin_only=False)


def orpo(rho_w: Tensor, rho_l: Tensor, scalars: Scalars) -> Base:
    """ORPO's odds-ratio term. rho / beta is an answer's mean log-prob, odds its log-odds.

        odds_s            x_s - log(1 - exp x_s),  x_s = rho_s / beta
        value             -beta log sigmoid(odds_w - odds_l)
        d value / drho_w  -sigmoid(odds_l - odds_w) / (1 - exp x_w)
        d value / drho_l  sigmoid(odds_l - odds_w) / (1 - exp x_l)

    The chosen answer's mean negative log-likelihood is added beside it (`Objective.nll`).

    Paper: ORPO, arXiv 2403.07691, Eq. 6-7. Differs: x is at most -1e-12, and beyond that the
    slopes are 0, because the odds of a certain answer are infinite.
    """
    odds_w, rate_w = _log_odds(rho_w / scalars.beta)
    odds_l, rate_l = _log_odds(rho_l / scalars.beta)
    wrong = sigmoid(odds_l - odds_w)
    return Base(-scalars.beta * logsigmoid(odds_w - odds_l), -wrong * rate_w, wrong * rate_l)


def _log_odds(logp: Tensor) -> tuple[Tensor, Tensor]:
    """x - log(1 - exp x) of a log-prob x, and its derivative 1 / (1 - exp x)."""
    x = logp.clamp(max=ALMOST_CERTAIN)
    rest = -torch.expm1(x)
    rate = torch.where(logp > ALMOST_CERTAIN, 0.0, 1 / rest)
    return x - torch.log(rest), rate


ORPO = Objective(
    orpo,
    "ORPO, arXiv 2403.07691, Eq. 6-7",
    margin_only=False,
    length_normalised=True,
    reference_free=True,
    nll=True,
)


def _sigmoid_slope(x: Tensor) -> Tensor:
    """d sigmoid(x) / dx."""
    return sigmoid(x) * sigmoid(-x)
