"""The executable specification: dense, plain PyTorch, one line a formula; float64 in, float64 out.

Every op of `treg.ops` and every objective of `treg.losses` is tested against this file, which
shares no code with them. It holds [N, V] logits and loops over pairs: it is the oracle and the
baseline, not a way to train.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from treg.results import LinearLogprobs, TRegLoss


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
    scored = target != ignore_index
    y = torch.where(scored, target, 0).unsqueeze(-1)
    z = hidden @ weight.T
    z = z if z.dtype == torch.float64 else z.float()
    if bias is not None:
        z = z + bias.to(z.dtype)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    logp = z.log_softmax(-1)
    zero = z.new_zeros(())
    extra = {
        "lse": lambda: z.logsumexp(-1),
        "entropy": lambda: torch.special.entr(logp.exp()).sum(-1),
        "mean_logit": lambda: z.mean(-1),
        "is_top1": lambda: z.gather(-1, y).squeeze(-1) >= z.amax(-1),
        "log_sum_sq_probs": lambda: (2 * logp).logsumexp(-1),
    }
    found = {name: extra[name]().detach() for name in outputs}
    found = {
        n: x & scored if x.dtype == torch.bool else torch.where(scored, x, zero)
        for n, x in found.items()
    }
    return LinearLogprobs(torch.where(scored, logp.gather(-1, y).squeeze(-1), zero), **found)


def fused_treg_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_rewards: Tensor | None,
    ref_logps: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 0.25,
    loss_type: str = "dpo",
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    weighting: str = "gradient",
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    **head,
) -> TRegLoss:
    """T-REG (arXiv 2412.02685, Eq. 1-3) over any base objective, pair by pair; arguments as in
    `treg.ops`.
    """
    scores = linear_logprobs(hidden, weight, target, ignore_index=ignore_index, **head)
    logps = scores.logprobs
    if cu_seqlens is None:
        rows = [
            torch.nonzero(t != ignore_index).flatten() + i * target.shape[1]
            for i, t in enumerate(target)
        ]
    else:
        ends = cu_seqlens.tolist()
        rows = [
            a + torch.nonzero(target[a:b] != ignore_index).flatten()
            for a, b in itertools.pairwise(ends)
        ]
    lp, count = logps.flatten(), len(rows) // 2

    def of(x: Tensor, s: int) -> Tensor:
        return x.flatten()[rows[s]].to(lp.dtype)

    per_token_ref = ref_logps is not None and ref_logps.shape == target.shape
    mean = loss_type in ("simpo", "ipo", "orpo")
    sums, rho, reg = [], [], []
    for s in range(2 * count):
        x = of(lp, s)
        sums.append(x.sum())
        d = x - of(ref_logps, s) if per_token_ref else x
        u = torch.ones_like(x) if token_weights is None else of(token_weights, s)
        r = (u * d).sum()
        if ref_logps is not None and not per_token_ref:
            r = r - ref_logps[s].to(x.dtype)
        rho.append(beta * r / (len(x) if mean else 1))
        rhat = torch.zeros_like(x) if token_rewards is None else of(token_rewards, s)
        reg.append(-(beta * rhat * x).sum() / (len(x) if mean else 1))

    losses, weights = [], []
    for b in range(count):
        w, l = b, count + b
        base, grads = _base(loss_type, rho[w], rho[l], beta, gamma, label_smoothing)
        if weighting == "static":
            grads = [1.0, 1.0]
        weights.append([abs(float(g)) for g in grads])
        loss = base + alpha * (weights[b][0] * reg[w] + weights[b][1] * reg[l])
        if loss_type in ("orpo", "cpo"):
            loss = loss - of(lp, w).mean()
        losses.append(loss)

    loss = torch.stack(losses)
    loss = {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[reduction]()
    ws = torch.tensor(weights, dtype=lp.dtype, device=lp.device)
    two = loss_type in ("nca_pair", "bco_pair", "apo_zero", "apo_down", "sppo_hard", "orpo")
    sums, rho, reg = (torch.stack(x).detach() for x in (sums, rho, reg))
    return TRegLoss(
        loss,
        sums[:count],
        sums[count:],
        rho[:count],
        rho[count:],
        reg[:count] + reg[count:],
        ws.T.flatten() if two else ws[:, 0],
        logps.detach(),
        *scores[1:],
    )


def _base(loss_type, rho_w, rho_l, beta, gamma, eps):
    """The objective of one pair, and its gradient with respect to the two implicit rewards."""
    w, l = rho_w.detach().double().requires_grad_(), rho_l.detach().double().requires_grad_()
    with torch.enable_grad():
        grads = torch.autograd.grad(_formula(loss_type, w, l, beta, gamma, eps), (w, l))
    return _formula(loss_type, rho_w, rho_l, beta, gamma, eps), grads


def _formula(loss_type, w, l, beta, gamma, eps):
    ls, sig, m = F.logsigmoid, torch.sigmoid, w - l
    if loss_type in ("dpo", "sigmoid", "cpo"):
        return -(1 - eps) * ls(m) - eps * ls(-m)
    if loss_type == "simpo":
        return -(1 - eps) * ls(m - gamma) - eps * ls(gamma - m)
    if loss_type == "ipo":
        return (m / beta - 1 / (2 * beta)) ** 2
    if loss_type == "hinge":
        return F.relu(1 - m)
    if loss_type == "robust":
        return (-(1 - eps) * ls(m) + eps * ls(-m)) / (1 - 2 * eps)
    if loss_type == "exo_pair":
        p = torch.stack([sig(m), sig(-m)])
        q = torch.tensor([1 - eps, eps], dtype=p.dtype, device=p.device)
        return (p * (p / q).log()).sum()
    if loss_type == "nca_pair":
        return -ls(w) - 0.5 * ls(-w) - 0.5 * ls(-l)
    if loss_type == "bco_pair":
        return -ls(w) - ls(-l)
    if loss_type == "apo_zero":
        return (1 - sig(w)) + sig(l)
    if loss_type == "apo_down":
        return sig(w) + 1 - sig(w - l)
    if loss_type == "sppo_hard":
        return (w / beta - 0.5 / beta) ** 2 + (l / beta + 0.5 / beta) ** 2
    if loss_type == "discopop":
        gate = sig(m / 0.05)
        return -ls(m) * (1 - gate) + torch.exp(-m) * gate
    if loss_type == "orpo":
        p, q = torch.exp(w / beta), torch.exp(l / beta)
        return -beta * ls(torch.log(p / (1 - p)) - torch.log(q / (1 - q)))
    raise ValueError(f"loss_type: unknown {loss_type!r}")
