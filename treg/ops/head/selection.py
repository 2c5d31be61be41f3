"""Which rows are computed: those with a target, in the order in which they are taken."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowSelection:
    """Some of `total` rows, in order. A part is a range of rows, or a list of row numbers."""

    total: int
    parts: tuple[slice | Tensor, ...]

    @classmethod
    def all(cls, total: int) -> "RowSelection":
        return cls(total, (slice(0, total),))

    @property
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

    def __len__(self) -> int:
        return sum(_length(part) for part in self.parts)

    def read(self, x: Tensor) -> Tensor:
        """x's rows of the selection, [len(self), ...]; a view where it is one range."""
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
        return RowSelection(self.total, tuple(found) or (slice(0, 0),))

    def chunks(self, step: int) -> "Iterator[RowSelection]":
        """Successive selections of one part and at most `step` rows each."""
        for part in self.parts:
            length = _length(part)
            for first in range(0, length, step):
                piece = _cut(part, first, min(first + step, length))
                yield RowSelection(self.total, (piece,))


def scored_rows(target: Tensor, ignore_index: int) -> RowSelection:
    """The rows with a target. All rows where values may not be looked at."""
    return rows_where(target != ignore_index)


def rows_where(used: Tensor) -> RowSelection:
    """The rows where used [N] is True. All rows where values may not be looked at."""
    everything = RowSelection.all(used.shape[0])
    if not sees_values(used) or bool(used.all()):
        return everything
    return RowSelection(used.shape[0], (used.nonzero().squeeze(1),))


def sees_values(x: Tensor) -> bool:
    """Whether a tensor's values may be looked at: not while a CUDA graph is captured.

    Elsewhere a GPU is waited for, in the forward and in the backward. What that costs is
    far less than the products of prompts and padding.
    """
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def check_same_rows(rows: RowSelection, left_out: Tensor | bool) -> None:
    """RuntimeError where a backward finds other rows than its forward, which noted in left_out
    whether rows were left out.
    """
    if rows.complete == bool(left_out):
        raise RuntimeError(
            "target: expected forward and backward both inside the capture of a CUDA graph, or "
            "both outside, got one of each: ignored tokens are left out outside alone"
        )


def _length(part: slice | Tensor) -> int:
    return part.stop - part.start if isinstance(part, slice) else part.shape[0]


def _cut(part: slice | Tensor, first: int, last: int) -> slice | Tensor:
    if isinstance(part, slice):
        return slice(part.start + first, part.start + last)
    return part[first:last]
