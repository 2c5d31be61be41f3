"""A language-model head and the rows that go through it; what every implementation shares."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from treg.ops.gemm import add_transposed, times_weight, widened

# temporaries of an op, in bytes, unless the caller says otherwise
DEFAULT_BUDGET = {"cpu": 384 << 20}
DEFAULT_BUDGET_GPU = 1 << 30

# rows whose logits cost as much as a pass of the backward over [V, D], which reads the weight and adds to its sums
PASS_ROWS = {"cpu": 32}
PASS_ROWS_GPU = 512


@dataclass(frozen=True)
class Head:
    """z = softcap(logit_scale * (h W^T + b)) / temperature."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100

    @classmethod
    def of(cls, weight, bias, logit_scale, softcap, temperature, ignore_index) -> "Head":
        """From checked arguments; numbers of any kind become floats."""
        cap = None if softcap is None else float(softcap)
        return cls(weight, bias, float(logit_scale), cap, float(temperature), ignore_index)

    @property
    def scale(self) -> float:
        """dz / da at a softcap's slope of 1."""
        return self.logit_scale / self.temperature


def without_autocast(x: Tensor):
    """A context in which products keep the dtypes they are given."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def budget_of(memory_budget: int | None, device: torch.device) -> int:
    return memory_budget or DEFAULT_BUDGET.get(device.type, DEFAULT_BUDGET_GPU)


def pass_rows(device: torch.device) -> int:
    return PASS_ROWS.get(device.type, PASS_ROWS_GPU)


def tile_rows(tiles, budget: int, *, stash: bool, outputs: tuple[str, ...] = (), reserved: int = 0) -> int:
    """Rows of one tile within budget bytes, of which `reserved` are taken; 0 where not one row fits."""
    return max(0, budget - reserved - tiles.fixed_bytes) // tiles.row_bytes(stash=stash, outputs=outputs)


def tile_step(tiles, budget: int, **kwargs) -> int:
    """Rows of each tile of a longer run: what the budget holds (`check_budget`: at least one), as far as it helps."""
    return max(1, min(tiles.max_rows, tile_rows(tiles, budget, **kwargs)))


def check_budget(tiles, budget: int, *, stash: bool, outputs: tuple[str, ...] = ()) -> None:
    """ValueError where the budget does not hold a tile of one row, without a stash and (if needed) with one."""
    sizes = [tiles.row_bytes(stash=False, outputs=outputs)]
    if stash:
        sizes.append(tiles.row_bytes(stash=True, outputs=outputs))
    least = tiles.fixed_bytes + max(sizes)
    if budget < least:
        V = tiles.head.weight.shape[0]
        raise ValueError(f"memory_budget: expected at least {least} bytes (one row at V={V}), got {budget}")


def sees_values(x: Tensor) -> bool:
    """Whether looking at a tensor's values is free. On a GPU it would wait for the device."""
    return not x.is_cuda


def scored_rows(target: Tensor, ignore_index: int) -> Tensor | None:
    """Rows with a target; None for all of them, and where nobody may look."""
    if not sees_values(target):
        return None
    scored = target != ignore_index
    return None if bool(scored.all()) else scored.nonzero().squeeze(1)


def select(hidden: Tensor, target: Tensor, rows: slice | Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Rows of both. Where ignored rows could not be left out, what they hold (NaN even) is replaced by 0."""
    h, y = hidden[rows], target[rows]
    if not sees_values(target):
        h = torch.where((y != ignore_index).unsqueeze(-1), h, 0.0)
    return h, y


def chunks(
    rows: Tensor | None, n: int, step: int, *, start: int = 0, stop: int | None = None
) -> Iterator[slice | Tensor]:
    """Successive selections of at most `step` of n rows, or of the rows listed; from the start-th to the stop-th."""
    stop = stop if stop is not None else n if rows is None else rows.shape[0]
    for i in range(start, stop, max(1, step)):
        piece = slice(i, min(i + step, stop))
        yield piece if rows is None else rows[piece]


def empty_rows(hidden: Tensor, compute: torch.dtype, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Zeros [N] for what `forward` of the tiles gives of each row, by name."""
    return {n: hidden.new_zeros(hidden.shape[0], dtype=torch.bool if n == "is_top1" else compute) for n in names}


class HeadGradients:
    """dhidden, dweight and dbias, added up tile by tile.

    dhidden is kept without its row factors (`row_scale`, [N]), which are multiplied in once, at the end, together with
    the upstream gradient. dweight and dbias are float32 sums unless a single tile makes them at once.
    """

    def __init__(self, hidden: Tensor, head: Head, needs: tuple[bool, bool, bool], *, compute: torch.dtype,
                 complete: bool, single: bool = False):  # fmt: skip
        """complete: every row of hidden will be added (else the others stay 0). single: by one tile."""
        self.head = head
        need_hidden, need_weight, need_bias = needs
        weight, bias = head.weight, head.bias
        make = hidden.new_empty if complete else hidden.new_zeros
        self.dhidden = make(hidden.shape) if need_hidden else None
        self.row_scale = hidden.new_zeros(hidden.shape[0], dtype=compute)
        sums = weight.dtype if single and not widened(weight.dtype, weight.device) else compute
        self.dweight = torch.empty(weight.shape, dtype=sums, device=weight.device) if need_weight else None
        self.dbias = torch.empty_like(bias, dtype=compute) if need_bias else None
        self.empty = True

    def add(self, tile: Tensor, rows: slice | Tensor, hidden: Tensor, scale: Tensor | None = None) -> None:
        """Add a tile G [n, V] of d L / d a = scale[:, None] * G at these rows (scale None: 1)."""
        self.row_scale[rows] = 1.0 if scale is None else scale
        if self.dhidden is not None:
            self.dhidden[rows] = times_weight(tile, self.head.weight)
        if self.dweight is not None:
            scaled = hidden if scale is None else (hidden * scale.unsqueeze(-1)).to(hidden.dtype)
            add_transposed(self.dweight, tile, scaled, first=self.empty)
        if self.dbias is not None:
            ones = self.row_scale[rows].unsqueeze(-1).to(tile.dtype)
            add_transposed(self.dbias.unsqueeze(-1), tile, ones, first=self.empty)
        self.empty = False

    def finish(self) -> None:
        """After the last tile: the sums of no tile are 0."""
        for total in (self.dweight, self.dbias):
            if self.empty and total is not None:
                total.zero_()
