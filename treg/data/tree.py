"""Sequences that begin alike, laid out so that what they share stands once.

Several sequences of tokens become one row: the first as it is, of each other one only what follows
its common beginning with the one before it. These pieces are branches. A branch goes on from its
parent, so its first token has the position after the last token that it shares, and it sees the
shared tokens, itself, and nothing else: every token sees what it would see in a row of its own.

    chosen    a b c d e          row        a b c d e x y z
    rejected  a b c x y z        positions  0 1 2 3 4 3 4 5
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.integer]

# Columns of an array of branches: the row of the batch, the place of the first token in that row,
# how many tokens; the branch that it goes on from, -1 where it is a beginning, and how many tokens
# of that branch's sequence it shares.
ROW, START, LENGTH, PARENT, SHARED = range(5)

# of a sequence's tokens, what it must share with another one to go on from it: a beginning that
# shares none is plain causal attention, which is faster than one with a mask
LEAST_SHARED = 0.1


@dataclass(frozen=True)
class TokenTree:
    """Rows of tokens, and what each of them may see.

    ids, positions: [rows, T] int64; positions within a token's own sequence. What belongs to no
        branch is padding.
    branches: [n, 5] int64, see ROW to SHARED; in the order in which they stand in the rows.
    paths: of each sequence, the places of its tokens in the flattened rows.
    """

    ids: IntArray
    positions: IntArray
    branches: IntArray
    paths: list[IntArray]

    @property
    def tokens(self) -> int:
        """How many tokens the rows hold, without padding."""
        return int(self.branches[:, LENGTH].sum())


def grow(sequences: Sequence[IntArray]) -> TokenTree:
    """One row of sequences, each of which shares what it begins with with the one before it.

    Sorted ones share all that they can; of two, the order does not matter.

    Args:
        sequences: [tokens] integers each, at least one token.
    """
    ids: list[IntArray] = []
    positions: list[IntArray] = []
    branches: list[tuple[int, int, int, int, int]] = []
    starts: list[int] = []
    paths: list[IntArray] = []
    width = 0
    for sequence in sequences:
        shared = shared_beginning(sequences[len(paths) - 1], sequence) if paths else 0
        parent, beginning = -1, np.empty(0, dtype=np.int64)
        if shared:
            beginning = paths[-1][:shared]
            parent = bisect_right(starts, int(beginning[-1])) - 1
        own = len(sequence) - shared
        paths.append(np.concatenate([beginning, np.arange(width, width + own)]))
        if own:
            ids.append(np.asarray(sequence[shared:], dtype=np.int64))
            positions.append(np.arange(shared, len(sequence)))
            branches.append((0, width, own, parent, shared))
            starts.append(width)
            width += own
    return TokenTree(
        np.concatenate(ids)[None],
        np.concatenate(positions)[None],
        np.array(branches, dtype=np.int64),
        paths,
    )


def shared_beginning(a: IntArray, b: IntArray) -> int:
    """How many tokens both begin with."""
    n = min(len(a), len(b))
    differ = np.asarray(a[:n]) != np.asarray(b[:n])
    return int(differ.argmax()) if differ.any() else n


def shared_pairs(
    sequences: Sequence[IntArray], *, packed: bool, pad: int = 0, multiple: int = 1
) -> TokenTree:
    """Pairs of sequences that share what they begin with.

    Args:
        sequences: of 2B sequences the B chosen ones first; a pair is i and B + i.
        packed, pad, multiple: as in `shared_groups`.
    Returns:
        A tree whose paths are in the order of the sequences.
    """
    pairs = len(sequences) // 2
    groups = [(i, pairs + i) for i in range(pairs)]
    return shared_groups(sequences, groups, packed=packed, pad=pad, multiple=multiple)


def shared_groups(
    sequences: Sequence[IntArray],
    groups: Sequence[Sequence[int]],
    *,
    packed: bool,
    pad: int = 0,
    multiple: int = 1,
) -> TokenTree:
    """Groups of sequences, each of which shares what it begins with with the one before it.

    Args:
        groups: the numbers of the sequences of each group; each sequence is in one group.
        packed: whether all groups go into one row, one after the other; else a row a group.
        pad, multiple: of rows, see `padded_rows`.
    Returns:
        A tree whose paths are in the order of the sequences.
    """
    trees = [grow([sequences[i] for i in group]) for group in groups]
    tree = one_row(trees) if packed else padded_rows(trees, pad, multiple)
    order = np.argsort(np.concatenate(groups))
    return replace(tree, paths=[tree.paths[i] for i in order])


def groups_alike(sequences: Sequence[IntArray]) -> list[list[int]]:
    """The numbers of sequences, in any order, in groups that begin alike, for `shared_groups`.

    A group is sorted by its tokens, so that it shares all that it can. Sequences that have only a
    few tokens in common, such as the first ones of a chat template, are in groups of their own.
    """
    found: list[list[int]] = []
    for i in sorted(range(len(sequences)), key=lambda i: sequences[i].tolist()):
        last = sequences[found[-1][-1]] if found else sequences[i][:0]
        if shared_beginning(last, sequences[i]) > LEAST_SHARED * len(sequences[i]):
            found[-1].append(i)
        else:
            found.append([i])
    return found


def one_row(trees: Sequence[TokenTree]) -> TokenTree:
    """Trees of one row each, one after the other in one row."""
    starts = np.cumsum([0, *(tree.ids.shape[1] for tree in trees)])[:-1]
    return TokenTree(
        np.concatenate([tree.ids for tree in trees], axis=1),
        np.concatenate([tree.positions for tree in trees], axis=1),
        _joined(trees, starts, rows=np.zeros_like(starts)),
        [path + start for tree, start in zip(trees, starts, strict=True) for path in tree.paths],
    )


def padded_rows(trees: Sequence[TokenTree], pad: int, multiple: int = 1) -> TokenTree:
    """Trees of one row each, a row each, padded on the right.

    pad: the id of padding, whose position is 0. multiple: that the width is a multiple of.
    """
    width = max(tree.ids.shape[1] for tree in trees)
    width += -width % multiple
    ids = np.full((len(trees), width), pad, dtype=np.int64)
    positions = np.zeros_like(ids)
    for row, tree in enumerate(trees):
        ids[row, : tree.ids.shape[1]] = tree.ids[0]
        positions[row, : tree.ids.shape[1]] = tree.positions[0]
    rows = np.arange(len(trees))
    paths = [path + row * width for row, tree in enumerate(trees) for path in tree.paths]
    return TokenTree(ids, positions, _joined(trees, np.zeros_like(rows), rows), paths)


def _joined(trees: Sequence[TokenTree], starts: IntArray, rows: IntArray) -> IntArray:
    """The branches of trees of one row each, whose tokens stand at starts in rows."""
    found, count = [], 0
    for tree, start, row in zip(trees, starts, rows, strict=True):
        branches = tree.branches.copy()
        branches[:, ROW] = row
        branches[:, START] += start
        branches[:, PARENT] += np.where(branches[:, PARENT] < 0, 0, count)
        found.append(branches)
        count += len(branches)
    return np.concatenate(found)


def model_inputs(tree: TokenTree, device: torch.device | None = None) -> dict[str, Any]:
    """What a model whose head is installed takes of a tree: input_ids and position_ids [rows, T],
    on the device, and branches, which stay a numpy array: the host needs them.
    """
    return {
        "input_ids": torch.from_numpy(tree.ids).to(device),
        "position_ids": torch.from_numpy(tree.positions).to(device),
        "branches": tree.branches,
    }


def places_in(tree: TokenTree, sequences: Sequence[IntArray], size: int) -> IntArray:
    """Where each token of another layout stands in the flattened rows of a tree, [size] int64; 0
    where that layout has padding.

    sequences: the places of each sequence's tokens in the other layout, in the order of tree.paths.
    """
    found = np.zeros(size, dtype=np.int64)
    for sequence, path in zip(sequences, tree.paths, strict=True):
        found[sequence] = path
    return found
