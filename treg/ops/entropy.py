"""The gradient of entropies that a forward pass has already computed, in hidden, weight and bias.

    a = h W^T + b          z = softcap * tanh( logit_scale * a / softcap ) / temperature
    p_tv = softmax_v(z_t)  H_t = - sum_v p_tv log p_tv

    dH_t / dz_tv = - p_tv (log p_tv + H_t)
    dz / da      = logit_scale / temperature * (1 - tanh^2)          (without a softcap tanh is 0)

The logits are computed again, a tile of rows after the other, and never rounded to 16 bits. This
takes three matrix products a row, and none where the upstream gradient is 0.

N rows, n rows of a tile, V vocabulary, D hidden size.
"""

import torch
from torch import Tensor

from treg import checks
from treg.operators import LOOKS_AT_VALUES, Operator, scalars
from treg.ops.head.gemm import add_transposed, logits_into, slab_bytes, times_weight
from treg.ops.head.head import Head, autocast_dtype, without_autocast
from treg.ops.head.memory import budget_of
from treg.ops.head.selection import sees_values

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
    checks.check_transforms(hidden=hidden, weight=head.weight, bias=head.bias)
    checks.check_memory_budget(memory_budget)
    cast = autocast_dtype(hidden, head.weight)
    dtype = hidden.dtype if cast is None else cast
    if cast is None and head.weight.dtype != dtype:
        raise ValueError(
            f"weight: expected {dtype} (hidden's dtype), got {head.weight.dtype}; convert one, or "
            "use torch.autocast"
        )
    budget = budget_of(memory_budget, hidden.device)
    softcap = 0.0 if head.softcap is None else head.softcap
    (result,) = _ENTROPY(
        entropy.detach(),
        None if lse is None else lse.detach(),
        hidden,
        head.weight,
        head.bias,
        target,
        scalars(head.logit_scale, softcap, head.temperature),
        _encode(dtype, head.softcap is not None, head.ignore_index, budget),
    )
    return result


def _encode(dtype: torch.dtype, softcapped: bool, ignore_index: int, budget: int) -> str:
    """What is fixed in a run, as the operators take it."""
    return f"{str(dtype).removeprefix('torch.')} {int(softcapped)} {ignore_index} {budget}"


def _decode(
    fixed: str, weight: Tensor, bias: Tensor | None, numbers: Tensor
) -> tuple[Head, torch.dtype, int]:
    """The head, the dtype of the products, and the memory budget."""
    dtype, softcapped, ignore_index, budget = fixed.split()
    logit_scale, softcap, temperature = numbers.tolist()
    cap = softcap if softcapped == "1" else None
    head = Head(weight, bias, logit_scale, cap, temperature, int(ignore_index))
    return head, getattr(torch, dtype), int(budget)


def _forward(
    entropy: Tensor,
    lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    numbers: Tensor,
    fixed: str,
) -> list[Tensor]:
    return [entropy.clone(memory_format=torch.contiguous_format)]


def _gradients(
    upstream: Tensor,
    entropy: Tensor,
    lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    numbers: Tensor,
    fixed: str,
    needs: str,
) -> list[Tensor]:
    """dhidden, dweight and dbias; empty where needs has a 0. upstream: [N], d loss / d entropy."""
    head, dtype, budget = _decode(fixed, weight, bias, numbers)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    total = _Sums(hidden, weight, bias, needs, compute)
    used = (target != head.ignore_index) & (upstream != 0.0)
    rows = _selected(used)
    weight = weight.to(dtype)
    step = _tile_rows(weight, compute, budget)
    with without_autocast(hidden):
        for chosen in rows.split(step):
            h = hidden[chosen].to(dtype)
            unused = None
            if not sees_values(used):
                # All rows are here, and what the unused ones hold must not reach a product.
                unused = ~used[chosen].unsqueeze(1)
                h.masked_fill_(unused, 0.0)
            known = None if lse is None else (lse[chosen], entropy[chosen])
            coef = upstream[chosen].to(compute)
            slope = _logit_gradient(h, weight, head, coef, known)
            if unused is not None:
                slope.masked_fill_(unused, 0.0)
            if total.dbias is not None:
                total.dbias += slope.sum(0)
            total.add(slope.to(dtype), h, weight, chosen)
    return total.results()


def _selected(used: Tensor) -> Tensor:
    """Numbers of the rows that are used; of all rows where values cannot be looked at."""
    if sees_values(used):
        return used.nonzero().squeeze(1)
    return torch.arange(used.shape[0], device=used.device)


def _tile_rows(weight: Tensor, compute: torch.dtype, budget: int) -> int:
    """Rows of a tile whose temporaries fit into the budget; at least one."""
    V, D = weight.shape
    fixed_bytes, row_bytes = slab_bytes(D, weight.dtype, weight.device)
    row_bytes += TILE_BUFFERS * V * compute.itemsize + V * weight.dtype.itemsize
    row_bytes += ROW_BUFFERS * D * compute.itemsize
    return max(1, (budget - fixed_bytes) // row_bytes)


def _logit_gradient(
    hidden: Tensor, weight: Tensor, head: Head, coef: Tensor, known: tuple[Tensor, Tensor] | None
) -> Tensor:
    """coef_t * dH_t / da_tv, [n, V], in coef's dtype.

    known: logsumexp and entropy [n] of the whole softmax, where the weight is a part of the
    vocabulary. Otherwise they are computed anew from the tile: then the gradients of a row add up
    to 0 whatever the size of its logits, which those that were rounded once do not.
    """
    z = coef.new_empty(hidden.shape[0], weight.shape[0])
    logits_into(hidden, weight, z)
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


class _Sums:
    """dhidden, dweight and dbias, added up tile by tile; None where not needed."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: str,
        compute: torch.dtype,
    ):
        self.leaves = (hidden, weight, bias)
        wanted = [need == "1" for need in needs]
        self.dhidden = hidden.new_zeros(hidden.shape) if wanted[0] else None
        self.dweight = weight.new_empty(weight.shape, dtype=compute) if wanted[1] else None
        self.dbias = None
        if bias is not None and wanted[2]:
            self.dbias = bias.new_zeros(bias.shape, dtype=compute)
        self.empty = True

    def add(self, tile: Tensor, hidden: Tensor, weight: Tensor, rows: Tensor) -> None:
        """tile: [n, V], d loss / d a of these rows of hidden; all in the dtype of the products."""
        if self.dhidden is not None:
            out = tile.new_empty(hidden.shape, dtype=self.dhidden.dtype)
            if out.dtype == tile.dtype:
                times_weight(tile, weight, out)
            else:
                # A float32 hidden under autocast: the product is not rounded to 16 bits.
                add_transposed(out, tile.T, weight, first=True)
            self.dhidden[rows] = out
        if self.dweight is not None:
            add_transposed(self.dweight, tile, hidden, first=self.empty)
        self.empty = False

    def results(self) -> list[Tensor]:
        if self.dweight is not None and self.empty:
            self.dweight.zero_()
        found = []
        sums = (self.dhidden, self.dweight, self.dbias)
        for total, leaf in zip(sums, self.leaves, strict=True):
            if total is None or leaf is None:
                found.append(self.leaves[0].new_empty(0))
            else:
                found.append(total.to(leaf.dtype))
        return found


def _fake_forward(entropy: Tensor, *_) -> list[Tensor]:
    return [torch.empty_like(entropy, memory_format=torch.contiguous_format)]


def _fake_gradients(
    upstream, entropy, lse, hidden, weight, bias, target, numbers, fixed, needs
) -> list[Tensor]:
    found = []
    for need, leaf in zip(needs, (hidden, weight, bias), strict=True):
        if leaf is None or need == "0":
            found.append(hidden.new_empty(0))
        else:
            found.append(leaf.new_empty(leaf.shape))
    return found


def _save(ctx, inputs, output) -> None:
    *tensors, fixed = inputs
    ctx.save_for_backward(*tensors)
    ctx.fixed = fixed
    ctx.set_materialize_grads(False)


def _backward(ctx, grads):
    nothing = (None,) * 8
    upstream = grads[0]
    if upstream is None:
        return nothing
    # While a graph is traced the tensors are of a subclass, and have no values.
    visible = type(upstream) is Tensor and sees_values(upstream)
    if visible and not bool(upstream.any()):
        return nothing
    needs = "".join("1" if need else "0" for need in ctx.needs_input_grad[2:5])
    found = _GRADIENTS(upstream, *ctx.saved_tensors, ctx.fixed, needs)
    dhidden, dweight, dbias = (
        x if need == "1" else None for x, need in zip(found, needs, strict=True)
    )
    return None, None, dhidden, dweight, dbias, None, None, None


_OPERANDS = (
    "Tensor entropy, Tensor? lse, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
    "Tensor numbers, str fixed"
)
_ENTROPY = Operator(f"linear_entropy({_OPERANDS}) -> Tensor[]", _forward, _fake_forward)
_ENTROPY.differentiable(_save, _backward)
_GRADIENTS = Operator(
    f"linear_entropy_grad(Tensor upstream, {_OPERANDS}, str needs) -> Tensor[]",
    _gradients,
    _fake_gradients,
    LOOKS_AT_VALUES,
)
_GRADIENTS.first_derivatives_only()
