"""Sums over sequences against Python loops."""

import itertools

import pytest
import torch
from helpers import DEVICE, EPS

from treg.losses.segments import segment_sum

LENGTHS = {
    "usual": [3, 1, 4, 2],
    "empty-first": [0, 2, 3],
    "empty-last": [2, 3, 0],
    "empty-inside": [2, 0, 0, 5, 1],
    "one": [6],
    "all-empty": [0, 0],
    "none": [],
}
INDEX_DTYPES = [torch.int32, torch.int64]


def offsets(lengths, dtype=torch.int64):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def pieces(values, lengths):
    """Each sequence's values as Python floats."""
    items, start = values.tolist(), 0
    for n in lengths:
        yield items[start : start + n]
        start += n


@pytest.mark.parametrize("dtype", INDEX_DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_sums(lengths, dtype):
    values = torch.randn(sum(lengths), dtype=torch.float64)
    found = segment_sum(values.to(DEVICE), offsets(lengths, dtype))
    assert found.shape == (len(lengths),) and found.dtype == torch.float64
    assert found.tolist() == pytest.approx([sum(p) for p in pieces(values, lengths)], rel=1e-14)


def test_padded_sums():
    values = torch.randn(4, 5, dtype=torch.float64)
    assert segment_sum(values).tolist() == pytest.approx(
        [sum(row) for row in values.tolist()], rel=1e-14
    )
    assert segment_sum(values[:, :0]).tolist() == [0.0] * 4


def test_whole_numbers_are_exact():
    """Sums below 2^24 have one float32 value in any order."""
    values = torch.randint(-9, 9, (5000,))
    lengths = [1, 2000, 0, 2998, 1]
    found = segment_sum(values.float().to(DEVICE), offsets(lengths))
    assert found.tolist() == [sum(p) for p in pieces(values, lengths)]


def test_long_sums_in_float32():
    """Within n roundings of the float64 sum, the worst order there is."""
    lengths, values = [4000, 96], torch.rand(4096)
    exact = torch.stack([x.sum() for x in values.double().split(lengths)])
    found = segment_sum(values.to(DEVICE), offsets(lengths)).double().cpu()
    assert ((found - exact).abs() <= torch.tensor(lengths) * EPS[torch.float32] * exact).all()


def test_strided_values():
    values = torch.randn(10, 2, dtype=torch.float64)[:, 0]
    lengths = [4, 6]
    assert segment_sum(values, offsets(lengths)).tolist() == pytest.approx(
        [sum(p) for p in pieces(values, lengths)]
    )


def test_offsets_on_either_device():
    values, cu_seqlens = torch.randn(6, device=DEVICE), offsets([2, 4])
    assert torch.equal(segment_sum(values, cu_seqlens), segment_sum(values, cu_seqlens.to(DEVICE)))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_gradient_is_the_sequences_own(lengths):
    """d sum_s / d value_t is 1 for the sequence of t, else 0."""
    values = torch.randn(sum(lengths), dtype=torch.float64, device=DEVICE, requires_grad=True)
    upstream = torch.arange(1.0, len(lengths) + 1, dtype=torch.float64, device=DEVICE)
    (found,) = torch.autograd.grad(segment_sum(values, offsets(lengths)), values, upstream)
    assert found.tolist() == [float(s + 1) for s, n in enumerate(lengths) for _ in range(n)]


@pytest.mark.parametrize("dtype", INDEX_DTYPES)
def test_gradcheck(dtype):
    values = torch.randn(8, dtype=torch.float64, requires_grad=True)
    cu_seqlens = offsets(LENGTHS["empty-inside"], dtype)
    assert torch.autograd.gradcheck(lambda x: segment_sum(x.square(), cu_seqlens), values)
    assert torch.autograd.gradcheck(lambda x: segment_sum(x.square().view(2, 4)), values)


def test_deterministic_and_alone():
    """The same bits again, and whatever the neighbours are: a batch may be split."""
    lengths = [700, 1, 0, 1299]
    values, cu_seqlens = torch.randn(2000, device=DEVICE), offsets(lengths)
    first = segment_sum(values, cu_seqlens)
    assert all(torch.equal(segment_sum(values, cu_seqlens), first) for _ in range(3))
    alone = [segment_sum(x.contiguous(), offsets([x.shape[0]])) for x in values.split(lengths)]
    assert torch.equal(torch.cat(alone), first)
