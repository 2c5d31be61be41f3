"""`linear_logprobs` as an autograd function.

forward only       1 GEMM a row
frozen head        2: the forward also leaves dhidden without its coefficient, which the backward multiplies in
trainable head     4: the logits are computed again in the backward, when the coefficients are known
"""

from dataclasses import replace

import torch
from torch import Tensor

from treg.ops.gemm import scaled_to
from treg.ops.head import Head, HeadGradients, check_budget, chunks, scored_rows, select, tile_step, without_autocast


def run_logprobs(tiles, hidden: Tensor, target: Tensor, outputs: tuple[str, ...], budget: int) -> dict[str, Tensor]:
    """Log-probs of [N, D] rows and the outputs asked for, each [N]; differentiable in hidden, weight and bias."""
    names = ("logprobs", *outputs)
    head: Head = tiles.head
    grad = torch.is_grad_enabled()  # within an autograd function it is always off
    values = _LinearLogprobs.apply(hidden, head.weight, head.bias, target, tiles, outputs, budget, grad)
    return dict(zip(names, values, strict=True))


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, tiles, outputs, budget, grad):
        N = hidden.shape[0]
        rows = scored_rows(target, tiles.head.ignore_index)
        need_hidden, need_weight, need_bias = (grad and need for need in ctx.needs_input_grad[:3])
        # float16 cannot hold a stash before its sum is known
        frozen = need_hidden and not (need_weight or need_bias) and weight.dtype != torch.float16
        found = {n: hidden.new_zeros(N, dtype=torch.bool if n == "is_top1" else tiles.compute)
                 for n in ("logprobs", "norm", *outputs)}  # fmt: skip
        check_budget(tiles, budget, stash=need_hidden or need_weight or need_bias, outputs=outputs)
        step = tile_step(tiles, budget, stash=frozen, outputs=outputs)
        stash = grads = None
        if frozen:
            count = N if rows is None else rows.shape[0]
            stash = hidden.new_empty(min(step, count), weight.shape[0], dtype=tiles.stash_dtype)
            grads = HeadGradients(
                hidden, tiles.head, (True, False, False), compute=tiles.compute, complete=rows is None
            )
        for r in chunks(rows, N, step):
            h, y = select(hidden, target, r, tiles.head.ignore_index)
            tile = None if stash is None else stash[: h.shape[0]]
            got = tiles.forward(h, y, outputs, tile)
            for name, x in found.items():
                x[r] = got[name]
            if grads is not None:
                grads.add(tile, r, h, got["factor"])
        tiles.release()
        # tensors are saved by autograd alone, so that it can free, check and move them
        kind, bare, logits_dtype = type(tiles), replace(tiles.head, weight=None, bias=None), tiles.logits_dtype
        ctx.tiles = lambda weight, bias: kind(replace(bare, weight=weight, bias=bias), logits_dtype)
        ctx.budget, ctx.frozen = budget, frozen
        if frozen:
            ctx.save_for_backward(grads.dhidden, grads.row_scale)
        else:
            ctx.save_for_backward(hidden, weight, bias, target, found["norm"], rows)
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
            return scaled_to(dhidden, (row_scale * coef).unsqueeze(-1), dhidden.dtype), *nothing[1:]
        hidden, weight, bias, target, norm, rows = ctx.saved_tensors
        tiles, N, coef = ctx.tiles(weight, bias), hidden.shape[0], coef.contiguous()
        count = N if rows is None else rows.shape[0]
        step = tile_step(tiles, ctx.budget, stash=True)
        grads = HeadGradients(hidden, tiles.head, ctx.needs_input_grad[:3], compute=tiles.compute,
                              complete=rows is None, single=count <= step)  # fmt: skip
        tile = hidden.new_empty(min(step, count), weight.shape[0], dtype=tiles.stash_dtype)
        with without_autocast(hidden):
            for r in chunks(rows, N, step):
                h, y = select(hidden, target, r, tiles.head.ignore_index)
                out = tile[: h.shape[0]]
                tiles.gradient(h, y, norm[r], coef[r], out)
                grads.add(out, r, h)
        grads.finish()
        tiles.release()
        dweight = None if grads.dweight is None else grads.dweight.to(weight.dtype)
        dbias = None if grads.dbias is None else grads.dbias.to(bias.dtype)
        return grads.dhidden, dweight, dbias, *nothing[3:]
