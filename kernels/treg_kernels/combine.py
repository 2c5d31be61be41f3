"""The tiles of the forward added up: log-prob, norm and statistics of each row, and the stash
finished. The formulas are in forward.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from treg_kernels.launch import ceil_div, power_of_2, row_stride


@triton.jit(do_not_specialize=["N", "ignore_index"], do_not_specialize_on_alignment=["target_ptr"])
def _combine_kernel(
    k_ptr, s_ptr, top_ptr, ez_ptr, z_ptr, ee_ptr, target_ptr, target_z2_ptr, stash_ptr,
    logprob_ptr, norm_ptr, lse_ptr, factor_ptr, is_top1_ptr, entropy_ptr, mean_logit_ptr,
    log_sum_sq_ptr,
    N, V, stride_part, stride_stash, ignore_index, scale, cap2,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Add up the tiles of BLOCK_R rows; finish the stash: the target's entry, and one offset per
    row.
    """
    # constants of the module would be compared in every launch
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=ignore_index)
    scored = target != ignore_index
    z2_y = tl.load(target_z2_ptr + offs_n, mask=mask_n & scored, other=0.0)

    offs_j = tl.arange(0, BLOCK_J)
    mask = (mask_n & scored)[:, None] & (offs_j < tl.cdiv(V, WIDTH))[None, :]
    at = offs_n[:, None] * stride_part + offs_j[None, :]
    k = tl.load(k_ptr + at, mask=mask, other=-1e30)
    K = tl.max(k, axis=1)
    lift = tl.exp2(k - K[:, None])
    s = tl.load(s_ptr + at, mask=mask, other=0.0)
    S = tl.sum(s * lift, axis=1)
    # log2 of the odds against the target; -inf where nothing else has mass
    gap = (K - z2_y) + tl.log2(S)
    # log2(1 + 2**-|gap|), exact also where 1 + x rounds: the classical correction by what was
    # really added
    x = tl.exp2(-tl.abs(gap))
    added = (1.0 + x) - 1.0
    correction = x / tl.where(added == 0.0, 1.0, added)
    log2_1p = tl.where(added == 0.0, x * LOG2E, tl.log2(1.0 + x) * correction)
    above = tl.maximum(gap, 0.0) + log2_1p
    tl.store(logprob_ptr + offs_n, tl.where(scored, -above * LN2, 0.0), mask=mask_n)
    # from the largest term, so that z2 - lse2 of a nearly certain token rounds to what it is
    largest = tl.maximum(K, z2_y)
    more = tl.log2(S * tl.exp2(K - largest) + tl.exp2(z2_y - largest))
    lse2 = largest + more
    rest = (largest - lse2) + more  # what the sum lost
    tl.store(norm_ptr + 2 * offs_n, tl.where(scored, lse2, 0.0), mask=mask_n)
    tl.store(norm_ptr + 2 * offs_n + 1, tl.where(scored, rest, 0.0), mask=mask_n)
    if lse_ptr is not None:
        tl.store(lse_ptr + offs_n, tl.where(scored, lse2 * LN2, 0.0), mask=mask_n)

    p_y = tl.exp2(-above)
    # from the largest term: beside huge logits lse2 has lost its own sum
    shrink = tl.exp2((K - largest) - more)
    if is_top1_ptr is not None:
        top = tl.max(tl.load(top_ptr + at, mask=mask, other=float("-inf")), axis=1)
        tl.store(is_top1_ptr + offs_n, scored & (z2_y >= top), mask=mask_n)
    if entropy_ptr is not None:
        # sum_v p_v (lse2 - z2_v), every term >= 0; a tile without mass has k = -1e30, which 0 *
        # would keep finite
        ez = tl.load(ez_ptr + at, mask=mask, other=0.0)
        below = (largest[:, None] - k) + more[:, None]
        terms = tl.where(s > 0.0, (s * below - ez) * lift, 0.0)
        entropy = tl.sum(terms, axis=1) * shrink + p_y * above
        tl.store(entropy_ptr + offs_n, tl.where(scored, entropy * LN2, 0.0), mask=mask_n)
    if mean_logit_ptr is not None:
        total = tl.sum(tl.load(z_ptr + at, mask=mask, other=0.0), axis=1)
        tl.store(mean_logit_ptr + offs_n, tl.where(scored, total / V * LN2, 0.0), mask=mask_n)
    if log_sum_sq_ptr is not None:
        squares = tl.sum(tl.load(ee_ptr + at, mask=mask, other=0.0) * lift * lift, axis=1)
        total = squares * shrink * shrink + p_y * p_y
        tl.store(log_sum_sq_ptr + offs_n, tl.where(scored, tl.log2(total) * LN2, 0.0), mask=mask_n)

    if stash_ptr is not None:
        tl.store(
            factor_ptr + offs_n,
            tl.where(scored, -scale / (S + tl.exp2(z2_y - K)), 0.0),
            mask=mask_n,
        )
        entry = -S
        if cap2 is not None:
            entry = -S * (1.0 - (z2_y / cap2) * (z2_y / cap2))
        valid = mask_n & scored & (target >= 0) & (target < V)
        uneven = valid & (tl.max(tl.where(mask & (k < K[:, None]), 1, 0), axis=1) > 0)
        at_target = stash_ptr + offs_n * stride_stash + tl.where(valid, target, 0)
        tl.store(at_target, entry.to(stash_ptr.dtype.element_ty), mask=valid & (uneven == 0))
        # rows whose tiles have several offsets are brought to K; elsewhere this loop has no turn
        columns = tl.where(tl.max(uneven.to(tl.int32), axis=0) > 0, V, 0)
        for start in range(0, columns, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            mask_v = uneven[:, None] & (offs_v < V)[None, :]
            k_here = tl.load(
                k_ptr + offs_n[:, None] * stride_part + (offs_v // WIDTH)[None, :],
                mask=mask_v,
                other=0.0,
            )
            ptrs = stash_ptr + offs_n[:, None] * stride_stash + offs_v[None, :]
            value = tl.load(ptrs, mask=mask_v, other=0.0).to(tl.float32) * tl.exp2(
                k_here - K[:, None]
            )
            value = tl.where(offs_v[None, :] == target[:, None], entry[:, None], value)
            tl.store(ptrs, value.to(stash_ptr.dtype.element_ty), mask=mask_v)


def combine(
    parts: Sequence[torch.Tensor | None],
    target: torch.Tensor,
    target_z2: torch.Tensor,
    stash: torch.Tensor | None,
    found: dict[str, torch.Tensor],
    V: int,
    ignore_index: int,
    width: int,
    scale: float,
    cap2: float | None,
) -> None:
    """Fill what `forward.logprob_forward` returns, and the stash's targets.

    Args:
        parts: k, s, top, ez, z, ee of `forward._tile_kernel`, [N, columns] float32 or None.
        target: [N] int64. target_z2: [N] float32. stash: [N, V] or None.
        found: the rows to fill, by name, [N]; norm [N, 2]. width: columns of a tile.
        scale, cap2: see `tiles.Scalars`.
    """
    N, columns = target.shape[0], ceil_div(V, width)
    rest = ("lse", "factor", "is_top1", "entropy", "mean_logit", "log_sum_sq_probs")
    block_j = power_of_2(columns)
    block_r = max(1, min(16, 2048 // block_j))
    _combine_kernel[(ceil_div(N, block_r),)](
        *parts, target, target_z2, stash, found["logprobs"], found["norm"],
        *[found.get(n) for n in rest],
        N, V, columns, 0 if stash is None else row_stride(stash), ignore_index, scale, cap2,
        WIDTH=width, BLOCK_R=block_r, BLOCK_J=block_j, BLOCK_V=2048 // block_r,
    )  # fmt: skip
