"""Which rows are computed: those with a target, in the order in which they are taken."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

# So few rows are all computed on a GPU: to wait for it, in order to know which ones are scored,
# costs more than their products.
FEW_ROWS = 512
BLIND = -1  # `RowSelection.note` where values were not looked at


@dataclass(frozen=True)
class RowSelection:
    """Some of `total` rows, in order. A part is a range of rows, or a list of row numbers."""

    total: int
    parts: tuple[slice | Tensor, ...]
    looked: bool = True  # False: all rows are here, and some of them perhaps are not scored

    @classmethod
    def all(cls, total: int) -> "RowSelection":
        return cls(total, (slice(0, total),))

    @cached_property
    def complete(self) -> bool:
        """Whether it was made by `all`: every row, in order."""
        part = self.parts[0]
        return isinstance(part, slice) and part == slice(0, self.total)

    @property
    def numbers(self) -> Tensor:
        """The row numbers of a selection that lists them."""
        (part,) = self.parts
        if isinstance(part, slice):
            raise TypeError(f"expected listed rows, got the range {part}")
        return part

    @property
    def note(self) -> int:
        """What `same_rows` makes the selection of again."""
        return len(self) if self.looked else BLIND

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _count(self) -> int:
        return self.total if self.complete else sum([_length(part) for part in self.parts])

    def read(self, x: Tensor) -> Tensor:
        """x's rows of the selection, [len(self), ...]; a view where it is one range."""
        if self.complete:
            return x
        if len(self.parts) == 1:
            return x[self.parts[0]]
        return torch.cat([x[part] for part in self.parts])

    def write(self, x: Tensor, values: Tensor) -> None:
        """x's rows of the selection become values, [len(self), ...]."""
        for place, part in self.places():
            x[part] = values[place]

    def places(self) -> Iterator[tuple[slice, slice | Tensor]]:
        """Each part: where its rows lie within the selection, and which rows they are."""
        start = 0
        for part in self.parts:
            stop = start + _length(part)
            yield slice(start, stop), part
            start = stop

    def section(self, start: int, stop: int) -> "RowSelection":
        """The start-th to the (stop-1)-th row of the selection."""
        found = []
        for place, part in self.places():
            first = max(start, place.start) - place.start
            last = min(stop, place.stop) - place.start
            if first < last:
                found.append(_cut(part, first, last))
        return replace(self, parts=tuple(found) or (slice(0, 0),))

    def chunks(self, step: int) -> "Iterator[RowSelection]":
        """Successive selections of one part and at most `step` rows each."""
        for part in self.parts:
            length = _length(part)
            for first in range(0, length, step):
                piece = _cut(part, first, min(first + step, length))
                yield replace(self, parts=(piece,))


def scored_rows(target: Tensor, ignore_index: int) -> RowSelection:
    """The rows with a target. All rows where values are not looked at."""
    return rows_where(target != ignore_index) if looks(target) else _all_blind(target)


def rows_where(used: Tensor) -> RowSelection:
    """The rows where used [N] is True. All rows where values are not looked at.

    A GPU is waited for once.
    """
    return _rows_where(used, int(used.sum())) if looks(used) else _all_blind(used)


def sees_values(x: Tensor) -> bool:
    """Whether a tensor's values may be looked at: not while a CUDA graph is captured.

    Elsewhere a GPU is waited for, in the forward of log-probs and losses and in the backward of
    entropies. What that costs is far less than the products of prompts and padding.
    """
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def looks(x: Tensor) -> bool:
    """Whether rows of x [N, ...] that are not scored are looked for: where it is possible, and pays
    for the wait.
    """
    return sees_values(x) and not (x.is_cuda and x.shape[0] <= FEW_ROWS)


def same_rows(target: Tensor, ignore_index: int, note: int) -> RowSelection:
    """The selection that `scored_rows` made of the same target, without a wait for the device.

    note: `RowSelection.note` of that selection.
    Raises:
        RuntimeError: that selection is of a forward within the capture of a CUDA graph, and this is
            outside, or the reverse.
    """
    seen = looks(target)
    if note == target.shape[0]:
        return RowSelection.all(note)
    # a forward within a capture did not know whether rows are ignored: here it decides
    if seen != (note != BLIND) and not (seen and bool((target != ignore_index).all())):
        raise RuntimeError(
            "target: expected forward and backward both inside the capture of a CUDA graph, or "
            "both outside, got one of each: ignored tokens are left out outside alone"
        )
    if note == BLIND:
        return _all_blind(target)
    return _rows_where(target != ignore_index, note)


def _all_blind(x: Tensor) -> RowSelection:
    count = x.shape[0]
    return RowSelection(count, (slice(0, count),), looked=False)


def _rows_where(used: Tensor, count: int) -> RowSelection:
    """The rows where used [N] is True, which are so many."""
    if count == used.shape[0]:
        return RowSelection.all(count)
    # of a size that is known, the list needs no wait
    return RowSelection(used.shape[0], (torch.nonzero_static(used, size=count).squeeze(1),))


def _length(part: slice | Tensor) -> int:
    return part.stop - part.start if isinstance(part, slice) else part.shape[0]


def _cut(part: slice | Tensor, first: int, last: int) -> slice | Tensor:
    if isinstance(part, slice):
        return slice(part.start + first, part.start + last)
    return part[first:last]
