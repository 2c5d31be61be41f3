"""The public ops: per-token log-probs of a language-model head, and the T-REG loss, without [N, V]
logits.

N rows, D hidden size, V vocabulary, B pairs, S = 2B sequences (chosen first), T padded length.
"""

import torch
from torch import Tensor

from treg import checks
from treg.losses import LossOptions, check_reference, treg_loss
from treg.losses.segments import segment_sum
from treg.ops.head import Head, budget_of, without_autocast
from treg.ops.logprobs import make_tiles, run_logprobs
from treg.ops.pairs import run_pairs
from treg.ops.vocab_parallel import VocabShard, local_operands, run_vocab_parallel
from treg.results import LinearLogprobs, TRegLoss

__all__ = ["LinearLogprobs", "TRegLoss", "VocabShard", "fused_treg_loss", "linear_logprobs"]


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

        z_t  = softcap * tanh( logit_scale * (h_t W^T + b) / softcap ) / temperature      (softcap optional)
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
            is waited for, once in the forward and once in the backward, to leave them out (while a
            CUDA graph is captured it is not, and they are computed).
        outputs: any of "lse", "entropy", "mean_logit", "is_top1", "log_sum_sq_probs"; see
            `LinearLogprobs`.
        impl: "triton" (a GPU), "torch" (any device), None: "triton" on a GPU. A name never falls
            back.
        memory_budget: bytes of temporaries, whatever N is; a float32 [V, D] sum of dweight,
            [N]-sized rows, with filter_eps [N, V / 128] numbers, and on a GPU copies of a tile's
            rows of hidden where ignored tokens are left out, come on top. With a trainable head, or
                a shard, they are held until the backward: several calls
            before one backward hold as much each. None: 1 GiB on a GPU, 384 MiB on a CPU. "least":
                192 and 96 MiB,
            and dhidden in float32 in place of that sum of dweight: 4 products for a trainable head.
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
    impl = checks.resolve_impl(impl, hidden)
    hidden, weight = _autocast(hidden, weight)
    names = checks.check_outputs(outputs)
    checks.check_head(
        hidden,
        weight,
        target,
        bias,
        logit_scale,
        softcap,
        temperature,
        ignore_index,
        impl,
        memory_budget,
        logits_dtype,
        sharded=shard is not None,
        filter_eps=filter_eps,
    )
    head = Head.of(weight, bias, logit_scale, softcap, temperature, ignore_index)
    budget = budget_of(memory_budget, hidden.device)
    rows, y = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1).contiguous()
    with without_autocast(hidden):
        found = _score(
            impl,
            head,
            logits_dtype,
            rows,
            y,
            names,
            budget,
            shard,
            filter_eps,
            memory_budget == "least",
        )
    return LinearLogprobs(**{name: x.reshape(target.shape) for name, x in found.items()})


def fused_treg_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_rewards: Tensor | None,
    ref_logps: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 0.25,
    loss_type: str = "dpo",
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    weighting: str = "gradient",
    token_weights: Tensor | None = None,
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
            token_weights); None for the reference-free loss types simpo, orpo, cpo.
        cu_seqlens: [2B+1] int32 (or int64) offsets of packed sequences, 0 to N, on hidden's device
            or the CPU. While a CUDA graph is captured it must be on the device; a batch larger than
            memory_budget then takes 4 products.
        beta: > 0, reward scale. alpha: >= 0, weight of the regularizer. gamma: simpo's margin, in
            rewards.
        loss_type: a key of `treg.losses.OBJECTIVES`. label_smoothing: in [0, 0.5). weighting:
            "gradient", or "static" (w = 1). token_weights: like target, u_t >= 0.
        reduction: "mean" over pairs, "sum", or "none".
        outputs: statistics of each token, as in `linear_logprobs`; they cost no matrix product.
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
    impl = checks.resolve_impl(impl, hidden)
    options = LossOptions(loss_type, beta, alpha, gamma, label_smoothing, weighting)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    hidden, weight = _autocast(hidden, weight)
    names = checks.check_outputs(outputs)
    checks.check_head(
        hidden,
        weight,
        target,
        bias,
        logit_scale,
        softcap,
        temperature,
        ignore_index,
        impl,
        memory_budget,
        logits_dtype,
        sharded=shard is not None,
        filter_eps=filter_eps,
    )
    count = checks.check_sequences("hidden", hidden, 3, cu_seqlens)
    scored = target != ignore_index
    checks.check_pair_inputs(target, scored, token_rewards, ref_logps, token_weights, count, alpha)
    token_rewards, ref_logps, token_weights = (
        None if x is None else x.detach() for x in (token_rewards, ref_logps, token_weights)
    )
    per_token = ref_logps is not None and ref_logps.shape == target.shape
    check_reference(options, ref_logps, per_token=per_token, weighted=token_weights is not None)
    if checks.values_visible(target):
        checks.check_lengths("target", segment_sum(scored.float(), cu_seqlens).tolist())

    head = Head.of(weight, bias, logit_scale, softcap, temperature, ignore_index)
    budget = budget_of(memory_budget, hidden.device)
    rows, y = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1).contiguous()
    trained = torch.is_grad_enabled() and (
        weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    least, taken_in_pairs = (
        memory_budget == "least",
        reduction != "none" and weight.dtype != torch.float16,
    )
    with without_autocast(hidden):
        if trained and shard is None and not least and filter_eps is None and taken_in_pairs:
            inputs = (token_rewards, ref_logps, token_weights)
            inputs = (None if x is None else x.reshape(-1).contiguous() for x in inputs)
            loss, result, found = run_pairs(
                impl,
                head,
                logits_dtype,
                rows,
                y,
                *inputs,
                cu_seqlens,
                count,
                options,
                names,
                budget,
            )
        else:
            found = _score(
                impl, head, logits_dtype, rows, y, names, budget, shard, filter_eps, least
            )
            result = treg_loss(
                found["logprobs"].reshape(target.shape),
                token_rewards,
                ref_logps,
                options,
                cu_seqlens=cu_seqlens,
                mask=scored,
                token_weights=token_weights,
                impl=impl,
            )
            loss = result.loss if reduction == "none" else result.loss.sum()
    if reduction == "mean":
        loss = loss / (count // 2)
    token_logps, *statistics = (x.detach().reshape(target.shape) for x in found.values())
    return TRegLoss(loss, *result[1:], token_logps, **dict(zip(names, statistics, strict=True)))


def _score(
    impl: str,
    head: Head,
    logits_dtype: torch.dtype | None,
    rows: Tensor,
    target: Tensor,
    names: tuple[str, ...],
    budget: int,
    shard: VocabShard | None,
    filter_eps: float | None,
    least: bool,
) -> dict[str, Tensor]:
    """Log-probs and statistics of [N, D] rows, under a head that is whole or in parts."""
    if shard is None:
        return run_logprobs(
            impl, head, logits_dtype, rows, target, names, budget, filter_eps, least
        )
    return run_vocab_parallel(
        make_tiles(impl, head, logits_dtype), rows, target, names, budget, shard
    )


def _autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What torch.autocast would do to a linear layer's operands; anything else is left for the
    checks to refuse.
    """
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or not isinstance(weight, Tensor):
        return hidden, weight
    if hidden.dtype not in checks.HEAD_DTYPES or weight.dtype not in checks.HEAD_DTYPES:
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype)
