"""Preference objectives and their derivatives, in float64, as device functions.

BASES maps a loss type to a function of (rho_w, rho_l, beta, first, second) that returns (base,
slope_w, slope_l) with slope_s = d base / d rho_s; m = rho_w - rho_l. first and second are the
options that the objective declares, in its order; an argument that a formula does not use is `_`
or `__`. What each is, and its paper: `treg.losses`.

An objective without a function here is computed in PyTorch.

Triton has no log1p, expm1 and sigmoid of float64 that all backends and the interpreter share, so
they are built here from exp and log.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _log1p(x):
    """log(1 + x) for x > -1, exact also where 1 + x rounds: the classical correction by what was
    really added.
    """
    added = (1.0 + x) - 1.0
    return tl.where(added == 0.0, x, tl.log(1.0 + x) * (x / tl.where(added == 0.0, 1.0, added)))


@triton.jit
def _expm1(x):
    """exp(x) - 1 for -1 <= x <= 0, likewise."""
    u = tl.exp(x)
    return tl.where(u == 1.0, x, (u - 1.0) * (x / tl.where(u == 1.0, 1.0, tl.log(u))))


@triton.jit
def _softplus(x):
    """log(1 + exp x) = -log sigmoid(-x)."""
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _dpo(rho_w, rho_l, beta, eps, _):
    """-(1 - eps) log sigmoid(m) - eps log sigmoid(-m)."""
    m = rho_w - rho_l
    slope = eps * _sigmoid(m) - (1.0 - eps) * _sigmoid(-m)
    return (1.0 - eps) * _softplus(-m) + eps * _softplus(m), slope, -slope


@triton.jit
def _simpo(rho_w, rho_l, beta, gamma, eps):
    """_dpo at m - gamma."""
    return _dpo(rho_w - gamma, rho_l, beta, eps, 0.0)


@triton.jit
def _ipo(rho_w, rho_l, beta, _, __):
    """(m / beta - 1 / (2 beta))^2."""
    x = (rho_w - rho_l) / beta - 0.5 / beta
    slope = 2.0 * x / beta
    return x * x, slope, -slope


@triton.jit
def _hinge(rho_w, rho_l, beta, _, __):
    """max(0, 1 - m)."""
    x = 1.0 - (rho_w - rho_l)
    slope = tl.where(x <= 0.0, 0.0, -1.0)
    return tl.where(x <= 0.0, 0.0, x), slope, -slope


@triton.jit
def _robust(rho_w, rho_l, beta, eps, _):
    """(-(1 - eps) log sigmoid(m) + eps log sigmoid(-m)) / (1 - 2 eps)."""
    m = rho_w - rho_l
    value = (1.0 - eps) * _softplus(-m) - eps * _softplus(m)
    slope = -((1.0 - eps) * _sigmoid(-m) + eps * _sigmoid(m)) / (1.0 - 2.0 * eps)
    return value / (1.0 - 2.0 * eps), slope, -slope


@triton.jit
def _exo_pair(rho_w, rho_l, beta, eps, _):
    """p (log p - log(1 - eps)) + q (log q - log eps), p = sigmoid(m) = 1 - q; d p / d m = p q, log
    p - log q = m.
    """
    m = rho_w - rho_l
    p, q = _sigmoid(m), _sigmoid(-m)
    log_rest, log_eps = _log1p(-eps), tl.log(eps)
    slope = p * q * (m - log_rest + log_eps)
    return p * (-_softplus(-m) - log_rest) + q * (-_softplus(m) - log_eps), slope, -slope


@triton.jit
def _nca_pair(rho_w, rho_l, beta, _, __):
    """-log sigmoid(rho_w) - 0.5 log sigmoid(-rho_w) - 0.5 log sigmoid(-rho_l)."""
    value = _softplus(-rho_w) + 0.5 * _softplus(rho_w) + 0.5 * _softplus(rho_l)
    return value, 0.5 * _sigmoid(rho_w) - _sigmoid(-rho_w), 0.5 * _sigmoid(rho_l)


@triton.jit
def _bco_pair(rho_w, rho_l, beta, _, __):
    """-log sigmoid(rho_w) - log sigmoid(-rho_l)."""
    return _softplus(-rho_w) + _softplus(rho_l), -_sigmoid(-rho_w), _sigmoid(rho_l)


@triton.jit
def _apo_zero(rho_w, rho_l, beta, _, __):
    """sigmoid(-rho_w) + sigmoid(rho_l)."""
    value = _sigmoid(-rho_w) + _sigmoid(rho_l)
    return value, -_sigmoid(rho_w) * _sigmoid(-rho_w), _sigmoid(rho_l) * _sigmoid(-rho_l)


@triton.jit
def _apo_down(rho_w, rho_l, beta, _, __):
    """sigmoid(rho_w) + sigmoid(-m)."""
    m = rho_w - rho_l
    slope_l = _sigmoid(m) * _sigmoid(-m)
    return _sigmoid(rho_w) + _sigmoid(-m), _sigmoid(rho_w) * _sigmoid(-rho_w) - slope_l, slope_l


@triton.jit
def _sppo_hard(rho_w, rho_l, beta, _, __):
    """(rho_w / beta - 1 / (2 beta))^2 + (rho_l / beta + 1 / (2 beta))^2."""
    x, y = (rho_w - 0.5) / beta, (rho_l + 0.5) / beta
    return x * x + y * y, 2.0 * x / beta, 2.0 * y / beta


@triton.jit
def _discopop(rho_w, rho_l, beta, tau, _):
    """-(1 - g) log sigmoid(m) + g exp(-m), g = sigmoid(x), x = m / tau; d g / d m = g (1 - g) /
    tau.
    """
    m = rho_w - rho_l
    x = m / tau
    decay = tl.exp(-_softplus(-x) - m)  # g exp(-m), where exp(-m) alone would overflow
    shut = _sigmoid(-x)
    slope = -shut * (_sigmoid(x) * _softplus(-m) / tau + _sigmoid(-m)) + decay * (shut / tau - 1.0)
    return shut * _softplus(-m) + decay, slope, -slope


@triton.jit
def _log_odds(x):
    """x - log(1 - exp x) at most at x = -1e-12 (the odds of a certain answer are infinite), and 1 /
    (1 - exp x).
    """
    clamped = x > -1e-12
    x = tl.where(clamped, -1e-12, x)
    near = x > -LN2  # each side is exact on its side
    e = tl.exp(x)
    rest = tl.where(near, -_expm1(tl.where(near, x, -0.5)), 1.0 - e)
    log_rest = tl.where(near, tl.log(rest), _log1p(tl.where(near, -0.5, -e)))
    return x - log_rest, tl.where(clamped, 0.0, 1.0 / rest)


@triton.jit
def _orpo(rho_w, rho_l, beta, _, __):
    """-beta log sigmoid(odds_w - odds_l), odds_s the log-odds of rho_s / beta."""
    odds_w, rate_w = _log_odds(rho_w / beta)
    odds_l, rate_l = _log_odds(rho_l / beta)
    gap = odds_w - odds_l
    return beta * _softplus(-gap), -_sigmoid(-gap) * rate_w, _sigmoid(-gap) * rate_l


BASES = {
    "dpo": _dpo,
    "sigmoid": _dpo,
    "simpo": _simpo,
    "ipo": _ipo,
    "hinge": _hinge,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "sppo_hard": _sppo_hard,
    "discopop": _discopop,
    "orpo": _orpo,
    "cpo": _dpo,
}
