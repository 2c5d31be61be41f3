"""From tensors to launches: how a kernel gets its operands, and the slabs of columns that a launch
covers.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from treg_kernels import configs
from treg_kernels.configs import Tile

# product(rows [n, D], columns [c, D], out [n, c] float32): out = rows columns^T, by the vendor's
# library
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]


class Slab(NamedTuple):
    """Columns first..first+columns-1 of [N, V]: the operands of the kernel that covers them."""

    first: int
    columns: int
    operands: tuple  # hidden, weight, stride_hn, stride_hd, stride_wv, stride_wd
    constants: dict  # SOURCE, BLOCK_N, BLOCK_V, BLOCK_D, GROUP_N, PRECISION
    grid: tuple[int]
    options: dict


def slabs(
    tile: Tile, hidden: torch.Tensor, weight: torch.Tensor, product: Product | None
) -> Iterator[Slab]:
    """All of [N, V] at once, or the vendor's product a slab at a time: each is to be launched
    before the next.
    """
    (N, D), V = hidden.shape, weight.shape[0]
    constants = {
        "BLOCK_N": tile.n, "BLOCK_V": tile.v, "BLOCK_D": tile.d, "PRECISION": "ieee",
        "GROUP_N": configs.shared_tiles(tile, D, hidden.element_size()),
    }  # fmt: skip
    step = tile.slab_columns(N) if tile.vendor else V
    buffer = hidden.new_empty(N * min(step, V), dtype=torch.float32) if tile.vendor else None
    for first in range(0, V, step):
        columns = min(step, V - first)
        if buffer is not None:
            logits = buffer[: N * columns].view(N, columns)
            product(hidden, weight[first : first + columns], logits)
            operands, source = (logits, None, columns, 1, 0, 0), "logits"
        elif (
            tile.descriptors
            and at_16_bytes(weight)
            and at_16_bytes(hidden := contiguous_rows(hidden))
        ):
            pair = (descriptor(hidden, tile.n, tile.d), descriptor(weight, tile.v, tile.d))
            operands, source = (*pair, *hidden.stride(), *weight.stride()), "descriptors"
        else:
            operands, source = (hidden, weight, *hidden.stride(), *weight.stride()), "pointers"
        tiles = ceil_div(N, tile.n) * ceil_div(columns, tile.v)
        grid = (configs.programs(tile, tiles),)
        yield Slab(
            first, columns, operands, constants | {"SOURCE": source}, grid, configs.options(tile)
        )


def target_matrix(tile: Tile, slab: Slab, out: torch.Tensor) -> tuple[object, str]:
    """A slab of the columns of out [N, V] as a kernel stores to it, and its STORE constant."""
    here = out[:, slab.first : slab.first + slab.columns]
    if tile.descriptors and at_16_bytes(here):
        return descriptor(here, tile.n, tile.v), "descriptors"
    return here, "pointers"


def ceil_div(a: int, b: int) -> int:
    """triton.cdiv of numbers of the host, where that takes microseconds."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least that is >= n >= 1; triton.next_power_of_2, in the same way."""
    return 1 << (n - 1).bit_length()


def contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """A matrix that the copy engine can address, if its number of columns allows one: else, or if
    it is one, itself.
    """
    return x if addressable(x) or x.shape[1] * x.element_size() % 16 else x.contiguous()


def addressable(x: torch.Tensor) -> bool:
    """Whether the copy engine can address a matrix: rows contiguous and aligned to 16 bytes in
    their storage.
    """
    size = x.element_size()
    aligned = x.stride(0) * size % 16 == 0 and x.storage_offset() * size % 16 == 0
    return aligned and x.stride(1) == 1 and x.stride(0) >= x.shape[1]


def at_16_bytes(x: torch.Tensor) -> bool:
    """`addressable`, and storage of whatever origin begins where it must."""
    return addressable(x) and x.data_ptr() % 16 == 0


def descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Made on the host, so that no launch needs memory of its own (Triton's allocator differs
    between threads).
    """
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])
