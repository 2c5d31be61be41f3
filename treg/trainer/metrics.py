"""What a trainer logs of preference pairs: sums over a batch on the device, means over all
processes when asked for.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from treg.results import TRegLoss


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
    ) -> None:
        """Add a batch: lengths [2B] tokens of each sequence, rewards [N], ref_logps [2B] or [N];
        chosen first. weighted: whether tokens have weights, some of which may be 0.
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
        return {name: total / n for name, (total, n) in zip(sums, totals, strict=True) if n}
