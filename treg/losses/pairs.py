"""The loss of preference pairs and its coefficients, d sum_b loss_b / d lp_t, from flat tensors.

The formulas stand in `treg.losses.treg_loss`, and in `treg_kernels.objective` as they are coded in
Triton. Both implementations compute in float64 and without autograd, so that operators can use
them. Inputs have been checked by the caller.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from treg import checks
from treg.losses.options import LossOptions, check_reference
from treg.losses.segments import segment_sum
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
)


@dataclass(frozen=True)
class TokenInputs:
    """What a loss takes beside the log-probs of N tokens of 2B sequences, chosen sequences first.
    All tensors are flat and contiguous.

    Args:
        target: [N] integer, scored where it is not ignore_index; or bool, scored where True; None:
            all tokens are scored. Nothing is read of a token that is not scored.
        token_rewards, token_weights: [N] floating, or None (0, and 1).
        ref_logps: [N], or sums [2B], floating; None: 0.
        starts: [2B+1] integer on the device of the log-probs; see `row_starts`.
    """

    target: Tensor | None
    token_rewards: Tensor | None
    ref_logps: Tensor | None
    token_weights: Tensor | None
    starts: Tensor
    ignore_index: int = -100

    def reference_per_token(self, logps: Tensor) -> bool:
        """Whether ref_logps has a number for each of these tokens, and not the sequences' sums."""
        return self.ref_logps is not None and self.ref_logps.shape == logps.shape


@dataclass(frozen=True)
class PairOutputs:
    """What `evaluate_pairs` writes."""

    loss: Tensor  # [B]
    stats: Tensor  # [len(STATS), B], of loss' dtype
    coef: Tensor  # [N]

    @classmethod
    def empty(cls, pairs: int, like: Tensor) -> "PairOutputs":
        """Room for B = pairs, in the dtype of like [N]. loss and stats are not initialised.

        coef is 0: a token that belongs to no pair has no coefficient.
        """
        loss = like.new_empty(pairs)
        stats = like.new_empty(len(STATS), pairs)
        return cls(loss, stats, torch.zeros_like(like))


def pair_loss(loss: Tensor, stats: Tensor, options: LossOptions) -> PairLoss:
    """From the fields of `PairOutputs`; w of both sequences where the objective has two."""
    rows = dict(zip(STATS, stats.unbind(), strict=True))
    if options.objective.margin_only:
        weights = rows["chosen_weight"]
    else:
        weights = torch.cat([rows["chosen_weight"], rows["rejected_weight"]])
    return PairLoss(
        loss=loss,
        chosen_logps=rows["chosen_logps"],
        rejected_logps=rows["rejected_logps"],
        chosen_rewards=rows["chosen_rewards"],
        rejected_rewards=rows["rejected_rewards"],
        reg_loss=rows["reg_loss"],
        weights=weights,
    )


def check_pairs(
    name: str,
    like: Tensor,
    scored: Tensor | None,
    token_rewards: Tensor | None,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
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
        like, scored, token_rewards, ref_logps, token_weights, count, options.alpha
    )
    per_token = ref_logps is not None and ref_logps.shape == like.shape
    check_reference(options, ref_logps, per_token=per_token, weighted=token_weights is not None)
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
        if base is not None:
            _launch(base, logps, inputs, options, outputs, first, count)
            return
    _evaluate_in_torch(logps, inputs, options, outputs, first, count)


def row_starts(logps: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[2B+1] on logps' device: the first row of each sequence of logps.reshape(-1).

    logps: [2B, T] where cu_seqlens is None, else [N].
    """
    if cu_seqlens is not None:
        return cu_seqlens.to(logps.device, non_blocking=True)
    sequences, length = logps.shape
    return torch.arange(sequences + 1, device=logps.device) * length


def sequence_of_row(starts: Tensor, rows: int) -> Tensor:
    """The sequence that each of so many rows belongs to, [rows] int64."""
    ends = starts[1:].long()
    return torch.searchsorted(ends, torch.arange(rows, device=starts.device), right=True)


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
            inputs.token_rewards,
            inputs.ref_logps,
            inputs.token_weights,
            inputs.starts,
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


@dataclass(frozen=True)
class _Tokens:
    """Each token in float64, [N]; 0 where it is not scored, whatever stands there."""

    scored: Tensor  # bool
    logps: Tensor
    rewards: Tensor  # rhat_t
    weights: Tensor  # u_t
    ratios: Tensor  # u_t (lp_t - ref_t); u_t lp_t where the reference is a sum or none

    @classmethod
    def of(cls, logps: Tensor, inputs: TokenInputs) -> "_Tokens":
        scored = _scored(logps, inputs)
        per_token = inputs.reference_per_token(logps)

        def clean(x: Tensor) -> Tensor:
            return torch.where(scored, x.double(), 0.0)

        logps = clean(logps)
        rewards, weights = torch.zeros_like(logps), torch.ones_like(logps)
        if inputs.token_rewards is not None:
            rewards = clean(inputs.token_rewards)
        if inputs.token_weights is not None:
            weights = clean(inputs.token_weights)
        ratios = logps
        if inputs.ref_logps is not None and per_token:
            ratios = ratios - clean(inputs.ref_logps)
        return cls(scored, logps, rewards, weights, ratios * weights)


def _scored(logps: Tensor, inputs: TokenInputs) -> Tensor:
    """[N] bool."""
    if inputs.target is None:
        return torch.ones_like(logps, dtype=torch.bool)
    if inputs.target.dtype == torch.bool:
        return inputs.target
    return inputs.target != inputs.ignore_index


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
    tokens = _Tokens.of(logps, inputs)

    def total(x: Tensor) -> Tensor:
        return segment_sum(x, inputs.starts)

    # Of each sequence, [2B].
    lengths = total(tokens.scored.double())
    sums = total(tokens.logps)
    scale = torch.full_like(lengths, options.beta)
    if objective.length_normalised:
        scale = scale / lengths
    rho = total(tokens.ratios)
    if inputs.ref_logps is not None and not inputs.reference_per_token(logps):
        rho = rho - inputs.ref_logps.double()
    rho = scale * rho
    regularizer = -scale * total(tokens.rewards * tokens.logps)
    base = options.base(*rho.chunk(2))
    slope = torch.cat([base.slope_w, base.slope_l])
    weight = slope.abs()
    if options.weighting == "static":
        weight = torch.ones_like(slope)
    likelihood = torch.zeros_like(lengths)  # d nll / d lp_t
    if objective.nll:
        likelihood.chunk(2)[0].copy_(-1 / lengths.chunk(2)[0])

    # Of each pair, [B].
    loss = base.value
    if alpha:  # an infinite regularizer times 0 would be NaN
        added_w, added_l = (weight * regularizer).chunk(2)
        loss = loss + alpha * (added_w + added_l)
    if objective.nll:
        loss = loss + (likelihood * sums).chunk(2)[0]
    reg_w, reg_l = regularizer.chunk(2)
    stats = [*sums.chunk(2), *rho.chunk(2), reg_w + reg_l, *weight.chunk(2), *slope.chunk(2)]

    # Of each token, [N].
    sequence = sequence_of_row(inputs.starts, tokens.logps.shape[0])
    coef = (scale * slope)[sequence] * tokens.weights + likelihood[sequence]
    if alpha:
        coef = coef - (alpha * scale * weight)[sequence] * tokens.rewards
    coef = torch.where(tokens.scored, coef, 0.0).to(outputs.coef.dtype)

    pairs, last = loss.shape[0], first + count
    outputs.loss[first:last] = loss[first:last]
    outputs.stats[:, first:last] = torch.stack(stats)[:, first:last]
    pair = sequence % pairs
    asked = (pair >= first) & (pair < last)
    outputs.coef.copy_(torch.where(asked, coef, outputs.coef))
