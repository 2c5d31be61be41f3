"""The Triton implementation of a head on a tile of rows: what `torch_tiles` does, with logits kept
in registers.
"""

import torch
from torch import Tensor

from treg.ops.head.gemm import logits_into, slab_bytes
from treg.ops.head.head import Head, on_device
from treg.ops.head.memory import ROW_MULTIPLE, row_width


class TritonTiles:
    """`treg.ops.head.head.Tiles` in Triton: logits are float32, in registers."""

    impl = "triton"
    row_multiple = ROW_MULTIPLE
    norm_per_nat = 1.4426950408889634  # log2(e)

    logits_dtype = None

    def __init__(self, head: Head):
        from treg_kernels import configs
        from treg_kernels.forward import part_columns
        from treg_kernels.launch import addressable
        from treg_kernels.tiles import Scalars

        self.head = head
        self.compute = torch.float32
        self.stash_dtype = head.weight.dtype
        self._scalars = Scalars.of(head.logit_scale, head.softcap, head.temperature)
        self._bias = None if head.bias is None else head.bias.contiguous()
        weight = head.weight
        V, D = weight.shape
        copied = addressable(weight)  # by the copy engine
        with on_device(head.weight):
            self._columns = part_columns(head.weight)
            # The largest tile of the forward comes first: its width is that of "tops", whatever
            # the number of rows.
            self._tiles: list[configs.Tile] = []
            for kind in configs.KINDS:
                smallest_first = configs.tiles_for(kind, weight.dtype, V, D, copied)
                self._tiles += [tile for _, tile in reversed(smallest_first)]
        self._vendor_bytes = configs.SLAB_BYTES if any(tile.vendor for tile in self._tiles) else 0

    @property
    def max_rows(self) -> int:
        return min(tile.max_rows for tile in self._tiles)

    @property
    def fixed_bytes(self) -> int:
        weight = self.head.weight
        # slabs are of a CPU, where the interpreter runs
        return slab_bytes(weight.shape[1], weight.dtype, weight.device)[0] + self._vendor_bytes

    def row_bytes(self, *, stash: bool, outputs: tuple[str, ...] = ()) -> int:
        V, D = self.head.weight.shape
        size = self.stash_dtype.itemsize
        partial = 4 * self._columns * (2 + len(outputs))
        # Rows that are listed by number are copied. On a GPU these few D beside V are not counted,
        # so that whole batches without ignored rows fill the budget.
        gathered = 0 if self.head.weight.is_cuda else 3 * D * size
        if not stash:
            return partial + gathered + 64
        # partial results are gone when hidden's copy is made
        wide = row_width(V, self.row_multiple) * size
        return max(partial, self.scaled_columns * size) + wide + gathered + 64

    def column_bytes(self, rows: int) -> int:
        return rows * self.stash_dtype.itemsize

    @property
    def top_width(self) -> int:
        return self._tiles[0].v

    @property
    def scaled_columns(self) -> int:
        """About as large as the partial results of the row."""
        D = self.head.weight.shape[1]
        most = max(512, 8 * self._columns // self.stash_dtype.itemsize)
        parts = -(-D // most)
        return -(-D // (parts * 128)) * 128  # equal parts, of whole cache lines

    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        outputs: tuple[str, ...] = (),
        stash: Tensor | None = None,
    ) -> dict[str, Tensor]:
        from treg_kernels import logprob_forward

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
                self._tiles[0] if "tops" in outputs else None,
            )

    def gradient(
        self, hidden: Tensor, target: Tensor, norm: Tensor, coef: Tensor, out: Tensor
    ) -> None:
        from treg_kernels import logits_gradient

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

    def release(self) -> None:
        """Nothing is kept."""
