"""`fused_policy_loss`: the loss of a policy from its hidden states, without [N, V] logits."""

from torch import Tensor

from treg.ops import linear_logprobs
from treg.ops.entropy import differentiable_entropy
from treg.ops.head import Head
from treg.rl.layout import Layout
from treg.rl.policy import DEFAULT, PolicyLoss, Rows, check_options, loss_of_rows
from treg.rl.policy_options import PolicyOptions

IGNORED = -100  # a target that is not scored


def fused_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    ratio_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    accumulation_steps: int = 1,
    options: PolicyOptions = DEFAULT,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: str | None = None,
    memory_budget: int | str | None = None,
) -> PolicyLoss:
    """`policy_loss` of a language-model head, in bounded memory.

    Log-probs and entropies are those of `treg.ops.linear_logprobs`: 1 matrix product a row forward
    only, 2 with a frozen head, 3 to 4 with a trainable one. With entropy_coef > 0 the exact
    gradient of the entropies takes 3 more.

    Args:
        hidden: [B, T, D], or [N, D] beside cu_seqlens. weight: [V, D].
        target: [B, T] or [N] int64, already aligned: target[i] is the token predicted from
            hidden[i]; -100 where none is scored. It has the place of `policy_loss`'s mask; whatever
            hidden holds there is not read.
        temperature: > 0, at which the samples were drawn; logits are divided by it.
        bias, logit_scale, softcap, impl, memory_budget: as in `linear_logprobs`.
        advantages, old_logprobs, ref_logprobs, sampling_logprobs, ratio_weights, num_items,
            accumulation_steps, options, cu_seqlens: as in `policy_loss`, of the shape of target.
    Raises:
        TypeError: what must be a tensor is none. ValueError: any other bad input, by name.
    """
    rows = Rows.of(Layout.of_targets(target, IGNORED, cu_seqlens))
    check_options(options)
    head = Head(weight, bias, logit_scale, softcap, temperature, IGNORED)
    found = linear_logprobs(
        hidden,
        weight,
        target,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=IGNORED,
        outputs=("entropy",),
        impl=impl,
        memory_budget=memory_budget,
    )
    entropy = found.entropy
    if options.entropy_coef != 0.0 and entropy is not None:
        states, flat = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
        known = entropy.reshape(-1)
        exact = differentiable_entropy(known, states, flat, head, memory_budget=memory_budget)
        entropy = exact.reshape(target.shape)
    others = {
        "advantages": advantages,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "sampling_logprobs": sampling_logprobs,
        "entropy": entropy,
        "ratio_weights": ratio_weights,
    }
    return loss_of_rows(rows, found.logprobs, others, options, num_items, accumulation_steps)
