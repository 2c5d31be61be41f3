"""`fused_treg_loss`: the T-REG loss of preference pairs from hidden states, without [N, V] logits.

The coefficient of a token, d L / d lp_t, is known only when its whole pair has been through the
head. A batch whose stash fits into the budget keeps it until the backward; of a larger one the plan
`pair_groups` takes the gradients in the forward, group by group, so that no logits are made twice.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from treg import checks
from treg.losses import LossOptions, treg_loss
from treg.losses.options import pair_table
from treg.losses.pairs import (
    STATS,
    Given,
    TokenInputs,
    check_pairs,
    constant,
    pair_loss,
    row_starts,
    spans_of,
)
from treg.losses.tokens import sequence_of_row
from treg.operators import Operator, values_of
from treg.ops.call import HEAD_NUMBERS, Batch, Call
from treg.ops.head.selection import sees_values
from treg.ops.linear_kl import linear_kl
from treg.ops.linear_logprobs import (
    batch_of,
    fake_scores,
    linear_logprobs,
    plan_of_backward,
    rows_of,
    score,
)
from treg.ops.options import HeadOptions
from treg.ops.plans import choose_plan, fake_note, note_of
from treg.ops.plans.vocab_parallel import VocabShard, local_operands
from treg.results import PairLoss, TRegLoss


def fused_treg_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_rewards: Tensor | None,
    ref_logps: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.1,
    alpha: float | None = None,
    loss_type: str = "dpo",
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    weighting: str = "gradient",
    scalars: Mapping[str, float] | None = None,
    token_weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    pair_values: Mapping[str, Tensor] | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logit_scale: float | None = None,
    ref_softcap: float | str | None = "same",
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    outputs: tuple[str, ...] = (),
    impl: str | None = None,
    memory_budget: int | str | None = None,
    logits_dtype: torch.dtype | None = None,
    shard: VocabShard | None = None,
    filter_eps: float | None = None,
) -> TRegLoss:
    """The T-REG loss of B preference pairs from hidden states, with exact gradients and without [N,
    V] logits.

        L     = base(rho_w, rho_l) + alpha * ( w_w L_reg(y_w) + w_l L_reg(y_l) )
        rho_s = beta * sum_t u_t (lp_t - ref_t)         L_reg(y) = - sum_t beta * rhat_t * lp_t
        w_s   = | d base / d rho_s |, detached          (dpo: both sigmoid(-m), m = rho_w - rho_l)

    so that d L / d lp_t = -beta w (1 + alpha rhat_t) on chosen tokens, +beta w (1 - alpha rhat_t)
    on rejected ones.

    Paper: T-REG, arXiv 2412.02685, Eq. 1-3. The other objectives: `treg.losses.OBJECTIVES`.
    Differs: see `treg.losses.treg_loss`.

    A trainable head takes 3 matrix products a row, a frozen one 2, and a call under no_grad 1. What
    the gradients need of a batch is kept until the backward where memory_budget holds it; else they
    are taken in the forward, some pairs after the other. One product more is needed for float16
    inputs (so that a loss scaler's factor reaches the 16-bit products), and for a pair that does
    not fit into memory_budget where its objective is not -w * (known coefficients), or where the
    budget holds no second float32 [V, D] sum beside other pairs. reduction="none", shard and
    filter_eps take the products of `linear_logprobs`; memory_budget="least" takes 4.

    Args:
        hidden: [2B, T, D], or packed [N, D] with cu_seqlens; see `linear_logprobs`. Chosen
            sequences first.
        weight: [V, D]. target: [2B, T] or [N] int64, aligned with hidden.
        token_rewards: like target, floating; rhat_t. May be None when alpha is 0.
        ref_logps: [2B] summed reference log-probs, or like target per token (needed with
            token_weights, and by loss types that weigh tokens); None for reference-free loss types,
            and where ref_hidden is given.
        cu_seqlens: [2B+1] int32 (or int64) offsets of packed sequences, 0 to N, on hidden's device
            or the CPU. While a CUDA graph is captured it must be on the device; a batch larger than
            memory_budget then takes 4 products.
        beta: > 0, reward scale. alpha: >= 0, weight of the regularizer; None: 0.25, or 0 for loss
            types that are another method of token credit (`docs/methods.md`). gamma: simpo's
            margin, in rewards.
        loss_type: a key of `treg.losses.OBJECTIVES`. label_smoothing: in [0, 0.5). weighting:
            "gradient", or "static" (w = 1).
        token_weights: like target, u_t >= 0. They may require a gradient (learned masks):
            log-probs and loss are then two operators, as for tdpo1, tdpo2 and sparsepo.
        kl_weights: like target, weights of the KL term of those three; None: token_weights.
        pair_values: numbers of each pair by name, [B] each, for loss types that need them (bfpo:
            chosen_safe and rejected_safe).
        ref_hidden, ref_weight, ref_bias, ref_logit_scale, ref_softcap: hidden states of the
            reference, laid out as hidden, and its head, for tdpo1, tdpo2 and sparsepo, whose KL
            divergence runs over the whole vocabulary (see `treg.ops.linear_kl`); the reference's
            log-probs come with it. ref_weight None: weight and bias, as constants.
        scalars: the objective's other options by name, e.g. {"tau": 0.05} for discopop; see
            `treg.losses.LossOptions`.
        reduction: "mean" over pairs, "sum", or "none".
        outputs: statistics of each token, as in `linear_logprobs`; they cost no matrix product, but
            one for loss types with a KL term.
        bias, logit_scale, softcap, temperature, ignore_index, impl, memory_budget, logits_dtype,
            shard, filter_eps: as in `linear_logprobs`.
    Returns:
        TRegLoss; `loss` carries the gradient in hidden, weight and bias, everything else is
        detached.
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
    loss_options = LossOptions(
        loss_type, beta, alpha, gamma, label_smoothing, weighting, scalars or {}
    )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    given = Given(token_rewards, ref_logps, token_weights, kl_weights=kl_weights)
    for name, x in zip(Given._fields, given, strict=True):
        checks.check_tensor(name, x, optional=True)
    with_kl = loss_options.with_kl
    learned = any([x is not None and x.requires_grad for x in (token_weights, kl_weights)])
    at_once = shard is None and not with_kl and not learned  # head and loss in one operator
    known, summed = loss_options if at_once else None, at_once and reduction != "none"
    call = options.call(hidden, weight, target, bias, known, summed=summed)
    count = checks.check_sequences("hidden", hidden, 3, cu_seqlens)
    reference = {
        "hidden": ref_hidden,
        "weight": ref_weight,
        "bias": ref_bias,
        "logit_scale": ref_logit_scale,
        "softcap": None if ref_softcap == "same" else ref_softcap,
    }
    _check_reference(reference, options, loss_options, given)
    pairs = pair_table(loss_options, pair_values, hidden, count // 2)
    if at_once:
        given = given._replace(
            token_rewards=_constant(token_rewards),
            ref_logps=_constant(ref_logps),
            token_weights=_constant(token_weights),
            pair_values=pairs,
        )
        numbers = (*options.numbers(), *loss_options.numbers())
        operands = (hidden, weight, bias, target, *_of_operator(given))
        loss, stats, *scores = _forward(*operands, cu_seqlens, numbers, call)
        found = dict(zip(("logprobs", *call.outputs), scores, strict=False))
        return _result(pair_loss(loss, stats, loss_options), found, reduction)
    _check_early(target, given._replace(pair_values=pairs), cu_seqlens, call, loss_options)
    if with_kl:
        reference["softcap"] = ref_softcap
        found = _score_with_kl(options, hidden, weight, bias, target, reference)
        given = given._replace(kl=found["kl"], ref_logps=found.pop("ref_logprobs"))
    else:
        found = score(options, call, hidden, weight, bias, target)
    tensors: dict[str, Any] = given._asdict() | {"pair_values": pair_values}
    result = treg_loss(
        found["logprobs"],
        options=loss_options,
        cu_seqlens=cu_seqlens,
        mask=target != ignore_index,
        impl=call.impl,
        **tensors,
    )
    return _result(result, found, reduction)


def _check_early(
    target: Tensor,
    given: Given,
    cu_seqlens: Tensor | None,
    call: Call,
    loss_options: LossOptions,
) -> None:
    """What `treg_loss` would refuse once the rows have been through the head."""
    if torch.compiler.is_compiling():
        return
    if loss_options.with_kl:  # they are made
        made = torch.zeros(target.shape, device=target.device)
        given = given._replace(kl=made, ref_logps=made)
    scored = target != call.ignore_index
    check_pairs("target", target, scored, given, cu_seqlens, loss_options)


def _check_reference(
    reference: Mapping[str, Any],
    options: HeadOptions,
    loss_options: LossOptions,
    given: Given,
) -> None:
    """Raise ValueError where the reference's hidden states and the objective do not go together."""
    name = f"loss_type={loss_options.loss_type!r}"
    if not loss_options.with_kl:
        if given.kl_weights is not None:
            raise ValueError(f"kl_weights: expected None for {name}, which has no KL term, got one")
        for argument, x in reference.items():
            if x is not None:
                raise ValueError(
                    f"ref_{argument}: expected None for {name}, which has no KL term, got one"
                )
        return
    if reference["hidden"] is None:
        raise ValueError(
            f"ref_hidden: expected the reference's hidden states for {name}, whose KL divergence "
            "runs over the whole vocabulary, got None"
        )
    if given.ref_logps is not None:
        raise ValueError(
            f"ref_logps: expected None beside ref_hidden, of which {name} makes them, got a tensor"
        )
    for argument in ("shard", "filter_eps", "logits_dtype"):
        if getattr(options, argument) is not None:
            raise ValueError(
                f"{argument}: expected None for {name}, got {getattr(options, argument)!r}"
            )


def _score_with_kl(
    options: HeadOptions,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    reference: Mapping[str, Any],
) -> dict[str, Tensor]:
    """kl, log-probs of both models, and the outputs asked for, like target."""
    ref_hidden, ref_weight, ref_bias, ref_logit_scale, ref_softcap = reference.values()
    if ref_weight is None:
        if ref_bias is not None:
            raise ValueError("ref_bias: expected None where ref_weight is None, got one")
        ref_weight, ref_bias = weight, bias
    common: dict[str, Any] = {
        "logit_scale": options.logit_scale,
        "softcap": options.softcap,
        "temperature": options.temperature,
        "ignore_index": options.ignore_index,
        "impl": options.impl,
        "memory_budget": options.memory_budget,
    }
    kl = linear_kl(
        hidden,
        weight,
        ref_hidden,
        ref_weight,
        target=target,
        bias=bias,
        ref_bias=ref_bias,
        ref_logit_scale=ref_logit_scale,
        ref_softcap=ref_softcap,
        **common,
    )
    found = {"kl": kl.kl, "logprobs": kl.logprobs, "ref_logprobs": kl.ref_logprobs}
    if options.outputs:
        with torch.no_grad():
            statistics = linear_logprobs(
                hidden, weight, target, bias=bias, outputs=options.outputs, **common
            )
        found |= {name: getattr(statistics, name) for name in options.outputs}
    return found


def _constant(x: Tensor | None) -> Tensor | None:
    return None if x is None else constant(x)


def _result(pairs: PairLoss, found: dict[str, Tensor], reduction: str) -> TRegLoss:
    """The pairs' losses reduced, and everything else detached."""
    loss = pairs.loss
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    detached = {name: constant(x) for name, x in found.items()}
    token_logps = detached.pop("logprobs")
    return TRegLoss(loss, *pairs[1:], token_logps, **detached)


# Of `Given`, what the operator takes: the objectives of the others take another way.
OPERANDS = ("token_rewards", "ref_logps", "token_weights", "pair_values")


def _of_operator(given: Given) -> list[Tensor | None]:
    return [getattr(given, name) for name in OPERANDS]


def _score(hidden, weight, bias, target, *others) -> list[Tensor]:
    """loss [B], stats, log-probs and outputs like target; coef where the plan scores first; what
    the plan saved; the note.
    """
    *tensors, cu_seqlens, numbers, text = others
    given = Given(**dict(zip(OPERANDS, tensors, strict=True)))
    call = Call.of(text)
    options = call.loss_options
    if options is None:
        options = LossOptions.of(call.loss, values_of(numbers)[HEAD_NUMBERS:])
    # only values are compared with it
    scored = target != call.ignore_index if checks.values_visible(target) else None
    check_pairs("target", target, scored, given, cu_seqlens, options)
    batch = batch_of(hidden, weight, bias, target, numbers, call)
    plan = choose_plan(call, batch.tiles, batch.hidden.shape[0])
    pairs = TokenInputs(
        target=batch.target,
        given=given.flat(),
        spans=spans_of(target, cu_seqlens),
        ignore_index=call.ignore_index,
    )
    ends = functools.partial(known_ends, target, cu_seqlens)
    scores, saved, outputs = plan.forward_pairs(batch, pairs, options, ends)
    found = [scores[name].view(target.shape) for name in ("logprobs", *call.outputs)]
    note = note_of(plan, batch)
    return [outputs.loss, outputs.stats, *found, outputs.coef, *saved.values(), note]


def _score_fake(hidden, weight, bias, target, *others) -> list[Tensor]:
    *_, cu_seqlens, _, text = others
    call = Call.of(text)
    batch = Batch.of_shapes(call, rows_of(hidden), weight, bias, target.reshape(-1))
    plan = choose_plan(call, batch.tiles, batch.hidden.shape[0])
    sequences = target.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    coef = hidden.new_empty(target.numel(), dtype=batch.tiles.compute)
    loss = coef.new_empty(sequences // 2)
    stats = coef.new_empty(len(STATS), sequences // 2)
    saved = plan.saved(batch)
    return [loss, stats, *fake_scores(batch, target), coef, *saved.values(), fake_note()]


def known_ends(target: Tensor, cu_seqlens: Tensor | None) -> list[int] | None:
    """Offsets of the sequences, [2B+1], as far as the host may look; None where it may not."""
    if cu_seqlens is None:
        sequences, length = target.shape
        return [i * length for i in range(sequences + 1)]
    if not sees_values(cu_seqlens):
        return None
    ends = cu_seqlens.tolist()
    checks.check_ends(ends, "hidden", target.shape[0])
    return ends


def _differentiate(
    upstream, saved, hidden, weight, bias, target, cu_seqlens, numbers, text
) -> list[Tensor]:
    """The gradients that are needed, in the order hidden, weight, bias, of sum_b upstream_b loss_b.

    upstream: [B], all the same where the pairs' losses are summed.
    """
    call = Call.of(text)
    coef, *values, note = saved
    plan, batch = plan_of_backward(call, hidden, weight, bias, target, numbers, note)
    kept = dict(zip(plan.saved_names, values, strict=True))
    if call.summed:
        of_row = upstream[:1]
    else:
        starts = row_starts(target, cu_seqlens)
        of_row = upstream.repeat(2)[sequence_of_row(starts, coef.shape[0])]
    gradients = plan.backward_pairs(batch, of_row, coef, kept)
    return [x for x in gradients.like(hidden, weight, bias) if x is not None]


def _differentiate_fake(
    upstream, saved, hidden, weight, bias, target, cu_seqlens, numbers, text
) -> list[Tensor]:
    return Call.of(text).needs.empty(hidden, weight, bias)


_forward = Operator(
    "treg_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? token_rewards, "
    "Tensor? ref_logps, Tensor? token_weights, Tensor? pair_values, Tensor? cu_seqlens, "
    "Tensor numbers, str call) -> Tensor[]",
    _score,
    _score_fake,
)
_gradient = Operator(
    "treg_loss_grad(Tensor upstream, Tensor[] saved, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor target, Tensor? cu_seqlens, Tensor numbers, str call) -> Tensor[]",
    _differentiate,
    _differentiate_fake,
)


def _save(ctx, inputs, output) -> None:
    hidden, weight, bias, target, _, _, _, _, cu_seqlens, numbers, text = inputs
    ctx.call = Call.of(text)
    scores = 3 + len(ctx.call.outputs)  # loss, stats, log-probs, outputs
    ctx.save_for_backward(hidden, weight, bias, target, cu_seqlens, numbers, *output[scores:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grads):
    upstream = grads[0]
    others = (None,) * 8
    if upstream is None:
        return None, None, None, *others
    hidden, weight, bias, target, cu_seqlens, numbers, *saved = ctx.saved_tensors
    found = _gradient(upstream, saved, hidden, weight, bias, target, cu_seqlens, numbers, ctx.call)
    return *ctx.call.needs.spread(found), *others


_forward.differentiable(_save, _backward)
_gradient.first_derivatives_only()
