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
    constants: dict  # SOURCE, FLAT, BLOCK_N, BLOCK_V, BLOCK_D, GROUP_N, PRECISION
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
        elif tile.descriptors and at_16_bytes(weight) and at_16_bytes(hidden):
            pair = (descriptor(hidden, tile.n, tile.d), descriptor(weight, tile.v, tile.d))
            operands, source = (*pair, *hidden.stride(), *weight.stride()), "descriptors"
        else:
            operands, source = (hidden, weight, *hidden.stride(), *weight.stride()), "pointers"
        tiles = ceil_div(N, tile.n) * ceil_div(columns, tile.v)
        grid = (configs.programs(tile, tiles),)
        form = {"SOURCE": source, "FLAT": tile.flat and source == "descriptors"}
        yield Slab(first, columns, operands, constants | form, grid, configs.options(tile))


def target_matrix(tile: Tile, slab: Slab, out: torch.Tensor) -> tuple[object, str]:
    """A slab of the columns of out [N, V] as a kernel stores to it, and its STORE constant."""
    here = out
    if slab.columns < out.shape[1]:
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


def tile_of_launch(
    kind: str, hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None
) -> Tile:
    """The tile of one of configs.KINDS for these operands.

    A tile as wide as the copy engine feeds is taken where that can address the weight, and what is
    written, for the pointers to such a tile's elements do not fit into registers. It can always
    address `at_16_byte_rows(hidden)`.
    """
    direct = at_16_bytes(weight) and (out is None or at_16_bytes(out))
    return configs.tile_for(kind, hidden.dtype, hidden.shape[0], *weight.shape, direct)


def at_16_byte_rows(x: torch.Tensor) -> torch.Tensor:
    """x [N, D] itself where all its rows begin at 16 bytes, else a copy of which they do.

    So the copy engine can address hidden states beside any weight, and where a batch starts in a
    longer tensor asks for no kernel of its own. A copy moves 2 N D elements, beside a product of
    2 N D V operations: for V = 128256 and 16 bits less than 1 % of its time. It is in no memory
    budget where D would allow descriptors, and only the tensor begins elsewhere.
    """
    if at_16_bytes(x):
        return x
    columns, each = x.shape[1], 16 // x.element_size()
    rows = x.new_empty(x.shape[0], ceil_div(columns, each) * each)[:, :columns]
    return rows.copy_(x)


def row_stride(x: torch.Tensor) -> int:
    """Elements between two rows of a matrix whose rows are contiguous and apart."""
    assert x.stride(1) == 1 or x.shape[1] == 1
    assert x.stride(0) >= x.shape[1] or x.shape[0] <= 1
    return x.stride(0)


def addressable(x: torch.Tensor) -> bool:
    """Whether the copy engine can address a matrix: rows contiguous and aligned to 16 bytes in
    their storage.
    """
    return _rows_at_16_bytes(x) and x.storage_offset() * x.element_size() % 16 == 0


def at_16_bytes(x: torch.Tensor) -> bool:
    """`addressable`, and storage of whatever origin begins where it must."""
    return _rows_at_16_bytes(x) and x.data_ptr() % 16 == 0


def _rows_at_16_bytes(x: torch.Tensor) -> bool:
    """Whether the rows of a matrix are contiguous, and 16 bytes or a multiple apart."""
    row, column = x.stride()
    return column == 1 and row >= x.shape[1] and row * x.element_size() % 16 == 0


def descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Made on the host, so that no launch needs memory of its own (Triton's allocator differs
    between threads).
    """
    return TensorDescriptor(x, x.shape, x.stride(), [rows, columns])
