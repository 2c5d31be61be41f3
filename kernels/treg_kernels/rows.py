"""Hidden states times a number for each row, as the product for dweight reads them, in one launch.

    scale_t = first_t * second_t * third_t        out[t] = scale_t * hidden[t]

clean: both 0 where the last factor is 0, whatever the others and hidden hold, NaN even.

PyTorch takes two operations for each factor and three for rows without one. N rows, D columns.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from treg_kernels.launch import at_16_bytes, ceil_div, power_of_2

MOST_FACTORS = 3
BLOCK_N = 4


@triton.jit
def _times(scale, last, ptr, stride, offs_n, mask_n):
    """scale times one factor more, and the last factor."""
    if ptr is not None:
        last = tl.load(ptr + offs_n * stride, mask=mask_n, other=0.0)
        scale *= last
    return scale, last


def _scale_kernel(
    hidden_ptr, rows_ptr, first_ptr, second_ptr, third_ptr, scale_ptr, out_ptr,
    N, D, stride_hn, stride_hd, stride_out, stride_first, stride_second, stride_third,
    CLEAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = offs_n < N
    rows = offs_n
    if rows_ptr is not None:
        rows = tl.load(rows_ptr + offs_n, mask=mask_n, other=0)
    scale = tl.load(first_ptr + offs_n * stride_first, mask=mask_n, other=0.0)
    scale, last = _times(scale, scale, second_ptr, stride_second, offs_n, mask_n)
    scale, last = _times(scale, last, third_ptr, stride_third, offs_n, mask_n)
    read = mask_n
    if CLEAN:
        scale = tl.where(last == 0.0, 0.0, scale)
        read &= last != 0.0
    tl.store(scale_ptr + offs_n, scale, mask=mask_n & (tl.program_id(1) == 0))
    inside = (offs_d < D)[None, :]
    at = rows[:, None] * stride_hn + offs_d.to(tl.int64)[None, :] * stride_hd
    value = (
        tl.load(hidden_ptr + at, mask=read[:, None] & inside, other=0.0).to(tl.float32)
        * scale[:, None]
    )
    tl.store(
        out_ptr + offs_n[:, None] * stride_out + offs_d[None, :],
        value.to(out_ptr.dtype.element_ty),
        mask=mask_n[:, None] & inside,
    )


# Where rows begin at 16 bytes, they are read and written so many at once. Elsewhere it would depend
# on a batch's first row whether they do: that kernel is not compiled for it.
NUMBERS = ["N", "stride_first", "stride_second", "stride_third"]
OF_ROWS = ["rows_ptr", "first_ptr", "second_ptr", "third_ptr"]
ANYWHERE = ["hidden_ptr", "scale_ptr", "out_ptr", *OF_ROWS]
_of_aligned = triton.jit(
    _scale_kernel, do_not_specialize=NUMBERS, do_not_specialize_on_alignment=OF_ROWS
)
_of_any = triton.jit(
    _scale_kernel, do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ANYWHERE
)


def scale_rows(
    hidden: torch.Tensor,
    rows: torch.Tensor | None,
    factors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    clean: bool,
) -> torch.Tensor:
    """Fill out and return scale, [n] float32.

    Args:
        hidden: [N, D] float32, bfloat16 or float16, any strides. rows: [n] int64, rows of hidden;
            None: all, n = N.
        factors: one to MOST_FACTORS of [n] float32, or [1] for a number of all rows; contiguous.
        out: [n, D] of hidden's dtype, contiguous.
    """
    n, D = out.shape
    assert 0 < len(factors) <= MOST_FACTORS
    assert all([x.is_contiguous() for x in (out, *factors)])
    scale = torch.empty(n, dtype=torch.float32, device=out.device)
    if n == 0:
        return scale
    missing = [None] * (MOST_FACTORS - len(factors))
    strides = [0 if x is None or x.shape[0] == 1 else 1 for x in (*factors, *missing)]
    block_d = min(1024, power_of_2(D))
    aligned = at_16_bytes(hidden) and D * out.element_size() % 16 == 0
    (_of_aligned if aligned else _of_any)[(ceil_div(n, BLOCK_N), ceil_div(D, block_d))](
        hidden, rows, *factors, *missing, scale, out, n, D, *hidden.stride(), D, *strides,
        CLEAN=clean, BLOCK_N=BLOCK_N, BLOCK_D=block_d,
    )  # fmt: skip
    return scale
