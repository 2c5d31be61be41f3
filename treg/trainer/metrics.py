"""What a trainer logs of preference pairs: sums over a batch on the device, means over all
processes when asked for.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from treg.ops import TRegLoss

RATIO = "treg/gradient_ratio"


class PairMetrics:
    """Sums and counts by name, of one process. Nothing waits for the device until `means`."""

    def __init__(self):
        self.sums: dict[str, tuple[Any, Any]] = {}

    def record(
        self,
        result: TRegLoss,
        lengths: np.ndarray,
        rewards: Tensor | None,
        ref_logps: Tensor | None,
        *,
        weighted: bool = False,
        alpha: float = 0.0,
        length_normalised: bool = False,
    ) -> None:
        """Add a batch: lengths [2B] tokens of each sequence, rewards [N], ref_logps [2B] or [N];
        chosen first. weighted: whether tokens have weights, some of which may be 0.

        With alpha > 0, rewards and no weights, treg/gradient_ratio is the norm of the regularizer's
        gradient in the log-probs by that of the objective's. With w_s of the sequence of token t,
        and norm_s its tokens with length_normalised, else 1:

            sqrt( sum_t (alpha * w_s * rhat_t / norm_s)^2 ) / sqrt( sum_t (w_s / norm_s)^2 )

        T-REG, arXiv 2412.02685, Eq. 2; as coded in `treg.losses.treg_loss` for weighting="gradient"
        without a likelihood term.
        """
        rho_w, rho_l = result.chosen_rewards, result.rejected_rewards
        self.add("rewards/chosen", rho_w)
        self.add("rewards/rejected", rho_l)
        self.add("rewards/accuracies", rho_w > rho_l)
        self.add("rewards/margins", rho_w - rho_l)
        self.add("logps/chosen", result.chosen_logps)
        self.add("logps/rejected", result.rejected_logps)
        self.add("treg/reg_loss", result.reg_loss)
        self.add("treg/weight", result.weights)
        if weighted:
            self.add("treg/kept", result.kept, int(lengths.sum()))
            self.add("treg/empty_answers", result.kept == 0)
        if result.kl is not None:
            self.add("kl", result.kl)
        chosen = int(lengths[: len(lengths) // 2].sum())
        if rewards is not None:
            self.add("treg/reward_chosen", rewards[:chosen])
            self.add("treg/reward_rejected", rewards[chosen:])
            if alpha > 0 and not weighted:
                own = _weights_of_tokens(result.weights, lengths, length_normalised)
                self.add(RATIO, (alpha * own * rewards).square(), own.square().sum())
            if ref_logps is not None and ref_logps.shape == result.token_logps.shape:
                ratio = result.token_logps - ref_logps
                counted = (rewards != 0) & (ratio != 0)
                self.add("treg/alignment", counted & ((rewards > 0) == (ratio > 0)), counted.sum())
        if result.entropy is not None:
            self.add("entropy", result.entropy)
        if result.is_top1 is not None:
            self.add("mean_token_accuracy", result.is_top1)
        if result.mean_logit is not None:
            self.add("logits/chosen", result.mean_logit[:chosen])
            self.add("logits/rejected", result.mean_logit[chosen:])

    def add(self, name: str, x: Tensor, count: Tensor | int | None = None) -> None:
        """Add the elements of x, or as many as count says."""
        total, n = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (
            total + x.detach().sum(dtype=torch.float64),
            n + (x.numel() if count is None else count),
        )

    def means(self, accelerator: Any) -> dict[str, float]:
        """Means since the last call, over all processes, which must have added the same names."""
        sums, self.sums = self.sums, {}
        if not sums:
            return {}
        flat = [
            torch.as_tensor(x, dtype=torch.float64, device=accelerator.device)
            for pair in sums.values()
            for x in pair
        ]
        totals = accelerator.reduce(torch.stack(flat), "sum").view(-1, 2).tolist()
        found = {name: total / n for name, (total, n) in zip(sums, totals, strict=True) if n}
        if RATIO in found:  # the sums are those of squares
            found[RATIO] **= 0.5
        return found


def _weights_of_tokens(weights: Tensor, lengths: np.ndarray, length_normalised: bool) -> Tensor:
    """[N] float64: w_s / norm_s of each token's sequence. weights: [B] of pairs, or [2B]."""
    weights = weights.detach().double()
    if len(weights) < len(lengths):
        weights = torch.cat([weights, weights])
    counts = torch.from_numpy(lengths).to(weights.device, non_blocking=True)
    if length_normalised:
        weights = weights / counts
    return weights.repeat_interleave(counts, output_size=int(lengths.sum()))
