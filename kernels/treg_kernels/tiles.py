"""Device helpers shared by the kernels: the order of tiles, one tile of logits, and the logit
transform.

Base 2 throughout: z2 = z * log2(e), so that exp(z) = 2**z2 is one instruction.

    z2       = a * scale2                                       a = hidden . weight + bias
    z2       = cap2 * tanh(a * cap_scale)                       with a softcap
    dz / da  = scale                                            without a softcap
    dz / da  = scale * (1 - tanh^2)                             with a softcap

"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

APPROXIMATE = tl.constexpr(not triton.knobs.runtime.interpret)
# tanh(x) / v for |v| < EDGE, |x| < 0.4, in powers of v^2
EDGE = tl.constexpr(1.1541560327111708)
C0 = tl.constexpr(0.34657359027997264)
C1 = tl.constexpr(-0.013875423112538263)
C2 = tl.constexpr(0.0006638926437849742)
C3 = tl.constexpr(-2.8704079876766458e-05)


class Scalars(NamedTuple):
    """What the kernels need of s (logit_scale), cap (softcap) and temperature."""

    scale: float  # s / temperature
    scale2: float  # s / temperature * log2(e)
    cap_scale: float | None  # s / cap
    cap2: float | None  # cap / temperature * log2(e)

    @classmethod
    def of(cls, logit_scale: float, softcap: float | None, temperature: float) -> "Scalars":
        scale, log2e = logit_scale / temperature, math.log2(math.e)
        if softcap is None:
            return cls(scale, scale * log2e, None, None)
        return cls(scale, scale * log2e, logit_scale / softcap, softcap / temperature * log2e)

    @property
    def rising(self) -> bool:
        """Whether a larger product has a larger z2."""
        return self.scale2 > 0

    def natural(self) -> tuple[float, float | None, float | None]:
        """What `transform` needs for z in place of z2: scale, cap_scale, cap / temperature."""
        cap = None if self.cap2 is None else self.cap2 / math.log2(math.e)
        return self.scale, self.cap_scale, cap


@triton.jit
def tile_of(index, N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP_N: tl.constexpr):
    """Row and column tile of an index: GROUP_N row tiles share each weight tile while it is in
    L2.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_v = tl.cdiv(V, BLOCK_V)
    group = index // (GROUP_N * tiles_v)
    first = group * GROUP_N
    rows = tl.minimum(tiles_n - first, GROUP_N)
    within = index % (GROUP_N * tiles_v)
    return first + within % rows, within // rows


@triton.jit
def tiles_of_program(tiles):
    """How many of all tiles this program has: its own number, and every num_programs-th after."""
    return tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0))


@triton.jit
def product_tile(
    hidden, weight, tile_n, tile_v, N, V, D, depth,
    stride_hn, stride_hd, stride_wv, stride_wd,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    SOURCE: tl.constexpr,
):  # fmt: skip
    """hidden[rows] . weight[columns] of a tile in float32, [BLOCK_N, BLOCK_V].

    SOURCE: "descriptors": hidden and weight are tensor descriptors, which read 0 past the end.
    "pointers": the strides apply; rows and columns past the end read the last one: in bounds, and
    masked by whoever uses the tile. "logits": hidden is a float32 matrix [N, stride_hn] that holds
    the products already, its first column that of tile_v = 0. depth is D, or 0 to skip the product.
    """
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    acc = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    if SOURCE == "descriptors":
        for start in range(0, depth, BLOCK_D):
            h = hidden.load([tile_n * BLOCK_N, start])
            w = weight.load([tile_v * BLOCK_V, start])
            acc = tl.dot(h, w.T, acc, input_precision=PRECISION)
    elif SOURCE == "pointers":
        rows = tl.minimum(offs_n, N - 1)
        cols = tl.minimum(offs_v, V - 1).to(tl.int64)
        offs_d = tl.arange(0, BLOCK_D)
        deep = offs_d.to(tl.int64)
        h_ptrs = hidden + rows[:, None] * stride_hn + deep[None, :] * stride_hd
        w_ptrs = weight + deep[:, None] * stride_wd + cols[None, :] * stride_wv
        for start in range(0, depth, BLOCK_D):
            left = D - start
            h = tl.load(h_ptrs, mask=offs_d[None, :] < left, other=0.0)
            w = tl.load(w_ptrs, mask=offs_d[:, None] < left, other=0.0)
            acc = tl.dot(h, w, acc, input_precision=PRECISION)
            h_ptrs += BLOCK_D * stride_hd
            w_ptrs += BLOCK_D * stride_wd
    elif depth > 0:
        mask = (offs_n < N)[:, None] & (offs_v < V)[None, :]
        acc = tl.load(hidden + offs_n[:, None] * stride_hn + offs_v[None, :], mask=mask, other=0.0)
    return acc


@triton.jit
def with_bias(a, bias_ptr, tile_v, V, BLOCK_V: tl.constexpr):
    """a [BLOCK_N, BLOCK_V] + bias[columns], or a where there is none."""
    if bias_ptr is not None:
        offs_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
        a += tl.load(bias_ptr + tl.minimum(offs_v, V - 1)).to(tl.float32)[None, :]
    return a


@triton.jit
def _reciprocal(x):
    """1 / x of a positive float32, to about one unit in the last place."""
    if APPROXIMATE and is_cuda():  # a division takes 8 instructions, for operands of any size
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = 1.0 / x
    return y


@triton.jit
def tanh(v):
    """tanh(x) for v = 2 x log2(e), to float32 accuracy, also relative near 0.

        far from 0    2 / (1 + 2^-v) - 1, whose error is that of a number near 1
        |x| < 0.4     an odd polynomial of degree 7, with the least relative error

    There is no branch, and neither a sign nor a large |v| needs care: where 2^-v overflows, its
    reciprocal is 0.
    """
    far = _reciprocal(tl.exp2(-v) * 0.5 + 0.5) - 1.0
    v2 = v * v
    near = v * (C0 + v2 * (C1 + v2 * (C2 + v2 * C3)))
    return tl.where(tl.abs(v) < EDGE, near, far)


@triton.jit
def bounded(a, cap_scale):
    """What z2 is a multiple of: tanh(a * cap_scale) with a softcap, else a."""
    # a constant of the module would be compared in every launch
    TWO_LOG2E: tl.constexpr = 2.8853900817779268
    return a if cap_scale is None else tanh(a * (cap_scale * TWO_LOG2E))


@triton.jit
def multiple(scale2, cap_scale, cap2):
    """z2 / bounded(a, cap_scale)."""
    return scale2 if cap_scale is None else cap2


@triton.jit
def slope_of(x, cap_scale):
    """The factor of dz / da that depends on a, for x = bounded(a, cap_scale); 1 without a softcap.

    From tanh itself: one instruction, and no register beside it. Its error is at most 2^-20, less
    than the rounding of a bfloat16 stash wherever 1 - tanh^2 is more than 2^-11.
    """
    return 1.0 if cap_scale is None else 1.0 - x * x


@triton.jit
def transform(a, scale2, cap_scale, cap2):
    """z2 and its slope (`slope_of`)."""
    x = bounded(a, cap_scale)
    return x * multiple(scale2, cap_scale, cap2), slope_of(x, cap_scale)


@triton.jit
def uniform(tile_v, target, scored, V, BLOCK_V: tl.constexpr):
    """Whether all rows of a tile are scored, and no column of it is a target or past the end."""
    local = target - tile_v * BLOCK_V
    exceptional = (local >= 0) & (local < BLOCK_V) | (scored == 0)
    return ((tile_v + 1) * BLOCK_V <= V) & (tl.max(exceptional.to(tl.int32), axis=0) == 0)


@triton.jit
def store_tile(
    out,
    value,
    tile_n,
    tile_v,
    N,
    V,
    stride,
    STORE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """value [BLOCK_N, BLOCK_V] into out [N, V], a descriptor or a pointer to rows of that
    stride.
    """
    if STORE == "descriptors":
        out.store([tile_n * BLOCK_N, tile_v * BLOCK_V], value.to(out.dtype))
    else:
        offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
        mask = (offs_n < N)[:, None] & (offs_v < V)[None, :]
        tl.store(
            out + offs_n[:, None] * stride + offs_v[None, :],
            value.to(out.dtype.element_ty),
            mask=mask,
        )
