"""The preference loss of B pairs from per-token log-probs, and its gradient in each of them, in one
launch.

Sequences, chosen ones first: pair b is sequences b and B + b. Sums run over the scored tokens of a
sequence, of which there are n_s; norm_s = n_s for length-normalised objectives, else 1.

    rho_s  = beta * (sum_t u_t * (lp_t - ref_t)) / norm_s            implicit reward
    reg_s  = -beta * (sum_t rhat_t * lp_t) / norm_s
    loss   = base(rho_w, rho_l) [- sum_t lp_t / n_w, chosen] + alpha * (w_w * reg_w + w_l * reg_l)
    slope_s = d base / d rho_s          w_s = |slope_s|, a constant; 1 with weighting="static"

    coef_t = d loss / d lp_t = beta / norm_s * (slope_s * u_t - alpha * w_s * rhat_t) [- 1 / n_w,
    chosen]

Computed in float64: sums over thousands of tokens, and differences of such sums. The bases:
`bases.py`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

POINTERS = [
    "logps_ptr", "target_ptr", "rewards_ptr", "ref_ptr", "weights_ptr", "starts_ptr",
    "loss_ptr", "stats_ptr", "coef_ptr",
]  # fmt: skip


@triton.jit
def _rows(target_ptr, at, end, ignore_index, BLOCK: tl.constexpr):
    """A block of a sequence's rows: which, whether they are before its end, and whether they are
    scored.
    """
    rows = at + tl.arange(0, BLOCK)
    inside = rows < end
    scored = inside
    if target_ptr is not None:
        scored = inside & (
            tl.load(target_ptr + rows, mask=inside, other=ignore_index) != ignore_index
        )
    return rows, inside, scored


@triton.jit
def _span(starts_ptr, length, sequence, N):
    """First row of a sequence and the one after its last, within the N rows whatever starts
    holds.
    """
    if starts_ptr is None:
        start = sequence * length
        end = start + length
    else:
        start = tl.maximum(tl.load(starts_ptr + sequence).to(tl.int64), 0)
        end = tl.load(starts_ptr + sequence + 1).to(tl.int64)
        start, end = tl.minimum(start, N), tl.minimum(end, N)
    return start, end


@triton.jit
def _load(ptr, rows, mask):
    return tl.load(ptr + rows, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _sums(
    logps_ptr, target_ptr, rewards_ptr, ref_ptr, weights_ptr, sequence, start, end, ignore_index,
    REF_PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a sequence: scored tokens, those with u != 0, sum lp, sum u (lp - ref), sum rhat lp."""
    kept = tl.zeros([BLOCK], dtype=tl.float64)
    count = tl.zeros([BLOCK], dtype=tl.float64)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    ratios = tl.zeros([BLOCK], dtype=tl.float64)
    rewarded = tl.zeros([BLOCK], dtype=tl.float64)
    for at in range(start, end, BLOCK):
        rows, _, scored = _rows(target_ptr, at, end, ignore_index, BLOCK)
        lp = _load(logps_ptr, rows, scored)
        ratio = lp
        if REF_PER_TOKEN:
            ratio -= _load(ref_ptr, rows, scored)
        if weights_ptr is not None:
            weights = _load(weights_ptr, rows, scored)
            ratio *= weights
            kept += (weights != 0.0).to(tl.float64)
        if rewards_ptr is not None:
            rewarded += _load(rewards_ptr, rows, scored) * lp
        count += scored.to(tl.float64)
        total += lp
        ratios += ratio
    ratio = tl.sum(ratios, axis=0)
    if ref_ptr is not None and not REF_PER_TOKEN:
        ratio -= tl.load(ref_ptr + sequence).to(tl.float64)
    if weights_ptr is None:
        kept = count
    total, rewarded = tl.sum(total, axis=0), tl.sum(rewarded, axis=0)
    return tl.sum(count, axis=0), tl.sum(kept, axis=0), total, ratio, rewarded


@triton.jit
def _store_coefficients(
    coef_ptr, target_ptr, rewards_ptr, weights_ptr, start, end, ignore_index,
    of_weight, of_reward, constant, BLOCK: tl.constexpr,
):  # fmt: skip
    """coef_t = of_weight * u_t + of_reward * rhat_t + constant; 0 where not scored."""
    for at in range(start, end, BLOCK):
        rows, inside, scored = _rows(target_ptr, at, end, ignore_index, BLOCK)
        coef = tl.zeros([BLOCK], dtype=tl.float64) + of_weight
        if weights_ptr is not None:
            coef *= _load(weights_ptr, rows, scored)
        if rewards_ptr is not None:
            coef += of_reward * _load(rewards_ptr, rows, scored)
        coef = tl.where(scored, coef + constant, 0.0)
        tl.store(coef_ptr + rows, coef.to(coef_ptr.dtype.element_ty), mask=inside)


# `first` differs from group to group, and sequences start anywhere: no kernel of its own for that
@triton.jit(
    do_not_specialize=["B", "N", "first", "length"], do_not_specialize_on_alignment=POINTERS
)
def _pair_kernel(
    logps_ptr, target_ptr, rewards_ptr, ref_ptr, weights_ptr, starts_ptr,
    loss_ptr, stats_ptr, coef_ptr,
    B, N, first, length, ignore_index, beta: tl.float64, alpha: tl.float64,
    first_option: tl.float64, second_option: tl.float64,
    BASE: tl.constexpr, REF_PER_TOKEN: tl.constexpr, LENGTH_NORMALISED: tl.constexpr,
    NLL: tl.constexpr, STATIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pair: its sums, its loss and statistics, the coefficient of each of its tokens."""
    chosen = first + tl.program_id(0).to(tl.int64)
    rejected = B + chosen
    start_w, end_w = _span(starts_ptr, length, chosen, N)
    start_l, end_l = _span(starts_ptr, length, rejected, N)
    count_w, kept_w, total_w, ratio_w, rewarded_w = _sums(
        logps_ptr, target_ptr, rewards_ptr, ref_ptr, weights_ptr,
        chosen, start_w, end_w, ignore_index, REF_PER_TOKEN, BLOCK,
    )  # fmt: skip
    count_l, kept_l, total_l, ratio_l, rewarded_l = _sums(
        logps_ptr, target_ptr, rewards_ptr, ref_ptr, weights_ptr,
        rejected, start_l, end_l, ignore_index, REF_PER_TOKEN, BLOCK,
    )  # fmt: skip

    # the interpreter passes numbers as they are
    beta, alpha = tl.full((), beta, tl.float64), tl.full((), alpha, tl.float64)
    first_option = tl.full((), first_option, tl.float64)
    second_option = tl.full((), second_option, tl.float64)
    scale_w, scale_l = beta, beta
    if LENGTH_NORMALISED:
        scale_w, scale_l = beta / count_w, beta / count_l
    rho_w, rho_l = scale_w * ratio_w, scale_l * ratio_l
    loss, slope_w, slope_l = BASE(rho_w, rho_l, beta, first_option, second_option)
    weight_w, weight_l = tl.abs(slope_w), tl.abs(slope_l)
    if STATIC:
        weight_w, weight_l = tl.full((), 1.0, tl.float64), tl.full((), 1.0, tl.float64)
    reg_w, reg_l = -scale_w * rewarded_w, -scale_l * rewarded_l
    # alpha = 0 turns the regularizer off, an infinite one even
    strength_w = tl.where(alpha == 0.0, 0.0, alpha * weight_w)
    strength_l = tl.where(alpha == 0.0, 0.0, alpha * weight_l)
    if rewards_ptr is not None:
        loss += tl.where(alpha == 0.0, 0.0, strength_w * reg_w + strength_l * reg_l)
    likelihood = tl.full((), 0.0, tl.float64)
    if NLL:
        likelihood = -1.0 / count_w
        loss += likelihood * total_w

    out = stats_ptr.dtype.element_ty
    tl.store(loss_ptr + chosen, loss.to(out))
    tl.store(stats_ptr + chosen, total_w.to(out))
    tl.store(stats_ptr + B + chosen, total_l.to(out))
    tl.store(stats_ptr + 2 * B + chosen, rho_w.to(out))
    tl.store(stats_ptr + 3 * B + chosen, rho_l.to(out))
    tl.store(stats_ptr + 4 * B + chosen, (reg_w + reg_l).to(out))
    tl.store(stats_ptr + 5 * B + chosen, weight_w.to(out))
    tl.store(stats_ptr + 6 * B + chosen, weight_l.to(out))
    tl.store(stats_ptr + 7 * B + chosen, slope_w.to(out))
    tl.store(stats_ptr + 8 * B + chosen, slope_l.to(out))
    tl.store(stats_ptr + 9 * B + chosen, kept_w.to(out))
    tl.store(stats_ptr + 10 * B + chosen, kept_l.to(out))
    _store_coefficients(
        coef_ptr, target_ptr, rewards_ptr, weights_ptr, start_w, end_w, ignore_index,
        scale_w * slope_w, -scale_w * strength_w, likelihood, BLOCK,
    )  # fmt: skip
    _store_coefficients(
        coef_ptr, target_ptr, rewards_ptr, weights_ptr, start_l, end_l, ignore_index,
        scale_l * slope_l, -scale_l * strength_l, 0.0, BLOCK,
    )  # fmt: skip


BLOCK = 1024


def pair_objective(
    logps: torch.Tensor,
    target: torch.Tensor | None,
    token_rewards: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    spans: torch.Tensor | int,
    first: int,
    count: int,
    loss: torch.Tensor,
    stats: torch.Tensor,
    coef: torch.Tensor,
    *,
    base: object,
    beta: float,
    alpha: float,
    options: Sequence[float],
    static: bool,
    length_normalised: bool,
    nll: bool,
    ignore_index: int = -100,
) -> None:
    """Write loss, statistics and coefficients of pairs first..first+count-1; nothing else is
    touched.

    All tensors are contiguous and on one device. N rows, B pairs.

    Args:
        logps: [N] floating, nats. token_rewards, token_weights: [N] floating or None (u_t = 1).
        target: [N] integer, a row is scored where it is not ignore_index; or bool, scored where
            True; None: all are. Nothing is read of a row that is not scored.
        ref_logps: [N], or [2B] sums, floating; None: 0.
        spans: [2B+1] int32 or int64; sequence i has rows spans[i]..spans[i+1]-1. Or the length of
            every sequence.
        loss: [B], stats: [11, B], of one floating dtype; the columns of the pairs are written. Rows
            of stats: sum_t lp_t of chosen and of rejected, rho_w, rho_l, reg_w + reg_l, w_w, w_l,
                slope_w, slope_l, tokens with u_t != 0 of chosen and of rejected.
        coef: [N] floating; rows of the pairs are written, 0 where not scored.
        base: a function of `treg_kernels.bases`. options: at most two numbers that it takes.
        static: w_s = 1. length_normalised, nll: what `treg.losses.OBJECTIVES` says of it.
    """
    starts, length = (None, spans) if isinstance(spans, int) else (spans, 0)
    tensors = (logps, target, token_rewards, ref_logps, token_weights, starts, loss, stats, coef)
    assert all([x is None or x.is_contiguous() for x in tensors])
    assert loss.dtype == stats.dtype and stats.shape == (11, loss.shape[0])
    assert len(options) <= 2
    first_option, second_option = (*options, 0.0, 0.0)[:2]
    if count == 0:
        return
    masked = target is not None and target.dtype == torch.bool
    unscored = 0 if masked else ignore_index  # what target is where a token is not scored
    _pair_kernel[(count,)](
        logps, target, token_rewards, ref_logps, token_weights, starts, loss, stats, coef,
        loss.shape[0], logps.shape[0], first, length, unscored,
        float(beta), float(alpha), float(first_option), float(second_option), BASE=base,
        REF_PER_TOKEN=ref_logps is not None and ref_logps.shape == logps.shape,
        LENGTH_NORMALISED=length_normalised, NLL=nll, STATIC=static, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
