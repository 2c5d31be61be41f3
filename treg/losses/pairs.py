"""The loss of preference pairs and its coefficients, d sum_b loss_b / d lp_t, from flat tensors.

The formulas stand in `treg.losses.treg_loss`, and in `treg_kernels.objective` as they are coded in
Triton. Both implementations compute in float64 and without autograd, so that operators can use
them. Inputs have been checked by the caller.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from treg import checks
from treg.losses.options import LossOptions, check_needs, check_pair_table, check_reference
from treg.losses.segments import segment_sum
from treg.losses.tokens import Tokens
from treg.results import PairLoss

# The rows of `PairOutputs.stats`.
STATS = (
    "chosen_logps",
    "rejected_logps",
    "chosen_rewards",
    "rejected_rewards",
    "reg_loss",
    "chosen_weight",
    "rejected_weight",
    "chosen_slope",
    "rejected_slope",
    "chosen_kept",
    "rejected_kept",
)
# Inputs beside log-probs in which a loss can be asked for its gradient.
OTHER_SLOPES = ("token_weights", "kl", "kl_weights")


class Given(NamedTuple):
    """What a loss takes beside log-probs, of their shape unless said; None for what is not given.

    token_rewards, token_weights: floating (0, and 1). ref_logps: or sums [2B], floating (0). kl:
    floating, nats. kl_weights: floating (token_weights). pair_values: [K, B] float64, see
    `treg.losses.options.pair_table`.
    """

    token_rewards: Tensor | None = None
    ref_logps: Tensor | None = None
    token_weights: Tensor | None = None
    kl: Tensor | None = None
    kl_weights: Tensor | None = None
    pair_values: Tensor | None = None

    def flat(self) -> "Given":
        """The same of flat log-probs, contiguous."""
        *of_tokens, pair_values = self
        flat = [None if x is None else constant(x).reshape(-1).contiguous() for x in of_tokens]
        return Given._make([*flat, pair_values])


def constant(x: Tensor) -> Tensor:
    """x without a gradient; itself where it has none."""
    return x.detach() if x.requires_grad else x


class Even(NamedTuple):
    """Sequences of the same length, one after the other."""

    count: int
    length: int


@dataclass(frozen=True)
class TokenInputs:
    """What a loss takes beside the log-probs of N tokens of 2B sequences, chosen sequences first.
    All tensors are flat and contiguous.

    Args:
        target: [N] integer, scored where it is not ignore_index; or bool, scored where True; None:
            all tokens are scored. Nothing is read of a token that is not scored.
        given: of N tokens.
        spans: which rows each sequence has: `Even`, or the first row of each and N, [2B+1] integer
            on the device of the log-probs; see `spans_of`.
    """

    target: Tensor | None
    given: Given
    spans: Tensor | Even
    ignore_index: int = -100

    @property
    def pairs(self) -> int:
        spans = self.spans
        return (spans.count if isinstance(spans, Even) else spans.shape[0] - 1) // 2

    def scored(self, logps: Tensor) -> Tensor:
        """[N] bool."""
        if self.target is None:
            return torch.ones_like(logps, dtype=torch.bool)
        if self.target.dtype == torch.bool:
            return self.target
        return self.target != self.ignore_index


@dataclass(frozen=True)
class PairOutputs:
    """What `evaluate_pairs` writes."""

    loss: Tensor  # [B]
    stats: Tensor  # [len(STATS), B], of loss' dtype
    coef: Tensor  # [N]
    # d loss / d x_t [N] of those of OTHER_SLOPES that are asked for
    others: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, pairs: int, like: Tensor, others: tuple[str, ...] = ()) -> "PairOutputs":
        """Room for B = pairs, in the dtype of like [N]. loss and stats are not initialised.

        coef is 0: a token that belongs to no pair has no coefficient.
        """
        loss, stats = like.new_empty(pairs), like.new_empty(len(STATS), pairs)
        more = {name: torch.zeros_like(like) for name in others}
        return cls(loss, stats, torch.zeros_like(like), more)


def pair_loss(loss: Tensor, stats: Tensor, options: LossOptions) -> PairLoss:
    """From the fields of `PairOutputs`; w of both sequences where the objective has two."""
    # rows 0 to 4, and three statistics of the chosen sequences, then of the rejected ones
    one, both = stats.shape[1], 2 * stats.shape[1]
    weights = [one, one] if options.objective.margin_only else [both]
    parts = stats.view(-1).split_with_sizes([one] * 5 + [*weights, both, both])
    return PairLoss(loss, *parts[:5], weights=parts[5], kept=parts[-1])


def check_pairs(
    name: str,
    like: Tensor,
    scored: Tensor | None,
    given: Given,
    cu_seqlens: Tensor | None,
    options: LossOptions,
) -> None:
    """Shapes always, and values where they may be looked at.

    Args:
        name: of the argument that tells which tokens are scored, for messages.
        like: [2B, T], or [N] with cu_seqlens. scored: like it, bool, or None: all are.
    """
    count = checks.check_sequences(name, like, 2, cu_seqlens)
    checks.check_pair_inputs(
        like,
        scored,
        given.token_rewards,
        given.ref_logps,
        given.token_weights,
        count,
        options.alpha,
        given.kl,
        given.kl_weights,
    )
    check_needs(options, given)
    check_pair_table(options, given.pair_values)
    ref_logps, weighted = given.ref_logps, given.token_weights is not None
    per_token = ref_logps is not None and ref_logps.shape == like.shape
    check_reference(options, ref_logps, per_token=per_token, weighted=weighted)
    if checks.values_visible(like):
        kept = torch.ones_like(like, dtype=torch.float32) if scored is None else scored.float()
        checks.check_lengths(name, segment_sum(kept, cu_seqlens).tolist())


def evaluate_pairs(
    impl: str,
    logps: Tensor,
    inputs: TokenInputs,
    options: LossOptions,
    outputs: PairOutputs,
    first: int = 0,
    count: int | None = None,
) -> None:
    """Write what belongs to pairs first..first+count-1; nothing else changes.

    Nothing waits for the device.

    Args:
        impl: "triton" takes one launch, where the objective has a Triton form; an objective
            without one is computed in PyTorch, as with "torch".
        logps: [N] floating, nats, contiguous. Those of other pairs need not be there yet.
        count: None: all pairs from first on.
    """
    if count is None:
        count = outputs.loss.shape[0] - first
    if impl == "triton":
        from treg_kernels.bases import BASES

        base = BASES.get(options.loss_type)
        if base is not None and not outputs.others:
            _launch(base, logps, inputs, options, outputs, first, count)
            return
    _evaluate_in_torch(logps, inputs, options, outputs, first, count)


def spans_of(logps: Tensor, cu_seqlens: Tensor | None) -> Tensor | Even:
    """Which rows of logps.reshape(-1) each sequence has; logps: [2B, T] where cu_seqlens is None,
    else [N].
    """
    if cu_seqlens is None:
        return Even(*logps.shape)
    return row_starts(logps, cu_seqlens).contiguous()


def row_starts(logps: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[2B+1] on logps' device: the first row of each sequence of logps.reshape(-1).

    logps: [2B, T] where cu_seqlens is None, else [N].
    """
    if cu_seqlens is not None:
        return cu_seqlens.to(logps.device, non_blocking=True)
    return _even_starts(Even(*logps.shape), logps.device)


def _even_starts(spans: Even, device: torch.device) -> Tensor:
    """[count+1]: the first row of each sequence, and the number of rows."""
    count, length = spans
    if not length:
        return torch.zeros(count + 1, dtype=torch.int64, device=device)
    return torch.arange(0, count * length + 1, length, device=device)


def _launch(
    base: object,
    logps: Tensor,
    inputs: TokenInputs,
    options: LossOptions,
    outputs: PairOutputs,
    first: int,
    count: int,
) -> None:
    from treg_kernels.objective import pair_objective

    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(logps):
        pair_objective(
            logps,
            inputs.target,
            inputs.given.token_rewards,
            inputs.given.ref_logps,
            inputs.given.token_weights,
            inputs.spans.length if isinstance(inputs.spans, Even) else inputs.spans,
            first,
            count,
            outputs.loss,
            outputs.stats,
            outputs.coef,
            base=base,
            beta=options.beta,
            alpha=options.alpha,
            options=tuple(options.declared().values()),
            static=options.weighting == "static",
            length_normalised=options.objective.length_normalised,
            nll=options.objective.nll,
            ignore_index=inputs.ignore_index,
        )


def _tokens(logps: Tensor, inputs: TokenInputs) -> Tokens:
    """Each token in float64."""
    given, scored, starts = inputs.given, inputs.scored(logps), inputs.spans
    if isinstance(starts, Even):
        starts = _even_starts(starts, logps.device)

    def clean(x: Tensor) -> Tensor:
        return torch.where(scored, x.double(), 0.0)

    def clean_or(x: Tensor | None, default: float) -> Tensor:
        return torch.full_like(logps, default, dtype=torch.float64) if x is None else clean(x)

    ref = given.ref_logps
    weights = clean_or(given.token_weights, 1.0)
    return Tokens(
        scored=scored,
        logps=clean(logps),
        ref_logps=clean(ref) if ref is not None and ref.shape == logps.shape else None,
        rewards=clean_or(given.token_rewards, 0.0),
        weights=weights,
        kl=None if given.kl is None else clean(given.kl),
        kl_weights=weights if given.kl_weights is None else clean_or(given.kl_weights, 0.0),
        starts=starts,
    )


@dataclass(frozen=True)
class _Rewards:
    """The implicit rewards, and what the derivative in each input of a token is made of."""

    rho: Tensor  # [2B]
    scale: Tensor  # [2B], beta / norm_s
    weights: Tensor  # [N], u_t, those of the data included
    slopes: dict[str, Tensor]  # [N], d (rho_s / scale_s) / d x_t of OTHER_SLOPES

    @classmethod
    def of(cls, tokens: Tokens, inputs: TokenInputs, options: LossOptions) -> "_Rewards":
        credit = options.credit(tokens)
        weights = own = tokens.weights
        if credit.weights is not None:
            weights = torch.where(tokens.scored, credit.weights, 0.0) * tokens.weights
            own = credit.weights
        scale = torch.full_like(tokens.lengths, options.beta)
        if credit.norm is not None:
            scale = scale / credit.norm
        elif options.objective.length_normalised:
            scale = scale / tokens.lengths
        ratios = tokens.logps
        if tokens.ref_logps is not None:
            ratios = ratios - tokens.ref_logps
        total = tokens.total(weights * ratios)
        ref = inputs.given.ref_logps
        if ref is not None and tokens.ref_logps is None:
            total = total - ref.double()
        slopes = {"token_weights": ratios if credit.weights is None else own * ratios}
        if credit.kl is not None and tokens.kl is not None:
            total = total + tokens.total(credit.kl * tokens.kl_weights * tokens.kl)
            in_kl = credit.kl if credit.kl_slope is None else credit.kl_slope
            slopes["kl"] = in_kl * tokens.kl_weights
            in_weights = credit.kl * tokens.kl
            if inputs.given.kl_weights is None:
                slopes["token_weights"] = slopes["token_weights"] + in_weights
            else:
                slopes["kl_weights"] = in_weights
        return cls(scale * total, scale, weights, slopes)


def _evaluate_in_torch(
    logps: Tensor,
    inputs: TokenInputs,
    options: LossOptions,
    outputs: PairOutputs,
    first: int,
    count: int,
) -> None:
    """The kernel in PyTorch: it computes all pairs, and keeps those that are asked for."""
    objective, alpha = options.objective, options.alpha
    tokens = _tokens(logps, inputs)

    # Of each sequence, [2B].
    sums = tokens.total(tokens.logps)
    found = _Rewards.of(tokens, inputs, options)
    scale = found.scale
    regularizer = -scale * tokens.total(tokens.rewards * tokens.logps)
    rho_w, rho_l = found.rho.chunk(2)
    base = options.base(rho_w, rho_l, _numbers_of_pairs(inputs.given, options))
    slope = torch.cat([base.slope_w, base.slope_l])
    weight = slope.abs()
    if options.weighting == "static":
        weight = torch.ones_like(slope)
    likelihood = torch.zeros_like(sums)  # d nll / d lp_t
    if objective.nll:
        likelihood.chunk(2)[0].copy_(-1 / tokens.lengths.chunk(2)[0])
    kept = tokens.total((tokens.scored & (found.weights != 0)).double())

    # Of each pair, [B].
    loss = base.value
    if alpha:  # an infinite regularizer times 0 would be NaN
        added_w, added_l = (weight * regularizer).chunk(2)
        loss = loss + alpha * (added_w + added_l)
    if objective.nll:
        loss = loss + (likelihood * sums).chunk(2)[0]
    reg_w, reg_l = regularizer.chunk(2)
    stats = [*sums.chunk(2), rho_w, rho_l, reg_w + reg_l]
    stats += [*weight.chunk(2), *slope.chunk(2), *kept.chunk(2)]

    # Of each token, [N].
    of_rho = tokens.spread(scale * slope)
    coef = of_rho * found.weights + tokens.spread(likelihood)
    if alpha:
        coef = coef - tokens.spread(alpha * scale * weight) * tokens.rewards

    pairs, last = loss.shape[0], first + count
    outputs.loss[first:last] = loss[first:last]
    outputs.stats[:, first:last] = torch.stack(stats)[:, first:last]
    pair = tokens.sequence % pairs
    asked = tokens.scored & (pair >= first) & (pair < last)

    def write(out: Tensor, values: Tensor) -> None:
        others = (pair < first) | (pair >= last)
        out.copy_(torch.where(others, out, torch.where(asked, values, 0.0).to(out.dtype)))

    write(outputs.coef, coef)
    for name, out in outputs.others.items():
        write(out, of_rho * found.slopes[name])


def _numbers_of_pairs(given: Given, options: LossOptions) -> dict[str, Tensor]:
    """[B] float64 each, by name."""
    if given.pair_values is None:
        return {}
    names = options.objective.pair_columns
    return dict(zip(names, given.pair_values.unbind(), strict=True))
