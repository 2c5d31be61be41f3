"""Hidden states times a number for each row: rows of any kind, factors of any number, in both
implementations.
"""

import pytest
import torch
from helpers import DTYPES, IMPLS, device_of

from treg.ops.head import Head, make_tiles

N, D = 37, 70


def rows_of_kind(kind: str):
    return {
        "all": None,
        "range": slice(5, 22),
        "list": torch.tensor([36, 0, 7, 7, 20]),
        "one": slice(3, 4),
        "none": torch.empty(0, dtype=torch.int64),
    }[kind]


def hidden_of(layout: str, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(N, D).to(dtype)
    if layout == "transposed":
        return values.T.contiguous().T
    if layout == "part of a longer tensor":
        return torch.cat([values[:1], values]).flatten()[D - 1 :][: N * D].view(N, D)
    return values


def scaled(impl, hidden, rows, factors, *, clean=False):
    device = device_of(impl)
    hidden, factors = hidden.to(device), [x.to(device) for x in factors]
    rows = rows.to(device) if isinstance(rows, torch.Tensor) else rows
    tiles = make_tiles(impl, Head(hidden.new_zeros(3, hidden.shape[1])))
    count = hidden.shape[0] if rows is None else hidden[rows].shape[0]
    out = hidden.new_full((count, hidden.shape[1]), 123.0)
    scale = tiles.scale_rows(hidden, rows, factors, out, clean=clean)
    return out.cpu(), scale.cpu()


def factors_of(count: int, number: int) -> list[torch.Tensor]:
    """The second is one number for all rows."""
    return [torch.randn(1 if i == 1 else count) for i in range(number)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("layout", ["plain", "transposed", "part of a longer tensor"])
@pytest.mark.parametrize("kind", ["all", "range", "list", "one", "none"])
def test_rows_are_scaled_and_rounded_once(kind, layout, number, dtype, impl):
    hidden, rows = hidden_of(layout, dtype), rows_of_kind(kind)
    chosen = hidden if rows is None else hidden[rows]
    factors = factors_of(len(chosen), number)
    out, scale = scaled(impl, hidden, rows, factors)
    exact = torch.ones(len(chosen), dtype=torch.float64)
    for x in factors:
        exact = exact * x.double()
    torch.testing.assert_close(scale.double(), exact, rtol=2.0**-22, atol=0)
    # of the scale that was returned, the product is rounded once
    product = chosen.float() * scale.unsqueeze(-1)
    assert torch.equal(out, product.to(dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("columns", [1, 64, 1025])
def test_any_number_of_columns(columns, impl):
    hidden, scale = torch.randn(6, columns), torch.randn(6)
    out, found = scaled(impl, hidden, None, [scale])
    assert torch.equal(found, scale) and torch.equal(out, hidden * scale.unsqueeze(-1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["all", "list"])
def test_what_a_row_without_a_last_factor_holds_does_not_matter(kind, bad, number, impl):
    """Neither its hidden state nor its other factors; elsewhere both are seen."""
    hidden, rows = torch.randn(N, D), rows_of_kind(kind)
    hidden[7] = bad
    chosen = torch.arange(N) if rows is None else rows
    unused = chosen == 7
    factors = factors_of(len(chosen), number)
    factors[0][unused] = bad
    factors[-1] = torch.where(unused, 0.0, torch.rand(len(chosen)) + 0.5)
    out, scale = scaled(impl, hidden, rows, factors, clean=True)
    assert torch.equal(scale == 0, unused) and not out[unused].any()
    assert torch.equal(out[~unused], (hidden[chosen] * scale.unsqueeze(-1))[~unused])
    assert scaled(impl, hidden, rows, factors)[0][unused].isnan().all()
    factors[0][-1], factors[-1][-1] = 0.0, float("nan")
    out, scale = scaled(impl, hidden, rows, factors, clean=True)
    assert scale[-1].isnan() and out[-1].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_scale_that_is_no_number_is_seen(impl):
    out, scale = scaled(impl, torch.ones(2, D), None, [torch.tensor([float("nan"), 2.0])])
    assert scale.isnan().tolist() == [True, False] and out[0].isnan().all() and (out[1] == 2).all()
