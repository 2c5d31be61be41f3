"""Log-prob of a target per row, streaming over the vocabulary; optionally the stash, from which
both gradients follow.

    lse_t = logsumexp_v z_t[v]          lp_t = z_t[y_t] - lse_t

Each tile leaves, per row, its offset k (the rounded-up maximum of z2) and s = sum_{v != y} 2**(z2 -
k); the target is kept out of s and its z2 stored by the one tile that holds it. combine.py adds the
tiles up:

    A    = K + log2 sum_j s_j 2**(k_j - K),  K = max_j k_j   log2-sum of everything but the target
    lp   = -ln 2 * softplus2(A - z2_y),      softplus2(x) = log2(1 + 2**x)

so lp <= 0 always, and keeps its relative accuracy when the target is nearly certain.

The stash E [N, V] (float32 or bfloat16) is written in the same pass, before the sum is known:

    E[t,v] = 2**(z2 - K) * slope    (v != y)         E[t,y] = -S_t * slope_y,  S_t = 2**(A - K)
    d lp_t / d a_t[v] = factor_t * E[t,v],           factor_t = -scale / (S_t + 2**(z2_y - K))

The offset K of a row is its target's z2, rounded (a cheap dot product beforehand), so that no
maximum is needed first. A tile that rises more than LIMIT = 2**48 above it takes its own offset;
such rows, rare, are brought to one offset afterwards by a multiplication by a power of two, exact.

N rows, D hidden size, V vocabulary. A row whose target is ignore_index has lp = 0, factor = 0, E =
0; one whose target is outside [0, V) has lp = NaN and touches no memory outside.
"""

import torch
import triton
import triton.language as tl

from treg_kernels import configs
from treg_kernels.combine import combine
from treg_kernels.launch import (
    Product,
    at_16_byte_rows,
    ceil_div,
    power_of_2,
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
    transform,
    uniform,
    with_bias,
)

LIMIT = tl.constexpr(48.0)
STATISTIC_SUMS = ("ez_ptr", "z_ptr", "ee_ptr")


# No kernel is compiled for where a batch's rows start in a longer tensor, for how many they are, or
# for the first column of a slab: those pointers and integers are not specialised.
@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["target_ptr"])
def _offset_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, offset_ptr, target_z2_ptr, N, V, D,
    stride_hn, stride_hd, stride_wv, stride_wd, scale2, cap_scale, cap2,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """offset[t] = round(z2 of the target): any nearby integer would do. target_z2[t] = NaN, which
    an impossible target leaves.
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, N - 1)
    target = tl.load(target_ptr + rows)
    target = tl.where((target >= 0) & (target < V), target, 0)
    acc = tl.zeros([BLOCK_N], dtype=tl.float32)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    for start in range(0, D, BLOCK_D):
        mask = (start + offs_d < D)[None, :]
        h_ptrs = hidden_ptr + rows[:, None] * stride_hn + (start + offs_d)[None, :] * stride_hd
        w_ptrs = weight_ptr + target[:, None] * stride_wv + (start + offs_d)[None, :] * stride_wd
        h = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptrs, mask=mask, other=0.0).to(tl.float32)
        acc += tl.sum(h * w, axis=1)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + target).to(tl.float32)
    z2, _ = transform(acc, scale2, cap_scale, cap2)
    tl.store(offset_ptr + offs_n, tl.floor(z2 + 0.5), mask=offs_n < N)
    tl.store(target_z2_ptr + offs_n, float("nan"), mask=offs_n < N)


@triton.jit
def _offset(top, offset):
    """k of a tile's rows: its rounded-up maximum; beside a stash the row's offset, unless the
    maximum is far above.
    """
    # a tile of the target alone, or of logits of -inf, has no maximum: any finite offset serves
    k = tl.where(top == float("-inf"), -1e30, tl.ceil(top))
    if offset is not None:
        k = tl.where(k > offset + LIMIT, k, offset)
    return k


@triton.jit
def _plain_epilogue(
    x, scale2, cap_scale, cap2, offset, stash, k_ptr, s_ptr, top_ptr, tile_n, tile_v, N, V,
    stride_part, stride_stash,
    RISING: tl.constexpr, STORE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """k, s, top and the stash of a tile in which every entry counts: a third of the operations of
    `_full_epilogue`.
    """
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    unit = multiple(scale2, cap_scale, cap2)
    # x * unit - k is one instruction if no other needs x * unit
    top = tl.max(x, axis=1) * unit if RISING else tl.max(x * unit, axis=1)
    k = _offset(top, offset)
    e = tl.exp2(x * unit - k[:, None])
    at = offs_n * stride_part + tile_v
    tl.store(k_ptr + at, k, mask=mask_n)
    tl.store(s_ptr + at, tl.sum(e, axis=1), mask=mask_n)
    if top_ptr is not None:
        tl.store(top_ptr + at, top, mask=mask_n)
    if stash is not None:
        value = e * slope_of(x, cap_scale)
        store_tile(stash, value, tile_n, tile_v, N, V, stride_stash, STORE, BLOCK_N, BLOCK_V)


@triton.jit
def _full_epilogue(
    x, scale2, cap_scale, cap2, target, scored, offset, stash, target_z2_ptr, k_ptr, s_ptr,
    top_ptr, ez_ptr, z_ptr, ee_ptr,
    tile_n, tile_v, N, V, stride_part, stride_stash,
    STORE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Of any tile: per row its offset k, s, and what else is asked for; the target's z2; the
    stash.
    """
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V) < V
    at = offs_n * stride_part + tile_v
    # z2 = x * unit. With a softcap it is made anew where it is used, beside the slope: x alone is
    # kept in registers
    unit = multiple(scale2, cap_scale, cap2)
    if cap_scale is None:
        x, unit = x * unit, 1.0
    if z_ptr is not None:
        z = tl.sum(tl.where(mask_v[None, :], x, 0.0), axis=1) * unit
        tl.store(z_ptr + at, z, mask=mask_n)
    local = target - tile_v * BLOCK_V
    here = (local >= 0) & (local < BLOCK_V) & (target < V)
    is_target = tl.arange(0, BLOCK_V)[None, :] == local.to(tl.int32)[:, None]
    tl.store(
        target_z2_ptr + offs_n,
        tl.sum(tl.where(is_target, x, 0.0), axis=1) * unit,
        mask=mask_n & here & scored,
    )

    other = mask_v[None, :] & (is_target == 0)
    z2_other = tl.where(other, x * unit, float("-inf"))
    top = tl.max(z2_other, axis=1)
    k = _offset(top, offset)
    e = tl.exp2(z2_other - k[:, None])

    tl.store(k_ptr + at, k, mask=mask_n)
    tl.store(s_ptr + at, tl.sum(e, axis=1), mask=mask_n)
    if top_ptr is not None:
        tl.store(top_ptr + at, top, mask=mask_n)
    if ez_ptr is not None:
        above = tl.maximum(x * unit - k[:, None], -1e30)
        tl.store(ez_ptr + at, tl.sum(e * above, axis=1), mask=mask_n)
    if ee_ptr is not None:
        tl.store(ee_ptr + at, tl.sum(e * e, axis=1), mask=mask_n)
    if stash is not None:
        value = tl.where(scored[:, None], e * slope_of(x, cap_scale), 0.0)
        store_tile(stash, value, tile_n, tile_v, N, V, stride_stash, STORE, BLOCK_N, BLOCK_V)


@triton.jit
def _rows_of(
    tile_n, tile_v, target_ptr, offset_ptr, N, V, ignore_index, first_v,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Of a tile's rows, before its product, which hides the latency: target among these columns
    (ignore_index - first_v where not scored), offset (0 without a stash), and whether the tile is
    `uniform`.
    """
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + offs_n, mask=offs_n < N, other=ignore_index)
    scored = target != ignore_index
    target -= first_v
    offset = tl.zeros([BLOCK_N], tl.float32)
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + offs_n, mask=offs_n < N, other=0.0)
    return target, offset, uniform(tile_v, target, scored, V, BLOCK_V)


@triton.jit
def _finish(
    a, target, offset, plain, tile_n, tile_v, stash, target_z2_ptr, bias_ptr,
    k_ptr, s_ptr, top_ptr, ez_ptr, z_ptr, ee_ptr,
    N, V, ignored, stride_part, stride_stash, scale2, cap_scale, cap2,
    RISING: tl.constexpr, STORE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """From the products a [BLOCK_N, BLOCK_V] of a tile to what `_tile_kernel` leaves of it; a
    target of `ignored` is not scored.
    """
    nothing_else: tl.constexpr = ez_ptr is None and z_ptr is None and ee_ptr is None
    # the slope is computed again where it is used: registers are fewer than operations
    x = bounded(with_bias(a, bias_ptr, tile_v, V, BLOCK_V), cap_scale)
    own = None if stash is None else offset
    if nothing_else & plain:
        _plain_epilogue(
            x, scale2, cap_scale, cap2, own, stash, k_ptr, s_ptr, top_ptr, tile_n, tile_v, N, V,
            stride_part, stride_stash, RISING, STORE, BLOCK_N, BLOCK_V,
        )  # fmt: skip
    else:
        _full_epilogue(
            x, scale2, cap_scale, cap2, target, target != ignored, own, stash, target_z2_ptr,
            k_ptr, s_ptr, top_ptr, ez_ptr, z_ptr, ee_ptr, tile_n, tile_v, N, V, stride_part,
            stride_stash, STORE, BLOCK_N, BLOCK_V,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["N", "ignore_index", "first_v"],
    do_not_specialize_on_alignment=["target_ptr", "k_ptr", "s_ptr", "top_ptr", *STATISTIC_SUMS],
)
def _tile_kernel(
    hidden, weight, stride_hn, stride_hd, stride_wv, stride_wd, bias_ptr, target_ptr, offset_ptr,
    stash, target_z2_ptr,
    k_ptr, s_ptr, top_ptr, ez_ptr, z_ptr, ee_ptr,
    N, V, D, ignore_index, first_v, stride_part, stride_stash, scale2, cap_scale, cap2,
    PRECISION: tl.constexpr, GROUP_N: tl.constexpr, SOURCE: tl.constexpr, STORE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, FLAT: tl.constexpr,
    RISING: tl.constexpr,
):  # fmt: skip
    """The tiles of one program: what `_full_epilogue` leaves of each.

    k, s, top (maximum of z2), ez (sum of e*(z2-k)), z (sum of z2), ee (sum of e^2): [N,
    stride_part] float32, a column a tile, the target left out of all but z. V counts the columns of
    this launch, of which first_v is the first.

    RISING: z2 rises with a, so that the largest product has the largest z2.

    FLAT: one loop over the steps of all tiles instead of a loop over D in each tile. The compiler
    prefetches across turns of a loop, and so the first blocks of the next tile are under way while
    this tile's epilogue runs. SOURCE must be "descriptors"; a tile without a scored row is computed
    like any other.
    """
    tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(V, BLOCK_V)
    if FLAT:
        steps = tl.cdiv(D, BLOCK_D)
        step, index = -1, tl.program_id(0) - tl.num_programs(0)
        tile_n, tile_v, plain = 0, 0, False
        target, offset = tl.zeros([BLOCK_N], tl.int64), tl.zeros([BLOCK_N], tl.float32)
        a = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
        for _ in tl.range(0, tiles_of_program(tiles) * steps):
            step = tl.where(step == steps - 1, 0, step + 1)
            if step == 0:
                index += tl.num_programs(0)
                tile_n, tile_v = tile_of(index, N, V, BLOCK_N, BLOCK_V, GROUP_N)
                target, offset, plain = _rows_of(
                    tile_n, tile_v, target_ptr, offset_ptr, N, V, ignore_index, first_v,
                    BLOCK_N, BLOCK_V,
                )  # fmt: skip
            h = hidden.load([tile_n * BLOCK_N, step * BLOCK_D])
            w = weight.load([tile_v * BLOCK_V, step * BLOCK_D])
            a = tl.dot(h, w.T, a, input_precision=PRECISION)
            if step == steps - 1:
                _finish(
                    a, target, offset, plain, tile_n, tile_v, stash, target_z2_ptr,
                    bias_ptr, k_ptr, s_ptr, top_ptr, ez_ptr, z_ptr, ee_ptr,
                    N, V, ignore_index - first_v, stride_part, stride_stash, scale2, cap_scale,
                    cap2, RISING, STORE, BLOCK_N, BLOCK_V,
                )  # fmt: skip
                a = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    else:
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            tile_n, tile_v = tile_of(index, N, V, BLOCK_N, BLOCK_V, GROUP_N)
            target, offset, plain = _rows_of(
                tile_n, tile_v, target_ptr, offset_ptr, N, V, ignore_index, first_v,
                BLOCK_N, BLOCK_V,
            )  # fmt: skip
            # prompts and padding come in runs: a tile without a scored row costs no matmul
            scored = target != ignore_index - first_v
            depth = tl.where(tl.max(scored.to(tl.int32), axis=0) > 0, D, 0)
            a = product_tile(
                hidden, weight, tile_n, tile_v, N, V, D, depth,
                stride_hn, stride_hd, stride_wv, stride_wd, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION,
                SOURCE,
            )  # fmt: skip
            _finish(
                a, target, offset, plain, tile_n, tile_v, stash, target_z2_ptr, bias_ptr,
                k_ptr, s_ptr, top_ptr, ez_ptr, z_ptr, ee_ptr,
                N, V, ignore_index - first_v, stride_part, stride_stash, scale2, cap_scale,
                cap2, RISING, STORE, BLOCK_N, BLOCK_V,
            )  # fmt: skip


STATISTICS = ("lse", "entropy", "mean_logit", "is_top1", "log_sum_sq_probs")


def logprob_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    scalars: Scalars,
    ignore_index: int,
    outputs: tuple[str, ...] = (),
    stash: torch.Tensor | None = None,
    product: Product | None = None,
    tile: configs.Tile | None = None,
) -> dict[str, torch.Tensor]:
    """Launch the forward on N rows.

    Args:
        hidden: [N, D] float32, bfloat16 or float16, any strides. weight: [V, D], same dtype, any
            strides.
        target: [N] int64, contiguous. bias: [V] or None, contiguous. scalars: see `tiles.Scalars`.
        outputs: any of STATISTICS, and "tops".
        stash: [N, V], rows of any stride, float32 or bfloat16, overwritten with E; None where no
            gradient follows.
        product: the vendor's matrix product, which a tile may ask for. tile: None for
            `launch.tile_of_launch`.
    Returns:
        {"logprobs", "norm", *outputs} and "factor" beside a stash, each [N] float32 (is_top1:
        bool); norm, which `logits_gradient` takes, is [N, 2]: lse / ln 2, and what its rounding
        lost; tops: [N, ceil(V / tile.v)], the largest z2 of each tile without the target's.
        Temporaries: 4 * N * ceil(V / tile.v) bytes for each of k and s and for each statistic
        but lse, a copy of hidden where its rows do not begin at 16 bytes, and configs.SLAB_BYTES
        where the tile takes the vendor's product.
    """
    N, D = hidden.shape
    V = weight.shape[0]
    dev = hidden.device
    assert all([x is None or x.is_contiguous() for x in (target, bias)])
    stride_stash = 0 if stash is None else row_stride(stash)

    def row(dtype=torch.float32):
        return torch.empty(N, dtype=dtype, device=dev)

    norm = torch.empty(N, 2, dtype=torch.float32, device=dev)
    found = {"logprobs": row(), "norm": norm}
    for name in outputs:
        if name != "tops":
            found[name] = row(torch.bool if name == "is_top1" else torch.float32)
    if stash is not None:
        found["factor"] = row()
    if N == 0:
        return found
    kind = "forward" if stash is None else "stash"
    tile = tile or tile_of_launch(kind, hidden, weight, stash)
    hidden = at_16_byte_rows(hidden)
    columns = ceil_div(V, tile.v)

    def part():
        return torch.empty(N, columns, dtype=torch.float32, device=dev)

    # an impossible target leaves NaN
    target_z2 = row() if stash is not None else row().fill_(float("nan"))
    offset = found.get("factor")  # `combine` does not read it: factors are written in its place
    if stash is not None:
        _offset_kernel[(ceil_div(N, 4),)](
            hidden, weight, bias, target, offset, target_z2, N, V, D,
            *hidden.stride(), *weight.stride(), scalars.scale2, scalars.cap_scale, scalars.cap2,
            BLOCK_N=4, BLOCK_D=min(1024, power_of_2(D)),
        )  # fmt: skip
    tops = part() if "is_top1" in outputs or "tops" in outputs else None
    statistics = ("entropy", "mean_logit", "log_sum_sq_probs")
    sums = [part() if name in outputs else None for name in statistics]
    parts = (part(), part(), tops, *sums)
    if "tops" in outputs:
        found["tops"] = tops
    for slab in slabs(tile, hidden, weight, product):
        here = parts
        if slab.first:
            here = [None if x is None else x[:, slab.first // tile.v :] for x in parts]
        out, store = (None, "pointers") if stash is None else target_matrix(tile, slab, stash)
        _tile_kernel[slab.grid](
            *slab.operands, None if bias is None else bias[slab.first :], target, offset, out,
            target_z2, *here,
            N, slab.columns, D, ignore_index, slab.first, columns, stride_stash,
            scalars.scale2, scalars.cap_scale, scalars.cap2, **slab.constants, STORE=store,
            RISING=scalars.rising, **slab.options,
        )  # fmt: skip
    combine(
        parts, target, target_z2, stash, found, V, ignore_index, tile.v, scalars.scale, scalars.cap2
    )
    return found
