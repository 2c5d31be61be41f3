"""The products that follow a tile, on a CPU: values, and what an operation allocates inside."""

import pytest
import torch
from helpers import EPS, error
from torch.profiler import ProfilerActivity, profile

from treg.ops.head import gemm

N, D, V = 60, 40, 700


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    monkeypatch.setattr(gemm, "SLAB", 10 * D)


def largest_allocation(run) -> int:
    """Bytes of the largest allocation on a CPU, those that an operation frees itself too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    return max(event.cpu_memory_usage for event in record.events())


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_row", [True, False], ids=["a row", "all"])
def test_scaled_to_makes_no_wide_copy(per_row, wide):
    x = torch.randn(N, D).to(wide)
    factor = torch.rand(N, 1) if per_row else torch.rand(())
    found = gemm.scaled_to(x, factor, torch.bfloat16)
    assert torch.equal(found, (x.double() * factor.double()).float().bfloat16()) or not per_row
    assert error(found, x.double() * factor.double()) < EPS[torch.bfloat16]
    assert largest_allocation(lambda: gemm.scaled_to(x, factor, torch.bfloat16)) <= found.nbytes


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_row", [True, False], ids=["a row", "all"])
def test_scaled_in_place(per_row, wide):
    """Where the dtype stays, no other memory is taken than a slab's."""
    x = torch.randn(N, D).to(wide)
    factor = torch.rand(N, 1) if per_row else torch.rand(())
    before, expected = x.clone(), gemm.scaled_to(x, factor, torch.bfloat16)
    found = gemm.scaled_to(x, factor, torch.bfloat16, in_place=True)
    assert torch.equal(found, expected)
    assert (found is x) == (wide == torch.bfloat16)
    assert torch.equal(x, expected if found is x else before)
    again = largest_allocation(lambda: gemm.scaled_to(found, factor, wide, in_place=True))
    assert again <= max(4 * gemm.SLAB, 0 if wide == torch.bfloat16 else x.nbytes)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("rows", [N, V], ids=["rows of hidden", "rows of the weight"])
def test_float16_is_widened_slab_by_slab(rows, first):
    """acc [n, D] += tile [rows, n]^T right [rows, D], either operand the long one."""
    n = V if rows == N else N
    tile, right = torch.randn(rows, n).half(), torch.randn(rows, D).half()
    before = torch.full((n, D), float("nan")) if first else torch.randn(n, D)
    acc = before.clone()
    gemm.add_transposed(acc, tile, right, first=first)
    exact = tile.double().T @ right.double()
    assert error(acc, exact if first else exact + before.double()) < 1e-6

    def again():
        gemm.add_transposed(acc, tile, right, first=False)

    assert largest_allocation(again) <= 4 * gemm.slab_rows(D) * max(D, gemm.slab_rows(D))
