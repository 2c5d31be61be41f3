"""The torch implementation of a head on a tile of rows: the CPU path, and the portable one on any
device.

A tile's logits [n, V] come from one GEMM; what follows runs over a few rows at a time, in place, in
float32, so that it stays in cache. Exact float32 logits are the rule; `logits_dtype` says where
they are not.
"""

import torch
from torch import Tensor

from treg.ops.filtered import block_tops
from treg.ops.gemm import logits_into, slab_bytes, slab_rows
from treg.ops.head import Head, empty_rows, sees_values

BLOCK = {
    "cpu": 1 << 20
}  # elements that the row passes work on at a time: 4 MiB in float32 stay in a CPU's cache;
BLOCK_GPU = 1 << 24  # on a GPU each pass is a launch
PASS_BUFFERS = 4  # such blocks alive at once, at most


class TorchTiles:
    """See `treg.ops.triton_tiles.TritonTiles` for the same interface on Triton."""

    impl = "torch"
    top_width = 128  # columns of which "tops" has one number
    norm_per_nat = 1.0  # the norm of a row is its lse in this unit

    def __init__(self, head: Head, logits_dtype: torch.dtype | None = None):
        self.head = head
        weight = head.weight
        self.compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if logits_dtype is None:
            rounded = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
            logits_dtype = torch.bfloat16 if rounded else self.compute
        self.logits_dtype = logits_dtype
        self.stash_dtype = weight.dtype
        self._block = BLOCK.get(weight.device.type, BLOCK_GPU)
        self._logits: Tensor | None = None

    # -- sizes, in bytes
    # ----------------------------------------------------------------------------------------

    def row_bytes(self, *, stash: bool, outputs: tuple[str, ...] = ()) -> int:
        """Temporaries per row of a tile, a stash included."""
        V, D = self.head.weight.shape
        tile = V * self.logits_dtype.itemsize if not stash or self._upcast else 0
        _, products = slab_bytes(D, self.stash_dtype, self.head.weight.device)
        return (
            tile + stash * V * self.stash_dtype.itemsize + 4 * D * self.compute.itemsize + products
        )

    def column_bytes(self, rows: int) -> int:
        """Temporaries per word of a tile of so many rows that has a part of the vocabulary."""
        return rows * (self.stash_dtype.itemsize + self._upcast * self.logits_dtype.itemsize)

    @property
    def fixed_bytes(self) -> int:
        """Temporaries that do not depend on the rows of a tile."""
        V, D = self.head.weight.shape
        passes = PASS_BUFFERS * max(self._block, V) * self.compute.itemsize
        products, _ = slab_bytes(D, self.stash_dtype, self.head.weight.device)
        return passes + max(products, self._upcast * slab_rows(D) * D * self.compute.itemsize)

    @property
    def max_rows(self) -> int:
        """More rows a tile are not faster."""
        return 1024 if self.head.weight.device.type == "cpu" else 4096

    @property
    def scaled_columns(self) -> int:
        """Columns of hidden whose scaled copy is made at a time: all."""
        return self.head.weight.shape[1]

    @property
    def _upcast(self) -> bool:
        """Logits are wider than the weight and the stash: they have a buffer of their own."""
        return self.logits_dtype != self.head.weight.dtype

    # -- work
    # ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        outputs: tuple[str, ...] = (),
        stash: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Log-probs and statistics of n rows; with a stash [n, V], d lp / d a = factor * stash.

        Args: hidden [n, D], target [n]. Returns: {"logprobs", "norm", *outputs}, beside a stash
        "factor"; each [n]. norm is what `gradient` takes.
        """
        n = hidden.shape[0]
        scored = target != self.head.ignore_index
        hidden = self._cleaned(hidden, scored)
        y = torch.where(scored, target, 0).unsqueeze(-1)
        found = empty_rows(hidden, self, ("logprobs", "norm", *outputs))
        logits = self._matmul(hidden, stash)
        for rows in self._blocks(n):
            z, slope = self._transform(logits[rows])
            z_y = z.gather(1, y[rows]).squeeze(1)
            top = z.amax(1)
            if "tops" in outputs:
                found["tops"][rows] = block_tops(z, y[rows], self.top_width)
            if "mean_logit" in outputs:
                found["mean_logit"][rows] = z.mean(1)
            if "is_top1" in outputs:
                found["is_top1"][rows] = z_y >= top
            p = torch.softmax(z, 1, out=z)
            # the largest probability is exp(top - lse), never small: the log-sum costs no second
            # pass
            log_top = p.amax(1).log()
            lse = top - log_top
            found["norm"][rows] = lse
            found["logprobs"][rows] = (
                z_y - top
            ) + log_top  # not z_y - lse, whose rounding is that of lse
            if "lse" in outputs:
                found["lse"][rows] = lse
            if "entropy" in outputs:
                found["entropy"][rows] = torch.special.entr(p).sum(1)
            if "log_sum_sq_probs" in outputs:
                found["log_sum_sq_probs"][rows] = p.square().sum(1).log()
            if stash is not None:
                p.scatter_add_(1, y[rows], p.new_full((p.shape[0], 1), -1.0))
                if slope is not None:
                    p.mul_(slope)
                if p.data_ptr() != stash[rows].data_ptr():
                    stash[rows] = p
        if stash is not None:
            found["factor"] = hidden.new_full((n,), -self.head.scale, dtype=self.compute)
        for name, x in found.items():
            if x.ndim == 1:
                found[name] = x & scored if x.dtype == torch.bool else x.masked_fill_(~scored, 0.0)
        return found

    def gradient(
        self, hidden: Tensor, target: Tensor, norm: Tensor, coef: Tensor, out: Tensor
    ) -> None:
        """Fill out [n, V] with d L / d a for coef [n] = d L / d lp and norm [n] from `forward`.

        A negative target other than ignore_index is in none of these columns: the row gets -coef *
            scale * p alone.
        """
        scored = target != self.head.ignore_index
        hidden = self._cleaned(hidden, scored)
        y, here = target.clamp(min=0).unsqueeze(-1), (target >= 0).to(self.compute).unsqueeze(-1)
        row = torch.where(scored, -self.head.scale * coef, 0.0).to(self.compute).unsqueeze(-1)
        logits = self._matmul(hidden, out)
        for rows in self._blocks(hidden.shape[0]):
            z, slope = self._transform(logits[rows])
            p = z.sub_(norm[rows].unsqueeze(-1)).exp_()
            p.scatter_add_(1, y[rows], -here[rows])
            p.mul_(row[rows] if slope is None else slope.mul_(row[rows]))
            if p.data_ptr() != out[rows].data_ptr():
                out[rows] = p

    def release(self) -> None:
        """Free the buffers kept between tiles."""
        self._logits = None

    def _cleaned(self, hidden: Tensor, scored: Tensor) -> Tensor:
        """What ignored rows hold (NaN even) is replaced by 0, where they could not be left out."""
        return hidden if sees_values(hidden) else torch.where(scored.unsqueeze(-1), hidden, 0.0)

    def _blocks(self, n: int):
        step = max(1, self._block // self.head.weight.shape[0])
        return (slice(i, min(i + step, n)) for i in range(0, n, step))

    def _matmul(self, hidden: Tensor, out: Tensor | None) -> Tensor:
        """hidden W^T [n, V] in logits_dtype: into out where the dtypes agree, else into a buffer
        that is kept.
        """
        weight, n = self.head.weight, hidden.shape[0]
        if out is None or self._upcast:
            if self._logits is None or self._logits.shape[0] < n:
                self._logits = None  # freed before its successor is allocated
                self._logits = hidden.new_empty(n, weight.shape[0], dtype=self.logits_dtype)
            out = self._logits[:n]
        logits_into(hidden, weight, out)
        return out

    def _transform(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """z, in place where logits are of the compute dtype, and the slope 1 - tanh^2 of a
        softcap.
        """
        head = self.head
        z = logits.to(self.compute)
        if head.bias is not None:
            z += head.bias
        if head.softcap is None:
            return (z.mul_(head.scale) if head.scale != 1.0 else z), None
        t = z.mul_(head.logit_scale / head.softcap).tanh_()
        slope = torch.addcmul(t.new_ones(()), t, t, value=-1.0)
        return t.mul_(head.softcap / head.temperature), slope
