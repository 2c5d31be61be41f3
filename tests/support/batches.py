"""Rows of a head as the plans take them."""

import torch

from treg.ops.call import Batch, Call
from treg.ops.head.gradients import Needs
from treg.ops.head.selection import scored_rows


def call_of(**options) -> Call:
    """A call of the torch implementation with these options of `treg.ops.call.Call`."""
    given = {
        "impl": "torch",
        "dtype": torch.float32,
        "logits_dtype": None,
        "ignore_index": -100,
        "outputs": (),
        "budget": 1 << 20,
        "needs": (True, True, True),
    } | options
    given["needs"] = Needs(*given["needs"])
    return Call(**given)


def batch_of_tiles(tiles, hidden, target, *, budget, needs=(False, False, False), **options):
    """A batch of these tiles; options: of `treg.ops.call.Call`."""
    given = {"impl": tiles.impl, "logits_dtype": tiles.logits_dtype} | options
    given["ignore_index"] = tiles.head.ignore_index
    call = call_of(dtype=hidden.dtype, budget=budget, needs=needs, **given)
    rows = scored_rows(target, call.ignore_index)
    return Batch(call, tiles, hidden, target, rows, hidden.dtype, tiles.head.weight.dtype)


def norm_of(lse: torch.Tensor) -> torch.Tensor:
    """[N, 2] of [N]: the rounding error of the second column unknown."""
    return torch.stack([lse, torch.zeros_like(lse)], 1)
