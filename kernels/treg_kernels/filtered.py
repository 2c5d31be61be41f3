"""The gradient of a head from the active tiles of the logits alone: 1 + 3 rho products, rho the
share of active tiles.

    G_ij = coef * scale * slope * ( 1{v = y} - 2**(z2 - norm) )
    dhidden_i = sum_{j active} G_ij W_j
    dweight_j = sum_{i active} G_ij^T h_i         dbias_j likewise

The logits are computed again, as in backward.py.

G is rounded to the weight's dtype in a slab that is whole tiles wide and high; inactive tiles of it
are neither written nor read. Both products are one kernel: a program has one block of the result,
and adds up its line of active tiles in their order, in float32, so results depend on nothing but
the inputs.

Balance: lines differ in length. The gradient kernel has a program for each tile, of which the
inactive end at once. The products start with the longest lines, so that short ones fill the end,
and each line is cut over D.
"""

import torch
import triton
import triton.language as tl

from treg_kernels.active import TILE_N, TILE_V, active_lists, tiles_of
from treg_kernels.launch import at_16_byte_rows
from treg_kernels.tiles import Scalars, transform


@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=["target_ptr", "norm_ptr", "coef_ptr"],
)
def _active_gradient_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, norm_ptr, coef_ptr, active_ptr, slab_ptr,
    N, V, D, tiles_v, stride_hn, stride_hd, stride_wv, stride_wd, scale, scale2, cap_scale, cap2,
    TILE_N: tl.constexpr, TILE_V: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # row blocks first: they share a block of the weight while it is in L2; all of a tile are
    # written
    blocks_n = tl.cdiv(N, TILE_N) * (TILE_N // BLOCK_N)
    block_n, block_v = tl.program_id(0) % blocks_n, tl.program_id(0) // blocks_n
    tile_n, tile_v = block_n * BLOCK_N // TILE_N, block_v * BLOCK_V // TILE_V
    if tl.load(active_ptr + tile_n * tiles_v + tile_v) == 0:
        return
    offs_n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = block_v.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_d = tl.arange(0, BLOCK_D)
    rows = tl.minimum(offs_n, N - 1)
    columns = tl.minimum(offs_v, V - 1)
    h_ptrs = hidden_ptr + rows[:, None] * stride_hn + offs_d.to(tl.int64)[None, :] * stride_hd
    w_ptrs = weight_ptr + columns[None, :] * stride_wv + offs_d.to(tl.int64)[:, None] * stride_wd
    a = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        h = tl.load(h_ptrs, mask=offs_d[None, :] < D - start, other=0.0)
        w = tl.load(w_ptrs, mask=offs_d[:, None] < D - start, other=0.0)
        a = tl.dot(h, w, a, input_precision="ieee")
        h_ptrs += BLOCK_D * stride_hd
        w_ptrs += BLOCK_D * stride_wd
    if bias_ptr is not None:
        a += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    z2, slope = transform(a, scale2, cap_scale, cap2)
    coef = tl.load(coef_ptr + offs_n, mask=offs_n < N, other=0.0)
    counts = coef != 0.0
    norm = tl.load(norm_ptr + 2 * offs_n, mask=counts, other=0.0)
    shrink = tl.exp2(-tl.load(norm_ptr + 2 * offs_n + 1, mask=counts, other=0.0))
    target = tl.load(target_ptr + offs_n, mask=counts, other=-1)
    one = tl.where(offs_v[None, :] == target[:, None], 1.0, 0.0)
    p = tl.exp2(z2 - norm[:, None]) * shrink[:, None]
    gradient = (coef * scale)[:, None] * (one - p) * slope
    gradient = tl.where(counts[:, None] & (offs_v < V)[None, :], gradient, 0.0)
    ptrs = slab_ptr + offs_n[:, None] * (tiles_v * TILE_V) + offs_v[None, :]
    tl.store(ptrs, gradient.to(slab_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["M", "K", "items"], do_not_specialize_on_alignment=["coef_ptr"])
def _product_kernel(
    slab_ptr, right_ptr, coef_ptr, list_ptr, count_ptr, order_ptr, out_ptr,
    M, K, D, items, stride_slab_m, stride_slab_k, stride_rk, stride_rd,
    ADD: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [M, D] = sum over the active tiles k of line m of slab[m, k] . right[k], or += where ADD.

    slab: its rows and columns, or with the strides exchanged its columns and rows. right: [K, D];
    rows of it with a coefficient of 0 are not read.
    """
    blocks_d = tl.cdiv(D, BLOCK_D)
    block, block_d = tl.program_id(0) // blocks_d, tl.program_id(0) % blocks_d
    line = tl.load(order_ptr + block // (TILE_M // BLOCK_M))
    count = tl.load(count_ptr + line)
    if ADD & (count == 0):
        return
    offs_m = line * TILE_M + block % (TILE_M // BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = block_d.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, BLOCK_K)
    mask_d = offs_d < D
    ptrs = out_ptr + offs_m[:, None] * D + offs_d[None, :]
    mask = (offs_m < M)[:, None] & mask_d[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if ADD:  # first, while registers are free
        acc += tl.load(ptrs, mask=mask, other=0.0)
    list_ptr += line * items
    for step in range(0, count * (TILE_K // BLOCK_K)):
        item = tl.load(list_ptr + step // (TILE_K // BLOCK_K))
        k = item.to(tl.int64) * TILE_K + step % (TILE_K // BLOCK_K) * BLOCK_K + offs_k
        g = tl.load(slab_ptr + offs_m[:, None] * stride_slab_m + k[None, :] * stride_slab_k)
        read = k < K
        if coef_ptr is not None:
            read &= tl.load(coef_ptr + k, mask=read, other=0.0) != 0.0
        r_ptrs = right_ptr + k[:, None] * stride_rk + offs_d[None, :] * stride_rd
        r = tl.load(r_ptrs, mask=read[:, None] & mask_d[None, :], other=0.0)
        acc = tl.dot(g, r, acc, input_precision="ieee")
    tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _configs(dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Blocks, warps and stages of the gradient and of the product kernel."""
    if dtype == torch.float32:  # full-precision products run outside the tensor cores
        run = {"num_warps": 4, "num_stages": 2}
        return (
            {"BLOCK_N": 32, "BLOCK_V": 64, "BLOCK_D": 32, **run},
            {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_D": 64, **run},
        )
    target = (
        None
        if triton.knobs.runtime.interpret
        else triton.runtime.driver.active.get_current_target()
    )
    nvidia = target is not None and target.backend == "cuda"
    hopper = nvidia and target.arch // 10 == 9
    depth = (
        64 if hopper or (nvidia and target.arch // 10 == 10) else 32
    )  # tensor cores that read shared memory
    run = {"num_warps": 8, "num_stages": 3 if nvidia else 2}
    return (
        {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": depth, **run},
        {"BLOCK_M": 128, "BLOCK_K": depth, "BLOCK_D": 256 if hopper else 128, **run},
    )


def slab_shape(N: int, V: int) -> tuple[int, int]:
    """Of the slab for N rows: whole tiles."""
    tiles_n, tiles_v = tiles_of(N, V)
    return tiles_n * TILE_N, tiles_v * TILE_V


def filtered_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    scalars: Scalars,
    norm: torch.Tensor,
    coef: torch.Tensor,
    active: torch.Tensor,
    slab: torch.Tensor,
    dhidden: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
    *,
    add: bool,
) -> None:
    """Fill dhidden, and fill dweight and dbias or `add` to them, with the gradients of N rows from
    their active tiles.

    Args:
        hidden: [N, D], weight: [V, D]; float32, bfloat16 or float16, any strides.
        target: [N] int64. bias: [V] or None. norm: [N, 2] float32, from `logprob_forward`.
        coef: [N] float32, 0 where not scored; what hidden holds there (NaN even) adds nothing.
        active: [tiles_n, tiles_v] bool, of these rows, from `active.active_tiles`. scalars: see
            `tiles.Scalars`.
        slab: `slab_shape(N, V)`, weight's dtype, overwritten; it may be longer.
        dhidden: [N, D], dweight: [V, D], dbias: [V], contiguous, or None where not needed.
    """
    (N, D), V = hidden.shape, weight.shape[0]
    tiles_n, tiles_v = tiles_of(N, V)
    assert active.shape == (tiles_n, tiles_v) and slab.shape[1] == tiles_v * TILE_V
    assert slab.shape[0] >= tiles_n * TILE_N and slab.dtype == weight.dtype
    assert norm.shape == (N, 2) and coef.shape == target.shape == (N,)
    needed = (target, bias, norm, coef, active, slab, dhidden, dweight, dbias)
    assert all(x is None or x.is_contiguous() for x in needed)
    hidden, slab = at_16_byte_rows(hidden), slab[: tiles_n * TILE_N]
    gradient, product = _configs(weight.dtype)
    blocks = slab.shape[0] // gradient["BLOCK_N"] * (slab.shape[1] // gradient["BLOCK_V"])
    _active_gradient_kernel[(blocks,)](
        hidden, weight, bias, target, norm, coef, active, slab, N, V, D, tiles_v,
        *hidden.stride(), *weight.stride(), *scalars, TILE_N=TILE_N, TILE_V=TILE_V, **gradient,
    )  # fmt: skip
    if dhidden is not None:
        _product(slab, active, weight, None, dhidden, product, add=False)
    columns = slab.T, active.T
    if dweight is not None:
        _product(*columns, hidden, coef, dweight, product, add=add)
    if dbias is not None:
        ones = hidden.new_ones(1).as_strided((N, 1), (0, 1))  # expand(1, 1) has other strides
        _product(*columns, ones, None, dbias.unsqueeze(1), {**product, "BLOCK_D": 16}, add=add)


def _product(
    slab: torch.Tensor,
    active: torch.Tensor,
    right: torch.Tensor,
    coef: torch.Tensor | None,
    out: torch.Tensor,
    config: dict[str, int],
    *,
    add: bool,
) -> None:
    """out [M, D] (+)= slab[:M] right over the active tiles of slab, right [K, D]."""
    (M, D), (lines, items) = out.shape, active.shape
    listed, count, order = active_lists(active)
    tile_m, tile_k = slab.shape[0] // lines, slab.shape[1] // items
    blocks = lines * (tile_m // config["BLOCK_M"]) * triton.cdiv(D, config["BLOCK_D"])
    _product_kernel[(blocks,)](
        slab, right, coef, listed, count, order, out, M, right.shape[0], D, items,
        *slab.stride(), *right.stride(), ADD=add, TILE_M=tile_m, TILE_K=tile_k, **config,
    )  # fmt: skip
