"""dhidden, dweight and dbias of a head, added up tile by tile."""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from treg.ops.head.gemm import add_transposed, product_of, scaled_to, times_weight
from treg.ops.head.head import Tiles
from treg.ops.head.selection import RowSelection


class Needs(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def trained(self) -> bool:
        """Whether the head itself is trained."""
        return self.weight or self.bias

    def empty(self, *operands: Tensor | None) -> list[Tensor]:
        """Room for the gradients of hidden, weight and bias that are needed."""
        found = []
        for x, needed in zip(operands, self, strict=True):
            if needed and x is not None:
                found.append(x.new_empty(x.shape))
        return found

    def spread(self, gradients: list[Tensor]) -> list[Tensor | None]:
        """Those of hidden, weight and bias, None where none is needed; gradients: as `empty`."""
        left = iter(gradients)
        return [next(left) if needed else None for needed in self]


class Gradients(NamedTuple):
    """Of the tensors that need one; None for the others."""

    hidden: Tensor | None  # [N, D]; 0 in rows that are not scored
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]

    def like(self, *operands: Tensor | None) -> "list[Tensor | None]":
        """The same in the shapes and dtypes of hidden [..., D], weight and bias."""
        found = []
        for gradient, operand in zip(self, operands, strict=True):
            if gradient is None or operand is None:
                found.append(None)
            else:
                if gradient.dtype != operand.dtype:
                    gradient = gradient.to(operand.dtype)
                same = gradient.shape == operand.shape
                found.append(gradient if same else gradient.view(operand.shape))
        return found


class GradientSums:
    """The sums of one backward.

    dhidden is kept without its row factors (`row_scale`, [N]), which are multiplied in once, at the
    end. dweight and dbias are float32 sums (float64 of float64), unless a single tile makes them.
    """

    def __init__(
        self,
        hidden: Tensor,
        tiles: Tiles,
        needs: Needs,
        *,
        complete: bool,
        dweight_dtype: torch.dtype | None = None,
    ):
        """complete: every row of hidden [N, D] will be added; else the others stay 0.
        dweight_dtype: None for that of sums; `Batch.dweight_dtype` where one tile makes all of it.
        """
        self.hidden, self.tiles = hidden, tiles
        self.empty = True
        self._row_scale: Tensor | None = None
        self.dhidden: Tensor | None = None
        self.dweight: Tensor | None = None
        self.dbias: Tensor | None = None
        if needs.hidden:
            make = hidden.new_empty if complete else hidden.new_zeros
            self.dhidden = make(hidden.shape)
        if needs.weight:
            dtype = dweight_dtype or tiles.compute
            self.dweight = hidden.new_empty(tiles.head.weight.shape, dtype=dtype)
        if needs.bias and tiles.head.bias is not None:
            self.dbias = hidden.new_empty(tiles.head.bias.shape, dtype=tiles.compute)

    @property
    def row_scale(self) -> Tensor:
        """[N], 0 where nothing was added."""
        if self._row_scale is None:
            rows, dtype = self.hidden.shape[0], self.tiles.compute
            self._row_scale = self.hidden.new_zeros(rows, dtype=dtype)
        return self._row_scale

    def add(self, tile: Tensor, rows: RowSelection, *factors: Tensor | None) -> None:
        """Add a tile G [n, V] of d L / d a = scale[:, None] * G at these rows.

        factors: scale is their product; each [n], [1] for a number of all rows, or None for 1.

        Where values were not looked at, rows that are not scored could not be left out: their last
        factor is 0, and they add nothing, whatever the others and hidden hold there (NaN even).
        """
        if not tile.shape[0]:  # a group of pairs in which nothing is scored
            return
        known = [x for x in factors if x is not None]
        if self.dweight is not None:
            for hidden, total in self._columns(self.dweight):
                scaled, known = self._scaled(hidden, rows, known)
                add_transposed(total, tile, scaled, first=self.empty)
                del scaled  # before its successor
        scale = product_of(known, clean=not rows.looked) if known else None
        if rows.complete and scale is not None and self._row_scale is None:
            self._row_scale = scale
            if self.dhidden is not None:
                times_weight(tile, self.tiles.head.weight, self.dhidden)
        else:
            self._add_rows(tile, rows, scale)
        if self.dbias is not None:
            ones = tile.new_ones(tile.shape[0]) if scale is None else scale.to(tile.dtype)
            total = self.dbias.unsqueeze(-1)
            add_transposed(total, tile, ones.unsqueeze(-1), first=self.empty)
        self.empty = False

    def apart(self) -> "GradientSums":
        """New sums of dweight and dbias, whose rows go into the same dhidden."""
        self._row_scale = self.row_scale  # of both from here on
        other = copy.copy(self)
        other.dweight = None if self.dweight is None else torch.empty_like(self.dweight)
        other.dbias = None if self.dbias is None else torch.empty_like(self.dbias)
        other.empty = True
        return other

    def finish(self) -> None:
        """After the last tile: sums to which nothing was added are 0."""
        if not self.empty:
            return
        for total in (self.dweight, self.dbias):
            if total is not None:
                total.zero_()

    def scaled_hidden_gradient(self, dtype: torch.dtype) -> Tensor | None:
        """dhidden with its row factors, rounded once to dtype. The sums are done with then."""
        dhidden, self.dhidden = self.dhidden, None
        if dhidden is None:
            return None
        return scaled_to(dhidden, self.row_scale.unsqueeze(-1), dtype, in_place=True)

    def _add_rows(self, tile: Tensor, rows: RowSelection, scale: Tensor | None) -> None:
        """dhidden, and the factors that it lacks."""
        for place, part in rows.places():
            self.row_scale[part] = 1.0 if scale is None else scale[place]
            if self.dhidden is not None:
                self._add_hidden(tile[place], part)

    def _add_hidden(self, tile: Tensor, part: slice | Tensor) -> None:
        assert self.dhidden is not None
        if isinstance(part, slice):
            times_weight(tile, self.tiles.head.weight, self.dhidden[part])
            return
        out = self.dhidden.new_empty(tile.shape[0], self.dhidden.shape[1])
        times_weight(tile, self.tiles.head.weight, out)
        self.dhidden[part] = out

    def _columns(self, dweight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """hidden and dweight, some columns at a time."""
        columns, step = self.hidden.shape[1], self.tiles.scaled_columns
        if columns <= step:
            yield self.hidden, dweight
            return
        for first in range(0, columns, step):
            part = slice(first, first + step)
            yield self.hidden[:, part], dweight[:, part]

    def _scaled(
        self, hidden: Tensor, rows: RowSelection, factors: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """scale[:, None] * hidden[rows] in hidden's dtype, and [scale]. Without factors
        hidden[rows], and none.
        """
        if not factors:
            return rows.read(hidden), factors
        out = hidden.new_empty(len(rows), hidden.shape[1])
        clean = not rows.looked
        if len(rows.parts) == 1:
            part = None if rows.complete else rows.parts[0]
            return out, [self.tiles.scale_rows(hidden, part, factors, out, clean=clean)]
        scale = product_of(factors, clean=clean)
        for place, part in rows.places():
            self.tiles.scale_rows(hidden, part, [scale[place]], out[place], clean=clean)
        return out, [scale]
