"""Gradient of the logits, when the coefficient of every token is known: the logits tile is computed again.

    d L / d a_t[v] = coef_t * scale * slope * ( 1{v = y_t} - 2**(z2 - lse2_t) ),   coef_t = d L / d lp_t

Written in the weight's dtype as a [N, V] slab; the two products that follow, dhidden = G W and dweight = G^T h, are
plain GEMMs. A row with target ignore_index, and one with coef 0, is 0. A target outside [0, V), which another part of
the vocabulary holds, matches no column: the row is -coef_t * scale * slope * p alone.
"""

import torch
import triton
import triton.language as tl

from treg_kernels.configs import CONFIGS, prune
from treg_kernels.tiles import Scalars, logits_tile, tile_of, transform


@triton.autotune(CONFIGS, key=["n_bucket", "V", "D"], prune_configs_by={"early_config_prune": prune})
@triton.jit
def _gradient_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, lse2_ptr, coef_ptr, out_ptr,
    N, V, D, ignore_index, n_bucket,
    stride_hn, stride_hd, stride_wv, stride_wd, scale, scale2, cap_scale, cap2,
    PRECISION: tl.constexpr, GROUP_N: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_n, tile_v = tile_of(tl.program_id(0), N, V, BLOCK_N, BLOCK_V, GROUP_N)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_n = offs_n < N
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=ignore_index)
    scored = target != ignore_index
    coef = tl.load(coef_ptr + offs_n, mask=mask_n & scored, other=0.0)
    # prompts and padding come in runs, and so do tokens without a coefficient: such a tile costs no matmul
    active = scored & (coef != 0.0)
    depth = tl.where(tl.max(active.to(tl.int32), axis=0) > 0, D, 0)
    a = logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, offs_n, offs_v, N, V, D, depth,
        stride_hn, stride_hd, stride_wv, stride_wd, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION,
    )  # fmt: skip
    z2, slope = transform(a, scale2, cap_scale, cap2)
    lse2 = tl.load(lse2_ptr + offs_n, mask=mask_n & active, other=0.0)
    p = tl.exp2(z2 - lse2[:, None])
    local = (target - tile_v * BLOCK_V).to(tl.int32)
    one = tl.where(tl.arange(0, BLOCK_V)[None, :] == local[:, None], 1.0, 0.0)
    gradient = (coef * scale)[:, None] * (one - p) * slope
    gradient = tl.where(active[:, None], gradient, 0.0)
    ptrs = out_ptr + offs_n[:, None] * V + offs_v[None, :]
    tl.store(ptrs, gradient.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & (offs_v < V)[None, :])


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
) -> None:
    """Fill out with d L / d a on N rows.

    Args:
        hidden: [N, D], weight: [V, D], float32, bfloat16 or float16, any strides. target: [N] int64, contiguous.
        bias: [V] or None, contiguous. scalars: see `tiles.Scalars`.
        norm: [N] float32, lse / ln 2, from `logprob_forward`. coef: [N] float32. out: [N, V] contiguous.
    """
    N, D = hidden.shape
    V = weight.shape[0]
    assert all(x is None or x.is_contiguous() for x in (target, bias, norm, coef, out))
    if N == 0:
        return
    _gradient_kernel[lambda c: (triton.cdiv(N, c["BLOCK_N"]) * triton.cdiv(V, c["BLOCK_V"]),)](
        hidden, weight, bias, target, norm, coef, out, N, V, D, ignore_index, triton.next_power_of_2(N),
        *hidden.stride(), *weight.stride(), *scalars, PRECISION="ieee", GROUP_N=8,
    )  # fmt: skip
