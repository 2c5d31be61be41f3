"""The Triton implementation of a head on a tile of rows: what `torch_tiles` does, with logits kept
in registers.
"""

import torch
from torch import Tensor

from treg.ops.gemm import logits_into, slab_bytes
from treg.ops.head import Head, on_device


class TritonTiles:
    """Same interface as `treg.ops.torch_tiles.TorchTiles`."""

    impl = "triton"
    norm_per_nat = 1.4426950408889634  # log2(e)

    def __init__(self, head: Head, logits_dtype: None = None):
        """Logits are float32, in registers."""
        from treg_kernels import configs
        from treg_kernels.forward import part_columns
        from treg_kernels.launch import addressable
        from treg_kernels.tiles import Scalars

        self.head, self.logits_dtype = head, logits_dtype
        self.compute = torch.float32
        self.stash_dtype = head.weight.dtype
        self._scalars = Scalars.of(head.logit_scale, head.softcap, head.temperature)
        self._bias = None if head.bias is None else head.bias.contiguous()
        shape = head.weight.dtype, *head.weight.shape, addressable(head.weight)
        with on_device(head.weight):
            self._columns = part_columns(head.weight)
            # the largest tile of the forward first: its width is that of "tops", whatever the
            # number of rows
            self._tiles = [
                tile
                for kind in configs.KINDS
                for _, tile in reversed(configs.tiles_for(kind, *shape))
            ]
        self._vendor_bytes = configs.SLAB_BYTES if any(tile.vendor for tile in self._tiles) else 0

    @property
    def max_rows(self) -> int:
        """Rows of one launch."""
        return min(tile.max_rows for tile in self._tiles)

    @property
    def fixed_bytes(self) -> int:
        """Temporaries that do not depend on the rows of a tile; most only where the interpreter
        runs on a CPU.
        """
        weight = self.head.weight
        return slab_bytes(weight.shape[1], weight.dtype, weight.device)[0] + self._vendor_bytes

    def row_bytes(self, *, stash: bool, outputs: tuple[str, ...] = ()) -> int:
        """Temporaries per row of a tile, a stash included. Partial results are gone when hidden's
        copy is made.
        """
        V = self.head.weight.shape[0]
        held = max(
            4 * self._columns * (2 + len(outputs)),
            stash * self.scaled_columns * self.stash_dtype.itemsize,
        )
        return held + stash * V * self.stash_dtype.itemsize + self._gathered_bytes + 64

    def column_bytes(self, rows: int) -> int:
        """Temporaries per word of a tile of so many rows that has a part of the vocabulary."""
        return rows * self.stash_dtype.itemsize

    @property
    def top_width(self) -> int:
        """Columns of which "tops" has one number."""
        return self._tiles[0].v

    @property
    def scaled_columns(self) -> int:
        """Columns of hidden whose scaled copy is made at a time: about as large as the partial
        results of the row.
        """
        D, size = self.head.weight.shape[1], self.stash_dtype.itemsize
        most = max(512, 8 * self._columns // size)
        return -(-D // (-(-D // most) * 128)) * 128  # equal parts, of whole cache lines

    @property
    def _gathered_bytes(self) -> int:
        """Rows that are listed by number, where ignored ones are left out, are copied: a few D
        beside V, on a GPU not
        counted, so that whole batches without ignored rows fill the budget."""
        D = self.head.weight.shape[1]
        return 0 if self.head.weight.is_cuda else 3 * D * self.stash_dtype.itemsize

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
        """Nothing is kept between tiles."""
