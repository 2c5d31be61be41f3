"""The pair loss of a trainable head as an operator, `treg::treg_loss`, and its backward: three
GEMMs a row.

The coefficient of a token, d L / d lp_t, is known only when its whole pair has been through the
head. So that no tile is computed twice, a batch whose stash fits into the budget keeps it until the
backward; others take their gradients in the forward, group by group (`treg.ops.groups`).
"""

import itertools

import torch
from torch import Tensor

from treg.checks import OUTPUTS, check_ends
from treg.losses import LossOptions
from treg.losses.pairs import PairOutputs, row_starts
from treg.ops.gemm import scaled_to
from treg.ops.groups import Pairs, Work
from treg.ops.head import (
    Head,
    HeadGradients,
    check_budget,
    check_same_rows,
    scored_rows,
    sees_values,
    tile_rows,
    without_autocast,
)
from treg.ops.logprobs import LOOKS, make_tiles, names_of, once_only
from treg.ops.rows import coefficients
from treg.results import PairLoss


def run_pairs(
    impl: str,
    head: Head,
    logits_dtype: torch.dtype | None,
    hidden: Tensor,
    target: Tensor,
    token_rewards: Tensor | None,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    count: int,
    options: LossOptions,
    outputs: tuple[str, ...],
    budget: int,
) -> tuple[Tensor, PairLoss, dict[str, Tensor]]:
    """The sum of the pairs' losses, their unreduced results, and log-probs and statistics of each
    token, [N].

    hidden [N, D], the others [N], ref_logps [N] or [2B]; padded sequences of equal length where
    cu_seqlens is None, 2B = count in all. Only the sum carries a gradient, in hidden, weight and
    bias.
    """
    needs = [x is not None and x.requires_grad for x in (hidden, head.weight, head.bias)]
    total, loss, stats, logprobs, *statistics = _pair_loss(
        hidden,
        head.weight,
        head.bias,
        target,
        token_rewards,
        ref_logps,
        token_weights,
        cu_seqlens,
        count,
        options.loss_type,
        options.beta,
        options.alpha,
        options.gamma,
        options.label_smoothing,
        options.weighting,
        head.logit_scale,
        head.softcap,
        head.temperature,
        head.ignore_index,
        impl,
        logits_dtype,
        budget,
        *needs,
        ",".join(outputs),
    )[: 4 + len(OUTPUTS)]
    found = {"logprobs": logprobs} | {
        n: x for n, x in zip(OUTPUTS, statistics, strict=True) if n in outputs
    }
    return total, PairOutputs(loss, stats, logprobs).results(options), found


def _layout(target: Tensor, cu_seqlens: Tensor | None, count: int, ignore_index: int):
    """The rows that are scored (None: all), and how many of them each sequence has, as far as the
    host can know.
    """
    n = target.shape[0]
    if cu_seqlens is None:
        ends = [i * (n // count) for i in range(count + 1)]
    elif not sees_values(cu_seqlens):
        return None, None
    else:
        ends = cu_seqlens.tolist()
        check_ends(ends, "hidden", n)
    rows = scored_rows(target, ignore_index)
    if rows is not None:
        ends = torch.searchsorted(rows, torch.tensor(ends, device=rows.device)).tolist()
    return rows, [b - a for a, b in itertools.pairwise(ends)]


@torch.library.custom_op("treg::treg_loss", mutates_args=(), tags=LOOKS)
def _pair_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_rewards: Tensor | None,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    count: int,
    loss_type: str,
    beta: float,
    alpha: float,
    gamma: float,
    label_smoothing: float,
    weighting: str,
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
) -> tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
]:
    """sum_b loss_b, loss [B], stats [len(STATS), B], log-probs, OUTPUTS; the gradients of the sum
    and what scales them,
    dhidden, its row_scale [N], dweight, dbias, the scale of both []; or stash [N, V] and scale [N],
    from which they follow, of as many rows as are scored; whether rows were left out. What is not
    asked for is empty."""
    tiles = make_tiles(
        impl, Head(weight, bias, logit_scale, softcap, temperature, ignore_index), logits_dtype
    )
    names = names_of(outputs)
    check_budget(tiles, budget, stash=True, outputs=names)
    options = LossOptions(loss_type, beta, alpha, gamma, label_smoothing, weighting)
    rows, lengths = _layout(target, cu_seqlens, count, ignore_index)
    starts = row_starts(target.view(count, -1) if cu_seqlens is None else target, cu_seqlens)
    pairs = Pairs(
        hidden,
        target,
        token_rewards,
        ref_logps,
        token_weights,
        starts,
        rows,
        lengths,
        options,
        names,
    )
    work = Work(pairs, tiles, budget, (need_hidden, need_weight, need_bias))
    stash, scale = _stash(tiles, hidden, budget, names)
    gradients = (None,) * 5
    if stash.numel():
        work.run_at_once(stash, scale)
    else:
        work.run_groups()
        g = work.grads
        gradients = (g.dhidden, g.row_scale, g.dweight, g.dbias, work.weight_scale)
    found = (*(work.found.get(n) for n in ("logprobs", *OUTPUTS)), *gradients)
    found = (hidden.new_empty(0) if x is None else x for x in found)
    return (
        work.outputs.loss.sum(),
        work.outputs.loss,
        work.outputs.stats,
        *found,
        stash,
        scale,
        torch.tensor(rows is not None),
    )


@_pair_loss.register_fake
def _(
    hidden,
    weight,
    bias,
    target,
    token_rewards,
    ref_logps,
    token_weights,
    cu_seqlens,
    count,
    loss_type,
    beta,
    alpha,
    gamma,
    label_smoothing,
    weighting,
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
):
    tiles = make_tiles(
        impl, Head(weight, bias, logit_scale, softcap, temperature, ignore_index), logits_dtype
    )
    names = names_of(outputs)
    stash, scale = _stash(tiles, hidden, budget, names)
    in_groups = stash.numel() == 0

    def like(x, needed=True, dtype=tiles.compute):
        return x.new_empty(x.shape, dtype=dtype) if needed else hidden.new_empty(0)

    row = like(target)
    room = PairOutputs.empty(count // 2, row)
    statistics = (
        like(target, n in names, torch.bool if n == "is_top1" else tiles.compute) for n in OUTPUTS
    )
    gradients = (
        like(hidden, in_groups and need_hidden, hidden.dtype),
        like(target, in_groups),
        like(weight, in_groups and need_weight),
        like(bias, in_groups and need_bias),
        like(row.new_empty(()), in_groups),
    )
    left_out = torch.empty((), dtype=torch.bool, device="cpu")
    return (
        row.new_empty(()),
        room.loss,
        room.stats,
        row,
        *statistics,
        *gradients,
        stash,
        scale,
        left_out,
    )


def fits_at_once(tiles, rows: int, budget: int, outputs: tuple[str, ...]) -> bool:
    """Whether the stash of so many rows fits, as far as shapes tell."""
    return rows <= tile_rows(tiles, budget, stash=True, outputs=outputs)


def _stash(tiles, hidden: Tensor, budget: int, outputs: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Room for the stash [N, V] and scale [N] of all rows, or for none."""
    rows = hidden.shape[0] if fits_at_once(tiles, hidden.shape[0], budget, outputs) else 0
    V = tiles.head.weight.shape[0]
    return hidden.new_empty(rows, V, dtype=tiles.stash_dtype), hidden.new_empty(
        rows, dtype=tiles.compute
    )


@torch.library.custom_op("treg::treg_loss_grad", mutates_args=(), tags=LOOKS)
def _gradients(
    upstream: Tensor,
    dhidden: Tensor,
    row_scale: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    weight_scale: Tensor,
    stash: Tensor,
    scale: Tensor,
    left_out: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    impl: str,
    logits_dtype: torch.dtype | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients times upstream [], rounded once to the dtypes of what they belong to; empty
    where not needed.
    """
    factor = upstream * weight_scale
    if stash.numel():
        rows = scored_rows(target, ignore_index)
        check_same_rows(rows, left_out)
        n, needs = (
            hidden.shape[0] if rows is None else rows.shape[0],
            (need_hidden, need_weight, need_bias),
        )
        tiles = make_tiles(impl, Head(weight, bias, ignore_index=ignore_index), logits_dtype)
        grads = HeadGradients(hidden, tiles, needs, complete=rows is None, single=True)
        with without_autocast(hidden):
            grads.add(
                stash[:n], slice(0, n) if rows is None else rows, coefficients(upstream, scale[:n])
            )
        dhidden, row_scale, dweight, dbias = (
            grads.dhidden,
            grads.row_scale,
            grads.dweight,
            grads.dbias,
        )
        factor = None
    rest = ((dweight, need_weight, weight), (dbias, need_bias, bias))
    return (
        scaled_to(
            dhidden,
            (row_scale if factor is None else row_scale * upstream).unsqueeze(-1),
            hidden.dtype,
        )
        if need_hidden
        else hidden.new_empty(0),
        *(
            (x.to(like.dtype) if factor is None else scaled_to(x, factor, like.dtype))
            if needed
            else hidden.new_empty(0)
            for x, needed, like in rest
        ),
    )


@_gradients.register_fake
def _(
    upstream,
    dhidden,
    row_scale,
    dweight,
    dbias,
    weight_scale,
    stash,
    scale,
    left_out,
    hidden,
    weight,
    bias,
    target,
    ignore_index,
    impl,
    logits_dtype,
    need_hidden,
    need_weight,
    need_bias,
):
    found = ((hidden, need_hidden), (weight, need_weight), (bias, need_bias))
    return tuple(x.new_empty(x.shape) if needed else hidden.new_empty(0) for x, needed in found)


def _setup(ctx, inputs, output):
    hidden, weight, bias, target = inputs[:4]
    # tensors are saved by autograd alone, so that it can free, check and move them
    ctx.save_for_backward(*output[-8:], hidden, weight, bias, target)
    ignore_index, impl, logits_dtype = inputs[18:21]
    ctx.inputs, ctx.options = len(inputs), (ignore_index, impl, logits_dtype, *inputs[-4:-1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, upstream, *_):
    if upstream is None:
        return (None,) * ctx.inputs
    found = _gradients(upstream, *ctx.saved_tensors, *ctx.options)
    gradients = (x if needed else None for x, needed in zip(found, ctx.options[-3:], strict=True))
    return *gradients, *(None for _ in range(ctx.inputs - 3))


_pair_loss.register_autograd(_backward, setup_context=_setup)
_gradients.register_autograd(once_only)
