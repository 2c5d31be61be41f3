"""Exact linear cross-entropy in the place of Apple's cut-cross-entropy.

The call is the same, and one import changes. The signatures are those of CCE's repository (June
2025). Those of release 25.1.1 order what follows targets another way; positional arguments in that
order are refused. CCE is not needed here.
"""

import enum
from numbers import Real

import torch
import torch.distributed as dist
from torch import Tensor, nn

from treg.checks import check_tensor
from treg.ops import VocabShard, linear_logprobs
from treg.ops.plans.vocab_parallel import local_operands

IMPLS = (
    "cce",
    "torch_compile",
    "cce_exact",
    "cce_kahan",
    "cce_kahan_full",
    "cce_kahan_full_c",
    "cce_kahan_full_e",
    "cce_kahan_full_c_full_e",
)


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str | enum.Enum = "cce",
    vocab_parallel_options=None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of a linear classifier, in bounded memory.

        z_t   = softcap * tanh( (e_t c^T + b) / softcap )        (softcap optional)
        nll_t = logsumexp_v z_tv - z_t[y_t],   y_t = targets[..., t + shift]

    Differs from CCE: always the gradient of "cce_exact", and float32 sums. filter_eps,
    filter_e_grad, filter_c_grad, accum_e_fp32, accum_c_fp32 and the choice of impl therefore have
    no effect. Bad input is an error.

    Args:
        e: [..., T, D] float32, bfloat16 or float16 (float64 on a CPU). c: [V, D], e's dtype. bias:
            [V] floating.
        targets: [..., T] int64. ignore_index: targets that are not scored.
        softcap: > 0. reduction: "mean" over the scored tokens (nan where there are none), "sum", or
            "none".
        shift: predict targets[..., t + shift] from e[..., t, :]; True is 1. 0 <= shift < T.
        return_lse: also return logsumexp_v z_tv. Its gradient, z's minus lp's, takes [N, D] and [V,
            D] float32 numbers more, and in 16 bits it is a difference of rounded numbers.
        impl: one of IMPLS, or CCE's enum.
        vocab_parallel_options: CCE's VocabParallelOptions(start, stop, group), or anything with
            those attributes: c and bias are rows start to stop of the whole, on this rank of group;
            the gradient in e is summed over the ranks, so that reduce_e_grad=False is refused.
    Returns:
        loss, float32, nats: a scalar, or [..., T - shift] with reduction="none", 0 where ignored.
        With return_lse a pair of it and lse [..., T - shift], 0 where ignored. Both are
        differentiable in e, c and bias.
    Raises:
        TypeError: an argument that must be a tensor is none. ValueError: any other bad input, by
        name (hidden, weight and target are e, c and targets).
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    _check_filter(filter_eps)
    _check_impl(impl)
    e, c, targets, bias, shard = local_operands(
        e, c, targets, bias, _vocab_shard(vocab_parallel_options, c)
    )
    if bias is not None and not isinstance(bias, Tensor):
        order = "pass what follows targets by name (CCE 25.1.1 has another order)"
        raise TypeError(
            f"bias: expected a torch.Tensor or None, got {type(bias).__name__}; {order}"
        )
    check_tensor("targets", targets)
    shift = _checked_shift(shift, targets)
    kept = targets.shape[-1] - shift
    y = targets
    if shift:
        # the targets move, so that e is not copied
        y = torch.full_like(targets, ignore_index)
        y[..., :kept] = targets[..., shift:]
    found = linear_logprobs(
        e,
        c,
        y,
        bias=bias,
        ignore_index=ignore_index,
        softcap=softcap,
        shard=shard,
        outputs=("lse",) if return_lse else (),
    )
    scored = y != ignore_index
    # Not a plain sum: at ignored tokens the gradient of the mean of nothing would be infinite.
    nll = torch.where(scored, -found.logprobs, 0.0)
    loss = nll[..., :kept] if reduction == "none" else nll.sum()
    if reduction == "mean":
        loss = loss / scored.sum()
    if not return_lse:
        return loss
    lse = found.lse
    if found.logprobs.requires_grad:
        logprobs = found.logprobs[scored]
        z = _TargetLogit.apply(
            e[scored], c, bias, y[scored], lse[scored] + logprobs.detach(), softcap, shard
        )
        lse = lse.index_put(scored.nonzero(as_tuple=True), z - logprobs)
    return loss, lse[..., :kept]


class LinearCrossEntropy(nn.Module):
    """`linear_cross_entropy` as a module.

    The arguments and their order are those of CCE's repository.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        softcap: float | None = None,
        reduction: str = "mean",
        shift: bool | int = 0,
        filter_eps: float | str | None = "auto",
        accum_e_fp32: bool = False,
        accum_c_fp32: bool = False,
        filter_e_grad: bool = True,
        filter_c_grad: bool = True,
        impl: str | enum.Enum = "cce",
        return_lse: bool = False,
    ):
        super().__init__()
        self.ignore_index = ignore_index
        self.softcap = softcap
        self.reduction = reduction
        self.shift = shift
        self.filter_eps = filter_eps
        self.accum_e_fp32 = accum_e_fp32
        self.accum_c_fp32 = accum_c_fp32
        self.filter_e_grad = filter_e_grad
        self.filter_c_grad = filter_c_grad
        self.impl = impl
        self.return_lse = return_lse

    def forward(
        self, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        return linear_cross_entropy(
            e,
            c,
            targets,
            bias,
            self.ignore_index,
            self.softcap,
            self.reduction,
            self.shift,
            self.return_lse,
            self.filter_eps,
            impl=self.impl,
        )


class _TargetLogit(torch.autograd.Function):
    """The target's logit, whose value is known; with it lse = z - lp.

        z_n   = softcap * tanh( (e_n . c[y_n] + b[y_n]) / softcap )
        d z_n = (1 - (z_n / softcap)^2) * ( c[y_n] . d e_n + e_n . d c[y_n] + d b[y_n] )

    With a shard the rank that holds y_n has its row; the gradients in e are added up.
    """

    @staticmethod
    def forward(ctx, e, c, bias, y, z, softcap, shard):
        ctx.save_for_backward(e, c, bias, y, z)
        ctx.softcap, ctx.shard = softcap, shard
        return z.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        e, c, bias, y, z = ctx.saved_tensors
        da = grad
        if ctx.softcap is not None:
            da = grad * (1 - (z / ctx.softcap) ** 2)
        da = da.unsqueeze(-1)
        if ctx.shard is not None:
            y = y - ctx.shard.start
            here = (y >= 0) & (y < c.shape[0])
            y, da = torch.where(here, y, 0), torch.where(here.unsqueeze(-1), da, 0.0)
        need_e, need_c, need_bias = ctx.needs_input_grad[:3]

        def sum_by_class(rows):
            # in the rows' dtype, whatever that of the weight; deterministic, unlike index_add
            return torch.ops.aten.embedding_dense_backward(rows, y, c.shape[0], -1, False)

        de = None
        if need_e:
            de = da * c[y]
            if ctx.shard is not None:
                dist.all_reduce(de, group=ctx.shard.group)
            de = de.to(e.dtype)
        dc = sum_by_class(da * e).to(c.dtype) if need_c else None
        dbias = sum_by_class(da).squeeze(-1).to(bias.dtype) if need_bias else None
        return de, dc, dbias, None, None, None, None


def _vocab_shard(options, c) -> VocabShard | None:
    if options is None:
        return None
    missing = [name for name in ("start", "stop", "group") if not hasattr(options, name)]
    if missing:
        raise TypeError(
            "vocab_parallel_options: expected a VocabParallelOptions (start, stop, group) or None, "
            f"got {type(options).__name__} without {missing}"
        )
    if not getattr(options, "reduce_e_grad", True):
        raise ValueError(
            "vocab_parallel_options: expected reduce_e_grad=True, got False; the gradient in e is "
            "always summed over the group"
        )
    check_tensor("c", c)
    if options.stop - options.start != c.shape[0]:
        raise ValueError(
            f"vocab_parallel_options: expected stop - start = {c.shape[0]} (rows of c), "
            f"got start={options.start}, stop={options.stop}"
        )
    return VocabShard(options.start, options.group)


def _check_filter(filter_eps) -> None:
    number = isinstance(filter_eps, Real) and not isinstance(filter_eps, bool)
    if not (filter_eps is None or number or filter_eps in ("auto", "high")):
        raise ValueError(
            f"filter_eps: expected a number, 'auto', 'high' or None, got {filter_eps!r}"
        )


def _check_impl(impl) -> None:
    name = impl.name.lower() if isinstance(impl, enum.Enum) else impl
    if name not in IMPLS:
        raise ValueError(
            f"impl: expected one of {list(IMPLS)}, all of which run the same exact op here, got "
            f"{impl!r}"
        )


def _checked_shift(shift, targets: Tensor) -> int:
    if targets.ndim == 0:
        raise ValueError("targets: expected shape [..., T], got []")
    length = targets.shape[-1]
    if not isinstance(shift, int) or not 0 <= shift < max(length, 1):
        raise ValueError(
            f"shift: expected a bool or an int in [0, {length}) (the length of targets), got "
            f"{shift!r}"
        )
    return int(shift)
