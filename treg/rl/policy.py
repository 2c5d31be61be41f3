"""The loss of a policy from the log-probs of its samples and their advantages.

B sequences, T tokens of the longest, N of all that are packed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from treg import checks
from treg.rl.kl import KL_ESTIMATORS, off_policy_kl
from treg.rl.layout import Layout
from treg.rl.policy_options import REDUCTIONS, PolicyOptions
from treg.rl.surrogates import Tokens, ratio_at

DEFAULT = PolicyOptions()


class PolicyLoss(NamedTuple):
    """What `policy_loss` returns: 0-dimensional tensors, of which only `loss` has a gradient.

    Means are over scored tokens, and over sequences where there is one number a sequence.
    """

    loss: Tensor
    policy_loss: Tensor  # without the entropy bonus, and before accumulation_steps
    ratio: Tensor  # mean importance ratio
    clip_low: Tensor | None = None  # share that is clipped from below; None: nothing ever is
    clip_high: Tensor | None = None  # from above
    kl: Tensor | None = None  # mean estimate of KL(policy || reference) as it enters, nats
    entropy: Tensor | None = None  # mean, nats


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    ratio_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    accumulation_steps: int = 1,
    options: PolicyOptions = DEFAULT,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> PolicyLoss:
    """The loss whose gradient makes samples of high advantage more likely.

        l_t  = surrogate(r, A, lp)_t * ratio_weights_t + beta * kl_t * r_t
        loss = reduction(l) - entropy_coef * mean_t H_t

    r is the importance ratio exp(lp - old) at the level of the options; `LOSS_TYPES` says which
    surrogate and which reduction a loss type is, `SURROGATES` and `REDUCTIONS` say their formulas.
    kl has no factor r without use_bias_correction_kl. With top_entropy_quantile < 1 surrogate and H
    are those of the tokens of highest entropy alone, of these tensors: other processes are not
    asked. The values are TRL's GRPOTrainer's; computed in float64.
    Differs: beyond e^80 a ratio is held, where TRL's overflows to NaN.

    Args:
        logprobs: [B, T], or packed [N], floating, nats, of the sampled tokens under the policy.
        advantages: [B], or one a token like logprobs. A tensor that could be both is one a token.
        old_logprobs: like logprobs, under the policy that the ratio starts from. None: this policy,
            so that each ratio is 1.
        ref_logprobs: like logprobs, under the reference; needed where beta > 0.
        sampling_logprobs: like logprobs, of the engine that sampled, for off_policy_mask_threshold;
            NaN where it gave none. None: old_logprobs.
        entropy: like logprobs, nats; needed by entropy_coef (with its gradient) and by
            top_entropy_quantile.
        ratio_weights: [B] or like logprobs, >= 0: factors of the surrogate that correct for the
            engine that sampled. vespo has them in its sequence ratio instead.
        num_items: > 0, the number of tokens (or sequences) that a reduction over a whole step
            divides by, divided by the number of processes; of a tensor the value is checked on a
            CPU, or under `treg.set_debug(True)`. None: of these tensors.
        accumulation_steps: > 0, of one step: without num_items the loss is divided by it, and the
            entropy bonus in any case.
        mask: [B, T] bool, True where a token is the policy's own and scored. None: all are. What
            stands at other tokens (NaN even) is not read.
        cu_seqlens: [B+1] int32 or int64, where packed sequences begin and end; without mask.
    Raises:
        TypeError: what must be a tensor is none. ValueError: any other bad input, by name.
    """
    return loss_of_rows(
        Rows.of(Layout.of("logprobs", logprobs, mask, cu_seqlens)),
        logprobs,
        {
            "advantages": advantages,
            "old_logprobs": old_logprobs,
            "ref_logprobs": ref_logprobs,
            "sampling_logprobs": sampling_logprobs,
            "entropy": entropy,
            "ratio_weights": ratio_weights,
        },
        options,
        num_items,
        accumulation_steps,
    )


@dataclass(frozen=True, eq=False)
class Rows:
    """The scored tokens of a batch in rows [B, W], see `Layout`, and numbers of sequences."""

    layout: Layout
    scored: Tensor  # [B, W] bool, whether a row holds a token there
    lengths: Tensor  # [B, 1] float64, scored tokens

    @classmethod
    def of(cls, layout: Layout) -> "Rows":
        return cls(layout, layout.there, layout.lengths.unsqueeze(1).double())

    @property
    def shape(self) -> torch.Size:
        """Of the tensors of tokens, [B, T] or [N]."""
        return self.layout.scored.shape

    def read(self, x: Tensor) -> Tensor:
        """[B, W] float64 of one number a token, [B, 1] of one a sequence."""
        if x.shape == self.shape:
            return self.layout.rows(x.double())
        return torch.where(self.lengths > 0, x.double().unsqueeze(1), 0.0)

    def mean(self, x: Tensor, among: Tensor | None = None) -> Tensor:
        """Over scored tokens of x [B, W], or over sequences that have one of x [B, 1]; 0 of none.

        among: [B, W] bool, those of them that count.
        """
        used = self.scored if x.shape == self.scored.shape else self.lengths > 0
        used = used if among is None else used & among
        return torch.where(used, x.double(), 0.0).sum() / used.sum().clamp(min=1)


def loss_of_rows(
    rows: Rows,
    logprobs: Tensor,
    others: dict[str, Tensor | None],
    options: PolicyOptions,
    num_items: float | Tensor | None,
    accumulation_steps: int,
) -> PolicyLoss:
    """`policy_loss` of tensors by name, which are checked here."""
    given = {"logprobs": logprobs, **others}
    _check_given(given, options, num_items, accumulation_steps)
    _check_tensors(given, rows)
    known = {name: rows.read(x) for name, x in given.items() if x is not None}
    x = _tokens(known, rows, options)
    found = options.surrogate(x, options)
    loss, among = found.loss, None
    if options.off_policy_mask_threshold is not None:
        sampled = known.get("sampling_logprobs", known.get("old_logprobs", x.logprobs.detach()))
        drift = off_policy_kl(x.logprobs, sampled).sum(1, keepdim=True)
        near = drift / rows.lengths.clamp(min=1.0) <= options.off_policy_mask_threshold
        loss = torch.where((x.advantages >= 0) | near, loss, 0.0)
    if options.top_entropy_quantile < 1.0:
        among = _of_high_entropy(known["entropy"], rows, options.top_entropy_quantile)
        loss = torch.where(among, loss, 0.0)
    if x.weights is not None and not found.weighted:
        loss = loss * x.weights
    kl = _kl(known, x, options)
    if kl is not None and options.beta != 0.0:
        loss = loss + options.beta * kl
    policy = _reduced(loss, rows, options, num_items)
    total = policy if num_items is not None else policy / accumulation_steps
    entropy = known.get("entropy")
    if entropy is not None and options.entropy_coef != 0.0:
        bonus = options.entropy_coef * rows.mean(entropy, among)
        total = total - bonus / accumulation_steps
    dtype = torch.promote_types(logprobs.dtype, torch.float32)

    def mean(values: Tensor | None) -> Tensor | None:
        return None if values is None else rows.mean(values.detach()).to(dtype)

    return PolicyLoss(
        loss=total.to(dtype),
        policy_loss=policy.detach().to(dtype),
        ratio=rows.mean(x.ratio.detach()).to(dtype),
        clip_low=mean(found.low),
        clip_high=mean(found.high),
        kl=mean(kl),
        entropy=mean(entropy),
    )


def _tokens(known: dict[str, Tensor], rows: Rows, options: PolicyOptions) -> Tokens:
    logprobs = known["logprobs"]
    weights = known.get("ratio_weights")
    log_ratio = logprobs - known.get("old_logprobs", logprobs).detach()
    return Tokens(
        logprobs=logprobs,
        log_ratio=log_ratio,
        ratio=ratio_at(options.importance_sampling_level, log_ratio, logprobs, rows.lengths),
        advantages=known["advantages"].detach(),
        weights=None if weights is None else weights.detach(),
        scored=rows.scored,
    )


def _kl(known: dict[str, Tensor], x: Tokens, options: PolicyOptions) -> Tensor | None:
    """The estimate at each token, [B, T]; None without a reference."""
    if "ref_logprobs" not in known:
        return None
    kl = KL_ESTIMATORS[options.kl_estimator](x.logprobs, known["ref_logprobs"].detach())
    return kl * x.ratio if options.use_bias_correction_kl else kl


def _of_high_entropy(entropy: Tensor, rows: Rows, share: float) -> Tensor:
    """[B, T] bool, the scored tokens whose entropy is among so many of the highest.

    In float32, as TRL does: which tokens are taken depends on how a quantile is rounded.
    """
    if not entropy.numel():
        return rows.scored
    entropy = entropy.detach().float()
    known = torch.where(rows.scored, entropy, torch.nan)
    return (entropy >= torch.nanquantile(known.flatten(), 1.0 - share)) & rows.scored


def _reduced(
    loss: Tensor, rows: Rows, options: PolicyOptions, num_items: float | Tensor | None
) -> Tensor:
    """One number from losses [B, T] or [B, 1]."""
    reduction = REDUCTIONS[options.reduction]
    total = torch.where(rows.scored, loss, 0.0).sum(1, keepdim=True)
    if reduction.own_length:
        total = total / rows.lengths.clamp(min=1.0)
    total = total.sum()
    if reduction.longest:
        total = total / _longest(rows, options)
    if num_items is not None:
        return total / (num_items.double() if isinstance(num_items, Tensor) else num_items)
    if reduction.by == "nothing":
        return total
    if reduction.by == "sequences":
        return total / max(rows.scored.shape[0], 1)
    counted = rows.lengths > 0 if reduction.by == "scored sequences" else rows.scored
    return total / counted.sum().clamp(min=1)


def _longest(rows: Rows, options: PolicyOptions) -> float:
    if options.max_length is not None:
        return options.max_length
    if len(rows.shape) == 1:
        raise ValueError(
            f"max_length: expected a number > 0 for packed tensors and "
            f"reduction={options.reduction!r}, got None; set it in the options"
        )
    return max(rows.shape[1], 1)


def check_options(options: PolicyOptions) -> None:
    if not isinstance(options, PolicyOptions):
        raise TypeError(f"options: expected PolicyOptions, got {type(options).__name__}")


def _check_given(
    given: dict[str, Tensor | None],
    options: PolicyOptions,
    num_items: float | Tensor | None,
    accumulation_steps: int,
) -> None:
    check_options(options)
    checks.check_number("accumulation_steps", accumulation_steps, positive=True)
    if num_items is not None:
        if not options.over_step:
            raise ValueError(
                f"num_items: expected None with reduction={options.reduction!r}, which counts what "
                "is here, got a number; use reduction='items', or leave it out"
            )
        _check_num_items(num_items)
    if options.beta != 0.0 and given["ref_logprobs"] is None:
        raise ValueError(f"ref_logprobs: expected a tensor for beta={options.beta}, got None")
    if not options.needs_entropy:
        return
    entropy = given["entropy"]
    why = f"entropy_coef={options.entropy_coef}"
    if options.entropy_coef == 0.0:
        why = f"top_entropy_quantile={options.top_entropy_quantile}"
    if entropy is None:
        raise ValueError(f"entropy: expected a tensor for {why}, got None")
    trained = given["logprobs"]
    trains = torch.is_grad_enabled() and isinstance(trained, Tensor) and trained.requires_grad
    if options.entropy_coef != 0.0 and trains and not entropy.requires_grad:
        raise ValueError(
            f"entropy: expected one with a gradient for {why}, got a detached one, whose bonus "
            "would change nothing; treg.heads.logprobs.token_logprobs has entropy_gradient=True"
        )


def _check_num_items(num_items: float | Tensor) -> None:
    if not isinstance(num_items, Tensor):
        checks.check_number("num_items", num_items, positive=True)
        return
    if num_items.numel() != 1:
        raise ValueError(f"num_items: expected one number, got {list(num_items.shape)}")
    if checks.values_visible(num_items):
        checks.check_number("num_items", num_items.item(), positive=True)


def _check_tensors(given: dict[str, Tensor | None], rows: Rows) -> None:
    logprobs = given["logprobs"]
    assert logprobs is not None
    for name, x in given.items():
        if name not in ("logprobs", "advantages") and x is None:
            continue
        checks.check_tensor(name, x)
        assert x is not None
        by_sequence = name in ("advantages", "ratio_weights")
        count = len(rows.lengths)
        if x.shape != rows.shape and not (by_sequence and tuple(x.shape) == (count,)):
            or_one = f"[{count}], or " if by_sequence else ""
            raise ValueError(
                f"{name}: expected shape {or_one}{list(rows.shape)} (one per token), "
                f"got {list(x.shape)}"
            )
        checks.check_floating(name, x)
        checks.check_device(name, x, logprobs)
        _check_values(name, x, rows)


def _check_values(name: str, x: Tensor, rows: Rows) -> None:
    if not checks.values_visible(x):
        return
    # a number of a token that is not scored is 0 here, whatever it was
    values = rows.read(x.detach())
    if name == "sampling_logprobs":
        values = values.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    checks.check_finite(name, values)
    if name == "ratio_weights" and bool((values < 0).any()):
        raise ValueError(f"ratio_weights: expected values >= 0, got {values.min().item()}")
