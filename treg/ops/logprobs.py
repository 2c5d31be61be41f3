"""`linear_logprobs` as an autograd function.

forward only       1 GEMM a row
frozen head        2: the forward also leaves dhidden without its coefficient, which the backward multiplies in
trainable head     3 for the rows whose unscaled gradient E of the logits is kept until the coefficients are known,
                   4 for the others (all in float16): their logits are computed again in the backward

    kept rows    d lp_t / d a_t = factor_t * E_t:   dhidden = coef * factor * (E W),  dweight += E^T (coef * factor * h)

As many rows are kept as memory_budget holds beside a tile of the others.
"""

from dataclasses import replace
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from treg.ops.gemm import scaled_to
from treg.ops.head import (
    Head,
    HeadGradients,
    check_budget,
    chunks,
    empty_rows,
    pass_rows,
    scored_rows,
    select,
    tile_rows,
    tile_step,
    without_autocast,
)


def run_logprobs(tiles, hidden: Tensor, target: Tensor, outputs: tuple[str, ...], budget: int) -> dict[str, Tensor]:
    """Log-probs of [N, D] rows and the outputs asked for, each [N]; differentiable in hidden, weight and bias."""
    names = ("logprobs", *outputs)
    head: Head = tiles.head
    grad = torch.is_grad_enabled()  # within an autograd function it is always off
    values = _LinearLogprobs.apply(hidden, head.weight, head.bias, target, tiles, outputs, budget, grad)
    return dict(zip(names, values, strict=True))


class Scored(NamedTuple):
    """What a pass over N rows leaves."""

    found: dict[str, Tensor]  # "logprobs", "norm" and the outputs, each [N]; 0 where ignored
    stash: Tensor | None  # [kept, V], of the first rows that are scored
    factor: Tensor | None  # [kept]


def kept_rows(tiles, budget: int, count: int, outputs: tuple[str, ...]) -> int:
    """How many of `count` rows have their stash kept: all, or what the budget holds beside a tile of the others.

    C rows of stash fit in all. Of n = count - C more, C - t rows kept leave n + t to be computed again, t at a time:
    n + t rows and (n + t) / t passes, each worth P = pass_rows of them, are the least at t = sqrt(P * n).
    """
    capacity = tile_rows(tiles, budget, stash=True, outputs=outputs)
    if count <= capacity:
        return count
    each = pass_rows(tiles.head.weight.device)
    kept = capacity - min(tiles.max_rows, isqrt(each * (count - capacity)))
    return kept if kept >= each else 0  # they cost a pass of their own


def score_rows(
    tiles, hidden: Tensor, target: Tensor, rows: Tensor | None, outputs: tuple[str, ...], budget: int, kept: int
) -> Scored:
    """Score the rows listed (None: all of N) tile by tile; the stash of the first `kept` stays."""
    N, head = hidden.shape[0], tiles.head
    found = empty_rows(hidden, tiles.compute, ("logprobs", "norm", *outputs))
    stash = hidden.new_empty(kept, head.weight.shape[0], dtype=tiles.stash_dtype) if kept else None
    factor = hidden.new_empty(kept, dtype=tiles.compute) if kept else None
    step = tile_step(tiles, budget, stash=False, outputs=outputs, reserved=0 if stash is None else stash.nbytes)
    at = 0
    for r in (*chunks(rows, N, min(tiles.max_rows, kept), stop=kept), *chunks(rows, N, step, start=kept)):
        h, y = select(hidden, target, r, head.ignore_index)
        here = slice(at, at + h.shape[0])
        got = tiles.forward(h, y, outputs, None if stash is None or at >= kept else stash[here])
        for name, x in found.items():
            x[r] = got[name]
        if factor is not None and at < kept:
            factor[here] = got["factor"]
        at = here.stop
    tiles.release()
    return Scored(found, stash, factor)


def differentiate_rows(
    tiles, hidden: Tensor, target: Tensor, rows: Tensor | None, norm: Tensor, coef: Tensor, stash: Tensor | None,
    factor: Tensor | None, budget: int, needs: tuple[bool, bool, bool],
) -> HeadGradients:  # fmt: skip
    """Gradients of sum_t coef_t lp_t over the rows listed; norm is [N], coef [N], stash and factor as `Scored`'s.

    The stash of the first rows gives theirs; the logits of the others are computed again.
    """
    N, head = hidden.shape[0], tiles.head
    count = N if rows is None else rows.shape[0]
    kept, reserved = (0, 0) if stash is None else (stash.shape[0], stash.nbytes)
    step = tile_step(tiles, budget, stash=True, reserved=reserved)
    grads = HeadGradients(hidden, head, needs, compute=tiles.compute, complete=rows is None,
                          single=kept == count or (not kept and count <= step))  # fmt: skip
    with without_autocast(hidden):
        for r in chunks(rows, N, kept, stop=kept):
            h, _ = select(hidden, target, r, head.ignore_index)
            grads.add(stash, r, h, coefficients(coef[r], factor))
        tile = hidden.new_empty(min(step, count - kept), head.weight.shape[0], dtype=tiles.stash_dtype)
        for r in chunks(rows, N, step, start=kept):
            h, y = select(hidden, target, r, head.ignore_index)
            out = tile[: h.shape[0]]
            tiles.gradient(h, y, norm[r], coef[r], out)
            grads.add(out, r, h)
    grads.finish()
    tiles.release()
    return grads


def coefficients(coef: Tensor, factor: Tensor) -> Tensor:
    """coef * factor; 0 where factor is, whatever a loss leaves at rows that are not scored (NaN even)."""
    return torch.where(factor == 0.0, factor, coef * factor)


def frozen_rows(
    tiles, hidden: Tensor, target: Tensor, rows: Tensor | None, outputs: tuple[str, ...], budget: int
) -> tuple[dict[str, Tensor], HeadGradients]:
    """Score the rows listed, and dhidden of each for a coefficient of 1, its row_scale not yet multiplied in."""
    N, head = hidden.shape[0], tiles.head
    found = empty_rows(hidden, tiles.compute, ("logprobs", "norm", *outputs))
    step = tile_step(tiles, budget, stash=True, outputs=outputs)
    count = N if rows is None else rows.shape[0]
    stash = hidden.new_empty(min(step, count), head.weight.shape[0], dtype=tiles.stash_dtype)
    grads = HeadGradients(hidden, head, (True, False, False), compute=tiles.compute, complete=rows is None)
    for r in chunks(rows, N, step):
        h, y = select(hidden, target, r, head.ignore_index)
        tile = stash[: h.shape[0]]
        got = tiles.forward(h, y, outputs, tile)
        for name, x in found.items():
            x[r] = got[name]
        grads.add(tile, r, h, got["factor"])
    tiles.release()
    return found, grads


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, tiles, outputs, budget, grad):
        rows = scored_rows(target, tiles.head.ignore_index)
        need_hidden, need_weight, need_bias = (grad and need for need in ctx.needs_input_grad[:3])
        trained = need_weight or need_bias
        stashes = weight.dtype != torch.float16  # which cannot hold a stash before its sum is known
        check_budget(tiles, budget, stash=need_hidden or trained, outputs=outputs)
        # tensors are saved by autograd alone, so that it can free, check and move them
        ctx.tiles, ctx.budget = unbound(tiles), budget
        ctx.frozen = need_hidden and not trained and stashes
        if ctx.frozen:
            found, grads = frozen_rows(tiles, hidden, target, rows, outputs, budget)
            ctx.save_for_backward(grads.dhidden, grads.row_scale)
        else:
            count = hidden.shape[0] if rows is None else rows.shape[0]
            kept = kept_rows(tiles, budget, count, outputs) if trained and stashes else 0
            found, stash, factor = score_rows(tiles, hidden, target, rows, outputs, budget, kept)
            ctx.save_for_backward(hidden, weight, bias, target, found["norm"], rows, stash, factor)
        results = tuple(found[n] for n in ("logprobs", *outputs))
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, coef, *_):
        nothing = (None,) * 8
        if coef is None:
            return nothing
        if ctx.frozen:
            dhidden, row_scale = ctx.saved_tensors
            scale = coefficients(coef, row_scale).unsqueeze(-1)
            return scaled_to(dhidden, scale, dhidden.dtype), *nothing[1:]
        hidden, weight, bias, target, norm, rows, stash, factor = ctx.saved_tensors
        grads = differentiate_rows(ctx.tiles(weight, bias), hidden, target, rows, norm, coef.contiguous(), stash,
                                   factor, ctx.budget, ctx.needs_input_grad[:3])  # fmt: skip
        dhidden = grads.dhidden
        if dhidden is not None and stash is not None:
            dhidden = scaled_to(dhidden, grads.row_scale.unsqueeze(-1), dhidden.dtype)
        return dhidden, *weight_gradients(grads, weight, bias), *nothing[3:]


def unbound(tiles):
    """A function of weight and bias that makes such tiles again, and holds no tensor."""
    kind, bare, logits_dtype = type(tiles), replace(tiles.head, weight=None, bias=None), tiles.logits_dtype
    return lambda weight, bias: kind(replace(bare, weight=weight, bias=bias), logits_dtype)


def weight_gradients(grads: HeadGradients, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """dweight and dbias in the dtypes of their tensors."""
    dweight = None if grads.dweight is None else grads.dweight.to(weight.dtype)
    return dweight, None if grads.dbias is None else grads.dbias.to(bias.dtype)
