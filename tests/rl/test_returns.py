"""Returns and advantages against numbers by hand and against loops over lists of numbers."""

import pytest
import torch
from helpers import EPS
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import LENGTHS, assert_near, both, numbers, runs, unit_numbers

from treg.rl import GAE, discounted_returns, gae

MACRO = unit_numbers()
TOKENS = [list(range(n)) for n in LENGTHS]
WHOLE = [[4] * n for n in LENGTHS]
FACTORS = [(1.0, 1.0), (1.0, 0.95), (0.9, 1.0), (0.9, 0.7), (0.0, 0.95), (1.0, 0.0)]


def slow_returns(rewards, units, gamma):
    out = [0.0] * len(rewards)
    total = 0.0
    for places in reversed(runs(units)):
        total = sum(rewards[t] for t in places) + gamma * total
        for t in places:
            out[t] = total
    return out


def slow_gae(rewards, values, units, gamma, lam, last=0.0):
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    after, A = last, 0.0
    for places in reversed(runs(units)):
        R = sum(rewards[t] for t in places)
        V = sum(values[t] for t in places) / len(places)
        A = R + gamma * after - V + gamma * lam * A
        after = V
        for t in places:
            advantages[t], returns[t] = A, A + V
    return advantages, returns


def test_returns_by_hand():
    rewards = torch.tensor([[1.0, 9.0, 2.0, 4.0], [8.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    found = discounted_returns(rewards, gamma=0.5, mask=mask)
    # 4; 2 + 4 / 2; 1 + 4 / 2
    assert found.tolist() == [[3.0, 0.0, 4.0, 4.0], [8.0, 0.0, 0.0, 0.0]]
    units = torch.tensor([[0, -5, 1, 1], [0, 0, 0, 0]])
    found = discounted_returns(rewards, gamma=0.5, units=units, mask=mask)
    # 2 + 4; 1 + 6 / 2
    assert found.tolist() == [[4.0, 0.0, 6.0, 6.0], [8.0, 0.0, 0.0, 0.0]]


def test_gae_by_hand():
    rewards = torch.tensor([0.0, 1.0, 2.0, 5.0])
    values = torch.tensor([1.0, 2.0, 4.0, 3.0])
    ends = torch.tensor([0, 3, 4])
    found = gae(rewards, values, gamma=0.5, lam=0.5, cu_seqlens=ends)
    # 2 - 4 = -2; 1 + 2 - 2 - 2 / 4 = 0.5; 0 + 1 - 1 + 0.5 / 4 = 0.125;   5 - 3
    assert found.advantages.tolist() == [0.125, 0.5, -2.0, 2.0]
    assert found.returns.tolist() == [1.125, 2.5, 2.0, 5.0]
    units = torch.tensor([0, 0, 1, 0])
    found = gae(rewards, values, gamma=0.5, lam=0.5, units=units, cu_seqlens=ends)
    # -2; V = (1 + 2) / 2: 0 + 1 + 2 - 1.5 - 2 / 4 = 1
    assert found.advantages.tolist() == [1.0, 1.0, -2.0, 2.0]
    assert found.returns.tolist() == [2.5, 2.5, 2.0, 5.0]
    last = torch.tensor([8.0, 0.0])
    found = gae(rewards, values, gamma=0.5, lam=0.5, last_values=last, cu_seqlens=ends)
    # 2 + 4 - 4 = 2; 1 + 2 - 2 + 2 / 4 = 1.5; 0 + 1 - 1 + 1.5 / 4
    assert found.advantages.tolist() == [0.375, 1.5, 2.0, 2.0]


@pytest.mark.parametrize("units", [None, MACRO, WHOLE], ids=["tokens", "macro", "whole"])
@pytest.mark.parametrize(("gamma", "lam"), FACTORS)
def test_against_loops(units, gamma, lam):
    rewards, values = numbers(seed=1), numbers(seed=2)
    each = units or TOKENS
    found = both(discounted_returns, rewards, units=units, gamma=gamma)
    assert_near(found, [slow_returns(r, u, gamma) for r, u in zip(rewards, each, strict=True)])
    last = torch.randn(len(LENGTHS), dtype=torch.float64)
    last[1] = torch.nan  # of a sequence without a token: it is not read
    found = both(gae, rewards, values, units=units, gamma=gamma, lam=lam, last_values=last)
    expected = [
        slow_gae(r, v, u, gamma, lam, end)
        for r, v, u, end in zip(rewards, values, each, last.tolist(), strict=True)
    ]
    for x, y in zip(found, zip(*expected, strict=True), strict=True):
        assert_near(x, list(y))


def test_units_of_one_token_are_tokens():
    rewards, values = numbers(seed=1), numbers(seed=2)
    assert both(gae, rewards, values, units=TOKENS) == both(gae, rewards, values)


def test_with_lambda_1_advantages_are_returns_less_values():
    rewards, values = numbers(seed=1), numbers(seed=2)
    A, G = both(gae, rewards, values, gamma=0.9, lam=1.0)
    expected = both(discounted_returns, rewards, gamma=0.9)
    assert_near(G, expected)
    less = [[g - v for g, v in zip(*x, strict=True)] for x in zip(expected, values, strict=True)]
    assert_near(A, less)


@pytest.mark.parametrize("factor", [0.0, 0.95, 1.0])
def test_a_long_sequence(factor):
    rewards, values = numbers([4096, 4000], seed=1), numbers([4096, 4000], seed=2)
    found = both(gae, rewards, values, gamma=factor, lam=1.0)
    expected = [
        slow_gae(r, v, list(range(len(r))), factor, 1.0)
        for r, v in zip(rewards, values, strict=True)
    ]
    for x, y in zip(found, zip(*expected, strict=True), strict=True):
        assert_near(x, list(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_narrow_input_is_rounded_once(dtype):
    rewards = [torch.tensor(x).to(dtype).tolist() for x in numbers(seed=1)]
    found = both(discounted_returns, rewards, gamma=0.9, dtype=dtype)
    expected = [slow_returns(r, list(range(len(r))), 0.9) for r in rewards]
    assert_near(found, expected, EPS[dtype])


def test_without_a_mask_every_token_is_scored():
    found = discounted_returns(torch.ones(2, 3, requires_grad=True))
    assert found.tolist() == [[3.0, 2.0, 1.0]] * 2
    assert not found.requires_grad


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_nothing_at_all(shape):
    empty = torch.empty(shape)
    assert discounted_returns(empty, units=empty.long()).shape == shape
    found = gae(empty, empty, last_values=torch.zeros(shape[0]))
    assert isinstance(found, GAE) and found.returns.shape == shape


@given(
    lengths=st.lists(st.integers(0, 12), max_size=5),
    seed=st.integers(0, 99),
    gamma=st.sampled_from([0.0, 0.3, 0.99, 1.0]),
    lam=st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_any_batch(lengths, seed, gamma, lam):
    rewards, values = numbers(lengths, seed), numbers(lengths, seed + 100)
    units = unit_numbers(lengths, seed)
    found = both(gae, rewards, values, units=units, gamma=gamma, lam=lam)
    expected = [
        slow_gae(r, v, u, gamma, lam) for r, v, u in zip(rewards, values, units, strict=True)
    ]
    for i, x in enumerate(found):
        assert_near(x, [y[i] for y in expected])


BAD = [
    ({"gamma": 1.5}, "gamma: expected a number in [0, 1], got 1.5"),
    ({"gamma": -0.1}, "gamma: expected a number in [0, 1], got -0.1"),
    ({"gamma": float("nan")}, "gamma: expected a finite number, got nan"),
    ({"lam": -1.0}, "lam: expected a number in [0, 1], got -1.0"),
    ({"values": torch.zeros(2, 4)}, "values: expected shape [2, 3] (one per token), got [2, 4]"),
    ({"last_values": torch.zeros(3)}, "last_values: expected shape [2] (one per sequence), got"),
    (
        {"last_values": torch.full((2,), torch.inf)},
        "last_values: expected finite values, got inf at index [0] (2 in all)",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[next(iter(x[0])) for x in BAD])
def test_refused(changes, message):
    arguments = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3), **changes}
    with pytest.raises(ValueError) as error:
        gae(**arguments)
    assert str(error.value).startswith(message)
