"""KL divergence of two heads' softmaxes from finished products, log-probs of targets, and their
gradients.

p, q: probabilities of policy and reference; d = log p - log q, and y the target.

    e        = p - q = sign(d) * max(p, q) * (1 - exp(-|d|))
    forward  KL(q, p) = sum_v ( e - q d )       dKL/dz = e - min(p, q) * sum_v e
    reverse  KL(p, q) = sum_v ( p d - e )       dKL/dz = p d - p * sum_v p d
    lp       = log p_y                          dlp/dz = 1{v = y} - p

No term of either sum is negative. d is a difference of logits less that of two logsumexps. Where p
and q are nearly equal, it is above all the rounding of the logsumexps that keeps sum_v e from 0,
and sum_v p d from KL. As written, it cancels in the gradient.

A program has a row. It reads both rows of products once for their logsumexps, once for the sums,
and for a gradient once more. A gradient may take the place of the products that it comes from: each
entry is read before it is written, by the same program.

V vocabulary. Logits are natural ones: in base 2, as in tiles.py, each would be rounded once more,
and the differences would have the error.
"""

import torch
import triton
import triton.language as tl

from treg_kernels.launch import row_stride
from treg_kernels.tiles import Scalars, transform

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
BLOCK = 4096
WARPS = 8
# Of a batch's rows, which start anywhere in a longer tensor: no kernel of its own for each start.
ROW_POINTERS = ["target_ptr", "kl_coef_ptr", "lp_coef_ptr"]


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
def _logits(a_ptr, bias_ptr, offs, mask, scale, cap_scale, cap):
    """z of some words, -inf past the end; and the slope of a softcap."""
    a = tl.load(a_ptr + offs, mask=mask, other=0.0)
    if bias_ptr is not None:
        a += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    z, slope = transform(a, scale, cap_scale, cap)
    return tl.where(mask, z, float("-inf")), slope


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _add_exp(top, total, z):
    """Running maxima and sums of exp(z - top), one a lane."""
    new = tl.maximum(top, z)
    base = tl.where(new == float("-inf"), 0.0, new)
    return new, total * _exp(top - base) + _exp(z - base)


@triton.jit
def _log_sum(top, total):
    """The maximum of all lanes, and the log of the sum above it."""
    highest = tl.max(top, axis=0)
    return highest, tl.log2(tl.sum(total * _exp(top - highest), axis=0)) * LN2


@triton.jit
def _words(z, ref_z, top, ref_top, log_sum, ref_log_sum):
    """p, q and d of some words. A word that both forbid has d = 0."""
    x, ref_x = z - top, ref_z - ref_top
    neither = (z == float("-inf")) & (ref_z == float("-inf"))
    d = tl.where(neither, 0.0, (x - ref_x) - (log_sum - ref_log_sum))
    return _exp(x - log_sum), _exp(ref_x - ref_log_sum), d


@triton.jit
def _weighted(mass, d, forbidden):
    """mass * d; 0 without mass, and infinite where the other distribution forbids the word."""
    return tl.where(d == forbidden, forbidden, tl.where(mass > 0.0, mass * d, 0.0))


@triton.jit
def _terms(p, q, d, REVERSE: tl.constexpr):
    """e; and x and c, of which dKL/dz is x_v - c_v * sum_v x_v."""
    size = tl.maximum(p, q) * _one_less_exp(tl.abs(d))
    e = tl.where(d < 0.0, -size, size)
    x = _weighted(p, d, float("inf")) if REVERSE else e
    c = p if REVERSE else tl.minimum(p, q)
    return e, x, c


@triton.jit
def _log_sums(
    a_ptr, ref_a_ptr, bias_ptr, ref_bias_ptr, V, scale, cap_scale, cap, ref_scale, ref_cap_scale,
    ref_cap, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest logit of a row and the log of the sum of exponentials above it, of policy and
    reference.
    """
    top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    ref_top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    ref_total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, V, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < V
        z, _slope = _logits(a_ptr, bias_ptr, offs, mask, scale, cap_scale, cap)
        ref_z, _ref_slope = _logits(
            ref_a_ptr, ref_bias_ptr, offs, mask, ref_scale, ref_cap_scale, ref_cap
        )
        top, total = _add_exp(top, total, z)
        ref_top, ref_total = _add_exp(ref_top, ref_total, ref_z)
    highest, log_sum = _log_sum(top, total)
    ref_highest, ref_log_sum = _log_sum(ref_top, ref_total)
    return highest, log_sum, ref_highest, ref_log_sum


@triton.jit
def _store_gradients(
    kl_gradient, p, slope, target, scored, kl_coef_ptr, lp_coef_ptr, kl_stash_ptr, lp_stash_ptr,
    out_ptr, row, V, stride_out, offs,
):  # fmt: skip
    """Both stashes of some words, or their sum with the row's coefficients."""
    at, mask = row * stride_out + offs, offs < V
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
    kl, lp, ref_lp, scored, inside, kl_ptr, logprob_ptr, ref_logprob_ptr, row
):  # fmt: skip
    if kl_ptr is not None:
        tl.store(kl_ptr + row, tl.where(scored, kl, 0.0))
    if logprob_ptr is not None:
        nothing = tl.where(scored, float("nan"), 0.0)  # of an impossible target
        tl.store(logprob_ptr + row, tl.where(scored & inside, lp, nothing))
        tl.store(ref_logprob_ptr + row, tl.where(scored & inside, ref_lp, nothing))


@triton.jit(do_not_specialize=["ignore_index"], do_not_specialize_on_alignment=ROW_POINTERS)
def _kl_kernel(
    a_ptr, ref_a_ptr, bias_ptr, ref_bias_ptr, target_ptr,
    kl_ptr, logprob_ptr, ref_logprob_ptr, kl_stash_ptr, lp_stash_ptr,
    kl_coef_ptr, lp_coef_ptr, out_ptr,
    V, stride_a, stride_ref, stride_out, ignore_index,
    scale, cap_scale, cap, ref_scale, ref_cap_scale, ref_cap,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    gradient: tl.constexpr = kl_stash_ptr is not None or out_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    a_ptr += row * stride_a
    ref_a_ptr += row * stride_ref
    scored = True
    target = -1
    if target_ptr is not None:
        target = tl.load(target_ptr + row)
        scored = target != ignore_index
    inside = (target >= 0) & (target < V)
    at = tl.where(inside, target, 0)
    # before anything is written, which may be in place
    z_y, _slope_there = _logits(a_ptr, bias_ptr, at, inside, scale, cap_scale, cap)
    ref_z_y, _slope_there = _logits(
        ref_a_ptr, ref_bias_ptr, at, inside, ref_scale, ref_cap_scale, ref_cap
    )
    highest, log_sum, ref_highest, ref_log_sum = _log_sums(
        a_ptr, ref_a_ptr, bias_ptr, ref_bias_ptr, V, scale, cap_scale, cap, ref_scale,
        ref_cap_scale, ref_cap, BLOCK,
    )  # fmt: skip

    terms = tl.zeros([BLOCK], dtype=tl.float32)
    uncentred = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, V, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < V
        z, _slope = _logits(a_ptr, bias_ptr, offs, mask, scale, cap_scale, cap)
        ref_z, _ref_slope = _logits(
            ref_a_ptr, ref_bias_ptr, offs, mask, ref_scale, ref_cap_scale, ref_cap
        )
        p, q, d = _words(z, ref_z, highest, ref_highest, log_sum, ref_log_sum)
        e, x, _c = _terms(p, q, d, REVERSE)
        terms += x - e if REVERSE else e - _weighted(q, d, float("-inf"))
        uncentred += x
    kl = tl.sum(terms, axis=0)
    kl = tl.where(kl < 0.0, 0.0, kl)  # NaN stays
    _store_scores(
        kl, (z_y - highest) - log_sum, (ref_z_y - ref_highest) - ref_log_sum, scored, inside,
        kl_ptr, logprob_ptr, ref_logprob_ptr, row,
    )  # fmt: skip
    if gradient:
        total = tl.sum(uncentred, axis=0)
        for start in range(0, V, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            mask = offs < V
            z, slope = _logits(a_ptr, bias_ptr, offs, mask, scale, cap_scale, cap)
            ref_z, _ref_slope = _logits(
                ref_a_ptr, ref_bias_ptr, offs, mask, ref_scale, ref_cap_scale, ref_cap
            )
            p, q, d = _words(z, ref_z, highest, ref_highest, log_sum, ref_log_sum)
            _e, x, c = _terms(p, q, d, REVERSE)
            _store_gradients(
                x - c * total, p, slope, target, scored, kl_coef_ptr, lp_coef_ptr, kl_stash_ptr,
                lp_stash_ptr, out_ptr, row, V, stride_out, offs,
            )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=ROW_POINTERS)
def _stash_sum_kernel(
    kl_stash_ptr, lp_stash_ptr, kl_coef_ptr, lp_coef_ptr, out_ptr, V, stride_stash, stride_out,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = kl_coef * kl_stash + lp_coef * lp_stash, of a row's block of words."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < V
    at = row * stride_stash + offs
    first = tl.load(kl_stash_ptr + at, mask=mask, other=0.0).to(tl.float32)
    total = tl.load(kl_coef_ptr + row) * first
    if lp_stash_ptr is not None:
        second = tl.load(lp_stash_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(lp_coef_ptr + row) * second
    tl.store(out_ptr + row * stride_out + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


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
        a, ref_a: [n, V] float32, rows of any stride: products of both heads, without biases. bias,
            ref_bias: [V] or None, contiguous. scalars, ref_scalars: see `tiles.Scalars`. target:
            [n] int64, contiguous, or None.
        stashes: none, or [dKL / da / scale], or with targets also [-dlp / da / scale], each [n, V],
            rows of one stride, overwritten; they may be ref_a and a themselves.
        coefs, out: of a gradient: [n] float32 each, contiguous, and [n, V], rows of any stride,
            filled with coefs[0] times the first stash and coefs[1] times the second (None: 0); out
            may be ref_a or a itself. Nothing is returned then.
    Returns:
        "kl" [n] float32, with targets also "logprobs" and "ref_logprobs".
    """
    n, V = a.shape
    vectors = (bias, ref_bias, target, *(coefs or ()))
    assert all(x is None or x.is_contiguous() for x in vectors)
    written = [x for x in (*stashes, out) if x is not None]
    assert len({row_stride(x) for x in written}) <= 1
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
        V, row_stride(a), row_stride(ref_a), row_stride(written[0]) if written else V, ignore_index,
        *scalars.natural(), *ref_scalars.natural(),
        REVERSE=reverse, BLOCK=min(BLOCK, triton.next_power_of_2(V)), num_warps=WARPS,
    )  # fmt: skip
    return found


def stash_sum(
    stashes: list[torch.Tensor],
    coefs: tuple[torch.Tensor, torch.Tensor | None],
    out: torch.Tensor,
) -> None:
    """out [n, V] = coefs[0] * stashes[0] + coefs[1] * stashes[1]; coefs [n] float32, None for 0.

    stashes: [n, V], rows of one stride. out: [n, V], rows of any stride.
    """
    n, V = out.shape
    lp_stash = None if coefs[1] is None else stashes[1]
    assert all(x is None or x.is_contiguous() for x in coefs)
    assert len({row_stride(x) for x in stashes}) == 1
    if n == 0:
        return
    block = min(BLOCK, triton.next_power_of_2(V))
    _stash_sum_kernel[(n, triton.cdiv(V, block))](
        stashes[0], lp_stash, *coefs, out, V, row_stride(stashes[0]), row_stride(out),
        BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
