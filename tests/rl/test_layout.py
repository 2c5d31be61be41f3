"""What is refused of tensors of tokens, whatever the function."""

import pytest
import torch
from ragged import LENGTHS, ends_of, make_mask, numbers, packed, padded

from treg import set_debug
from treg.rl import discounted_returns
from treg.rl.layout import Layout
from treg.rl.steps import sums_from_right

NAN = torch.tensor([[0.0, torch.nan, 0.0], [0.0, 0.0, 0.0]])
HOLE = torch.tensor([[True, False, True], [True, True, True]])
PACKED = {"rewards": torch.zeros(5), "cu_seqlens": torch.tensor([0, 2, 5])}
FALLS = torch.tensor([[0, 1, 1], [2, 3, 1]])

BAD = {
    "one dimension without cu_seqlens": (
        {"rewards": torch.zeros(5)},
        "rewards: expected [B, T], or [N] with cu_seqlens, got [5] without",
    ),
    "two dimensions with cu_seqlens": (
        {"cu_seqlens": torch.tensor([0, 3, 6])},
        "rewards: expected [N] beside cu_seqlens, got [2, 3]",
    ),
    "integers": (
        {"rewards": torch.zeros(2, 3, dtype=torch.int64)},
        "rewards: expected a floating-point tensor of 16, 32 or 64 bits, got torch.int64",
    ),
    "NaN": (
        {"rewards": NAN},
        "rewards: expected finite values, got nan at index [0, 1] (1 in all)",
    ),
    "mask of numbers": ({"mask": torch.ones(2, 3)}, "mask: expected torch.bool, got torch.float32"),
    "mask of another shape": (
        {"mask": torch.ones(2, 4, dtype=torch.bool)},
        "mask: expected shape [2, 3] (one per token), got [2, 4]",
    ),
    "mask and cu_seqlens": (
        {**PACKED, "mask": torch.ones(5, dtype=torch.bool)},
        "mask: expected None beside cu_seqlens, got both; packed sequences hold scored tokens",
    ),
    "cu_seqlens of floats": (
        {**PACKED, "cu_seqlens": torch.tensor([0.0, 5.0])},
        "cu_seqlens: expected [B+1] int32 or int64, got [2] torch.float32",
    ),
    "cu_seqlens of two dimensions": (
        {**PACKED, "cu_seqlens": torch.tensor([[0, 5]])},
        "cu_seqlens: expected [B+1] int32 or int64, got [1, 2] torch.int64",
    ),
    "cu_seqlens of nothing": (
        {**PACKED, "cu_seqlens": torch.tensor([], dtype=torch.int32)},
        "cu_seqlens: expected [B+1] int32 or int64, got [0] torch.int32",
    ),
    "cu_seqlens that end early": (
        {**PACKED, "cu_seqlens": torch.tensor([0, 2, 4])},
        "cu_seqlens: expected to end at N=5 (rows of rewards), got 4",
    ),
    "cu_seqlens that begin late": (
        {**PACKED, "cu_seqlens": torch.tensor([1, 5])},
        "cu_seqlens: expected to start at 0, got 1",
    ),
    "cu_seqlens that decrease": (
        {**PACKED, "cu_seqlens": torch.tensor([0, 3, 2, 5])},
        "cu_seqlens: expected not to decrease, got [0, 3, 2, 5]",
    ),
    "units of floats": (
        {"units": torch.zeros(2, 3)},
        "units: expected torch.int64, got torch.float32",
    ),
    "units of another shape": (
        {"units": torch.zeros(2, 2, dtype=torch.int64)},
        "units: expected shape [2, 3] (one per token), got [2, 2]",
    ),
    "units that decrease": (
        {"units": FALLS},
        "units: expected numbers that do not decrease in a sequence, got 1 after 3 in sequence 1; "
        "make them with treg.rl.units_from_starts",
    ),
    "units below 0": ({"units": FALLS - 1}, "units: expected numbers >= 0, got -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError) as error:
        discounted_returns(**{"rewards": torch.zeros(2, 3), **changes})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", ["rewards", "mask", "cu_seqlens", "units"])
def test_what_is_no_tensor_is_refused(name):
    arguments = {"rewards": torch.zeros(2, 3), name: [[1.0]]}
    with pytest.raises(TypeError, match=f"^{name}: expected a torch.Tensor"):
        discounted_returns(**arguments)


def test_what_is_not_scored_may_be_anything():
    assert discounted_returns(NAN, mask=HOLE).tolist() == [[0.0] * 3] * 2
    units = torch.tensor([[1, -9, 1], [0, 0, 1]])
    assert discounted_returns(NAN, units=units, mask=HOLE).tolist() == [[0.0] * 3] * 2


@pytest.mark.gpu
def test_values_on_a_gpu_are_checked_on_request():
    rewards = NAN.cuda()
    discounted_returns(rewards)
    set_debug(True)
    try:
        with pytest.raises(ValueError, match="rewards: expected finite values"):
            discounted_returns(rewards)
    finally:
        set_debug(False)


def test_there_and_back():
    mask = make_mask()
    rows = numbers()
    wide, flat = padded(rows, mask), packed(rows)
    for layout, x in (
        (Layout.of("x", wide, mask, None), wide),
        (Layout.of("x", flat, None, ends_of(rows)), flat),
    ):
        left = layout.take("x", x)
        for row, numbers_of_it in zip(left.tolist(), rows, strict=True):
            assert row == [*numbers_of_it, *[0.0] * (layout.width - len(numbers_of_it))]
        assert layout.lengths.tolist() == list(LENGTHS)
        assert layout.there.sum(1).tolist() == list(LENGTHS)
        assert torch.equal(layout.back(left, x.dtype), torch.where(layout.scored, x, 0.0))


@pytest.mark.parametrize("width", [1, 2, 3, 8, 13])
def test_sums_by_doubling(width):
    x = torch.randn(3, width, dtype=torch.float64)
    expected = x.clone()
    for t in reversed(range(width - 1)):
        expected[:, t] += 0.7 * expected[:, t + 1]
    torch.testing.assert_close(sums_from_right(x, 0.7), expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(sums_from_right(x, 0.0), x)
