"""Sums over the tokens of each sequence, padded [S, T] or packed [N] with cu_seqlens.

Deterministic on every device: no atomics, each sequence is summed in one order.
"""

import torch
from torch import Tensor


def segment_sum(values: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Sum each sequence's values.

    Args:
        values: [S, T] when cu_seqlens is None, else [N]; floating point.
        cu_seqlens: [S+1] integer offsets into N, from 0 to N, on any device.
    Returns:
        [S], values' dtype; differentiable in values.
    """
    if cu_seqlens is None:
        return values.sum(-1)
    lengths = cu_seqlens.diff().to(device=values.device, dtype=torch.int64, non_blocking=True)
    # unsafe=True: the check of the lengths would make a GPU wait
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True)
