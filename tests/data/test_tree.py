"""Sequences that begin alike, in rows that they share."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treg.data.batches import pack_pairs, pair_tokens
from treg.data.tree import (
    LEAST_SHARED,
    LENGTH,
    PARENT,
    ROW,
    SHARED,
    START,
    groups_alike,
    grow,
    one_row,
    padded_rows,
    shared_beginning,
    shared_groups,
    shared_pairs,
)

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=6)


def path_of(tree, branch):
    """Row and places that a branch's last token sees, told by the columns alone."""
    row, start, length, parent, shared = (int(x) for x in tree.branches[branch])
    own = [(row, start + i) for i in range(length)]
    if parent < 0:
        return own
    before = path_of(tree, parent)
    assert len(before) >= shared
    return before[:shared] + own


def check(tree, sequences):
    """Every sequence can be read along its path, and along a branch."""
    flat, width = tree.ids.reshape(-1), tree.ids.shape[1]
    paths = [path_of(tree, b) for b in range(len(tree.branches))]
    places = [[row * width + place for row, place in path] for path in paths]
    for sequence, path in zip(sequences, tree.paths, strict=True):
        assert flat[path].tolist() == list(sequence)
        assert tree.positions.reshape(-1)[path].tolist() == list(range(len(sequence)))
        assert any(x[: len(path)] == path.tolist() for x in places)
    covered = np.zeros(tree.ids.shape, dtype=int)
    for row, start, length in tree.branches[:, [ROW, START, LENGTH]].tolist():
        covered[row, start : start + length] += 1
    assert covered.max() == 1 and covered.sum() == tree.tokens
    order = tree.branches[:, [ROW, START]].tolist()
    assert order == sorted(order)
    assert all(parent < b for b, parent in enumerate(tree.branches[:, PARENT]))


@given(SEQUENCES)
def test_every_sequence_stands_in_the_row(sequences):
    check(grow([np.array(x) for x in sequences]), sequences)


@given(SEQUENCES)
def test_sorted_sequences_share_all_that_they_can(sequences):
    tree = grow([np.array(x) for x in sorted(sequences)])
    beginnings = {tuple(x[:n]) for x in sequences for n in range(1, len(x) + 1)}
    assert tree.tokens == len(beginnings)  # the nodes of their trie


@given(st.lists(SEQUENCES, min_size=1, max_size=4), st.integers(1, 4), st.booleans())
def test_trees_in_rows(groups, multiple, packed):
    trees = [grow([np.array(x) for x in group]) for group in groups]
    tree = one_row(trees) if packed else padded_rows(trees, 9, multiple)
    check(tree, [x for group in groups for x in group])
    assert tree.tokens == sum(x.tokens for x in trees)
    if packed:
        assert tree.ids.shape == (1, tree.tokens)
    else:
        assert tree.ids.shape[0] == len(groups) and tree.ids.shape[1] % multiple == 0
        assert (tree.ids == 9).sum() == tree.ids.size - tree.tokens


def test_a_pair():
    chosen, rejected = np.array([1, 2, 3, 4, 5]), np.array([1, 2, 3, 7, 8, 9])
    tree = grow([chosen, rejected])
    assert tree.ids.tolist() == [[1, 2, 3, 4, 5, 7, 8, 9]]
    assert tree.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert tree.branches.tolist() == [[0, 0, 5, -1, 0], [0, 5, 3, 0, 3]]
    assert tree.branches[1, [START, PARENT, SHARED]].tolist() == [5, 0, 3]


@pytest.mark.parametrize("packed", [False, True])
def test_pairs_keep_the_order_of_the_sequences(packed):
    sequences = [[1, 2, 3], [4, 4, 4, 4], [1, 2], [4, 4, 5]]
    tree = shared_pairs([np.array(x) for x in sequences], packed=packed)
    check(tree, sequences)
    assert tree.tokens == 3 + 5 and len(tree.ids) == (1 if packed else 2)


@given(SEQUENCES, st.booleans())
def test_groups_are_found_in_any_order(sequences, packed):
    arrays = [np.array(x) for x in sequences]
    groups = groups_alike(arrays)
    assert sorted(i for group in groups for i in group) == list(range(len(sequences)))
    tree = shared_groups(arrays, groups, packed=packed)
    check(tree, sequences)
    assert len(tree.ids) == (1 if packed else len(groups))
    # all that is shared stands once: of one token or more in so short sequences
    assert tree.tokens == len({tuple(x[:n]) for x in sequences for n in range(1, len(x) + 1)})


def test_a_few_tokens_in_common_are_not_shared():
    template, first, second = [1, 2], [*range(3, 30)], [*range(40, 70)]
    answers = [[7], [8, 9], [8]]
    sequences = [np.array([*template, *x, *y]) for y in answers for x in (first, second)]
    assert len(template) < LEAST_SHARED * min(map(len, sequences))
    assert groups_alike(sequences) == [[0, 4, 2], [1, 5, 3]]


def test_tokens_of_a_pair():
    example = {"prompt_ids": [1, 2, 3], "chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 8, 9]}
    a, b = [1, 2, 3, 5, 6], [1, 2, 3, 5, 6, 8]  # the last tokens predict nothing
    assert pair_tokens(example) == len(a) + len(b)
    assert pair_tokens(example, share_prompt=True) == grow([np.array(a), np.array(b)]).tokens == 6
    assert shared_beginning(np.array(a), np.array(b)) == 5
    assert len(pack_pairs([example, dict(example)], 12)) == 2
    assert len(pack_pairs([example, dict(example)], 12, share_prompt=True)) == 1
    with pytest.raises(ValueError, match=r"token_budget: .* 6 tokens, got 5"):
        pack_pairs([example], 5, share_prompt=True)


@pytest.mark.parametrize("packed", [True, False])
def test_a_group_goes_on_from_none_before_it(packed):
    sequences = [np.array(x) for x in ([1, 2, 3], [1, 2, 4], [1, 5, 6], [1, 5, 7])]
    tree = shared_groups(sequences, [(0, 1), (2, 3)], packed=packed)
    assert tree.branches[:, PARENT].tolist() == [-1, 0, -1, 2]
    assert tree.branches[:, SHARED].tolist() == [0, 2, 0, 2]
