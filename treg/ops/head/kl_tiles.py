"""Two heads of one vocabulary on a tile of rows: the KL divergence of their softmaxes, the
log-probs of targets, and the gradient of both in the policy's logits.

    p = softmax(z), q = softmax(ref_z)       d_v = log p_v - log q_v

    forward    KL(q, p) = sum_v q_v (log q_v - log p_v)      dKL/dz_v = p_v - q_v
    reverse    KL(p, q) = sum_v p_v (log p_v - log q_v)      dKL/dz_v = p_v (d_v - KL)
    log-prob   lp = log p_y                                  dlp/dz_v = 1{v = y} - p_v

What is summed is never negative, and small where p and q are nearly equal. With the sign of d,

    e_v        = p_v - q_v = sign(d_v) max(p_v, q_v) (1 - exp(-|d_v|))
    KL(q, p)   = sum_v ( e_v - q_v d_v )
    KL(p, q)   = sum_v ( p_v d_v - e_v )

since sum_v e_v = 0. An error of all d_v alike, as that of a logsumexp, is felt in the second order
alone, and so is the rounding of p and q. It cancels in the gradients, which are for any two heads:

    forward    e_v - min(p_v, q_v) sum_u e_u            reverse    p_v (d_v - sum_u p_u d_u)

the last sum over sum_u p_u in `kl_torch`, since PyTorch's softmax of many words is not quite 1.

The stashes [n, V] are unscaled gradients, the policy's dz / da = scale * slope aside:

    dKL / da = scale * stash_0        dlp / da = -scale * stash_1

Both products are the vendor's library's, into float32 tiles (float64 of float64).
"""

from math import isqrt
from typing import Protocol

import torch
from torch import Tensor

from treg.ops.head.gemm import logits_into, slab_bytes, slab_rows
from treg.ops.head.head import Head
from treg.ops.head.kl_torch import TorchPasses
from treg.ops.head.kl_triton import TritonPasses
from treg.ops.head.memory import pass_rows, row_width, stash_rows

# Rows of hidden that are alive at once: as read, scaled, its gradient, and copies of these.
ROW_BUFFERS = 4
MAX_ROWS = {"cpu": 1024}
MAX_ROWS_GPU = 4096


class Passes(Protocol):
    """What one implementation does with the products of both heads."""

    @property
    def fixed_bytes(self) -> int: ...

    @property
    def row_multiple(self) -> int:
        """Rows of products and stashes begin at multiples of so many elements."""
        ...

    def scores(
        self, a: Tensor, ref_a: Tensor, target: Tensor | None, stashes: list[Tensor]
    ) -> dict[str, Tensor]:
        """Fill stashes from products a and ref_a, both [n, V], which are overwritten.

        Args: target [n] or None; stashes: as many as are kept, [n, V], or none. The first may be
            ref_a itself, the second a.
        Returns: "kl" [n], with a target also "logprobs" and "ref_logprobs" [n]. Rows whose target
            is ignored have 0, in the stashes too.
        """
        ...

    def gradient(
        self,
        a: Tensor,
        ref_a: Tensor,
        target: Tensor | None,
        coefs: tuple[Tensor, Tensor | None],
        out: Tensor,
    ) -> None:
        """out [n, V] = coefs[0] * stash_0 + coefs[1] * stash_1 of these products, which are
        overwritten. out may be ref_a itself. coefs: [n] each, the second None for 0.
        """
        ...

    def combine(
        self, stashes: list[Tensor], coefs: tuple[Tensor, Tensor | None], out: Tensor
    ) -> None:
        """The same of stashes that are there, which are left as they are."""
        ...


class KlTiles:
    """A policy's head and its reference's."""

    def __init__(self, impl: str, head: Head, ref_head: Head, *, reverse: bool, scored: bool):
        """scored: there are targets, and so log-probs with a stash of their own."""
        weight = head.weight
        self.head, self.ref_head = head, ref_head
        self.compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.stash_dtype = weight.dtype
        self.stashes = 2 if scored else 1
        self.passes = make_passes(impl, head, ref_head, reverse)
        self._buffers: dict[str, Tensor] = {}

    @property
    def kept_bytes(self) -> int:
        """Of a row that is kept: its stashes, and hidden as it is multiplied in the end."""
        V, D = self.head.weight.shape
        return (self.stashes * self._width(V) + 2 * D) * self.stash_dtype.itemsize

    def row_bytes(self, *, gradient: bool, kept: bool = False) -> int:
        """Of a row that is worked on; kept: beside its stashes, which may be one of its buffers."""
        V, D = self.head.weight.shape
        ref_D = self.ref_head.weight.shape[1]
        V = self._width(V)
        wide = V if kept and self._in_place else 2 * V
        total = (wide + ROW_BUFFERS * D + 2 * ref_D) * self.compute.itemsize
        if gradient and not self._in_place:
            total += V * self.stash_dtype.itemsize
        return total + slab_bytes(D, self.stash_dtype, self.head.weight.device)[1]

    @property
    def fixed_bytes(self) -> int:
        D, device = self.head.weight.shape[1], self.head.weight.device
        products, _ = slab_bytes(D, self.stash_dtype, device)
        if not self._in_place and device.type == "cpu":
            for columns in (D, self.ref_head.weight.shape[1]):
                widened = slab_rows(columns) * columns * self.compute.itemsize
                products = max(products, widened)
        return self.passes.fixed_bytes + products

    def plan(self, budget: int, *, gradient: bool) -> tuple[int, int]:
        """The most rows that are kept, and rows that are worked on at a time, of any number.

        C rows would fit if nothing else had to. A tile of t rows takes the room of t * r kept ones,
        each of which saves two products; and its passes over the weights cost as much as P rows:
        C * P / t + 2 t * r is the least at t = sqrt(P * C / (2 r)).

        Raises: ValueError where the budget does not hold one row.
        """
        row, each = self.row_bytes(gradient=gradient), pass_rows(self.head.weight.device)
        free = budget - self.fixed_bytes
        if free < row:
            V = self.head.weight.shape[0]
            raise ValueError(
                f"memory_budget: expected at least {self.fixed_bytes + row} bytes (one row at "
                f"V={V}), got {budget}"
            )
        most = min(self._max_rows, free // row)
        if not gradient or self.stash_dtype == torch.float16:
            # a loss scaler's factor must reach the 16-bit products: no row is kept
            return 0, most
        capacity = free // self.kept_bytes
        step = min(most, max(1, isqrt(each * capacity * self.kept_bytes // (2 * row))))
        kept = (free - step * row) // self.kept_bytes
        return (kept, step) if kept >= each else (0, most)  # they cost a pass of their own

    def tile_beside(self, kept: int, budget: int, count: int) -> int:
        """Rows that are worked on at a time, of `count`, where `kept` have stashes and none is
        computed again: the fewest tiles that fit, all of a size.
        """
        free = budget - self.fixed_bytes - kept * self.kept_bytes
        most = min(self._max_rows, free // self.row_bytes(gradient=True, kept=True))
        tiles = max(1, -(-count // max(1, most)))
        return max(1, -(-count // tiles))

    def forward(
        self, hidden: Tensor, ref_hidden: Tensor, target: Tensor | None, stashes: list[Tensor]
    ) -> dict[str, Tensor]:
        """KL and log-probs of n rows, and their stashes: see `Passes.scores`."""
        a, ref_a = self._products(hidden, ref_hidden, stashes)
        return self.passes.scores(a, ref_a, target, stashes)

    def gradient(
        self,
        hidden: Tensor,
        ref_hidden: Tensor,
        target: Tensor | None,
        coefs: tuple[Tensor, Tensor | None],
        out: Tensor,
    ) -> None:
        """The gradient of n rows, of logits that are computed again: see `Passes.gradient`."""
        a, ref_a = self._products(hidden, ref_hidden, [out])
        self.passes.gradient(a, ref_a, target, coefs, out)

    def empty(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Room for stashes or products of some rows, [rows, V], not filled."""
        weight, multiple = self.head.weight, self.passes.row_multiple
        return stash_rows(weight, rows, weight.shape[0], dtype=dtype, multiple=multiple)

    def release(self) -> None:
        """Free the buffers kept between tiles."""
        self._buffers.clear()

    def _width(self, words: int) -> int:
        return row_width(words, self.passes.row_multiple)

    @property
    def _max_rows(self) -> int:
        return MAX_ROWS.get(self.head.weight.device.type, MAX_ROWS_GPU)

    @property
    def _in_place(self) -> bool:
        """Logits have the dtype of the stashes, and become them."""
        return self.stash_dtype == self.compute

    def _products(
        self, hidden: Tensor, ref_hidden: Tensor, room: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Those of both heads [n, V]: in room where that has the dtype, its first for the
        reference.
        """
        places = dict(zip(("ref", "policy"), room, strict=False)) if self._in_place else {}
        ref_a = places.get("ref")
        a = places.get("policy")
        n = hidden.shape[0]
        ref_a = self._buffer("ref", n) if ref_a is None else ref_a
        a = self._buffer("policy", n) if a is None else a
        logits_into(hidden, self.head.weight, a)
        logits_into(ref_hidden, self.ref_head.weight, ref_a)
        return a, ref_a

    def _buffer(self, name: str, n: int) -> Tensor:
        found = self._buffers.pop(name, None)
        if found is None or found.shape[0] < n:
            del found  # before its successor is allocated
            found = self.empty(n, self.compute)
        self._buffers[name] = found
        return found[:n]


def make_passes(impl: str, head: Head, ref_head: Head, reverse: bool) -> Passes:
    """impl: "torch" or "triton"."""
    if impl == "triton":
        return TritonPasses(head, ref_head, reverse=reverse)
    return TorchPasses(head, ref_head, reverse=reverse)
