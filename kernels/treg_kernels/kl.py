"""KL divergence of two heads' softmaxes from finished products, log-probs of targets, and their
gradients.

p, q: probabilities of policy and reference; d = log p - log q, and y the target.

    e        = p - q = sign(d) * max(p, q) * (1 - exp(-|d|))
    forward  KL(q, p) = sum_v ( e - q d )       dKL/dz = e
    reverse  KL(p, q) = sum_v ( p d - e )       dKL/dz = p (d - KL)
    lp       = log p_y                          dlp/dz = 1{v = y} - p

No term of either sum is negative. d is a difference of logits less a number a row, and so keeps its
digits where p and q are nearly equal, and e with it.

A program has a row. It reads both rows of products once for their logsumexps, once for the sum, and
in reverse once more, since the gradient needs the sum. A gradient may take the place of the
products that it comes from: each entry is read before it is written, by the same program.

V vocabulary; z2 is base 2, as in tiles.py.
"""

import torch
import triton
import triton.language as tl

from treg_kernels.tiles import Scalars, transform

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
BLOCK = 4096
WARPS = 8


@triton.jit
def _one_less_exp(x):
    """1 - exp(-x) for x >= 0, to float32 accuracy, also relative near 0."""
    far = 1.0 - tl.exp2(-x * LOG2E)
    near = 1.0 - x / 8.0
    near = 1.0 - x / 7.0 * near
    near = 1.0 - x / 6.0 * near
    near = 1.0 - x / 5.0 * near
    near = 1.0 - x / 4.0 * near
    near = 1.0 - x / 3.0 * near
    near = 1.0 - x / 2.0 * near
    return tl.where(x < 0.5, x * near, far)


@triton.jit
def _logits(a_ptr, bias_ptr, offs, mask, scale2, cap_scale, cap2):
    """z2 of some words, -inf past the end; and the slope of a softcap."""
    a = tl.load(a_ptr + offs, mask=mask, other=0.0)
    if bias_ptr is not None:
        a += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    z2, slope = transform(a, scale2, cap_scale, cap2)
    return tl.where(mask, z2, float("-inf")), slope


@triton.jit
def _add_exp(top, total, z2):
    """Running maxima and sums of 2**(z2 - top), one a lane."""
    new = tl.maximum(top, z2)
    base = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp2(top - base) + tl.exp2(z2 - base)


@triton.jit
def _log_sum(top, total):
    """The maximum of all lanes, and log2 of the sum above it."""
    highest = tl.max(top, axis=0)
    return highest, tl.log2(tl.sum(total * tl.exp2(top - highest), axis=0))


@triton.jit
def _words(z2, ref_z2, top, ref_top, log_sum, ref_log_sum):
    """p, q and d of some words. A word that both forbid has d = 0."""
    x, ref_x = z2 - top, ref_z2 - ref_top
    d = ((x - ref_x) - (log_sum - ref_log_sum)) * LN2
    neither = (z2 == float("-inf")) & (ref_z2 == float("-inf"))
    d = tl.where(neither, 0.0, d)
    return tl.exp2(x - log_sum), tl.exp2(ref_x - ref_log_sum), d


@triton.jit
def _weighted(mass, d, forbidden):
    """mass * d; 0 without mass, and infinite where the other distribution forbids the word."""
    return tl.where(d == forbidden, forbidden, tl.where(mass > 0.0, mass * d, 0.0))


@triton.jit
def _log_sums(
    a_ptr, ref_a_ptr, bias_ptr, ref_bias_ptr, V, scale2, cap_scale, cap2, ref_scale2,
    ref_cap_scale, ref_cap2, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest z2 of a row, and log2 of the sum above it, of policy and reference."""
    top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    ref_top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    ref_total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, V, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < V
        z2, _slope = _logits(a_ptr, bias_ptr, offs, mask, scale2, cap_scale, cap2)
        ref_z2, _ref_slope = _logits(
            ref_a_ptr, ref_bias_ptr, offs, mask, ref_scale2, ref_cap_scale, ref_cap2
        )
        top, total = _add_exp(top, total, z2)
        ref_top, ref_total = _add_exp(ref_top, ref_total, ref_z2)
    highest, log_sum = _log_sum(top, total)
    ref_highest, ref_log_sum = _log_sum(ref_top, ref_total)
    return highest, log_sum, ref_highest, ref_log_sum


@triton.jit
def _store_gradients(
    kl_gradient, p, slope, target, scored, kl_coef_ptr, lp_coef_ptr, kl_stash_ptr, lp_stash_ptr,
    out_ptr, row, V, offs,
):  # fmt: skip
    """Both stashes of some words, or their sum with the row's coefficients."""
    at, mask = row * V + offs, offs < V
    first = tl.where(scored, kl_gradient * slope, 0.0)
    second = tl.where(scored, (p - tl.where(offs == target, 1.0, 0.0)) * slope, 0.0)
    if kl_stash_ptr is not None:
        tl.store(kl_stash_ptr + at, first.to(kl_stash_ptr.dtype.element_ty), mask=mask)
    if lp_stash_ptr is not None:
        tl.store(lp_stash_ptr + at, second.to(lp_stash_ptr.dtype.element_ty), mask=mask)
    if out_ptr is not None:
        total = tl.load(kl_coef_ptr + row) * first
        if lp_coef_ptr is not None:
            total += tl.load(lp_coef_ptr + row) * second
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_scores(
    kl, lp2, ref_lp2, scored, inside, kl_ptr, logprob_ptr, ref_logprob_ptr, row
):  # fmt: skip
    if kl_ptr is not None:
        tl.store(kl_ptr + row, tl.where(scored, kl, 0.0))
    if logprob_ptr is not None:
        nothing = tl.where(scored, float("nan"), 0.0)  # of an impossible target
        tl.store(logprob_ptr + row, tl.where(scored & inside, lp2 * LN2, nothing))
        tl.store(ref_logprob_ptr + row, tl.where(scored & inside, ref_lp2 * LN2, nothing))


@triton.jit(do_not_specialize=["ignore_index"])
def _kl_kernel(
    a_ptr, ref_a_ptr, bias_ptr, ref_bias_ptr, target_ptr,
    kl_ptr, logprob_ptr, ref_logprob_ptr, kl_stash_ptr, lp_stash_ptr,
    kl_coef_ptr, lp_coef_ptr, out_ptr,
    V, ignore_index, scale2, cap_scale, cap2, ref_scale2, ref_cap_scale, ref_cap2,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    gradient: tl.constexpr = kl_stash_ptr is not None or out_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    a_ptr += row * V
    ref_a_ptr += row * V
    scored = True
    target = -1
    if target_ptr is not None:
        target = tl.load(target_ptr + row)
        scored = target != ignore_index
    inside = (target >= 0) & (target < V)
    at = tl.where(inside, target, 0)
    # before anything is written, which may be in place
    y2, _slope_there = _logits(a_ptr, bias_ptr, at, inside, scale2, cap_scale, cap2)
    ref_y2, _slope_there = _logits(
        ref_a_ptr, ref_bias_ptr, at, inside, ref_scale2, ref_cap_scale, ref_cap2
    )
    highest, log_sum, ref_highest, ref_log_sum = _log_sums(
        a_ptr, ref_a_ptr, bias_ptr, ref_bias_ptr, V, scale2, cap_scale, cap2, ref_scale2,
        ref_cap_scale, ref_cap2, BLOCK,
    )  # fmt: skip

    terms = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, V, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < V
        z2, slope = _logits(a_ptr, bias_ptr, offs, mask, scale2, cap_scale, cap2)
        ref_z2, _ref_slope = _logits(
            ref_a_ptr, ref_bias_ptr, offs, mask, ref_scale2, ref_cap_scale, ref_cap2
        )
        p, q, d = _words(z2, ref_z2, highest, ref_highest, log_sum, ref_log_sum)
        size = tl.maximum(p, q) * _one_less_exp(tl.abs(d))
        e = tl.where(d < 0.0, -size, size)
        if REVERSE:
            terms += _weighted(p, d, float("inf")) - e
        else:
            terms += e - _weighted(q, d, float("-inf"))
            if gradient:
                _store_gradients(
                    e, p, slope, target, scored, kl_coef_ptr, lp_coef_ptr, kl_stash_ptr,
                    lp_stash_ptr, out_ptr, row, V, offs,
                )  # fmt: skip
    kl = tl.sum(terms, axis=0)
    kl = tl.where(kl < 0.0, 0.0, kl)  # NaN stays
    _store_scores(
        kl, (y2 - highest) - log_sum, (ref_y2 - ref_highest) - ref_log_sum, scored, inside, kl_ptr,
        logprob_ptr, ref_logprob_ptr, row,
    )  # fmt: skip
    if REVERSE and gradient:
        for start in range(0, V, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            mask = offs < V
            z2, slope = _logits(a_ptr, bias_ptr, offs, mask, scale2, cap_scale, cap2)
            ref_z2, _ref_slope = _logits(
                ref_a_ptr, ref_bias_ptr, offs, mask, ref_scale2, ref_cap_scale, ref_cap2
            )
            p, q, d = _words(z2, ref_z2, highest, ref_highest, log_sum, ref_log_sum)
            _store_gradients(
                _weighted(p, d, float("inf")) - p * kl, p, slope, target, scored, kl_coef_ptr,
                lp_coef_ptr, kl_stash_ptr, lp_stash_ptr, out_ptr, row, V, offs,
            )  # fmt: skip


@triton.jit
def _stash_sum_kernel(
    kl_stash_ptr, lp_stash_ptr, kl_coef_ptr, lp_coef_ptr, out_ptr, V, BLOCK: tl.constexpr
):
    """out = kl_coef * kl_stash + lp_coef * lp_stash, of a row's block of words."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < V
    at = row * V + offs
    first = tl.load(kl_stash_ptr + at, mask=mask, other=0.0).to(tl.float32)
    total = tl.load(kl_coef_ptr + row) * first
    if lp_stash_ptr is not None:
        second = tl.load(lp_stash_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(lp_coef_ptr + row) * second
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def kl_rows(
    a: torch.Tensor,
    ref_a: torch.Tensor,
    bias: torch.Tensor | None,
    ref_bias: torch.Tensor | None,
    scalars: Scalars,
    ref_scalars: Scalars,
    target: torch.Tensor | None,
    ignore_index: int,
    *,
    reverse: bool,
    stashes: list[torch.Tensor],
    coefs: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    out: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """KL and log-probs of n rows, and their gradients.

    Args:
        a, ref_a: [n, V] float32, contiguous: products of both heads, without biases. bias,
            ref_bias: [V] or None, contiguous. scalars, ref_scalars: see `tiles.Scalars`. target:
            [n] int64, contiguous, or None.
        stashes: none, or [dKL / da / scale], or with targets also [-dlp / da / scale], each [n, V]
            contiguous, overwritten; they may be ref_a and a themselves.
        coefs, out: of a gradient: [n] float32 each, contiguous, and [n, V] contiguous, filled with
            coefs[0] times the first stash and coefs[1] times the second (None: 0); out may be ref_a
            or a itself. Nothing is returned then.
    Returns:
        "kl" [n] float32, with targets also "logprobs" and "ref_logprobs".
    """
    n, V = a.shape
    tensors = (a, ref_a, bias, ref_bias, target, *stashes, *(coefs or ()), out)
    assert all(x is None or x.is_contiguous() for x in tensors)
    assert a.shape == ref_a.shape and a.dtype == ref_a.dtype == torch.float32
    names = ("kl",) if target is None else ("kl", "logprobs", "ref_logprobs")
    found = {} if out is not None else {name: a.new_empty(n) for name in names}
    if n == 0:
        return found
    kl_stash, lp_stash = (*stashes, None, None)[:2]
    _kl_kernel[(n,)](
        a, ref_a, bias, ref_bias, target,
        found.get("kl"), found.get("logprobs"), found.get("ref_logprobs"), kl_stash, lp_stash,
        *(coefs or (None, None)), out,
        V, ignore_index, *scalars[1:], *ref_scalars[1:],
        REVERSE=reverse, BLOCK=min(BLOCK, triton.next_power_of_2(V)), num_warps=WARPS,
    )  # fmt: skip
    return found


def stash_sum(
    stashes: list[torch.Tensor],
    coefs: tuple[torch.Tensor, torch.Tensor | None],
    out: torch.Tensor,
) -> None:
    """out [n, V] = coefs[0] * stashes[0] + coefs[1] * stashes[1]; coefs [n] float32, None for 0."""
    n, V = out.shape
    lp_stash = None if coefs[1] is None else stashes[1]
    assert all(x is None or x.is_contiguous() for x in (*stashes, *coefs, out))
    if n == 0:
        return
    block = min(BLOCK, triton.next_power_of_2(V))
    _stash_sum_kernel[(n, triton.cdiv(V, block))](
        stashes[0], lp_stash, *coefs, out, V, BLOCK=block, num_warps=WARPS
    )
