"""How many rows of a head fit into a number of bytes."""

import torch
from torch import Tensor

from treg.ops.head.head import Tiles

# Temporaries of an op, in bytes, where the caller names no memory_budget.
DEFAULT_BUDGET = {"cpu": 384 << 20}
DEFAULT_BUDGET_GPU = 1 << 30
# The same for memory_budget="least".
LEAST_BUDGET = {"cpu": 96 << 20}
LEAST_BUDGET_GPU = 192 << 20

# What kernels write and the vendor's products read has rows of a multiple of so many elements: 128
# bytes of bfloat16, a line of a GPU's cache.
ROW_MULTIPLE = 64

# Rows whose logits cost as much as a pass of the backward over [V, D], which reads the weight and
# adds to the sum of its gradient.
PASS_ROWS = {"cpu": 32}
PASS_ROWS_GPU = 512


def budget_of(memory_budget: int | str | None, device: torch.device) -> int:
    """The bytes that a caller's memory_budget stands for."""
    if memory_budget == "least":
        return LEAST_BUDGET.get(device.type, LEAST_BUDGET_GPU)
    if memory_budget is None:
        return DEFAULT_BUDGET.get(device.type, DEFAULT_BUDGET_GPU)
    return int(memory_budget)


def pass_rows(device: torch.device) -> int:
    return PASS_ROWS.get(device.type, PASS_ROWS_GPU)


def tile_rows(
    tiles: Tiles,
    budget: int,
    *,
    stash: bool,
    outputs: tuple[str, ...] = (),
    reserved: int = 0,
) -> int:
    """Rows of one tile within budget bytes, of which `reserved` are taken; 0 where none fits."""
    free = max(0, budget - reserved - tiles.fixed_bytes)
    return free // tiles.row_bytes(stash=stash, outputs=outputs)


def tile_step(
    tiles: Tiles,
    budget: int,
    *,
    stash: bool,
    outputs: tuple[str, ...] = (),
    reserved: int = 0,
) -> int:
    """Rows of each tile of a longer run: what the budget holds, as far as it helps; at least 1."""
    rows = tile_rows(tiles, budget, stash=stash, outputs=outputs, reserved=reserved)
    return max(1, min(tiles.max_rows, rows))


def check_budget(tiles: Tiles, budget: int, *, stash: bool, outputs: tuple[str, ...] = ()) -> None:
    """ValueError where the budget does not hold one row, and one with its stash where needed."""
    row = tiles.row_bytes(stash=False, outputs=outputs)
    if stash:
        row = max(row, tiles.row_bytes(stash=True, outputs=outputs))
    least = tiles.fixed_bytes + row
    if budget < least:
        V = tiles.head.weight.shape[0]
        raise ValueError(
            f"memory_budget: expected at least {least} bytes (one row at V={V}), got {budget}"
        )


def row_width(words: int, multiple: int) -> int:
    """Elements between two rows of [n, words] that each begin at a multiple of so many."""
    return -(-words // multiple) * multiple


def stash_rows(like: Tensor, rows: int, words: int, *, dtype: torch.dtype, multiple: int) -> Tensor:
    """Room for a number of each row and word, [rows, words], on like's device, not filled.

    Rows are `row_width` apart, so that a GPU's copy engine and the vendor's products, which read
    16 bytes at a time, can address them whatever the vocabulary is.
    """
    width = row_width(words, multiple)
    room = like.new_empty(rows, width, dtype=dtype)
    return room if width == words else room[:, :words]


def held_bytes(rows: Tensor) -> int:
    """Bytes of rows from `stash_rows`, with what lies between them."""
    return rows.shape[0] * rows.stride(0) * rows.itemsize


def empty_rows(hidden: Tensor, tiles: Tiles, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Zeros for what `Tiles.forward` gives of each of hidden's N rows, by name."""
    rows = hidden.shape[0]
    blocks = -(-tiles.head.weight.shape[0] // tiles.top_width) if "tops" in names else 0
    shapes = {"tops": (rows, blocks), "norm": (rows, 2)}
    found = {}
    for name in names:
        dtype = torch.bool if name == "is_top1" else tiles.compute
        found[name] = hidden.new_zeros(shapes.get(name, (rows,)), dtype=dtype)
    return found
