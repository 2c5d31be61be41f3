"""Advantages over groups against numbers by hand, loops over lists, and the formulas of TRL."""

import itertools
import statistics

import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import LENGTHS, assert_near, both, make_mask, numbers, padded, runs, unit_numbers

from treg.rl import BASELINES, SCALES, group_advantages, token_advantages

# A sequence without a token, with others in its group and alone; one with a token alone.
GROUPS = [7, 7, 3, 7, 3, -1, 3, 7]
APART = [7, 5, 3, 7, 3, -1, 3, 7]
EPS = 1e-4


def at_end(scores):
    """Rewards that stand at the last token alone."""
    return [[0.0] * (n - 1) + [s] if n else [] for n, s in zip(LENGTHS, scores, strict=True)]


def slow_advantages(rewards, groups, units, gamma, lam, baseline, scale):
    """The docstring of `token_advantages`, line by line, over lists of numbers."""
    everyone = [i for i, r in enumerate(rewards) if r]
    group = {i: [j for j in everyone if groups[j] == groups[i]] for i in everyone}
    places = {i: runs(units[i]) for i in everyone}
    R = {i: [sum(rewards[i][t] for t in run) for run in places[i]] for i in everyone}
    S = {i: sum(R[i]) for i in everyone}

    def discounted(x):
        total, out = 0.0, []
        for number in reversed(x):
            total = number + gamma * lam * total
            out.append(total)
        return out[::-1]

    def over_values(b):
        A = {}
        for i in everyone:
            V = [b[i]] * len(R[i]) + [0.0]
            A[i] = discounted([r + gamma * V[m + 1] - V[m] for m, r in enumerate(R[i])])
        return A

    def by_token(A):
        return {i: [A[i][m] for m, run in enumerate(places[i]) for _ in run] for i in everyone}

    if baseline == "group":
        b = {i: statistics.fmean(S[j] for j in group[i]) for i in everyone}
        A = over_values(b)
    elif baseline == "rloo":
        others = {i: [S[j] for j in group[i] if j != i] for i in everyone}
        b = {i: statistics.fmean(others[i]) if others[i] else 0.0 for i in everyone}
        A = over_values(b)
    elif baseline == "process":
        b = {i: statistics.fmean(r for j in group[i] for r in R[j]) for i in everyone}
        A = {i: discounted([r - b[i] for r in R[i]]) for i in everyone}
    else:
        A = over_values(dict.fromkeys(everyone, 0.0))
        b = dict.fromkeys(everyone, 0.0)
        if baseline == "tokens":
            c = statistics.fmean(itertools.chain(*by_token(A).values()))
            b = dict.fromkeys(everyone, c)
            A = {i: [x - c for x in A[i]] for i in everyone}

    def size(members):
        if baseline == "process":
            found = [r for j in members for r in R[j]]
            c = statistics.fmean(found)
            return (sum((r - c) ** 2 for r in found) / max(len(found) - 1, 1)) ** 0.5
        c = statistics.fmean(b[j] for j in members)
        of = by_token(A)
        squares = [statistics.fmean((a + b[j] - c) ** 2 for a in of[j]) for j in members]
        return (sum(squares) / max(len(members) - 1, 1)) ** 0.5

    sizes = {
        "group": lambda i: size(group[i]),
        "batch": lambda i: size(everyone),
        "tokens": lambda i: statistics.stdev(itertools.chain(*by_token(A).values())),
    }
    divisor = {i: 1.0 if scale == "none" else sizes[scale](i) + EPS for i in everyone}
    found = by_token({i: [a / divisor[i] for a in A[i]] for i in everyone})
    return [found.get(i, []) for i in range(len(rewards))]


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.7), (1.0, 0.0), (0.0, 1.0)])
def test_against_loops(baseline, scale, gamma, lam):
    rewards = numbers(seed=1)
    names = {"gamma": gamma, "lam": lam, "baseline": baseline, "scale": scale}
    for units, groups in itertools.product((None, unit_numbers()), (GROUPS, APART)):
        found = both(token_advantages, rewards, groups=torch.tensor(groups), units=units, **names)
        each = units or [list(range(n)) for n in LENGTHS]
        assert_near(found, slow_advantages(rewards, groups, each, **names))


def test_by_hand():
    # two answers with sums 2 and 4: b = 3. From the right 1 - 3, 1 + 1 - 3; 4 - 3, 4 - 3
    rewards = torch.tensor([[1.0, 1.0], [0.0, 4.0]], dtype=torch.float64)
    plain = token_advantages(rewards, 2, scale="none")
    assert plain.tolist() == [[-1.0, -2.0], [1.0, 1.0]]
    # s^2 = 1/1 * ((1 + 4) / 2 + (1 + 1) / 2) = 3.5
    torch.testing.assert_close(token_advantages(rewards, 2), plain / (3.5**0.5 + EPS))
    # the others have 4 and 2
    assert token_advantages(rewards, 2, baseline="rloo", scale="none").tolist() == [
        [-2, -3],
        [2, 2],
    ]
    # the mean of 1, 1, 0, 4 is 1.5; their standard deviation is (9 / 3) ** 0.5
    process = token_advantages(rewards, 2, baseline="process", scale="none")
    assert process.tolist() == [[-1.0, -0.5], [1.0, 2.5]]
    found = token_advantages(rewards, 2, baseline="process", eps=0.0)
    torch.testing.assert_close(found, process / 3**0.5)
    # 2, 1, 4, 4 less their mean 2.75; of the squares .5625, 3.0625, 1.5625, 1.5625 the sum is 6.75
    tokens = token_advantages(rewards, 2, baseline="tokens", scale="none")
    assert tokens.tolist() == [[-0.75, -1.75], [1.25, 1.25]]
    found = token_advantages(rewards, 2, baseline="tokens", scale="tokens", eps=0.0)
    torch.testing.assert_close(found, tokens / 2.25**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_narrow_input_is_rounded_once(dtype):
    rewards = [torch.tensor(x).to(dtype).tolist() for x in numbers(seed=1)]
    found = both(token_advantages, rewards, groups=torch.tensor(GROUPS), dtype=dtype)
    each = [list(range(n)) for n in LENGTHS]
    expected = slow_advantages(rewards, GROUPS, each, 1.0, 1.0, "group", "group")
    assert_near(found, expected, helpers.EPS[dtype])


# -- one number a sequence: TRL 1.16, GRPOTrainer and RLOOTrainer


def trl_grpo(rewards, size, scale_rewards):
    grouped = rewards.view(-1, size)
    std = grouped.std(1).repeat_interleave(size) if scale_rewards == "group" else rewards.std()
    return (rewards - grouped.mean(1).repeat_interleave(size)) / (std + 1e-4)


def trl_rloo(rewards, size):
    grouped = rewards.view(-1, size)
    return rewards - ((grouped.sum(1, keepdim=True) - grouped) / (size - 1)).view(-1)


SCORES = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
TRL = {
    "group": ({}, trl_grpo(SCORES, 4, "group")),
    "batch": ({"scale": "batch"}, trl_grpo(SCORES, 4, "batch")),
    "rloo": ({"baseline": "rloo", "scale": "none"}, trl_rloo(SCORES, 4)),
}


@pytest.mark.parametrize("name", TRL)
def test_one_number_a_sequence_is_what_trl_computes(name):
    options, expected = TRL[name]
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(group_advantages(SCORES, 4, **options), expected, **exact)
    # at the last token alone; and spread over tokens that are one unit
    rows = torch.zeros(12, 5, dtype=torch.float64)
    rows[:, -1] = SCORES
    wide = expected[:, None].expand(12, 5)
    torch.testing.assert_close(token_advantages(rows, 4, **options), wide, **exact)
    parts = torch.rand(12, 5, dtype=torch.float64)
    parts[:, 2] += SCORES - parts.sum(1)
    found = token_advantages(parts, 4, units=torch.full((12, 5), 3), **options)
    torch.testing.assert_close(found, wide, **exact)


def test_process_of_one_step_is_group():
    found = group_advantages(SCORES, 4, baseline="process")
    torch.testing.assert_close(found, trl_grpo(SCORES, 4, "group"), rtol=1e-12, atol=1e-12)


def test_a_sequence_without_a_token_takes_no_part():
    """As the completions that no reward function scores in TRL."""
    scores = [1.0, 99.0, 2.0, 4.0, 0.5, 3.0, -1.0, 2.5]
    found = both(token_advantages, at_end(scores), groups=torch.tensor(GROUPS))
    for number in (7, 3):
        members = [i for i, g in enumerate(GROUPS) if g == number and LENGTHS[i]]
        kept = torch.tensor([scores[i] for i in members], dtype=torch.float64)
        expected = ((kept - kept.mean()) / (kept.std() + EPS)).tolist()
        assert_near(
            [found[i] for i in members],
            [[e] * LENGTHS[i] for e, i in zip(expected, members, strict=True)],
        )


# -- limits


@pytest.mark.parametrize("baseline", sorted(BASELINES.keys() - {"none"}))
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("eps", [EPS, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_rewards_give_exactly_nothing(baseline, scale, eps, dtype):
    names = {"baseline": baseline, "scale": scale, "eps": eps}
    for group in (3, 7):
        assert not group_advantages(torch.full((21,), 0.1, dtype=dtype), group, **names).any()
    if baseline == "process":  # its steps are the tokens
        rows = torch.full((6, 4), 0.1, dtype=dtype)
    else:
        rows = torch.tensor([0.0, 0.0, 0.0, 0.1], dtype=dtype).repeat(6, 1)
    assert not token_advantages(rows, 3, **names).any()
    whole = torch.zeros(6, 4, dtype=torch.int64)
    rows = torch.tensor([0.1, 0.7, -0.2, 0.3], dtype=dtype).repeat(6, 1)
    assert not token_advantages(rows, 3, units=whole, **names).any()


def test_equal_steps_of_ragged_sequences_give_exactly_nothing():
    found = both(
        token_advantages,
        [[0.1] * n for n in LENGTHS],
        groups=torch.tensor(GROUPS),
        baseline="process",
    )
    assert found == [[0.0] * n for n in LENGTHS]


def test_equal_sums_of_tokens_that_differ_do_not_blow_up():
    rewards = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert token_advantages(rewards, 3).abs().max() < 2
    assert token_advantages(1e-3 * rewards, 3).abs().max() < 2


def test_an_answer_alone():
    alone = torch.tensor([3.0, -2.0])
    assert group_advantages(alone, 1).tolist() == [0.0, 0.0]
    assert group_advantages(alone, 1, baseline="rloo", scale="none").tolist() == [3.0, -2.0]
    assert group_advantages(alone, 1, baseline="none", scale="none").tolist() == [3.0, -2.0]


def test_only_who_shares_a_group_counts():
    by_size = group_advantages(SCORES, 4)
    order = torch.randperm(12)
    named = torch.tensor([9, 9, 9, 9, -4, -4, -4, -4, 0, 0, 0, 0], dtype=torch.int32)
    found = group_advantages(SCORES[order], named[order])
    torch.testing.assert_close(found, by_size[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_nothing_at_all(shape):
    for baseline, scale in itertools.product(BASELINES, SCALES):
        empty = torch.empty(shape)
        names = {"baseline": baseline, "scale": scale}
        assert token_advantages(empty, 2, **names).shape == shape
        assert token_advantages(empty, torch.zeros(shape[0]).long(), **names).shape == shape


@given(
    lengths=st.lists(st.integers(0, 9), max_size=6).filter(any),
    seed=st.integers(0, 99),
    baseline=st.sampled_from(sorted(BASELINES)),
    scale=st.sampled_from(sorted(SCALES.keys() - {"tokens"})),
    factors=st.sampled_from([(1.0, 1.0), (0.9, 0.5), (0.0, 1.0)]),
)
@settings(max_examples=60, deadline=None)
def test_any_batch(lengths, seed, baseline, scale, factors):
    rewards, units = numbers(lengths, seed), unit_numbers(lengths, seed)
    groups = torch.randint(0, 3, (len(lengths),), generator=torch.Generator().manual_seed(seed))
    names = dict(zip(("gamma", "lam"), factors, strict=True), baseline=baseline, scale=scale)
    found = both(token_advantages, rewards, groups=groups, units=units, **names)
    assert_near(found, slow_advantages(rewards, groups.tolist(), units, **names))


BAD = {
    "baseline": (
        {"baseline": "mean"},
        "baseline: expected one of group, rloo, none, process, tokens, got 'mean'",
    ),
    "scale": ({"scale": True}, "scale: expected one of group, batch, tokens, none, got True"),
    "eps": ({"eps": -1e-4}, "eps: expected a number >= 0, got -0.0001"),
    "gamma": ({"gamma": 2}, "gamma: expected a number in [0, 1], got 2"),
    "lam": ({"lam": -0.5}, "lam: expected a number in [0, 1], got -0.5"),
    "groups that do not divide": (
        {"groups": 3},
        "groups: expected a number of sequences >= 1 that divides the 4 of the batch, or [B] "
        "int64, got 3",
    ),
    "groups that are a bool": ({"groups": True}, "groups: expected a number of sequences >= 1"),
    "groups of nobody": ({"groups": 0}, "groups: expected a number of sequences >= 1"),
    "groups of another length": (
        {"groups": torch.zeros(2, dtype=torch.int64)},
        "groups: expected [4], one number per sequence, got [2]",
    ),
    "groups of floats": (
        {"groups": torch.zeros(4)},
        "groups: expected [B] int64, or a whole number, got torch.float32",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError) as error:
        token_advantages(**{"rewards": torch.zeros(4, 3), "groups": 2, **changes})
    assert str(error.value).startswith(message)


def test_groups_that_are_no_tensor_are_refused():
    for groups in (2.0, [0, 0], None):
        with pytest.raises(TypeError, match=r"^groups: expected a torch\.Tensor"):
            group_advantages(torch.zeros(2), groups)


def test_scores_that_are_refused():
    with pytest.raises(ValueError, match=r"scores: expected \[B\], one per sequence, got \[2, 2\]"):
        group_advantages(torch.zeros(2, 2), 2)
    with pytest.raises(ValueError, match=r"scores: expected finite values, got nan at index \[0\]"):
        group_advantages(torch.tensor([torch.nan, 0.0]), 2)
    with pytest.raises(ValueError, match="scores: expected a floating-point tensor"):
        group_advantages(torch.tensor([1, 0]), 2)


def test_padding_of_garbage_changes_nothing():
    mask = make_mask()
    rewards = padded(numbers(seed=1), mask)
    clean = torch.where(mask, rewards, 0.0)
    assert torch.equal(
        token_advantages(rewards, 2, mask=mask), token_advantages(clean, 2, mask=mask)
    )
