"""Gradient of the logits, when the coefficient of every token is known: the logits tile is computed
again.

    d L / d a_t[v] = coef_t * scale * slope * ( 1{v = y_t} - 2**(z2 - lse2_t - rest_t) )
    coef_t = d L / d lp_t

rest_t is what the rounding of lse2_t lost. It multiplies all probabilities of a row alike, which a
common offset of the logits would make felt.

Written in the weight's dtype as a [N, V] slab; the two products that follow, dhidden = G W and
dweight = G^T h, are plain GEMMs. A row with target ignore_index, and one with coef 0, is 0. A
target outside [0, V), which another part of the vocabulary holds, matches no column: the row is
-coef_t * scale * slope * p alone.
"""

import torch
import triton
import triton.language as tl

from treg_kernels import configs
from treg_kernels.launch import (
    Product,
    at_16_byte_rows,
    row_stride,
    slabs,
    target_matrix,
    tile_of_launch,
)
from treg_kernels.tiles import (
    Scalars,
    bounded,
    multiple,
    product_tile,
    slope_of,
    store_tile,
    tile_of,
    tiles_of_program,
    uniform,
    with_bias,
)


@triton.jit
def _rows_of(
    tile_n, tile_v, target_ptr, norm_ptr, coef_ptr, N, V, ignore_index, first_v,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Of a tile's rows, before its product: target among these columns, coefficient (0 where not
    scored), lse2, shrink = 2**-rest, and whether the tile is `uniform`.
    """
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + offs_n, mask=offs_n < N, other=ignore_index)
    scored = target != ignore_index
    target -= first_v
    coef = tl.load(coef_ptr + offs_n, mask=(offs_n < N) & scored, other=0.0)
    active = coef != 0.0
    lse2 = tl.load(norm_ptr + 2 * offs_n, mask=active, other=0.0)
    rest = tl.load(norm_ptr + 2 * offs_n + 1, mask=active, other=0.0)
    plain = uniform(tile_v, target, active, V, BLOCK_V)
    return target, coef, lse2, tl.exp2(-rest), plain


@triton.jit
def _finish(
    a, target, coef, lse2, shrink, plain, tile_n, tile_v, bias_ptr, out, N, V, stride_out, scale,
    scale2, cap_scale, cap2,
    STORE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """From the products a [BLOCK_N, BLOCK_V] of a tile to its gradient, which is stored."""
    # p and the slope are made where they are used: of each tile's sums one number is kept
    x = bounded(with_bias(a, bias_ptr, tile_v, V, BLOCK_V), cap_scale)
    unit = multiple(scale2, cap_scale, cap2)
    factor = coef * scale
    if plain:
        p = tl.exp2(x * unit - lse2[:, None])
        gradient = -(factor * shrink)[:, None] * p * slope_of(x, cap_scale)
    else:
        local = (target - tile_v * BLOCK_V).to(tl.int32)
        one = tl.where(tl.arange(0, BLOCK_V)[None, :] == local[:, None], 1.0, 0.0)
        p = tl.exp2(x * unit - lse2[:, None])
        gradient = factor[:, None] * (one - p * shrink[:, None]) * slope_of(x, cap_scale)
        gradient = tl.where((coef != 0.0)[:, None], gradient, 0.0)
    store_tile(out, gradient, tile_n, tile_v, N, V, stride_out, STORE, BLOCK_N, BLOCK_V)


@triton.jit(
    do_not_specialize=["N", "ignore_index", "first_v"],
    do_not_specialize_on_alignment=["target_ptr", "norm_ptr", "coef_ptr"],
)
def _gradient_kernel(
    hidden, weight, stride_hn, stride_hd, stride_wv, stride_wd, bias_ptr, target_ptr, norm_ptr,
    coef_ptr, out,
    N, V, D, ignore_index, first_v, stride_out, scale, scale2, cap_scale, cap2,
    PRECISION: tl.constexpr, GROUP_N: tl.constexpr, SOURCE: tl.constexpr, STORE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """The tiles of one program; V counts the columns of this launch, of which first_v is the
    first. FLAT: see `forward._tile_kernel`.
    """
    tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(V, BLOCK_V)
    if FLAT:
        steps = tl.cdiv(D, BLOCK_D)
        step, index = -1, tl.program_id(0) - tl.num_programs(0)
        tile_n, tile_v, plain = 0, 0, False
        target = tl.zeros([BLOCK_N], tl.int64)
        coef, lse2 = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
        shrink = tl.zeros([BLOCK_N], tl.float32)
        a = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
        for _ in tl.range(0, tiles_of_program(tiles) * steps):
            step = tl.where(step == steps - 1, 0, step + 1)
            if step == 0:
                index += tl.num_programs(0)
                tile_n, tile_v = tile_of(index, N, V, BLOCK_N, BLOCK_V, GROUP_N)
                target, coef, lse2, shrink, plain = _rows_of(
                    tile_n, tile_v, target_ptr, norm_ptr, coef_ptr, N, V, ignore_index, first_v,
                    BLOCK_N, BLOCK_V,
                )  # fmt: skip
            h = hidden.load([tile_n * BLOCK_N, step * BLOCK_D])
            w = weight.load([tile_v * BLOCK_V, step * BLOCK_D])
            a = tl.dot(h, w.T, a, input_precision=PRECISION)
            if step == steps - 1:
                _finish(
                    a, target, coef, lse2, shrink, plain, tile_n, tile_v, bias_ptr, out, N, V,
                    stride_out, scale, scale2, cap_scale, cap2, STORE, BLOCK_N, BLOCK_V,
                )  # fmt: skip
                a = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    else:
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            tile_n, tile_v = tile_of(index, N, V, BLOCK_N, BLOCK_V, GROUP_N)
            target, coef, lse2, shrink, plain = _rows_of(
                tile_n, tile_v, target_ptr, norm_ptr, coef_ptr, N, V, ignore_index, first_v,
                BLOCK_N, BLOCK_V,
            )  # fmt: skip
            # prompts and padding come in runs, and so do tokens without a coefficient: such a tile
            # costs no matmul
            depth = tl.where(tl.max((coef != 0.0).to(tl.int32), axis=0) > 0, D, 0)
            a = product_tile(
                hidden, weight, tile_n, tile_v, N, V, D, depth,
                stride_hn, stride_hd, stride_wv, stride_wd, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION,
                SOURCE,
            )  # fmt: skip
            _finish(
                a, target, coef, lse2, shrink, plain, tile_n, tile_v, bias_ptr, out, N, V,
                stride_out, scale, scale2, cap_scale, cap2, STORE, BLOCK_N, BLOCK_V,
            )  # fmt: skip


def logits_gradient(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    scalars: Scalars,
    ignore_index: int,
    norm: torch.Tensor,
    coef: torch.Tensor,
    out: torch.Tensor,
    product: Product | None = None,
    tile: configs.Tile | None = None,
) -> None:
    """Fill out with d L / d a on N rows.

    Args:
        hidden: [N, D], weight: [V, D], float32, bfloat16 or float16, any strides. target: [N]
            int64, contiguous.
        bias: [V] or None, contiguous. scalars: see `tiles.Scalars`.
        norm: [N, 2] float32, lse / ln 2 and what its rounding lost, from `logprob_forward`.
        coef: [N] float32. out: [N, V], rows of any stride.
        product, tile: as in `logprob_forward`.
    """
    N, D = hidden.shape
    V = weight.shape[0]
    assert norm.shape == (N, 2) and coef.shape == target.shape == (N,) and out.shape == (N, V)
    assert all(x is None or x.is_contiguous() for x in (target, bias, norm, coef))
    stride_out = row_stride(out)
    if N == 0:
        return
    tile = tile or tile_of_launch("gradient", hidden, weight, out)
    hidden = at_16_byte_rows(hidden)
    for slab in slabs(tile, hidden, weight, product):
        here, store = target_matrix(tile, slab, out)
        _gradient_kernel[slab.grid](
            *slab.operands, None if bias is None else bias[slab.first :], target, norm, coef, here,
            N, slab.columns, D, ignore_index, slab.first, stride_out,
            scalars.scale, scalars.scale2, scalars.cap_scale, scalars.cap2,
            **slab.constants, STORE=store, **slab.options,
        )  # fmt: skip
