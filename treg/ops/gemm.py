"""The two products that follow a tile of logit gradients G [n, V]: dhidden = G W and dweight += G^T h.

Plain GEMMs of the vendor's library. What differs is where they round: dweight is added up in float32.
"""

import torch
from torch import Tensor

SLAB = 4096  # vocabulary rows of a CPU product at a time: its result stays in cache until it is added


def widened(dtype: torch.dtype, device: torch.device) -> bool:
    """float16 GEMMs of a CPU are 10-100 times slower than float32 ones: compute in float32."""
    return device.type == "cpu" and dtype == torch.float16


def times_weight(tile: Tensor, weight: Tensor) -> Tensor:
    """tile [n, V] @ weight [V, D] -> [n, D] in tile's dtype, float32 sums."""
    if not widened(tile.dtype, tile.device):
        return tile @ weight
    out = torch.zeros(tile.shape[0], weight.shape[1])
    for a in range(0, weight.shape[0], SLAB):
        out.addmm_(tile[:, a : a + SLAB].float(), weight[a : a + SLAB].float())
    return out.to(tile.dtype)


def add_transposed(acc: Tensor, tile: Tensor, rows: Tensor, *, first: bool) -> None:
    """acc [V, D] += tile [n, V]^T @ rows [n, D], or = where `first`. acc is float32 (float64 for float64 inputs).

    On a GPU the product is added in float32. On a CPU a bfloat16 product is rounded once before it is added.
    """
    beta = 0.0 if first else 1.0  # 0 does not read acc, which may be uninitialised
    if tile.dtype == acc.dtype and not widened(tile.dtype, tile.device):
        torch.addmm(acc, tile.T, rows, beta=beta, out=acc)
    elif tile.is_cuda:
        torch.addmm(acc, tile.T, rows, out_dtype=acc.dtype, beta=beta, out=acc)
    else:
        rows = rows.to(acc.dtype) if widened(tile.dtype, tile.device) else rows
        for a in range(0, acc.shape[0], SLAB):
            part = tile[:, a : a + SLAB].to(rows.dtype).T @ rows
            if first:
                acc[a : a + SLAB] = part
            else:
                acc[a : a + SLAB].add_(part.to(acc.dtype))
