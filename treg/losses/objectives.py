"""Preference objectives as pure functions of per-token log-probs, and T-REG over any of them.

B pairs, S = 2B sequences, chosen first. rho_s is the implicit reward of sequence s:

    rho_s = beta * sum_t u_t * (lp_t - ref_t)            u_t = 1 unless token_weights are given
    rho_s = beta * mean_t u_t * (lp_t - ref_t)           length-normalised objectives (simpo, ipo, orpo)
    m     = rho_w - rho_l

The functions in OBJECTIVES map (rho_w, rho_l) [B] to a loss [B]; `treg_loss` adds the regularizer.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from treg.checks import (
    check_floating,
    check_lengths,
    check_number,
    check_pair_inputs,
    check_sequences,
    check_shape,
    check_tensor,
    values_visible,
)
from treg.losses.segments import segment_sum
from treg.results import PairLoss

DISCOPOP_TAU = 0.05


def dpo(rho_w: Tensor, rho_l: Tensor, o: "LossOptions") -> Tensor:
    """-(1 - eps) log sigmoid(m) - eps log sigmoid(-m).   DPO, arXiv 2305.18290 Eq. 7; eps: conservative DPO."""
    m, eps = rho_w - rho_l, o.label_smoothing
    return -(1 - eps) * F.logsigmoid(m) - eps * F.logsigmoid(-m)


def simpo(rho_w: Tensor, rho_l: Tensor, o: "LossOptions") -> Tensor:
    """dpo at m - gamma, no reference, rho a mean.   SimPO, arXiv 2405.14734 Eq. 6."""
    return dpo(rho_w - o.gamma, rho_l, o)


def ipo(rho_w: Tensor, rho_l: Tensor, o: "LossOptions") -> Tensor:
    """(m / beta - 1 / (2 beta))^2.   IPO, arXiv 2310.12036 Eq. 17. Differs: rho is a mean over tokens, as in TRL."""
    return ((rho_w - rho_l) / o.beta - 1 / (2 * o.beta)) ** 2


def hinge(rho_w: Tensor, rho_l: Tensor, o: "LossOptions") -> Tensor:
    """max(0, 1 - m).   SLiC, arXiv 2305.10425, on the DPO margin."""
    return torch.relu(1 - (rho_w - rho_l))


def robust(rho_w: Tensor, rho_l: Tensor, o: "LossOptions") -> Tensor:
    """(-(1 - eps) log sigmoid(m) + eps log sigmoid(-m)) / (1 - 2 eps).   Robust DPO, arXiv 2403.00409."""
    m, eps = rho_w - rho_l, o.label_smoothing
    return (-(1 - eps) * F.logsigmoid(m) + eps * F.logsigmoid(-m)) / (1 - 2 * eps)


def exo_pair(rho_w: Tensor, rho_l: Tensor, o: "LossOptions") -> Tensor:
    """KL of (sigmoid(m), sigmoid(-m)) from (1 - eps, eps), eps > 0.   EXO, arXiv 2402.00856 Eq. 16."""
    m, eps = rho_w - rho_l, o.label_smoothing
    return torch.sigmoid(m) * (F.logsigmoid(m) - math.log1p(-eps)) + torch.sigmoid(-m) * (
        F.logsigmoid(-m) - math.log(eps)
    )


def nca_pair(rho_w: Tensor, rho_l: Tensor, o: "LossOptions") -> Tensor:
    """-log sigmoid(rho_w) - 0.5 log sigmoid(-rho_w) - 0.5 log sigmoid(-rho_l).   NCA, arXiv 2402.05369."""
    return -F.logsigmoid(rho_w) - 0.5 * F.logsigmoid(-rho_w) - 0.5 * F.logsigmoid(-rho_l)


def bco_pair(rho_w: Tensor, rho_l: Tensor, o: "LossOptions") -> Tensor:
    """-log sigmoid(rho_w) - log sigmoid(-rho_l).   BCO, arXiv 2404.04656. Differs: no reward shift, as in TRL."""
    return -F.logsigmoid(rho_w) - F.logsigmoid(-rho_l)


def apo_zero(rho_w: Tensor, rho_l: Tensor, o: "LossOptions") -> Tensor:
    """1 - sigmoid(rho_w) + sigmoid(rho_l).   APO-zero, arXiv 2408.06266 Eq. 7."""
    return torch.sigmoid(-rho_w) + torch.sigmoid(rho_l)


def apo_down(rho_w: Tensor, rho_l: Tensor, o: "LossOptions") -> Tensor:
    """sigmoid(rho_w) + 1 - sigmoid(m).   APO-down, arXiv 2408.06266 Eq. 8."""
    return torch.sigmoid(rho_w) + torch.sigmoid(rho_l - rho_w)


def sppo_hard(rho_w: Tensor, rho_l: Tensor, o: "LossOptions") -> Tensor:
    """(rho_w / beta - 1 / (2 beta))^2 + (rho_l / beta + 1 / (2 beta))^2.   SPPO, arXiv 2405.00675 Eq. 4.7, P = 1."""
    half = 1 / (2 * o.beta)
    return (rho_w / o.beta - half) ** 2 + (rho_l / o.beta + half) ** 2


def discopop(rho_w: Tensor, rho_l: Tensor, o: "LossOptions") -> Tensor:
    """-(1 - g) log sigmoid(m) + g exp(-m), g = sigmoid(m / 0.05).   DiscoPOP, arXiv 2406.08414 Eq. 5."""
    m = rho_w - rho_l
    gate = torch.sigmoid(m / DISCOPOP_TAU)
    # gate * exp(-m), where exp(-m) alone would overflow
    return -(1 - gate) * F.logsigmoid(m) + torch.exp(F.logsigmoid(m / DISCOPOP_TAU) - m)


def orpo(rho_w: Tensor, rho_l: Tensor, o: "LossOptions") -> Tensor:
    """-beta log sigmoid(odds_w - odds_l), odds_s = x - log(1 - exp x) at x = rho_s / beta, a mean
    log-prob;
    `treg_loss` adds the chosen answer's mean negative log-likelihood.   ORPO, arXiv 2403.07691 Eq. 6-7."""
    return -o.beta * F.logsigmoid(_log_odds(rho_w / o.beta) - _log_odds(rho_l / o.beta))


def _log_odds(logp: Tensor) -> Tensor:
    logp = logp.clamp(max=-1e-12)  # the odds of a certain answer are infinite
    near_zero = logp > -math.log(
        2
    )  # each branch is exact on its side; the other's input is kept finite for autograd
    log1m = torch.where(
        near_zero,
        torch.log(-torch.expm1(torch.where(near_zero, logp, -1.0))),
        torch.log1p(-torch.exp(torch.where(near_zero, -1.0, logp))),
    )
    return logp - log1m


@dataclass(frozen=True)
class Objective:
    """An objective and what a caller must know about it."""

    fn: Callable[[Tensor, Tensor, "LossOptions"], Tensor]
    margin_only: bool = True  # depends on rho_w - rho_l alone, so one weight a pair
    decreasing: bool = (
        False  # d loss / d m <= 0 everywhere (at label_smoothing 0 where that is an option)
    )
    length_normalised: bool = False
    reference_free: bool = False
    nll: bool = False  # the chosen answer's mean negative log-likelihood is added
    smoothing: bool = False  # label_smoothing is an option


OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective(dpo, decreasing=True, smoothing=True),
    "sigmoid": Objective(dpo, decreasing=True, smoothing=True),
    "simpo": Objective(
        simpo, decreasing=True, smoothing=True, length_normalised=True, reference_free=True
    ),
    "ipo": Objective(ipo, length_normalised=True),
    "hinge": Objective(hinge, decreasing=True),
    "robust": Objective(robust, decreasing=True, smoothing=True),
    "exo_pair": Objective(exo_pair, smoothing=True),
    "nca_pair": Objective(nca_pair, margin_only=False),
    "bco_pair": Objective(bco_pair, margin_only=False),
    "apo_zero": Objective(apo_zero, margin_only=False),
    "apo_down": Objective(apo_down, margin_only=False),
    "sppo_hard": Objective(sppo_hard, margin_only=False),
    "discopop": Objective(discopop),
    "orpo": Objective(
        orpo, margin_only=False, length_normalised=True, reference_free=True, nll=True
    ),
    "cpo": Objective(dpo, decreasing=True, smoothing=True, reference_free=True, nll=True),
}


@dataclass(frozen=True)
class LossOptions:
    """The scalars of a preference loss, checked once. Defaults as in `treg.ops.fused_treg_loss`."""

    loss_type: str = "dpo"
    beta: float = 0.1
    alpha: float = 0.25
    gamma: float = 0.0
    label_smoothing: float = 0.0
    weighting: str = "gradient"

    def __post_init__(self):
        if not isinstance(self.loss_type, str) or self.loss_type not in OBJECTIVES:
            near = difflib.get_close_matches(str(self.loss_type), OBJECTIVES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"loss_type: expected one of {sorted(OBJECTIVES)}, got {self.loss_type!r}{hint}"
            )
        if self.weighting not in ("gradient", "static"):
            raise ValueError(
                f"weighting: expected 'gradient' or 'static' (w = 1), got {self.weighting!r}"
            )
        for name in ("beta", "alpha", "gamma", "label_smoothing"):
            check_number(name, getattr(self, name), positive=name == "beta")
        if self.alpha < 0:
            raise ValueError(
                f"alpha: expected a number >= 0, got {self.alpha}; 0 turns the regularizer off"
            )
        if self.gamma and self.loss_type != "simpo":
            raise ValueError(
                f"gamma: expected 0 for loss_type={self.loss_type!r} (a margin of simpo), got {self.gamma}"
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing: expected 0 <= value < 0.5, got {self.label_smoothing}"
            )
        if self.label_smoothing and not self.objective.smoothing:
            raise ValueError(
                f"label_smoothing: expected 0 for loss_type={self.loss_type!r}, got {self.label_smoothing}"
            )
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError(
                "label_smoothing: expected a number > 0 for loss_type='exo_pair', got 0"
            )

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.loss_type]

    @property
    def pair_scalar(self) -> bool:
        """Whether d loss / d lp_t = -w * s_t with s_t known before the log-probs and one unknown w
        a pair.

        With alpha > 0 the regularizer enters through w = |d base / d m|, so the sign of d base / d
        m must be known.
        """
        if not self.objective.margin_only or self.objective.nll:
            return False
        decreasing = self.objective.decreasing and (
            self.label_smoothing == 0 or self.loss_type == "robust"
        )
        return self.alpha == 0 or (decreasing and self.weighting == "gradient")


def reward_gradient(rho_w: Tensor, rho_l: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """d base / d rho_w and d base / d rho_l, each [B], detached (the likelihood term of orpo and
    cpo apart).
    """
    # a clone made outside inference mode can take a gradient, whatever mode the caller is in
    with torch.inference_mode(False), torch.enable_grad():
        w, l = (x.detach().clone().requires_grad_() for x in (rho_w, rho_l))
        return torch.autograd.grad(options.objective.fn(w, l, options).sum(), (w, l))


def treg_loss(
    logps: Tensor,
    token_rewards: Tensor | None,
    ref_logps: Tensor | None = None,
    options: LossOptions = LossOptions(),
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
) -> PairLoss:
    """T-REG over any objective, from log-probs that the caller already has; unreduced.

        L     = base(rho_w, rho_l) [+ nll(y_w)] + alpha * ( w_w L_reg(y_w) + w_l L_reg(y_l) )
        L_reg = - sum_t beta * rhat_t * lp_t                 (a mean for length-normalised objectives)
        w_s   = | d base / d rho_s |, detached               (dpo: both sigmoid(-m)); 1 with weighting="static"

    Paper: T-REG, arXiv 2412.02685, Eq. 1 (L_reg, without the part of the reference, constant in the
    policy), Eq. 2 (L), Eq. 3 (rhat).
    Differs: the paper prints w for DPO only; w_s for the other objectives, and L_reg as a mean for
    the length-normalised ones, are the extension under which T-REG's gradient stays the base
    gradient times 1 +- alpha * rhat_t. The likelihood term of orpo and cpo has no part in w.

    Args:
        logps: [2B, T], or [N] with cu_seqlens; float32 or float64, nats; chosen sequences first.
        token_rewards: like logps; rhat_t, in [-0.5, 0.5] for contrastive rewards. May be None when
            alpha is 0.
        ref_logps: [2B] sums, or like logps (needed with token_weights); None for reference-free
            objectives.
        options: loss type and its scalars.
        cu_seqlens: [2B+1] integer offsets of packed sequences.
        mask: like logps, bool; True where a token is scored. None: all are.
        token_weights: like logps, u_t >= 0 in the margin.
    Returns:
        PairLoss, in logps' dtype (computed in float64); loss [B] carries the gradient.
    Raises:
        TypeError: an argument that must be a tensor is none. ValueError: any other bad input, by
            name.
    """
    check_tensor("logps", logps)
    check_floating("logps", logps)
    count = check_sequences("logps", logps, 2, cu_seqlens)
    check_tensor("mask", mask, optional=True)
    if mask is not None:
        check_shape("mask", mask, logps.shape, "one per token")
        if mask.dtype != torch.bool:
            raise ValueError(f"mask: expected torch.bool, got {mask.dtype}")
    if not isinstance(options, LossOptions):
        raise TypeError(f"options: expected a LossOptions, got {type(options).__name__}")
    check_pair_inputs(logps, mask, token_rewards, ref_logps, token_weights, count, options.alpha)
    per_token = ref_logps is not None and ref_logps.shape == logps.shape
    check_reference(options, ref_logps, per_token=per_token, weighted=token_weights is not None)
    if values_visible(logps):
        scored = torch.ones_like(logps) if mask is None else mask.to(logps.dtype)
        check_lengths("logps" if mask is None else "mask", segment_sum(scored, cu_seqlens).tolist())
    return pair_loss(logps, token_rewards, ref_logps, options, cu_seqlens, mask, token_weights)


def pair_loss(
    logps: Tensor,
    token_rewards: Tensor | None,
    ref_logps: Tensor | None,
    options: LossOptions,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    token_weights: Tensor | None,
) -> PairLoss:
    """`treg_loss` of inputs that have been checked."""
    objective = options.objective
    per_token = ref_logps is not None and ref_logps.shape == logps.shape
    # sums over thousands of tokens, and differences of such sums, are taken in float64
    dtype, logps = logps.dtype, logps.double()
    if mask is None:
        count = segment_sum(torch.ones_like(logps), cu_seqlens)
    else:
        count = segment_sum(mask.to(logps.dtype), cu_seqlens)
        # cleaned before any product: the gradient of where(mask, x * nan, 0) would be nan
        logps, token_rewards, token_weights = (
            None if x is None else torch.where(mask, x, 0.0)
            for x in (logps, token_rewards, token_weights)
        )
        ref_logps = torch.where(mask, ref_logps, 0.0) if per_token else ref_logps

    def total(x: Tensor) -> Tensor:
        return segment_sum(x, cu_seqlens)

    sums = total(logps)
    ratio = logps
    if per_token:
        ratio = ratio - ref_logps.to(logps.dtype)
    if token_weights is not None:
        ratio = ratio * token_weights.to(logps.dtype)
    rho = sums if ratio is logps else total(ratio)
    if ref_logps is not None and not per_token:
        rho = rho - ref_logps.to(logps.dtype)
    norm = count if objective.length_normalised else 1.0
    rho_w, rho_l = (options.beta * rho / norm).chunk(2)
    sums_w, sums_l = sums.chunk(2)

    if options.weighting == "static":
        weights = torch.ones_like(rho_w) if objective.margin_only else torch.ones_like(rho)
        per_sequence = torch.ones_like(rho)
    else:
        grad_w, grad_l = reward_gradient(rho_w, rho_l, options)
        per_sequence = torch.cat([grad_w, grad_l]).abs()
        weights = grad_w.abs() if objective.margin_only else per_sequence

    loss = objective.fn(rho_w, rho_l, options)
    if objective.nll:
        loss = loss - sums_w / count.chunk(2)[0]
    reg = torch.zeros_like(rho)
    if token_rewards is not None:
        reg = -options.beta * total(token_rewards.to(logps.dtype) * logps) / norm
    if options.alpha:
        loss = loss + options.alpha * sum((per_sequence * reg).chunk(2))
    reg_loss = sum(reg.chunk(2))
    rest = (sums_w, sums_l, rho_w, rho_l, reg_loss, weights)
    return PairLoss(loss.to(dtype), *(x.detach().to(dtype) for x in rest))


def check_reference(
    options: LossOptions, ref_logps: Tensor | None, *, per_token: bool, weighted: bool
) -> None:
    """Raise ValueError where ref_logps and the objective do not go together."""
    if options.objective.reference_free:
        if ref_logps is not None:
            raise ValueError(
                f"ref_logps: expected None for the reference-free loss_type={options.loss_type!r}, got a tensor"
            )
    elif ref_logps is None:
        raise ValueError(
            f"ref_logps: expected a tensor for loss_type={options.loss_type!r}, got None"
        )
    elif weighted and not per_token:
        raise ValueError(
            "ref_logps: expected per-token log-probs beside token_weights, got per-sequence sums"
        )
