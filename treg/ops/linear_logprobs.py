"""`linear_logprobs`: per-token log-probs of a language-model head, without [N, V] logits."""

import math

import torch
from torch import Tensor

from treg.operators import Operator, values_of
from treg.ops.call import Batch, Call
from treg.ops.head.selection import same_rows
from treg.ops.options import HeadOptions, check_numbers, check_targets
from treg.ops.plans import Plan, choose_plan, fake_note, note_of, read_note
from treg.ops.plans.vocab_parallel import VocabShard, local_operands, run_vocab_parallel
from treg.results import LinearLogprobs


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = (),
    impl: str | None = None,
    memory_budget: int | str | None = None,
    logits_dtype: torch.dtype | None = None,
    shard: VocabShard | None = None,
    filter_eps: float | None = None,
) -> LinearLogprobs:
    """Log-probability of each target under a language-model head, in bounded memory.

        z_t  = softcap * tanh( logit_scale * (h_t W^T + b) / softcap ) / temperature
        lp_t = z_t[y_t] - logsumexp_v z_t[v]
        d lp_t / d (h W^T + b)_tv = ( 1{v = y_t} - exp(z_tv - lse_t) ) * dz/da

    The matrix products a row are 1 forward only, 2 with a frozen head (3 in float16), and with a
    trainable one 3 for the rows whose unscaled gradient of the logits fits into memory_budget, 4
    for the others (all in float16).

    Args:
        hidden: [..., D] float32, bfloat16 or float16 (float64 too with impl="torch"), any strides.
        weight: [V, D], hidden's dtype, any strides. Under torch.autocast both are cast to its
            dtype.
        target: [...] int64, already aligned: target[i] is the token predicted from hidden[i].
        bias: [V] floating, or None. logit_scale: any finite number. softcap, temperature: > 0.
        ignore_index: targets that are not scored: log-prob 0, gradient 0. They cost nothing: a GPU
            is waited for once, in the forward, to leave them out. Of 512 rows or fewer, and while a
            CUDA graph is captured, it is not, and they are computed.
        outputs: any of "lse", "entropy", "mean_logit", "is_top1", "log_sum_sq_probs"; see
            `LinearLogprobs`.
        impl: "triton" (a GPU), "torch" (any device), None: "triton" on a GPU. A name never falls
            back.
        memory_budget: bytes of temporaries, whatever N is; a float32 [V, D] sum of dweight,
            [N]-sized rows, with filter_eps [N, V / 128] numbers, and on a GPU copies of a tile's
            rows of hidden where ignored tokens are left out (with "least" of all scored rows, and
            on a CPU as well), come on top. With a trainable head, or
            a shard, they are held until the backward: several calls before one backward hold as
            much each. None: 1 GiB on a GPU, 384 MiB on a CPU. "least": 192 and 96 MiB, and dhidden
            in float32 in place of that sum of dweight: 4 products for a trainable head. With a
            shard or filter_eps it is a smaller budget and nothing else.
        logits_dtype: dtype in which impl="torch" holds a tile's logits. None: float32, except for
            bfloat16 inputs on a CPU, where they are rounded to bfloat16, which doubles the speed of
            that product; torch.float32 keeps them exact there. Triton never rounds logits.
        shard: weight and bias are this rank's part of the vocabulary, as `VocabShard` says: every
            rank of its group calls this with the same hidden, target (ids of the whole vocabulary)
            and loss, gets the log-probs under the whole vocabulary, dhidden summed over the ranks,
            and dweight and dbias of its own rows. One all-gather of a few numbers a row, and in the
            backward one all-reduce of dhidden, in float32. A frozen head takes 3 products for the
            rows whose stash does not fit; "is_top1" is not available. A DTensor with placement
            Shard(0) on a mesh of one dimension needs no shard; one with Replicate() counts as a
            plain tensor.
        filter_eps: None: exact gradients. Else tiles of 128 tokens by 128 vocabulary entries are
            left out of them where no token has |d L / d lp| * p >= filter_eps * (the largest |d L /
            d lp|), p the largest of a block as wide as the forward's tiles (128 or 256), and no
            target lies; of a share rho of tiles that stays, 1 + 3 rho products are made (frozen 1 +
            2 rho). Approximate: what is left out has one sign. Deterministic; log-probs stay exact;
            0 leaves out nothing. Not with shard.
    Returns:
        LinearLogprobs; `logprobs` [...] float32, nats, differentiable in hidden, weight and bias.
    Raises:
        TypeError: an argument that must be a tensor is none. ValueError: any other bad input, by
            name.
    """
    hidden, weight, target, bias, shard = local_operands(hidden, weight, target, bias, shard)
    options = HeadOptions(
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        outputs=outputs,
        impl=impl,
        memory_budget=memory_budget,
        logits_dtype=logits_dtype,
        shard=shard,
        filter_eps=filter_eps,
    )
    call = options.call(hidden, weight, target, bias)
    found = score(options, call, hidden, weight, bias, target)
    return LinearLogprobs(**found)


def score(
    options: HeadOptions,
    call: Call,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
) -> dict[str, Tensor]:
    """Log-probs and the outputs asked for by name, like target; of checked arguments."""
    if options.shard is not None:
        rows = hidden.reshape(-1, hidden.shape[-1])
        check_targets(target, math.inf, call.ignore_index)
        flat = target.reshape(-1).contiguous()
        numbers = list(options.numbers())
        found = run_vocab_parallel(call, rows, weight, bias, flat, numbers, options.shard)
        return {name: x.reshape(target.shape) for name, x in found.items()}
    results = _forward(hidden, weight, bias, target, options.numbers(), call)
    return dict(zip(("logprobs", *call.outputs), results, strict=False))


def rows_of(hidden: Tensor) -> Tensor:
    """[N, D] from hidden [..., D]."""
    return hidden if hidden.ndim == 2 else hidden.reshape(-1, hidden.shape[-1])


def batch_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    numbers: Tensor | tuple[float, ...],
    call: Call,
) -> Batch:
    """The rows of an operator's arguments, whose values are known here and are checked.

    Args:
        hidden: [..., D]. target: [...]. numbers: the head's come first.
    """
    known = values_of(numbers)
    head = call.head(weight, bias, known)
    if isinstance(numbers, Tensor):  # a graph's, which nobody has seen; others are checked already
        check_numbers(head.logit_scale, head.softcap, head.temperature)
    check_targets(target, weight.shape[0], call.ignore_index)
    rows, flat = rows_of(hidden), target.reshape(-1).contiguous()
    return Batch.of(call, rows, weight, bias, flat, known)


def _score(hidden, weight, bias, target, numbers, text) -> list[Tensor]:
    """Log-probs and the outputs, like target; what the plan saved; the note."""
    call = Call.of(text)
    batch = batch_of(hidden, weight, bias, target, numbers, call)
    plan = choose_plan(call, batch.tiles, batch.hidden.shape[0])
    scores, saved = plan.forward(batch)
    found = [scores[name].view(target.shape) for name in ("logprobs", *call.outputs)]
    return [*found, *saved.values(), note_of(plan, batch)]


def _score_fake(hidden, weight, bias, target, numbers, text) -> list[Tensor]:
    call = Call.of(text)
    batch = Batch.of_shapes(call, rows_of(hidden), weight, bias, target.reshape(-1))
    plan = choose_plan(call, batch.tiles, batch.hidden.shape[0])
    saved = plan.saved(batch)
    return [*fake_scores(batch, target), *saved.values(), fake_note()]


def fake_scores(batch: Batch, target: Tensor) -> list[Tensor]:
    """Log-probs and outputs, not filled."""
    found = []
    for name in ("logprobs", *batch.call.outputs):
        dtype = torch.bool if name == "is_top1" else batch.tiles.compute
        found.append(batch.hidden.new_empty(target.shape, dtype=dtype))
    return found


def _differentiate(coef, saved, hidden, weight, bias, target, numbers, text) -> list[Tensor]:
    """The gradients that are needed, in the order hidden, weight, bias. coef: like target."""
    call = Call.of(text)
    *values, note = saved
    plan, batch = plan_of_backward(call, hidden, weight, bias, target, numbers, note)
    kept = dict(zip(plan.saved_names, values, strict=True))
    gradients = plan.backward(batch, coef.reshape(-1).contiguous(), kept)
    return [x for x in gradients.like(hidden, weight, bias) if x is not None]


def plan_of_backward(
    call: Call,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    numbers: Tensor | tuple[float, ...],
    note: Tensor,
) -> tuple[Plan, Batch]:
    """The plan of the forward, and its rows where the backward reads them.

    The forward has checked every value. note: from `note_of`.
    """
    plan, noted = read_note(note)
    reads = plan.backward_reads_rows
    flat, known = target.reshape(-1).contiguous(), values_of(numbers)
    rows = same_rows(flat, call.ignore_index, noted) if reads else None
    states = rows_of(hidden)
    return plan, Batch.of_shapes(call, states, weight, bias, flat, known, rows=rows, cast=reads)


def _differentiate_fake(coef, saved, hidden, weight, bias, target, numbers, text) -> list[Tensor]:
    return Call.of(text).needs.empty(hidden, weight, bias)


_forward = Operator(
    "linear_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor numbers, "
    "str call) -> Tensor[]",
    _score,
    _score_fake,
)
_gradient = Operator(
    "linear_logprobs_grad(Tensor coef, Tensor[] saved, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor target, Tensor numbers, str call) -> Tensor[]",
    _differentiate,
    _differentiate_fake,
)


def _save(ctx, inputs, output) -> None:
    *operands, text = inputs
    ctx.call = Call.of(text)
    scores = 1 + len(ctx.call.outputs)
    ctx.save_for_backward(*operands, *output[scores:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grads):
    coef = grads[0]
    if coef is None:
        return None, None, None, None, None, None
    hidden, weight, bias, target, numbers, *saved = ctx.saved_tensors
    found = _gradient(coef, saved, hidden, weight, bias, target, numbers, ctx.call)
    return *ctx.call.needs.spread(found), None, None, None


_forward.differentiable(_save, _backward)
_gradient.first_derivatives_only()
