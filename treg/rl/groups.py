"""Sums and means over groups of sequences: the answers to one prompt, or all of a batch."""

import torch
from torch import Tensor

from treg.checks import check_device, check_tensor
from treg.rl.steps import row_sums


def totals(x: Tensor, group: Tensor) -> Tensor:
    """[B] -> [B]: the sum over one's group."""
    return torch.zeros_like(x).index_add_(0, group, x)[group]


def means(x: Tensor, weights: Tensor, group: Tensor) -> Tensor:
    """[B, W] -> [B]: the weighted mean over one's group; equal numbers have exactly that mean."""
    counted = weights > 0
    lows = torch.where(counted, x, torch.inf).amin(1)
    low = torch.full_like(lows, torch.inf).scatter_reduce_(0, group, lows, "amin")[group]
    low = torch.where(low.isfinite(), low, 0.0)
    above = row_sums(torch.where(counted, weights * (x - low[:, None]), 0.0))
    return low + totals(above, group) / totals(row_sums(weights), group).clamp(min=1)


def group_numbers(groups: Tensor | int, lengths: Tensor) -> Tensor:
    """[B] int64: of each sequence the number of its group, less than B."""
    count = len(lengths)
    if isinstance(groups, int):
        if isinstance(groups, bool) or groups < 1 or count % groups:
            raise ValueError(
                f"groups: expected a number of sequences >= 1 that divides the {count} of the "
                f"batch, or [B] int64, got {groups}"
            )
        return torch.arange(count, device=lengths.device) // groups
    check_tensor("groups", groups)
    if groups.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"groups: expected [B] int64, or a whole number, got {groups.dtype}")
    if tuple(groups.shape) != (count,):
        raise ValueError(
            f"groups: expected [{count}], one number per sequence, got {list(groups.shape)}"
        )
    check_device("groups", groups, lengths)
    return groups.unique(return_inverse=True)[1]
