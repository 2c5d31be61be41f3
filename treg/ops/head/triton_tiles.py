"""The Triton implementation of a head on a tile of rows: what `torch_tiles` does, with logits kept
in registers.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treg.ops.head.gemm import logits_into, slab_bytes
from treg.ops.head.head import Head, on_device
from treg.ops.head.memory import ROW_MULTIPLE, row_width
from treg_kernels import configs, logits_gradient, logprob_forward
from treg_kernels.configs import KINDS, SLAB_BYTES
from treg_kernels.launch import addressable, at_16_byte_rows
from treg_kernels.rows import scale_rows
from treg_kernels.tiles import Scalars


@dataclass(frozen=True)
class _Tables:
    """What the shape, the dtype and the device of a weight decide."""

    largest: Any  # the forward's largest tile of `treg_kernels.configs`
    columns: int  # partial results of a row and statistic, at most
    max_rows: int
    fixed_bytes: int
    scaled_columns: int


@functools.lru_cache(maxsize=64)
def _tables(
    find: Callable, dtype: torch.dtype, V: int, D: int, copied: bool, device: torch.device
) -> _Tables:
    """find: `treg_kernels.configs.tiles_for`. copied: whether the copy engine can read the
    weight.
    """
    tiles = {kind: [tile for _, tile in find(kind, dtype, V, D, copied)] for kind in KINDS}
    every = [tile for found in tiles.values() for tile in found]
    narrowest = min(tile.v for kind in ("forward", "stash") for tile in tiles[kind])
    vendor_bytes = SLAB_BYTES if any(tile.vendor for tile in every) else 0
    columns = -(-V // narrowest)
    # a copy of them is about as large as the partial results of its row
    parts = -(-D // max(512, 8 * columns // dtype.itemsize))
    return _Tables(
        # its width is that of "tops", whatever the number of rows
        largest=tiles["forward"][-1],
        columns=columns,
        max_rows=min(tile.max_rows for tile in every),
        # slabs are of a CPU, where the interpreter runs
        fixed_bytes=slab_bytes(D, dtype, device)[0] + vendor_bytes,
        scaled_columns=-(-D // (parts * 128)) * 128,  # equal parts, of whole cache lines
    )


class TritonTiles:
    """`treg.ops.head.head.Tiles` in Triton: logits are float32, in registers."""

    impl = "triton"
    row_multiple = ROW_MULTIPLE
    norm_per_nat = 1.4426950408889634  # log2(e)

    logits_dtype = None

    def __init__(self, head: Head):
        self.head = head
        self.compute = torch.float32
        self.stash_dtype = head.weight.dtype
        self._scalars = Scalars.of(head.logit_scale, head.softcap, head.temperature)
        self._bias = None if head.bias is None else head.bias.contiguous()
        weight = head.weight
        # sizes may be symbolic where shapes alone are traced
        V, D = map(int, weight.shape)
        with on_device(weight):
            copied = addressable(weight)
            self._tables = _tables(configs.tiles_for, weight.dtype, V, D, copied, weight.device)

    @property
    def max_rows(self) -> int:
        return self._tables.max_rows

    @property
    def fixed_bytes(self) -> int:
        return self._tables.fixed_bytes

    @property
    def top_width(self) -> int:
        return self._tables.largest.v

    @property
    def scaled_columns(self) -> int:
        return self._tables.scaled_columns

    def row_bytes(self, *, stash: bool, outputs: tuple[str, ...] = ()) -> int:
        V, D = self.head.weight.shape
        size = self.stash_dtype.itemsize
        partial = 4 * self._tables.columns * (2 + len(outputs))
        # Rows that are listed by number are copied. On a GPU these few D beside V are not counted,
        # so that whole batches without ignored rows fill the budget.
        gathered = 0 if self.head.weight.is_cuda else 3 * D * size
        if D * size % 16:  # no row but the first begins where the copy engine can read
            gathered += (D * size + 15) // 16 * 16
        if not stash:
            return partial + gathered + 64
        # partial results are gone when hidden's copy is made
        wide = row_width(V, self.row_multiple) * size
        return max(partial, self.scaled_columns * size) + wide + gathered + 64

    def column_bytes(self, rows: int) -> int:
        return rows * self.stash_dtype.itemsize

    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        outputs: tuple[str, ...] = (),
        stash: Tensor | None = None,
    ) -> dict[str, Tensor]:
        with on_device(self.head.weight):
            return logprob_forward(
                hidden,
                self.head.weight,
                target,
                self._bias,
                self._scalars,
                self.head.ignore_index,
                outputs,
                stash,
                logits_into,
                self._tables.largest if "tops" in outputs else None,
            )

    def gradient(
        self, hidden: Tensor, target: Tensor, norm: Tensor, coef: Tensor, out: Tensor
    ) -> None:
        with on_device(self.head.weight):
            logits_gradient(
                hidden,
                self.head.weight,
                target,
                self._bias,
                self._scalars,
                self.head.ignore_index,
                norm,
                coef,
                out,
                logits_into,
            )

    def scale_rows(
        self,
        hidden: Tensor,
        rows: slice | Tensor | None,
        factors: Sequence[Tensor],
        out: Tensor,
        *,
        clean: bool,
    ) -> Tensor:
        if isinstance(rows, slice):
            hidden, rows = hidden[rows], None
        with on_device(hidden):
            return scale_rows(hidden, rows, factors, out, clean=clean)

    def readable(self, hidden: Tensor) -> Tensor:
        return at_16_byte_rows(hidden)

    def release(self) -> None:
        """Nothing is kept."""
