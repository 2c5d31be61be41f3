"""The executable specification: dense, plain PyTorch, one line a formula; float64 in, float64 out.

Every op of `treg.ops` and every objective of `treg.losses` is tested against this file, which
shares no code with them. It holds [N, V] logits and loops over pairs: it is the oracle and the
baseline, not a way to train.

N rows, D hidden size, V vocabulary, B pairs, S = 2B sequences (the B chosen ones first), T padded
length. y_t is the target of row t, lp_t its log-prob.
"""

import itertools
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from treg.results import LinearKL, LinearLogprobs, TRegLoss

LENGTH_NORMALISED = ("simpo", "ipo", "orpo")  # means over tokens in place of sums
WITH_LIKELIHOOD = ("orpo", "cpo")  # the chosen answer's mean negative log-likelihood is added
OF_BOTH_REWARDS = ("nca_pair", "bco_pair", "apo_zero", "apo_down", "sppo_hard", "orpo", "figa")
# the objectives that give tokens credit, and the one that they are on their weighted sums
AS_DPO = ("tgdpo", "tis_dpo", "d2po", "messagewise", "tdpo1", "tdpo2", "sparsepo")
AS_SIMPO = ("sepo", "confpo")
OWN_CREDIT = (*AS_DPO, *AS_SIMPO, "figa", "bfpo")  # T-REG stands on them only on request
DEFAULTS = {
    **{"strength": 0.5, "low": 0.7, "high": 1.3, "clamp": 0.0, "keep": 0.3},
    **{"decay": 0.98, "baseline": 0.0, "added": 1.0, "removed": 0.5, "gate": 0.6, "shift": 0.5},
    "kl_weight": 0.5,
}


# -- the head


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = (),
) -> LinearLogprobs:
    """lp_t = z_t[y_t] - logsumexp_v z_t[v],  z = cap * tanh(s * (h W^T + b) / cap) / temperature.

    Shapes and meaning as in `treg.ops.linear_logprobs`. 16-bit logits are rounded once by the
    matmul, then float32.
    """
    is_scored = target != ignore_index
    y = torch.where(is_scored, target, 0).unsqueeze(-1)

    z = _logits(hidden, weight, bias, logit_scale, softcap, temperature)
    log_p = z.log_softmax(-1)
    logprobs = log_p.gather(-1, y).squeeze(-1)

    statistics = {}
    for name in outputs:
        value = _statistic(name, z, log_p, y).detach()
        statistics[name] = torch.where(is_scored, value, torch.zeros_like(value))
    return LinearLogprobs(
        torch.where(is_scored, logprobs, torch.zeros_like(logprobs)), **statistics
    )


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    target: Tensor | None = None,
    direction: str = "forward",
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ref_logit_scale: float | None = None,
    ref_softcap: float | str | None = "same",
    ignore_index: int = -100,
) -> LinearKL:
    """KL_t = sum_v q_tv log(q_tv / p_tv), or sum_v p_tv log(p_tv / q_tv) with direction="reverse".

    p is the policy's softmax, q the reference's. Words of probability 0 in the first of the two add
    nothing. Shapes and meaning as in `treg.ops.linear_kl`.
    """
    ref_scale = logit_scale if ref_logit_scale is None else ref_logit_scale
    ref_cap = softcap if isinstance(ref_softcap, str) else ref_softcap
    z = _logits(hidden, weight, bias, logit_scale, softcap, temperature)
    ref_z = _logits(ref_hidden, ref_weight, ref_bias, ref_scale, ref_cap, temperature).detach()
    log_p, log_q = z.log_softmax(-1), ref_z.log_softmax(-1)

    first, second = (log_q, log_p) if direction == "forward" else (log_p, log_q)
    zero = torch.zeros_like(first)
    has_mass = first > -math.inf
    ratio = torch.where(has_mass, first, zero) - torch.where(has_mass, second, zero)
    kl = (first.exp() * ratio).sum(-1)
    if target is None:
        return LinearKL(kl)

    is_scored = target != ignore_index
    y = torch.where(is_scored, target, 0).unsqueeze(-1)
    rows = (kl, log_p.gather(-1, y).squeeze(-1), log_q.gather(-1, y).squeeze(-1))
    return LinearKL(*(torch.where(is_scored, x, torch.zeros_like(x)) for x in rows))


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """z [..., V], float32 or float64."""
    z = hidden @ weight.T
    if z.dtype != torch.float64:
        z = z.float()
    if bias is not None:
        z = z + bias.to(z.dtype)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def _statistic(name: str, z: Tensor, log_p: Tensor, y: Tensor) -> Tensor:
    """One of `outputs`, for every row."""
    if name == "lse":
        return z.logsumexp(-1)
    if name == "entropy":
        return torch.special.entr(log_p.exp()).sum(-1)  # entr(p) = -p log p
    if name == "mean_logit":
        return z.mean(-1)
    if name == "is_top1":
        return z.gather(-1, y).squeeze(-1) >= z.amax(-1)
    if name == "log_sum_sq_probs":
        return (2 * log_p).logsumexp(-1)
    raise ValueError(f"outputs: unknown {name!r}")


# -- the loss of pairs


def fused_treg_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_rewards: Tensor | None,
    ref_logps: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.1,
    alpha: float | None = None,
    loss_type: str = "dpo",
    gamma: float = 0.0,
    scalars: Mapping[str, float] | None = None,
    label_smoothing: float = 0.0,
    weighting: str = "gradient",
    token_weights: Tensor | None = None,
    kl: Tensor | None = None,
    kl_weights: Tensor | None = None,
    pair_values: Mapping[str, Tensor] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    **head,
) -> TRegLoss:
    """T-REG (arXiv 2412.02685, Eq. 1-3) over any base objective, pair by pair.

        rho_s   = beta * sum_t ( u_t (lp_t - ref_t) + v_t kl_t )  implicit reward of a sequence
        L_reg,s = -sum_t beta * rhat_t * lp_t                  regularizer of a sequence
        w_s     = |d base / d rho_s|, a constant; 1 with weighting="static"
        L       = base(rho_w, rho_l) + alpha * (w_w * L_reg,w + w_l * L_reg,l)

    Sums become means for the length-normalised objectives; orpo and cpo add the chosen answer's
    mean negative log-likelihood. Arguments as in `treg.ops.fused_treg_loss`; kl: like target, the
    KL divergence of each token, which may carry a gradient.
    """
    scores = linear_logprobs(hidden, weight, target, ignore_index=ignore_index, **head)
    lp = scores.logprobs.flatten()
    rows = _scored_rows(target, cu_seqlens, ignore_index)
    pairs = len(rows) // 2

    ref, ref_sum = _reference(ref_logps, target, lp, len(rows))
    given_u = _numbers_or(1.0, token_weights, lp)
    given_v = given_u if kl_weights is None else _numbers_or(0.0, kl_weights, lp)
    kl = _numbers_or(0.0, kl, lp)
    rhat = _numbers_or(0.0, token_rewards, lp)
    tau = 0.01 if loss_type == "bfpo" else 0.05
    options = {**DEFAULTS, "tau": tau, "gamma": gamma, "eps": label_smoothing, **(scalars or {})}
    if alpha is None:
        alpha = 0.0 if loss_type in OWN_CREDIT else 0.25

    own_u, own_v = torch.zeros_like(lp), torch.zeros_like(lp)
    for s, r in enumerate(rows):
        own_u[r], own_v[r] = _credit(loss_type, s < pairs, lp[r].detach(), rhat[r], options)
    u, v = own_u * given_u, own_v * given_v

    sums, rho, reg, kept = [], [], [], []  # of each sequence
    for s, r in enumerate(rows):
        lp_s, kl_s = lp[r], kl[r]
        if loss_type == "tdpo2" and s < pairs:
            kl_s = kl_s.detach()
        norm = _norm(loss_type, own_u, r, rows[(s + pairs) % len(rows)])
        sums.append(lp_s.sum())
        ratios = (u[r] * (lp_s - ref[r])).sum() - ref_sum[s]
        rho.append(beta * (ratios + (v[r] * kl_s).sum()) / norm)
        reg.append(-(beta * rhat[r] * lp_s).sum() / norm)
        kept.append((u[r] != 0).sum())

    def base_of(b: int) -> Callable[[Tensor, Tensor], Tensor]:
        of_pair = {name: float(x[b]) for name, x in (pair_values or {}).items()}
        return lambda rho_w, rho_l: _base(loss_type, rho_w, rho_l, beta, options | of_pair)

    losses, weights_w, weights_l = [], [], []  # of each pair
    for b in range(pairs):
        w, l = b, pairs + b  # the pair's winner and loser among the sequences
        weight_w, weight_l, base = 1.0, 1.0, base_of(b)
        if weighting != "static":
            slope_w, slope_l = _slopes(base, rho[w], rho[l])
            weight_w, weight_l = abs(slope_w), abs(slope_l)
        loss = base(rho[w], rho[l]) + alpha * (weight_w * reg[w] + weight_l * reg[l])
        if loss_type in WITH_LIKELIHOOD:
            loss = loss - lp[rows[w]].mean()
        losses.append(loss)
        weights_w.append(weight_w)
        weights_l.append(weight_l)

    # an objective of rho_w - rho_l alone has one weight a pair, the others one a sequence
    weights = weights_w + weights_l if loss_type in OF_BOTH_REWARDS else weights_w
    sums, rho, reg = (torch.stack(x).detach() for x in (sums, rho, reg))
    return TRegLoss(
        _reduced(torch.stack(losses), reduction),
        sums[:pairs],
        sums[pairs:],
        rho[:pairs],
        rho[pairs:],
        reg[:pairs] + reg[pairs:],
        torch.tensor(weights, dtype=lp.dtype, device=lp.device),
        torch.stack(kept).to(lp.dtype),
        scores.logprobs.detach(),
        *scores[1:],
    )


def _credit(
    loss_type: str, chosen: bool, lp: Tensor, rhat: Tensor, options: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """u_t and v_t of the n tokens of a sequence, without weights that the data give."""
    sign = 1 if chosen else -1
    u, v, n = torch.ones_like(lp), torch.zeros_like(lp), len(lp)
    if loss_type == "tgdpo":
        u = 1 + sign * options["strength"] * rhat
    if loss_type == "tis_dpo":
        u = torch.stack([_importance(sign * rhat, t, options) for t in range(n)])
    if loss_type == "sepo":
        best_first = sorted(range(n), key=lambda t: (-sign * float(rhat[t]), t))
        kept = best_first[: _kept_of(n, options["keep"])]
        u = torch.tensor([float(t in kept) for t in range(n)])
    if loss_type == "d2po":
        u = torch.tensor([options["decay"] ** (t + 1) for t in range(n)], dtype=torch.float64)
    if loss_type == "confpo":
        u = lp.exp() <= lp.exp().mean() * (1 + 1e-12)
    if loss_type == "messagewise":
        u = sign * (rhat - options["baseline"]) > 0
    if loss_type == "figa":
        u = options["added"] * rhat * (rhat > 0)
        if not chosen:
            u = options["removed"] * rhat * (rhat < 0) * (-lp <= options["gate"])
    if loss_type in ("tdpo1", "sparsepo"):
        v = torch.ones_like(lp)
    if loss_type == "tdpo2":
        v = torch.full_like(lp, options["kl_weight"])
    return u.to(lp), v


def _importance(score: Tensor, t: int, options: Mapping[str, float]) -> Tensor:
    """TIS-DPO's weight of token t among n whose scores these are."""
    n = len(score)
    low, high, clamp = options["low"], options["high"], options["clamp"]
    below, equal = (score < score[t]).sum().to(score), (score == score[t]).sum().to(score)
    share = (below + (equal - 1) / 2) / (n - 1) if n > 1 else 0.5 * equal
    if clamp > 0:
        share = (score[t].clamp(-clamp, clamp) + clamp) / (2 * clamp)
    return low + (high - low) * share


def _kept_of(n: int, keep: float) -> int:
    """SePO's number of tokens."""
    return min(max(1, math.ceil(keep * n - 1e-9)), n)


def _norm(loss_type: str, u: Tensor, rows: Tensor, other_rows: Tensor) -> int:
    """What a sequence's sum is divided by; other_rows: of the pair's other sequence."""
    if loss_type in LENGTH_NORMALISED:
        return len(rows)
    if loss_type in AS_SIMPO:
        return max(1, int((u[rows] != 0).sum()))
    if loss_type == "figa":
        return max(1, int((u[rows] != 0).sum() + (u[other_rows] != 0).sum()))
    return 1


def _scored_rows(target: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> list[Tensor]:
    """The numbers of the scored rows of each sequence, among target.flatten()."""
    if cu_seqlens is None:
        sequences, length = target.shape
        ends = [s * length for s in range(sequences + 1)]
    else:
        ends = cu_seqlens.tolist()
    is_scored = target.flatten() != ignore_index
    return [
        first + torch.nonzero(is_scored[first:last]).flatten()
        for first, last in itertools.pairwise(ends)
    ]


def _reference(
    ref_logps: Tensor | None, target: Tensor, lp: Tensor, sequences: int
) -> tuple[Tensor, Tensor]:
    """Reference log-probs of each row [N] and, of each sequence [2B], the sum that goes with them.

    They are given either per token or as sums; what is not given is 0.
    """
    no_rows, no_sums = torch.zeros_like(lp), lp.new_zeros(sequences)
    if ref_logps is None:
        return no_rows, no_sums
    if ref_logps.shape == target.shape:
        return ref_logps.flatten().to(lp.dtype), no_sums
    return no_rows, ref_logps.to(lp.dtype)


def _numbers_or(default: float, given: Tensor | None, lp: Tensor) -> Tensor:
    """A number a row [N], in lp's dtype."""
    if given is None:
        return torch.full_like(lp, default)
    return given.flatten().to(lp.dtype)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.mean()
    raise ValueError(f"reduction: unknown {reduction!r}")


# -- the objectives


def _slopes(
    base: Callable[[Tensor, Tensor], Tensor], rho_w: Tensor, rho_l: Tensor
) -> tuple[float, float]:
    """d base / d rho_w and d base / d rho_l, by autograd in float64."""
    w = rho_w.detach().double().requires_grad_()
    l = rho_l.detach().double().requires_grad_()
    with torch.enable_grad():
        slope_w, slope_l = torch.autograd.grad(base(w, l), (w, l))
    return float(slope_w), float(slope_l)


def _base(
    loss_type: str, rho_w: Tensor, rho_l: Tensor, beta: float, options: Mapping[str, float]
) -> Tensor:
    """The objective of one pair. Papers: `docs/methods.md`."""
    if loss_type == "figa":
        return -(rho_w + rho_l) / beta
    if loss_type in OF_BOTH_REWARDS:
        return _of_both_rewards(loss_type, rho_w, rho_l, beta)
    return _of_margin(loss_type, rho_w - rho_l, beta, options)


def _of_margin(loss_type: str, m: Tensor, beta: float, options: Mapping[str, float]) -> Tensor:
    """Objectives of the margin m = rho_w - rho_l alone; eps is the label smoothing."""
    logsigmoid, sigmoid = F.logsigmoid, torch.sigmoid
    gamma, eps, tau = options["gamma"], options["eps"], options["tau"]
    if loss_type == "bfpo":
        safe = 1.5 * options["chosen_safe"] - 0.5 * options["rejected_safe"]
        return (m / beta - (safe - options["shift"]) / options["tau"]) ** 2
    if loss_type in ("dpo", "sigmoid", "cpo", *AS_DPO):
        return -(1 - eps) * logsigmoid(m) - eps * logsigmoid(-m)
    if loss_type in ("simpo", *AS_SIMPO):
        return -(1 - eps) * logsigmoid(m - gamma) - eps * logsigmoid(gamma - m)
    if loss_type == "ipo":
        return (m / beta - 1 / (2 * beta)) ** 2
    if loss_type == "hinge":
        return F.relu(1 - m)
    if loss_type == "robust":
        return (-(1 - eps) * logsigmoid(m) + eps * logsigmoid(-m)) / (1 - 2 * eps)
    if loss_type == "exo_pair":
        p = torch.stack([sigmoid(m), sigmoid(-m)])
        q = torch.tensor([1 - eps, eps], dtype=p.dtype, device=p.device)
        return (p * (p / q).log()).sum()
    if loss_type == "discopop":
        gate = sigmoid(m / tau)
        return -logsigmoid(m) * (1 - gate) + torch.exp(-m) * gate
    raise ValueError(f"loss_type: unknown {loss_type!r}")


def _of_both_rewards(loss_type: str, rho_w: Tensor, rho_l: Tensor, beta: float) -> Tensor:
    """Objectives of the two rewards of a pair."""
    logsigmoid, sigmoid = F.logsigmoid, torch.sigmoid
    if loss_type == "nca_pair":
        return -logsigmoid(rho_w) - 0.5 * logsigmoid(-rho_w) - 0.5 * logsigmoid(-rho_l)
    if loss_type == "bco_pair":
        return -logsigmoid(rho_w) - logsigmoid(-rho_l)
    if loss_type == "apo_zero":
        return (1 - sigmoid(rho_w)) + sigmoid(rho_l)
    if loss_type == "apo_down":
        return sigmoid(rho_w) + 1 - sigmoid(rho_w - rho_l)
    if loss_type == "sppo_hard":
        return (rho_w / beta - 0.5 / beta) ** 2 + (rho_l / beta + 0.5 / beta) ** 2
    if loss_type == "orpo":
        p_w, p_l = torch.exp(rho_w / beta), torch.exp(rho_l / beta)
        log_odds_w = torch.log(p_w / (1 - p_w))
        log_odds_l = torch.log(p_l / (1 - p_l))
        return -beta * logsigmoid(log_odds_w - log_odds_l)
    raise ValueError(f"loss_type: unknown {loss_type!r}")
