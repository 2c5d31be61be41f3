"""The torch implementation of `kl_tiles.Passes`: over a few rows at a time, in place, so that they
stay in cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from treg.ops.head.head import Head
from treg.ops.head.selection import looks
from treg.ops.head.torch_tiles import BLOCK, BLOCK_GPU, transformed

PASS_BUFFERS = 4  # blocks alive at once, at most
NEAR = 40.0  # nats: see `_is_near`


class TorchPasses:
    row_multiple = 1

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
        room = self._room(a)
        for rows in self._blocks(a.shape[0]):
            y = None if target is None else target[rows]
            values, made = self._block_of(a[rows], ref_a[rows], y, len(stashes), room)
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
        room = self._room(a)
        for rows in self._blocks(a.shape[0]):
            y = None if target is None else target[rows]
            _, made = self._block_of(a[rows], ref_a[rows], y, count, room)
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

    @property
    def _step(self) -> int:
        return max(1, self._block // self.head.weight.shape[0])

    def _blocks(self, n: int) -> Iterator[slice]:
        return (slice(i, min(i + self._step, n)) for i in range(0, n, self._step))

    def _room(self, a: Tensor) -> Tensor:
        """For the rows of one block; memory that is new in each is slower than the work in it."""
        return torch.empty_like(a[: self._step], dtype=self.compute)

    def _block_of(
        self, a: Tensor, ref_a: Tensor, target: Tensor | None, count: int, room: Tensor
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The rows' numbers, and `count` stashes: the first in place of ref_a, the second of a.
        room is overwritten.
        """
        z, slope = transformed(a, self.head)
        ref_z, _ = transformed(ref_a, self.ref_head)
        # first, so that no offset of a row costs a difference a digit
        z.sub_(z.amax(1, keepdim=True))
        ref_z.sub_(ref_z.amax(1, keepdim=True))
        scored = y = None
        if target is not None:
            scored = target != self.head.ignore_index
            y = torch.where(scored, target, 0).unsqueeze(1)
        over, under = (ref_z, z) if self.reverse else (z, ref_z)
        d = torch.sub(over, under, out=room[: z.shape[0]])
        if _is_near(d):
            kl, logps = _near(z, ref_z, d, y, reverse=self.reverse, count=count)
        else:
            kl, logps = self._far(z, ref_z, d, y, count)
        values = {"kl": kl.clamp_(min=0.0)} | logps
        made = [ref_z, z][:count]
        if count > 1 and y is not None:
            z.scatter_(1, y, (z.gather(1, y) - 1).clamp_(max=0.0))
        if slope is not None:
            for x in made:
                x.mul_(slope)
        if scored is not None and not looks(scored):  # else only scored rows are here
            for x in values.values():
                x.masked_fill_(~scored, 0.0)
            for x in made:
                x.masked_fill_(~scored.unsqueeze(1), 0.0)
        return values, made

    def _far(
        self, z: Tensor, ref_z: Tensor, d: Tensor, y: Tensor | None, count: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same as `_near` of any two heads: a sum of terms that are never negative."""
        picked = [] if y is None else [z.gather(1, y), ref_z.gather(1, y)]  # the targets' logits
        if self.reverse:
            d.neg_()
        p, q = torch.softmax(z, 1, out=z), torch.softmax(ref_z, 1, out=ref_z)
        # the largest probability is exp(-logsumexp) here, never small
        logs = p.amax(1, keepdim=True).log_(), q.amax(1, keepdim=True).log_()
        d.add_(logs[0] - logs[1])
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
        kl = t.sum(1)
        if infinite is not None:
            kl.masked_fill_(infinite, torch.inf)
        # the gradients are moved so that their sum over the words is 0: see docs/maths.md
        if count and self.reverse:
            mean = w.sum(1).div_(p.sum(1))  # p as computed has a sum that is not quite 1
            mean = torch.where(kl.isfinite(), mean, kl)
            torch.addcmul(w, p, mean.unsqueeze(1), value=-1.0, out=q)
        elif count:
            smaller = torch.sub(p, torch.clamp(e, min=0.0, out=t), out=t)  # min(p, q)
            e.addcmul_(smaller, e.sum(1, keepdim=True), value=-1.0)
        names = ("logprobs", "ref_logprobs")
        found = zip(names, picked, logs, strict=False)
        return kl, {name: (z_y + log).squeeze(1) for name, z_y, log in found}


def _is_near(d: Tensor) -> bool:
    """Whether `_near` is right for a block of rows: o_v <= b_v * exp(NEAR) for every word v. A b_v
    that float32 loses, below exp(-87), then stands for an o_v below exp(-47), which is nothing
    beside 1. On a GPU a look at a value would be waited for.
    """
    return d.device.type == "cpu" and bool((d.amax(1) - d.amin(1)).max() < NEAR)


def _near(
    z: Tensor, ref_z: Tensor, d: Tensor, y: Tensor | None, *, reverse: bool, count: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL [n], and log-probs of the targets y [n, 1]; with count dKL / dz takes the place of ref_z,
    with 2 p that of z.

    b is q of the forward divergence, p of the reverse one, and the other distribution o is known by
    its logits above those of b. All that is small is computed as such:

        d_v = those of o - those of b, less their mean under b         r = sum_v b_v d_v
        x_v = exp(d_v) - 1                                             s = sum_v b_v x_v
        o_v = b_v (1 + x_v) / (1 + s)                KL(b, o) = log(1 + s) - r

        forward  dKL / dz_v = p_v - q_v = q_v (x_v - s) / (1 + s)
        reverse  dKL / dz_v = p_v (r - d_v)

    r is what the mean's rounding has left, and the sum of b may be as far from 1 as it is.

    Args: z, ref_z [n, V], the largest of a row 0; d [n, V] is overwritten.
    """
    base, other = (z, ref_z) if reverse else (ref_z, z)
    picked = None if y is None else (base.gather(1, y), other.gather(1, y))
    b = torch.softmax(base, 1, out=base)
    d.sub_(_mean(b, d, other))
    r = _mean(b, d, other)
    x = torch.expm1(d, out=other if reverse else d)
    o = torch.mul(b, x, out=other)
    s = o.sum(1, keepdim=True)
    shrink = 1 / (1 + s)
    logps: dict[str, Tensor] = {}
    if picked is not None:
        o.add_(b)  # (1 + s) times what it is called
        # the largest probability is exp(-logsumexp) here, never small
        tops = b.amax(1, keepdim=True), (o.amax(1, keepdim=True) * shrink).clamp_(max=1.0)
        found = [(x_y + top.log_()).squeeze(1) for x_y, top in zip(picked, tops, strict=True)]
        names = ("logprobs", "ref_logprobs") if reverse else ("ref_logprobs", "logprobs")
        logps = dict(zip(names, found, strict=True))
    if reverse and count:
        torch.sub(r, d, out=ref_z).mul_(b)
    elif count:
        if count > 1:
            o.mul_(shrink)
        b.mul_(x.sub_(s).mul_(shrink))
    return (s.log1p() - r).squeeze(1), logps


def _mean(weights: Tensor, x: Tensor, room: Tensor) -> Tensor:
    """[n, 1]; in room, which may be x; no product of matrices, which autocast would round."""
    return torch.mul(weights, x, out=room).sum(1, keepdim=True)
