"""A language-model head on tiles of rows: two implementations, memory, selections of rows, sums."""

import functools
from collections.abc import Callable

import torch

from treg.ops.head.head import Head, Tiles
from treg.ops.head.torch_tiles import TorchTiles

__all__ = ["Head", "Tiles", "make_tiles", "part_of"]


def make_tiles(impl: str, head: Head, logits_dtype: torch.dtype | None = None) -> Tiles:
    """The implementation of that name, "torch" or "triton"."""
    return _triton_tiles()(head) if impl == "triton" else TorchTiles(head, logits_dtype)


@functools.cache
def _triton_tiles() -> Callable[[Head], Tiles]:
    """Loaded where it is asked for: Triton need not be installed for the other."""
    from treg.ops.head.triton_tiles import TritonTiles

    return TritonTiles


def part_of(tiles: Tiles, columns: slice) -> Tiles:
    """The same implementation for a part of the vocabulary, whose targets are `local_target`'s."""
    return make_tiles(tiles.impl, tiles.head.part(columns), tiles.logits_dtype)
