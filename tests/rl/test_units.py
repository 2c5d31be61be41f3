"""Units against numbers by hand and loops over lists."""

import itertools

import pytest
import torch
from ragged import LENGTHS, both, make_mask, numbers, runs

from treg.rl import ngram_units, perplexity_units, random_ngram_units, units_from_starts

ROWS = numbers()


def units_of(function, *streams, **arguments):
    return both(function, *streams, result=torch.int64, **arguments)


def slow_units(starts):
    """From one bool a token; the first does not matter."""
    return list(itertools.accumulate([0, *starts[1:]]))[: len(starts)]


def test_from_starts_by_hand():
    starts = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 1]], dtype=torch.bool)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    # the starts at holes are not read
    expected = [[0, 0, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0]]
    assert units_from_starts(starts, mask=mask).tolist() == expected


def test_from_starts_against_loops():
    starts = [[x > 0.3 for x in row] for row in ROWS]
    found = units_of(units_from_starts, starts, dtype=torch.bool)
    assert found == [slow_units(row) for row in starts]


def test_perplexity_by_hand():
    probs = torch.tensor([0.5, 0.6, 0.6, 0.1, 0.9, 0.2, 0.2])
    found = perplexity_units(probs.log(), cu_seqlens=torch.tensor([0, 5, 7]))
    # a rise of the probability, or none, ends nothing
    assert found.tolist() == [0, 0, 0, 1, 1, 0, 0]


def test_perplexity_against_loops():
    starts = [[False, *(b < a for a, b in itertools.pairwise(row))][: len(row)] for row in ROWS]
    assert units_of(perplexity_units, ROWS) == [slow_units(row) for row in starts]


@pytest.mark.parametrize("n", [1, 2, 5, 100])
def test_ngrams(n):
    assert units_of(ngram_units, like=ROWS, n=n) == [[j // n for j in range(k)] for k in LENGTHS]


def test_random_ngrams():
    lengths = [400, 0, 1, 777]
    like = numbers(lengths)

    def drawn(seed, **arguments):
        generator = torch.Generator().manual_seed(seed)
        return random_ngram_units(generator=generator, **arguments)

    found = units_of(drawn, like=like, seed=1)
    assert found != units_of(drawn, like=like, seed=2)
    sizes = [[len(places) for places in runs(units)] for units in found]
    assert sizes[1:3] == [[], [1]]
    for units, of_it in zip(found, sizes, strict=True):
        assert units == [k for k, size in enumerate(of_it) for _ in range(size)]
        assert set(of_it[:-1]) <= {2, 3, 5, 10}
    # with equal chances: 5 tokens a unit, give or take four standard errors of 3.1 / sqrt(155)
    inner = sizes[3][:-1]
    assert set(inner) == {2, 3, 5, 10}
    assert abs(sum(inner) / len(inner) - 5) < 4 * 3.1 / len(inner) ** 0.5
    assert units_of(drawn, like=like, seed=1, lengths=(3,)) == [
        [j // 3 for j in range(k)] for k in lengths
    ]


def test_without_a_generator_torch_draws():
    mask = torch.ones(2, 50, dtype=torch.bool)
    torch.manual_seed(5)
    first = random_ngram_units(mask=mask)
    torch.manual_seed(5)
    assert torch.equal(random_ngram_units(mask=mask), first)
    assert not torch.equal(random_ngram_units(mask=mask), first)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_at_all(shape):
    mask = torch.ones(shape, dtype=torch.bool)
    for units in (
        ngram_units(2, mask=mask),
        random_ngram_units(mask=mask),
        units_from_starts(mask),
        perplexity_units(torch.ones(shape)),
    ):
        assert units.shape == shape


MASK = make_mask()
WRONG = {
    "starts of floats": (
        lambda: units_from_starts(torch.zeros(2, 3)),
        "starts: expected torch.bool, got torch.float32",
    ),
    "log-probs of minus infinity": (
        lambda: perplexity_units(torch.tensor([[0.0, -torch.inf]])),
        "logprobs: expected finite values, got -inf at index [0, 1] (1 in all)",
    ),
    "n": (lambda: ngram_units(0, mask=MASK), "n: expected a whole number >= 1, got 0"),
    "n of True": (lambda: ngram_units(True, mask=MASK), "n: expected a whole number >= 1, got"),
    "lengths": (
        lambda: random_ngram_units((2, 0), mask=MASK),
        "lengths: expected a whole number >= 1, got 0",
    ),
    "no lengths": (
        lambda: random_ngram_units((), mask=MASK),
        "lengths: expected whole numbers >= 1, got none",
    ),
    "neither": (
        lambda: ngram_units(2),
        "mask: expected mask [B, T], or cu_seqlens [B+1], which say what shape the result has, "
        "got neither",
    ),
    "both": (
        lambda: ngram_units(2, mask=MASK, cu_seqlens=torch.tensor([0, 1])),
        "mask: expected None beside cu_seqlens, got both",
    ),
    "a mask of numbers": (
        lambda: ngram_units(2, mask=MASK.long()),
        "mask: expected torch.bool, got torch.int64",
    ),
    "a mask of one row": (
        lambda: ngram_units(2, mask=MASK[0]),
        "mask: expected [B, T], or [N] with cu_seqlens, got [15] without",
    ),
    "cu_seqlens that decrease": (
        lambda: ngram_units(2, cu_seqlens=torch.tensor([0, -1])),
        "cu_seqlens: expected not to decrease, got [0, -1]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(message)
