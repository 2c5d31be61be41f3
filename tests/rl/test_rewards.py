"""Rewards of tokens against numbers by hand and loops over lists."""

import math

import pytest
import torch
from helpers import EPS
from ragged import LENGTHS, assert_near, both, numbers, runs, unit_numbers

from treg.rl import (
    SegmentNormaliser,
    at_end,
    contrastive_offset,
    gae,
    red_rewards,
    rto_rewards,
    segment_rewards,
    with_kl,
)

REWARDS, LP, REF = (numbers(seed=seed) for seed in (1, 2, 3))
SCORES = torch.randn(len(LENGTHS), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
SCORES[1] = torch.nan  # of a sequence without a token: it is not read
ENDS = [[0.0] * (n - 1) + [s] if n else [] for n, s in zip(LENGTHS, SCORES.tolist(), strict=True)]
LLAMA = SegmentNormaliser(w_mu=0.8345, b_mu=0.8798, w_sigma=0.4780, b_sigma=3.7358)


def each(function, *streams):
    """function of the numbers of every token."""
    return [[function(*x) for x in zip(*rows, strict=True)] for rows in zip(*streams, strict=True)]


def test_at_end():
    assert both(at_end, like=REWARDS, scores=SCORES) == ENDS
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    found = at_end(torch.tensor([3.0, torch.inf, 4.0], dtype=torch.bfloat16), mask=mask)
    assert found.tolist() == [[0, 0, 3, 0], [0, 0, 0, 0], [0, 4, 0, 0]]
    assert found.dtype == torch.bfloat16


def test_with_kl():
    found = both(with_kl, REWARDS, LP, REF, coef=0.02)
    assert_near(found, each(lambda r, lp, ref: r - 0.02 * (lp - ref), REWARDS, LP, REF))
    assert both(with_kl, REWARDS, LP, REF, coef=0.0) == REWARDS


@pytest.mark.parametrize("beta_c", [0.0, 0.5, 1.0])
def test_red(beta_c):
    found = both(red_rewards, REWARDS, scores=SCORES, beta_c=beta_c)
    assert_near(found, each(lambda r, end: beta_c * r + (1 - beta_c) * end, REWARDS, ENDS))


def test_red_keeps_the_sum_of_an_answer():
    """Prefix scores 1 (of the prompt), 1.5, 0.5, 3: whatever beta_c, the rewards add up to what
    the answer adds, as long as the score is counted from the prompt's.
    """
    rises = torch.tensor([[0.5, -1.0, 2.5]])
    for beta_c in (0.0, 0.3, 1.0):
        assert red_rewards(rises, torch.tensor([2.0]), beta_c).sum().item() == pytest.approx(2.0)


@pytest.mark.parametrize("limit", [0.05, 0.5, None])
def test_rto(limit):
    inside = limit or math.inf
    expected = each(lambda a, b: min(max(0.3 * (a - b), -inside), inside), LP, REF)
    assert_near(both(rto_rewards, LP, REF, scale=0.3, limit=limit), expected)
    found = both(rto_rewards, LP, REF, scores=SCORES, scale=0.3, limit=limit)
    assert_near(found, each(lambda r, end: r + end, expected, ENDS))


def test_segments_by_hand():
    scores = torch.tensor([9.0, 2.0, 9.0, 9.0, 6.0, 50.0])
    units = torch.tensor([0, 0, 1, 1, 1, 0])
    ends = torch.tensor([0, 5, 6])
    found = segment_rewards(scores, units, cu_seqlens=ends)
    assert found.tolist() == [1.0, 1.0, 2.0, 2.0, 2.0, 10.0]  # 2 / 2, 6 / 3, 50 limited
    # p = 1/2 and 1: mean 3 - 2 log 2 and 3, std 4 - log 2 and 4
    found = segment_rewards(
        scores, units, normaliser=SegmentNormaliser(2, 3, 1, 4), cu_seqlens=ends
    )
    first = (2 - 3 + 2 * math.log(2)) / (4 - math.log(2)) / 2
    assert found.tolist() == pytest.approx([first, first, 0.25, 0.25, 0.25, 10.0])


@pytest.mark.parametrize("normaliser", [None, LLAMA], ids=["plain", "normalised"])
@pytest.mark.parametrize("units", [None, unit_numbers()], ids=["tokens", "segments"])
def test_segments_against_loops(units, normaliser):
    expected = []
    for row, of_it in zip(REWARDS, units or [list(range(n)) for n in LENGTHS], strict=True):
        segments = runs(of_it)
        expected.append([])
        for k, places in enumerate(segments, 1):
            p = k / len(segments)
            mean, std = 0.0, 1.0
            if normaliser is not None:
                mean = 0.8345 * math.log(p) + 0.8798
                std = 0.4780 * math.log(p) + 3.7358
            share = (row[places[-1]] - mean) / std / len(places)
            expected[-1] += [min(max(share, -0.5), 0.5)] * len(places)
    found = both(
        lambda *x, units=None, **where: segment_rewards(
            *x, units, normaliser=normaliser, limit=0.5, **where
        ),
        REWARDS,
        units=units,
    )
    assert_near(found, expected)


def test_one_segment_that_fills_its_row():
    whole = torch.zeros(2, 4, dtype=torch.int64)
    scores = torch.tensor([[9.0, 9.0, 9.0, 4.0], [9.0, 9.0, 9.0, 8.0]])
    assert segment_rewards(scores, whole).tolist() == [[1.0] * 4, [2.0] * 4]


def test_a_segment_of_scores_earns_its_score():
    """Over the same units the shares of a segment add up to its score again."""
    units = unit_numbers()
    shared = both(lambda x, *, units, **w: segment_rewards(x, units, **w), REWARDS, units=units)
    zeros = each(lambda x: 0.0, REWARDS)
    found = both(gae, shared, zeros, units=units, lam=0.0)
    expected = [
        [row[places[-1]] for places in runs(of_it) for _ in places]
        for row, of_it in zip(REWARDS, units, strict=True)
    ]
    assert_near(found[0], expected)


def test_contrastive_offset():
    base = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    assert contrastive_offset(torch.tensor([5.0, -1.0]), base).tolist() == [2.0, -2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_narrow_input_is_rounded_once(dtype):
    r, lp, ref = ([torch.tensor(x).to(dtype).tolist() for x in rows] for rows in (REWARDS, LP, REF))
    found = both(with_kl, r, lp, ref, coef=0.1, dtype=dtype)
    assert_near(found, each(lambda r, lp, ref: r - 0.1 * (lp - ref), r, lp, ref), EPS[dtype])


ZEROS = torch.zeros(2, 3)
NAN = torch.full((2,), torch.nan)
WRONG = {
    "coef": (lambda: with_kl(ZEROS, ZEROS, ZEROS, -0.1), "coef: expected a number >= 0, got -0.1"),
    "ref_logprobs": (
        lambda: with_kl(ZEROS, ZEROS, ZEROS - torch.inf, 0.1),
        "ref_logprobs: expected finite values, got -inf at index [0, 0] (6 in all)",
    ),
    "logprobs": (
        lambda: with_kl(ZEROS, torch.zeros(2, 2), ZEROS, 0.1),
        "logprobs: expected shape [2, 3] (one per token), got [2, 2]",
    ),
    "beta_c": (lambda: red_rewards(ZEROS, NAN, 1.1), "beta_c: expected a number in [0, 1], got"),
    "scores": (
        lambda: red_rewards(ZEROS, NAN),
        "scores: expected finite values, got nan at index [0] (2 in all)",
    ),
    "scores of another length": (
        lambda: rto_rewards(ZEROS, ZEROS, torch.zeros(3)),
        "scores: expected shape [2] (one per sequence), got [3]",
    ),
    "limit": (lambda: rto_rewards(ZEROS, ZEROS, limit=0.0), "limit: expected a finite number > 0"),
    "scale": (
        lambda: rto_rewards(ZEROS, ZEROS, scale=torch.inf),
        "scale: expected a finite number, got inf",
    ),
    "scores of integers": (
        lambda: at_end(torch.zeros(2, dtype=torch.int64), mask=ZEROS.bool()),
        "scores: expected a floating-point tensor",
    ),
    "segment limit": (lambda: segment_rewards(ZEROS, None, limit=-1.0), "limit: expected a finite"),
    "three numbers": (
        lambda: segment_rewards(ZEROS, None, normaliser=(1.0, 2.0, 3.0)),
        "normaliser: expected (w_mu, b_mu, w_sigma, b_sigma) or None, got 3 numbers",
    ),
    "no number": (
        lambda: segment_rewards(ZEROS, None, normaliser=(1.0, 2.0, 3.0, "x")),
        "normaliser: b_sigma: expected a finite number, got 'x'",
    ),
    "a deviation below 0": (
        lambda: segment_rewards(ZEROS, None, normaliser=(0.0, 0.0, 1.0, 1.0)),
        "normaliser: expected a standard deviation > 0 at every segment, got -0.09861 at p = 0.33",
    ),
    "base_scores": (
        lambda: contrastive_offset(torch.zeros(2), torch.zeros(3, 2)),
        "base_scores: expected [B, k], one row per sequence, got [3, 2]",
    ),
    "no base_scores": (
        lambda: contrastive_offset(torch.zeros(2), torch.zeros(2, 0)),
        "base_scores: expected [B, k], one row per sequence, got [2, 0]",
    ),
    "base_scores that are not finite": (
        lambda: contrastive_offset(torch.zeros(1), torch.tensor([[torch.inf, 0.0]])),
        "base_scores: expected finite values, got inf at index [0, 0] (1 in all)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(message)
