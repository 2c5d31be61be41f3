"""The two products that follow a tile of logit gradients G [n, V]: dhidden = G W and dweight += G^T h.

Plain GEMMs of the vendor's library. What differs is where they round: dweight is added up in float32.
"""

import torch
from torch import Tensor

SLAB = 1 << 20  # elements of [V, D] that a CPU widens or adds at a time: 4 MiB in float32 stay in cache


def slab_rows(columns: int) -> int:
    return max(1, SLAB // columns)


def widened(dtype: torch.dtype, device: torch.device) -> bool:
    """float16 GEMMs of a CPU are 10-100 times slower than float32 ones: compute in float32."""
    return device.type == "cpu" and dtype == torch.float16


def slab_bytes(D: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Temporaries of the products below: bytes in all, and more per row of a tile."""
    if device.type != "cpu" or dtype.itemsize > 2:
        return 0, 0
    rows = slab_rows(D)
    return rows * D * 12, rows * 8 * widened(dtype, device)


def times_weight(tile: Tensor, weight: Tensor) -> Tensor:
    """tile [n, V] @ weight [V, D] -> [n, D] in tile's dtype, float32 sums."""
    if not widened(tile.dtype, tile.device):
        return tile @ weight
    out = torch.zeros(tile.shape[0], weight.shape[1])
    step = slab_rows(weight.shape[1])
    for a in range(0, weight.shape[0], step):
        out.addmm_(tile[:, a : a + step].float(), weight[a : a + step].float())
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
        step = slab_rows(rows.shape[1])
        for a in range(0, acc.shape[0], step):
            product = tile[:, a : a + step].to(rows.dtype).T @ rows
            if first:
                acc[a : a + step] = product
            else:
                acc[a : a + step].add_(product.to(acc.dtype))
            del product  # before its successor


def scaled_to(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor (a scalar or one number a row), rounded once to dtype; x is [n] or [n, D]."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.device.type != "cpu" or x.dtype == dtype:
        return torch.mul(x, factor, out=out)
    step = slab_rows(max(1, x[:1].numel()))  # a CPU would make a wide copy of all of it
    for a in range(0, x.shape[0], step):
        out[a : a + step] = x[a : a + step] * (factor if factor.ndim == 0 else factor[a : a + step])
    return out
