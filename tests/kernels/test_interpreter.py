"""bfloat16 in Triton's interpreter is wrong without `interpreter_bf16`: this fails where it is not
right.
"""

import pytest
import torch
import triton
import triton.language as tl
from helpers import GPU

pytestmark = [
    pytest.mark.interp,
    pytest.mark.skipif(GPU, reason="a real device computes bfloat16 itself"),
]


@triton.jit
def _probe(a_ptr, b_ptr, dot_ptr, sum_ptr, cast_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    square = i[:, None] * N + i[None, :]
    a, b = tl.load(a_ptr + square), tl.load(b_ptr + square)
    tl.store(dot_ptr + square, tl.dot(a, b))
    tl.store(sum_ptr + square, (a + b).to(tl.float32))
    tl.store(cast_ptr + square, (a.to(tl.float32) * b.to(tl.float32)).to(tl.bfloat16))


def test_bfloat16_operations():
    a, b = torch.randn(2, 16, 16).bfloat16()
    dot, total, cast = (
        torch.empty(16, 16),
        torch.empty(16, 16),
        torch.empty(16, 16, dtype=torch.bfloat16),
    )
    _probe[(1,)](a, b, dot, total, cast, N=16)
    assert torch.allclose(dot, a.float() @ b.float(), rtol=1e-6, atol=1e-5)
    assert torch.equal(total, (a + b).float())
    assert torch.equal(cast, (a.float() * b.float()).bfloat16())


@triton.jit
def _tanh_kernel(x_ptr, y_ptr, N: tl.constexpr):
    from_here = tl.arange(0, N)
    tl.store(y_ptr + from_here, _bounded(tl.load(x_ptr + from_here), 1.0))


from treg_kernels.tiles import bounded as _bounded  # noqa: E402  (a kernel's global must be a module global)


def test_tanh_keeps_its_relative_accuracy():
    """Measured: at most 3.2 units of 2^-23, just above 0.4, where the polynomial ends."""
    x = torch.cat([torch.logspace(-20, 1.95, 4096), torch.linspace(0.3, 3.0, 4095), torch.zeros(1)])
    x = torch.cat([x, -x])
    y = torch.empty_like(x)
    _tanh_kernel[(1,)](x, y, N=16384)
    exact = x.double().tanh()
    assert ((y.double() - exact).abs() <= 4 * 2.0**-23 * exact.abs()).all()
    assert y.abs().max() == 1.0
