"""The torch implementation of `kl_tiles.Passes`: over a few rows at a time, in place, so that they
stay in cache.
"""

import torch
from torch import Tensor

from treg.ops.head.head import Head
from treg.ops.head.selection import sees_values
from treg.ops.head.torch_tiles import BLOCK, BLOCK_GPU, transformed

PASS_BUFFERS = 4  # blocks alive at once, at most


class TorchPasses:
    def __init__(self, head: Head, ref_head: Head, *, reverse: bool):
        self.head, self.ref_head, self.reverse = head, ref_head, reverse
        weight = head.weight
        self.compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._block = BLOCK.get(weight.device.type, BLOCK_GPU)
        self._forbids = head.bias is not None or ref_head.bias is not None

    @property
    def fixed_bytes(self) -> int:
        return PASS_BUFFERS * max(self._block, self.head.weight.shape[0]) * self.compute.itemsize

    def scores(
        self, a: Tensor, ref_a: Tensor, target: Tensor | None, stashes: list[Tensor]
    ) -> dict[str, Tensor]:
        names = ("kl",) if target is None else ("kl", "logprobs", "ref_logprobs")
        found = {name: a.new_empty(a.shape[0]) for name in names}
        for rows in self._blocks(a.shape[0]):
            y = None if target is None else target[rows]
            values, made = self._block_of(a[rows], ref_a[rows], y, len(stashes))
            for name, x in values.items():
                found[name][rows] = x
            for stash, x in zip(stashes, made, strict=True):
                if stash.dtype != x.dtype:  # else it was made there
                    stash[rows] = x
        return found

    def gradient(
        self,
        a: Tensor,
        ref_a: Tensor,
        target: Tensor | None,
        coefs: tuple[Tensor, Tensor | None],
        out: Tensor,
    ) -> None:
        count = 1 if coefs[1] is None else 2
        for rows in self._blocks(a.shape[0]):
            y = None if target is None else target[rows]
            _, made = self._block_of(a[rows], ref_a[rows], y, count)
            self._combine(made, coefs, rows, out)

    def combine(
        self, stashes: list[Tensor], coefs: tuple[Tensor, Tensor | None], out: Tensor
    ) -> None:
        for rows in self._blocks(out.shape[0]):
            self._combine([x[rows].to(self.compute) for x in stashes], coefs, rows, out)

    def _combine(
        self,
        parts: list[Tensor],
        coefs: tuple[Tensor, Tensor | None],
        rows: slice,
        out: Tensor,
    ) -> None:
        """out[rows] = the parts of a block, each times its coefficients."""
        kl_coef, lp_coef = coefs
        here = out[rows]
        total = here if here.dtype == self.compute else torch.empty_like(parts[0])
        torch.mul(parts[0], kl_coef[rows].unsqueeze(1), out=total)
        if lp_coef is not None:
            total.addcmul_(parts[1], lp_coef[rows].unsqueeze(1))
        if total is not here:
            here.copy_(total)

    def _blocks(self, n: int):
        step = max(1, self._block // self.head.weight.shape[0])
        return (slice(i, min(i + step, n)) for i in range(0, n, step))

    def _block_of(
        self, a: Tensor, ref_a: Tensor, target: Tensor | None, count: int
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The rows' numbers, and `count` stashes: the first in place of ref_a, the second of a."""
        z, slope = transformed(a, self.head)
        ref_z, _ = transformed(ref_a, self.ref_head)
        scored = y = None
        # first, so that no offset of a row costs d a digit
        z.sub_(z.amax(1, keepdim=True))
        ref_z.sub_(ref_z.amax(1, keepdim=True))
        picked = []  # the targets' logits
        if target is not None:
            scored = target != self.head.ignore_index
            y = torch.where(scored, target, 0).unsqueeze(1)
            picked = [z.gather(1, y), ref_z.gather(1, y)]
        d = z - ref_z
        p, q = torch.softmax(z, 1, out=z), torch.softmax(ref_z, 1, out=ref_z)
        # the largest probability is exp(-logsumexp) here, never small
        logs = p.amax(1, keepdim=True).log_(), q.amax(1, keepdim=True).log_()
        d.add_(logs[0] - logs[1])
        kl = self._divergence(p, q, d, gradient=count > 0)
        values = {"kl": kl}
        for name, z_y, log in zip(("logprobs", "ref_logprobs"), picked, logs, strict=False):
            values[name] = (z_y + log).squeeze(1)
        made = [q, p][:count]
        if count > 1 and y is not None:
            p.scatter_add_(1, y, p.new_full(y.shape, -1.0))
        if slope is not None:
            for x in made:
                x.mul_(slope)
        if scored is not None and not sees_values(scored):  # else only scored rows are here
            for x in values.values():
                x.masked_fill_(~scored, 0.0)
            for x in made:
                x.masked_fill_(~scored.unsqueeze(1), 0.0)
        return values, made

    def _divergence(self, p: Tensor, q: Tensor, d: Tensor, *, gradient: bool) -> Tensor:
        """KL [n]; dKL / dz takes the place of q, p stays, d is overwritten."""
        infinite = None
        if self._forbids:
            # where both heads forbid a word it counts for nothing; where one does, d is infinite
            largest = torch.finfo(d.dtype).max
            d.nan_to_num_(nan=0.0, posinf=largest, neginf=-largest)
            infinite = d.amax(1) == largest if self.reverse else d.amin(1) == -largest
        t = torch.copysign(d, -1.0).expm1_()  # exp(-|d|) - 1
        w = d.mul_(p if self.reverse else q)  # the sign is that of d, also of a zero
        e = torch.maximum(p, q, out=q).mul_(t).copysign_(w)
        torch.sub(w, e, out=t) if self.reverse else torch.sub(e, w, out=t)
        kl = t.sum(1).clamp_(min=0.0)
        if infinite is not None:
            kl.masked_fill_(infinite, torch.inf)
        if self.reverse and gradient:
            torch.addcmul(w, p, kl.unsqueeze(1), value=-1.0, out=q)
        return kl
