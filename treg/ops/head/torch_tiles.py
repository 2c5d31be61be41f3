"""The torch implementation of a head on a tile of rows: the CPU path, and the portable one on any
device.

A tile's logits [n, V] come from one GEMM; what follows runs over a few rows at a time, in place, in
float32, so that it stays in cache. Exact float32 logits are the rule; `logits_dtype` says where
they are not.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from treg.ops.head.gemm import logits_into, product_of, slab_bytes, slab_rows
from treg.ops.head.head import Head
from treg.ops.head.memory import empty_rows
from treg.ops.head.selection import looks

# Elements that the row passes work on at a time. On a CPU 4 MiB of float32 stay in its cache; on a
# GPU each pass is a launch.
BLOCK = {"cpu": 1 << 20}
BLOCK_GPU = 1 << 24
PASS_BUFFERS = 4  # such blocks alive at once, at most


class TorchTiles:
    """`treg.ops.head.head.Tiles` in PyTorch."""

    impl = "torch"
    row_multiple = 1  # PyTorch's passes take contiguous rows
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

    def row_bytes(self, *, stash: bool, outputs: tuple[str, ...] = ()) -> int:
        V, D = self.head.weight.shape
        _, products = slab_bytes(D, self.stash_dtype, self.head.weight.device)
        total = 4 * D * self.compute.itemsize + products
        if not stash or self._upcast:
            total += V * self.logits_dtype.itemsize
        if stash:
            total += V * self.stash_dtype.itemsize
        return total

    def column_bytes(self, rows: int) -> int:
        logits = self.logits_dtype.itemsize if self._upcast else 0
        return rows * (self.stash_dtype.itemsize + logits)

    @property
    def fixed_bytes(self) -> int:
        V, D = self.head.weight.shape
        passes = PASS_BUFFERS * max(self._block, V) * self.compute.itemsize
        products, _ = slab_bytes(D, self.stash_dtype, self.head.weight.device)
        widened = slab_rows(D) * D * self.compute.itemsize if self._upcast else 0
        return passes + max(products, widened)

    @property
    def max_rows(self) -> int:
        return 1024 if self.head.weight.device.type == "cpu" else 4096

    @property
    def scaled_columns(self) -> int:
        return self.head.weight.shape[1]

    @property
    def _upcast(self) -> bool:
        """Logits are wider than the weight and the stash: they have a buffer of their own."""
        return self.logits_dtype != self.head.weight.dtype

    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        outputs: tuple[str, ...] = (),
        stash: Tensor | None = None,
    ) -> dict[str, Tensor]:
        scored = target != self.head.ignore_index
        hidden = self._cleaned(hidden, scored)
        y = torch.where(scored, target, 0).unsqueeze(-1)
        found = empty_rows(hidden, self, ("logprobs", "norm", *outputs))
        logits = self._matmul(hidden, stash)
        for rows in self._blocks(hidden.shape[0]):
            z, slope = self._transform(logits[rows])
            statistics, p = self._softmax(z, y[rows], outputs)
            for name, values in statistics.items():
                found[name][rows] = values
            if stash is not None:
                p.scatter_add_(1, y[rows], p.new_full((p.shape[0], 1), -1.0))
                if slope is not None:
                    p.mul_(slope)
                if p.data_ptr() != stash[rows].data_ptr():
                    stash[rows] = p
        if stash is not None:
            found["factor"] = hidden.new_full(target.shape, -self.head.scale, dtype=self.compute)
        for name, x in found.items():
            if x.dtype == torch.bool:
                found[name] = x & scored
            else:
                found[name] = x.masked_fill_(~(scored if x.ndim == 1 else scored.unsqueeze(1)), 0.0)
        return found

    def _softmax(
        self, z: Tensor, y: Tensor, outputs: tuple[str, ...]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Log-probs, norm and statistics of a block of rows, and its probabilities in place of z.

        Args: z [n, V]; y [n, 1], targets in [0, V).
        """
        z_y = z.gather(1, y).squeeze(1)
        top = z.amax(1)
        found = {}
        if "tops" in outputs:
            found["tops"] = block_tops(z, y, self.top_width)
        if "mean_logit" in outputs:
            found["mean_logit"] = z.mean(1)
        if "is_top1" in outputs:
            found["is_top1"] = z_y >= top
        p = torch.softmax(z, 1, out=z)
        # The largest probability is exp(top - lse), never small: the log-sum costs no second pass.
        log_top = p.amax(1).log()
        lse = top - log_top
        found["norm"] = torch.stack([lse, (top - lse) - log_top], 1)
        # Not z_y - lse, whose rounding is that of lse.
        found["logprobs"] = (z_y - top) + log_top
        if "lse" in outputs:
            found["lse"] = lse
        if "entropy" in outputs:
            found["entropy"] = torch.special.entr(p).sum(1)
        if "log_sum_sq_probs" in outputs:
            found["log_sum_sq_probs"] = p.square().sum(1).log()
        return found, p

    def gradient(
        self, hidden: Tensor, target: Tensor, norm: Tensor, coef: Tensor, out: Tensor
    ) -> None:
        scored = target != self.head.ignore_index
        hidden = self._cleaned(hidden, scored)
        y = torch.where(scored, target, 0).clamp(min=0).unsqueeze(-1)
        lse, rounding = norm.to(self.compute).split(1, dim=1)
        # p = exp(z - lse) * shrink: what the rounding of lse took from all of a row alike
        shrink = torch.exp(-rounding)
        one = (scored & (target >= 0)).to(self.compute).unsqueeze(-1) / shrink
        factor = torch.where(scored, -self.head.scale * coef, 0.0).to(self.compute).unsqueeze(-1)
        factor = factor * shrink
        logits = self._matmul(hidden, out)
        for rows in self._blocks(hidden.shape[0]):
            z, slope = self._transform(logits[rows])
            p = z.sub_(lse[rows]).exp_()
            p.scatter_add_(1, y[rows], -one[rows])
            p.mul_(factor[rows] if slope is None else slope.mul_(factor[rows]))
            if p.data_ptr() != out[rows].data_ptr():
                out[rows] = p

    def scale_rows(
        self,
        hidden: Tensor,
        rows: slice | Tensor | None,
        factors: Sequence[Tensor],
        out: Tensor,
        *,
        clean: bool,
    ) -> Tensor:
        scale = product_of(factors, clean=clean)
        torch.mul(hidden if rows is None else hidden[rows], scale.unsqueeze(-1), out=out)
        if clean:
            out.masked_fill_((scale == 0.0).unsqueeze(-1), 0.0)
        return scale

    def readable(self, hidden: Tensor) -> Tensor:
        return hidden

    def release(self) -> None:
        self._logits = None

    def _cleaned(self, hidden: Tensor, scored: Tensor) -> Tensor:
        """What ignored rows hold (NaN even) is replaced by 0, where they could not be left out."""
        return hidden if looks(hidden) else torch.where(scored.unsqueeze(-1), hidden, 0.0)

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
        return transformed(logits.to(self.compute), self.head)


def transformed(a: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """z of products a = h W^T, in place, and the slope 1 - tanh^2 of a softcap."""
    if head.bias is not None:
        a += head.bias
    if head.softcap is None:
        return (a.mul_(head.scale) if head.scale != 1.0 else a), None
    t = a.mul_(head.logit_scale / head.softcap).tanh_()
    slope = torch.addcmul(t.new_ones(()), t, t, value=-1.0)
    return t.mul_(head.softcap / head.temperature), slope


def block_tops(z: Tensor, target: Tensor, width: int) -> Tensor:
    """Largest z of each block of `width` words without the target's, [n, ceil(V / width)].

    Args: z [n, V], changed meanwhile; target [n, 1] int64 in [0, V). The block of a target alone
        has -inf.
    """
    held = z.gather(1, target)
    z.scatter_(1, target, -math.inf)
    even = z.shape[1] - z.shape[1] % width
    tops = z[:, :even].unflatten(1, (-1, width)).amax(2)
    if even < z.shape[1]:
        tops = torch.cat([tops, z[:, even:].amax(1, keepdim=True)], 1)
    z.scatter_(1, target, held)
    return tops
