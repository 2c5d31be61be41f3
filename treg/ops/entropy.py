"""The gradient of entropies that a forward pass has already computed, in hidden, weight and bias.

    a = h W^T + b          z = softcap * tanh( logit_scale * a / softcap ) / temperature
    p_tv = softmax_v(z_t)  H_t = - sum_v p_tv log p_tv

    dH_t / dz_tv = - p_tv (log p_tv + H_t)
    dz / da      = logit_scale / temperature * (1 - tanh^2)          (without a softcap tanh is 0)

The logits are computed again, a tile of rows after the other, and never rounded to 16 bits. This
takes three matrix products a row, and none where the upstream gradient is 0; on a GPU with 512 rows
or fewer, of which none is looked at, three for every row.

N rows, n rows of a tile, V vocabulary, D hidden size.
"""

import torch
from torch import Tensor

from treg.operators import Operator, values_of
from treg.ops.call import Batch, Call
from treg.ops.head.gemm import logits_into, slab_bytes
from treg.ops.head.gradients import Gradients, GradientSums
from treg.ops.head.head import Head, without_autocast
from treg.ops.head.selection import looks, rows_where
from treg.ops.options import HeadOptions

# Tensors of a tile's shape [n, V] that are alive at once: logits, their slopes, and a temporary.
TILE_BUFFERS = 3
# Tensors of shape [n, D] that are alive at once: rows of hidden and of its gradient, and copies.
ROW_BUFFERS = 4


def differentiable_entropy(
    entropy: Tensor,
    hidden: Tensor,
    target: Tensor,
    head: Head,
    *,
    lse: Tensor | None = None,
    memory_budget: int | str | None = None,
) -> Tensor:
    """The same entropies, with a gradient in hidden, head.weight and head.bias.

    Rows whose target is ignored, and rows whose upstream gradient is 0, are left out: whatever
    hidden holds there (NaN too) has no part in any gradient. An upstream gradient that is 0
    throughout costs nothing (in a compiled graph: no matrix product).

    The weight may be a part of the vocabulary. Then entropy and lse are those of the whole
    softmax, and the gradient in hidden is the share of this part: the caller adds up the shares.

    Args:
        entropy: [N] float32 (float64 for float64 inputs), detached, nats; as
            `treg.ops.linear_logprobs` returns it.
        hidden: [N, D]. head: weight [V, D] in hidden's dtype, bias, and the numbers. Under
            torch.autocast the products are taken in its dtype, and the gradients of float32
            operands are float32.
        target: [N] int64; only which targets equal head.ignore_index matters.
        lse: None where the weight has the whole vocabulary. For a part of it: [N], the logsumexp
            over the whole, in entropy's dtype.
        memory_budget: bytes of temporaries (None, "least": see `treg.ops.linear_logprobs`), but at
            least those of one row. A float32 [V, D] sum of the weight's gradient comes on top.
    Returns:
        [N], the numbers of entropy; entropy itself where no gradient is asked for.
    """
    operands = (hidden, head.weight, head.bias)
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in operands):
        return entropy
    options = HeadOptions(
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        temperature=head.temperature,
        ignore_index=head.ignore_index,
        outputs=(),
        impl="torch",
        memory_budget=memory_budget,
        logits_dtype=None,
        shard=None,
        filter_eps=None,
    )
    call = options.call(hidden, head.weight, target, head.bias)
    (result,) = _forward(
        entropy.detach(),
        None if lse is None else lse.detach(),
        *operands,
        target,
        options.numbers(),
        call,
    )
    return result


def _copy(entropy, lse, hidden, weight, bias, target, numbers, text) -> list[Tensor]:
    return [entropy.clone(memory_format=torch.contiguous_format)]


def _copy_fake(entropy, lse, hidden, weight, bias, target, numbers, text) -> list[Tensor]:
    return [torch.empty_like(entropy, memory_format=torch.contiguous_format)]


def _differentiate(
    upstream, entropy, lse, hidden, weight, bias, target, numbers, text
) -> list[Tensor]:
    """The gradients that are needed, in the order hidden, weight, bias. upstream: [N]."""
    call = Call.of(text)
    batch = Batch.of_shapes(call, hidden, weight, bias, target, values_of(numbers))
    used = (target != call.ignore_index) & (upstream != 0.0)
    rows, compute = rows_where(used), batch.tiles.compute
    sums = GradientSums(batch.hidden, batch.tiles, call.needs, complete=rows.complete)
    with without_autocast(hidden):
        for chosen in rows.chunks(_tile_rows(batch)):
            h = chosen.read(batch.hidden)
            factor = unused = None
            if not rows.looked:
                # All rows are here, and what the unused ones hold must not reach a product.
                unused = ~chosen.read(used).unsqueeze(1)
                factor = chosen.read(used).to(compute)
                h = h.masked_fill(unused, 0.0)
            known = None if lse is None else (chosen.read(lse), chosen.read(entropy))
            slope = _logit_gradient(h, batch.head, chosen.read(upstream).to(compute), known)
            if unused is not None:
                slope.masked_fill_(unused, 0.0)
            sums.add(slope.to(call.dtype), chosen, factor)
    sums.finish()
    dhidden = sums.scaled_hidden_gradient(batch.hidden_dtype)
    found = Gradients(dhidden, sums.dweight, sums.dbias).like(hidden, weight, bias)
    return [x for x in found if x is not None]


def _differentiate_fake(
    upstream, entropy, lse, hidden, weight, bias, target, numbers, text
) -> list[Tensor]:
    return Call.of(text).needs.empty(hidden, weight, bias)


def _tile_rows(batch: Batch) -> int:
    """Rows of a tile whose temporaries fit into the budget; at least one."""
    weight, compute = batch.head.weight, batch.tiles.compute
    V, D = weight.shape
    fixed_bytes, row_bytes = slab_bytes(D, weight.dtype, weight.device)
    row_bytes += TILE_BUFFERS * V * compute.itemsize + V * weight.dtype.itemsize
    row_bytes += ROW_BUFFERS * D * compute.itemsize
    return max(1, (batch.call.budget - fixed_bytes) // row_bytes)


def _logit_gradient(
    hidden: Tensor, head: Head, coef: Tensor, known: tuple[Tensor, Tensor] | None
) -> Tensor:
    """coef_t * dH_t / da_tv, [n, V], in coef's dtype.

    known: logsumexp and entropy [n] of the whole softmax, where the weight is a part of the
    vocabulary. Otherwise they are computed anew from the tile: then the gradients of a row add up
    to 0 whatever the size of its logits, which those that were rounded once do not.
    """
    z = coef.new_empty(hidden.shape[0], head.weight.shape[0])
    logits_into(hidden, head.weight, z)
    if head.bias is not None:
        z += head.bias
    slope = None
    if head.softcap is None:
        z.mul_(head.scale)
    else:
        z.mul_(head.logit_scale / head.softcap).tanh_()
        slope = 1.0 - z.square()
        z.mul_(head.softcap / head.temperature)
    # entr(p) = -p log p, and 0 at a probability of 0, whose logit may be -inf
    if known is None:
        p = torch.softmax(z, 1, out=z)
        terms = torch.special.entr(p)
        entropy = terms.sum(1)
    else:
        lse, entropy = known
        p = z.sub_(lse.unsqueeze(1)).exp_()
        terms = torch.special.entr(p)
    gradient = terms.sub_(p.mul_(entropy.unsqueeze(1)))
    gradient.mul_((coef * head.scale).unsqueeze(1))
    return gradient if slope is None else gradient.mul_(slope)


def _save(ctx, inputs, output) -> None:
    *operands, text = inputs
    ctx.save_for_backward(*operands)
    ctx.call = Call.of(text)
    ctx.set_materialize_grads(False)


def _backward(ctx, grads):
    nothing = (None,) * 8
    upstream = grads[0]
    if upstream is None:
        return nothing
    # While a graph is traced the tensors are of a subclass, and have no values.
    visible = type(upstream) is Tensor and looks(upstream)
    if visible and not bool(upstream.any()):
        return nothing
    found = _gradient(upstream, *ctx.saved_tensors, ctx.call)
    return None, None, *ctx.call.needs.spread(found), None, None, None


_OPERANDS = (
    "Tensor entropy, Tensor? lse, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
    "Tensor numbers, str call"
)
_forward = Operator(f"linear_entropy({_OPERANDS}) -> Tensor[]", _copy, _copy_fake)
_forward.differentiable(_save, _backward)
_gradient = Operator(
    f"linear_entropy_grad(Tensor upstream, {_OPERANDS}) -> Tensor[]",
    _differentiate,
    _differentiate_fake,
)
_gradient.first_derivatives_only()
