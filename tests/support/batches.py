"""Rows of a head as the plans take them."""

import torch

from treg.ops.call import Batch, Call
from treg.ops.head.gradients import Needs
from treg.ops.head.selection import scored_rows


def batch_of_tiles(tiles, hidden, target, *, budget, needs=(False, False, False), **options):
    """A batch of these tiles; options: of `treg.ops.call.Call`."""
    call = Call(
        impl=tiles.impl,
        dtype=hidden.dtype,
        logits_dtype=tiles.logits_dtype,
        ignore_index=tiles.head.ignore_index,
        outputs=(),
        needs=Needs(*needs),
        budget=budget,
        **options,
    )
    rows = scored_rows(target, call.ignore_index)
    return Batch(call, tiles, hidden, target, rows, hidden.dtype, tiles.head.weight.dtype)


def norm_of(lse: torch.Tensor) -> torch.Tensor:
    """[N, 2] of [N]: the rounding error of the second column unknown."""
    return torch.stack([lse, torch.zeros_like(lse)], 1)
