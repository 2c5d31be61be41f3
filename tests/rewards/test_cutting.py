"""Where pairs are cut into parts, and what the bar shows of them."""

import numpy as np
import pytest
import torch

from treg.data import Pair, pair_tokens
from treg.rewards.cutting import MINUTE, cut_parts, part_tokens
from treg.rewards.progress import FIRST_GUESS, MOST, Progress


def pair(tokens: int) -> Pair:
    """A pair of so many tokens, an even number of at least 4."""
    found = Pair.__new__(Pair)
    answer = np.zeros(tokens // 2, np.int32)
    ids = {"prompt_ids": answer[:1], "chosen_ids": answer, "rejected_ids": answer}
    for name, value in ids.items():
        object.__setattr__(found, name, value)
    return found


def sizes(parts):
    return [[pair_tokens(vars(x)) for x in part] for part in parts]


LONGEST_FIRST = [pair(n) for n in (100, 40, 40, 20, 20, 20, 20, 20, 20, 4)]
CUTS = {
    "by tokens": (2, 80, [[100], [40, 40], [20, 20], [20, 20], [20, 20], [4]]),
    "by pairs": (2, 10**6, [[100, 40], [40, 20], [20, 20], [20, 20], [20, 4]]),
    "one a part": (1, 10**6, [[100], [40], [40], [20], [20], [20], [20], [20], [20], [4]]),
    "few pairs are shared all the same": (
        32,
        10**6,
        [[100, 40], [40, 20], [20, 20], [20, 20], [20, 4]],
    ),
}


@pytest.mark.parametrize("case", CUTS)
def test_cuts(case):
    pairs, tokens, expected = CUTS[case]
    assert sizes(cut_parts(LONGEST_FIRST, pairs, tokens)) == expected


def test_many_pairs_are_cut_by_their_number():
    parts = cut_parts([pair(4)] * 1000, 32, 10**6)
    assert [len(x) for x in parts] == [32] * 31 + [8]
    assert cut_parts([], 32, 100) == []


def test_a_part_is_a_minute_of_work():
    """Two operations a parameter and token, four tokens for one of a pair."""
    model = torch.nn.Linear(1000, 1000, bias=False)
    model.device = torch.device("cpu")
    assert part_tokens(model) == MINUTE["cpu"] / (2 * 1e6 * 4)


def test_the_bar_moves_with_every_forward():
    bar = Progress(shown=True)
    parts = [LONGEST_FIRST[:1], LONGEST_FIRST[1:3]]  # 100 and 80 tokens
    places = []
    with bar.over(parts):
        assert bar.bar.total == 180
        for _ in range(8):
            bar.tokens(100)
            places.append(bar.bar.n)
        bar.part_done()  # 800 tokens for 100: 8 for one
        places.append(bar.bar.n)
        bar.tokens(320)
        places.append(bar.bar.n)
        bar.part_done()
        shown = str(bar.bar)
    guessed = [min(100 * (i + 1) / FIRST_GUESS, 100 * MOST) for i in range(8)]
    assert places == [*map(int, guessed), 100, 140]
    assert bar.bar.n == 180 and "3 of 3 pairs" in shown and "tokens/s" in shown


def test_a_part_of_which_every_pair_is_refused():
    bar = Progress(shown=True)
    with bar.over([LONGEST_FIRST[:1], LONGEST_FIRST[1:2]]):
        bar.part_done()
        bar.tokens(int(40 * FIRST_GUESS / 2))
        assert bar.bar.n == 120


def test_a_bar_that_is_not_wanted(capsys):
    bar = Progress(shown=False)
    bar.tokens(5)  # before there is one
    with bar.over([LONGEST_FIRST]):
        bar.tokens(100)
        bar.part_done()
    assert capsys.readouterr() == ("", "")
