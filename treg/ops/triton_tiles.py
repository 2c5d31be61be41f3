"""The Triton implementation of a head on a tile of rows: what `torch_tiles` does, with logits kept in registers."""

import contextlib

import torch
from torch import Tensor

from treg.ops.gemm import slab_bytes
from treg.ops.head import Head


class TritonTiles:
    """Same interface as `treg.ops.torch_tiles.TorchTiles`."""

    max_rows = 1 << 20
    norm_per_nat = 1.4426950408889634  # log2(e)

    def __init__(self, head: Head, logits_dtype: None = None):
        """Logits are float32, in registers."""
        from treg_kernels.forward import part_columns
        from treg_kernels.tiles import Scalars

        self.head, self.logits_dtype = head, logits_dtype
        self.compute = torch.float32
        self.stash_dtype = head.weight.dtype
        self._scalars = Scalars.of(head.logit_scale, head.softcap, head.temperature)
        self._bias = None if head.bias is None else head.bias.contiguous()
        self._columns = part_columns(head.weight.shape[0])

    @property
    def fixed_bytes(self) -> int:
        """Of the products alone, and only where the interpreter runs on a CPU."""
        weight = self.head.weight
        return slab_bytes(weight.shape[1], weight.dtype, weight.device)[0]

    def row_bytes(self, *, stash: bool, outputs: tuple[str, ...] = ()) -> int:
        V, D = self.head.weight.shape
        parts = 4 * self._columns * (2 + len(outputs))
        return parts + stash * V * self.stash_dtype.itemsize + 4 * D * self.stash_dtype.itemsize + 64

    def forward(
        self, hidden: Tensor, target: Tensor, outputs: tuple[str, ...] = (), stash: Tensor | None = None
    ) -> dict[str, Tensor]:
        from treg_kernels import logprob_forward

        with self._device():
            return logprob_forward(
                hidden, self.head.weight, target, self._bias, self._scalars, self.head.ignore_index,
                outputs, stash,
            )  # fmt: skip

    def gradient(self, hidden: Tensor, target: Tensor, norm: Tensor, coef: Tensor, out: Tensor) -> None:
        from treg_kernels import logits_gradient

        with self._device():
            logits_gradient(
                hidden, self.head.weight, target, self._bias, self._scalars, self.head.ignore_index, norm, coef, out
            )

    def release(self) -> None:
        """Nothing is kept between tiles."""

    def _device(self):
        """Triton launches on the current device, which need not be the tensors'."""
        weight = self.head.weight
        return torch.cuda.device(weight.device) if weight.is_cuda else contextlib.nullcontext()
