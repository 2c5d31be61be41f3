"""`linear_logprobs` as an operator, `treg::linear_logprobs`, and its backward,
`treg::linear_logprobs_grad`.

forward only       1 GEMM a row
frozen head        2: the forward also leaves dhidden without its coefficient, which the backward multiplies in
trainable head     3 for the rows whose unscaled gradient E of the logits is kept until the coefficients are known,
                   4 for the others (all in float16): their logits are computed again in the
                   backward
by_columns         4, frozen 2; in the least memory
filter_eps         1 + 3 rho, frozen 1 + 2 rho: see `treg.ops.filtered`
"""

import torch
from torch import Tensor

from treg.checks import OUTPUTS
from treg.ops.filtered import check_filter, filtered_rows
from treg.ops.gemm import scaled_to
from treg.ops.head import Head, check_budget, check_same_rows, empty_rows, scored_rows
from treg.ops.rows import (
    coefficients,
    differentiate_columns,
    differentiate_rows,
    frozen_rows,
    kept_rows,
    score_rows,
    weight_gradients,
)
from treg.ops.torch_tiles import TorchTiles
from treg.ops.triton_tiles import TritonTiles

# which rows are scored is looked at: Inductor leaves these operators out of the CUDA graphs that it
# captures
LOOKS = (torch.Tag.cudagraph_unsafe,)


def make_tiles(impl: str, head: Head, logits_dtype: torch.dtype | None) -> TorchTiles | TritonTiles:
    """The implementation of that name."""
    return TritonTiles(head) if impl == "triton" else TorchTiles(head, logits_dtype)


def names_of(outputs: str) -> tuple[str, ...]:
    """Names as an operator takes them: with commas."""
    return tuple(outputs.split(",")) if outputs else ()


def run_logprobs(
    impl: str,
    head: Head,
    logits_dtype: torch.dtype | None,
    hidden: Tensor,
    target: Tensor,
    outputs: tuple[str, ...],
    budget: int,
    filter_eps: float | None,
    by_columns: bool,
) -> dict[str, Tensor]:
    """Log-probs of [N, D] rows and the outputs asked for, each [N]; differentiable in hidden,
    weight and bias.
    """
    grad = torch.is_grad_enabled()  # within an operator it is always off
    needs = [grad and x is not None and x.requires_grad for x in (hidden, head.weight, head.bias)]
    logprobs, *statistics = _logprobs(
        hidden,
        head.weight,
        head.bias,
        target,
        head.logit_scale,
        head.softcap,
        head.temperature,
        head.ignore_index,
        impl,
        logits_dtype,
        budget,
        *needs,
        ",".join(outputs),
        filter_eps,
        by_columns,
    )[: 1 + len(OUTPUTS)]
    return {"logprobs": logprobs} | {
        n: x for n, x in zip(OUTPUTS, statistics, strict=True) if n in outputs
    }


@torch.library.custom_op("treg::linear_logprobs", mutates_args=(), tags=LOOKS)
def _logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    impl: str,
    logits_dtype: torch.dtype | None,
    budget: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    outputs: str,
    filter_eps: float | None,
    by_columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, OUTPUTS, norm, and what the backward needs: dhidden and its row factors, stash and
    factor, or tops;
    whether rows were left out.

    What is not asked for is empty.
    """
    tiles = make_tiles(
        impl, Head(weight, bias, logit_scale, softcap, temperature, ignore_index), logits_dtype
    )
    names = names_of(outputs)
    trained = need_weight or need_bias
    check_budget(tiles, budget, stash=need_hidden or trained, outputs=names)
    rows = scored_rows(target, ignore_index)
    if filter_eps is not None and (need_hidden or trained):
        check_filter(tiles, filter_eps, budget)
        found = score_rows(tiles, hidden, target, rows, (*names, "tops"), budget, None, None)
        kept = found["tops"], hidden.new_empty(0)
    elif _frozen(weight, need_hidden, trained):
        found, grads = frozen_rows(tiles, hidden, target, rows, names, budget)
        kept = grads.dhidden, grads.row_scale
    else:
        stash, factor = _stash(tiles, budget, hidden, names, trained and not by_columns)
        count = min(stash.shape[0], kept_rows(tiles, budget, _count(hidden, rows), names))
        first = (stash[:count], factor[:count]) if count else (None, None)
        found = score_rows(tiles, hidden, target, rows, names, budget, *first)
        kept = stash, factor
    statistics = (found.get(n, hidden.new_empty(0)) for n in OUTPUTS)
    return found["logprobs"], *statistics, found["norm"], *kept, torch.tensor(rows is not None)


@_logprobs.register_fake
def _(
    hidden,
    weight,
    bias,
    target,
    logit_scale,
    softcap,
    temperature,
    ignore_index,
    impl,
    logits_dtype,
    budget,
    need_hidden,
    need_weight,
    need_bias,
    outputs,
    filter_eps,
    by_columns,
):
    tiles = make_tiles(
        impl, Head(weight, bias, logit_scale, softcap, temperature, ignore_index), logits_dtype
    )
    names = names_of(outputs)

    def rows(wanted=True, dtype=tiles.compute):
        return hidden.new_empty(
            hidden.shape[0] if wanted else 0, dtype=dtype if wanted else hidden.dtype
        )

    statistics = (
        rows(n in names, torch.bool if n == "is_top1" else tiles.compute) for n in OUTPUTS
    )
    if filter_eps is not None and (need_hidden or need_weight or need_bias):
        kept = empty_rows(hidden, tiles, ("tops",))["tops"], hidden.new_empty(0)
    elif _frozen(weight, need_hidden, need_weight or need_bias):
        kept = torch.empty_like(hidden, memory_format=torch.contiguous_format), rows()
    else:
        kept = _stash(tiles, budget, hidden, names, (need_weight or need_bias) and not by_columns)
    return rows(), *statistics, rows(), *kept, torch.empty((), dtype=torch.bool, device="cpu")


def _frozen(weight: Tensor, need_hidden: bool, trained: bool) -> bool:
    """Whether the forward leaves dhidden; float16 cannot hold a stash before its sum is known."""
    return need_hidden and not trained and weight.dtype != torch.float16


def _stash(
    tiles, budget: int, hidden: Tensor, outputs: tuple[str, ...], trained: bool
) -> tuple[Tensor, Tensor]:
    """Room for the stash and factor of the rows that are kept, [rows, V] and [rows], as far as
    shapes tell.
    """
    weight = tiles.head.weight
    rows = (
        kept_rows(tiles, budget, hidden.shape[0], outputs)
        if trained and weight.dtype != torch.float16
        else 0
    )
    return hidden.new_empty(rows, weight.shape[0], dtype=tiles.stash_dtype), hidden.new_empty(
        rows, dtype=tiles.compute
    )


def _count(hidden: Tensor, rows: Tensor | None) -> int:
    return hidden.shape[0] if rows is None else rows.shape[0]


@torch.library.custom_op("treg::linear_logprobs_grad", mutates_args=(), tags=LOOKS)
def _gradients(
    coef: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    norm: Tensor,
    kept: Tensor,
    factor: Tensor,
    left_out: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    impl: str,
    logits_dtype: torch.dtype | None,
    budget: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    outputs: str,
    filter_eps: float | None,
    by_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight and dbias for coef = d L / d lp; empty where not needed."""
    if filter_eps is None and _frozen(weight, need_hidden, need_weight or need_bias):
        dhidden = scaled_to(kept, coefficients(coef, factor).unsqueeze(-1), kept.dtype)
        return dhidden, hidden.new_empty(0), hidden.new_empty(0)
    tiles = make_tiles(
        impl, Head(weight, bias, logit_scale, softcap, temperature, ignore_index), logits_dtype
    )
    names = names_of(outputs)
    rows, needs = scored_rows(target, ignore_index), (need_hidden, need_weight, need_bias)
    check_same_rows(rows, left_out)
    count = 0
    if filter_eps is not None:
        grads, _ = filtered_rows(
            tiles,
            hidden,
            target,
            rows,
            norm,
            coef,
            kept,
            tiles.top_width,
            filter_eps,
            budget,
            needs,
        )
    elif by_columns:
        grads = differentiate_columns(
            tiles, hidden, target, rows, norm, coef.contiguous(), budget, needs
        )
    else:
        count = min(kept.shape[0], kept_rows(tiles, budget, _count(hidden, rows), names))
        first = (kept[:count], factor[:count]) if count else (None, None)
        grads = differentiate_rows(
            tiles, hidden, target, rows, norm, coef.contiguous(), *first, budget, needs
        )
    dhidden = grads.dhidden
    if dhidden is not None and count:
        dhidden = scaled_to(dhidden, grads.row_scale.unsqueeze(-1), dhidden.dtype)
    found = (dhidden, *weight_gradients(grads, weight, bias))
    return tuple(hidden.new_empty(0) if x is None else x for x in found)


@_gradients.register_fake
def _(
    coef,
    hidden,
    weight,
    bias,
    target,
    norm,
    kept,
    factor,
    left_out,
    logit_scale,
    softcap,
    temperature,
    ignore_index,
    impl,
    logits_dtype,
    budget,
    need_hidden,
    need_weight,
    need_bias,
    outputs,
    filter_eps,
    by_columns,
):
    def like(x, needed):
        return (
            torch.empty_like(x, memory_format=torch.contiguous_format)
            if needed
            else hidden.new_empty(0)
        )

    return like(hidden, need_hidden), like(weight, need_weight), like(bias, need_bias)


def _setup(ctx, inputs, output):
    hidden, weight, bias, target, *options = inputs
    *_, norm, kept, factor, left_out = output
    # tensors are saved by autograd alone, so that it can free, check and move them
    ctx.save_for_backward(hidden, weight, bias, target, norm, kept, factor, left_out)
    ctx.options = options
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, coef, *_):
    options, needs = ctx.options, ctx.options[7:10]
    if coef is None:
        return (None,) * (4 + len(options))
    found = _gradients(coef, *ctx.saved_tensors, *options)
    dhidden, dweight, dbias = (
        x if needed else None for x, needed in zip(found, needs, strict=True)
    )
    return dhidden, dweight, dbias, None, *(None for _ in options)


def once_only(ctx, *_):
    raise RuntimeError(
        "expected first derivatives only: the gradient of a loss head's gradient is not implemented"
    )


_logprobs.register_autograd(_backward, setup_context=_setup)
_gradients.register_autograd(once_only)
