"""A language-model head and the rows that go through it; what every implementation shares."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from treg.ops.gemm import add_transposed, times_weight, widened

Rows = (
    slice | Tensor | tuple[slice, ...]
)  # some of N rows: a range, their numbers, or several ranges

IGNORED, ABSENT = (
    -1,
    -2,
)  # targets of a part of the vocabulary: not scored; scored, and in another part

# temporaries of an op, in bytes, unless the caller says otherwise
DEFAULT_BUDGET = {"cpu": 384 << 20}
DEFAULT_BUDGET_GPU = 1 << 30
# the same for memory_budget="least"
LEAST_BUDGET = {"cpu": 96 << 20}
LEAST_BUDGET_GPU = 192 << 20

# rows whose logits cost as much as a pass of the backward over [V, D], which reads the weight and
# adds to its sums
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
    return (
        torch.autocast(device, enabled=False)
        if torch.is_autocast_enabled(device)
        else contextlib.nullcontext()
    )


def budget_of(memory_budget: int | str | None, device: torch.device) -> int:
    if memory_budget == "least":
        return LEAST_BUDGET.get(device.type, LEAST_BUDGET_GPU)
    return memory_budget or DEFAULT_BUDGET.get(device.type, DEFAULT_BUDGET_GPU)


def pass_rows(device: torch.device) -> int:
    return PASS_ROWS.get(device.type, PASS_ROWS_GPU)


def tile_rows(
    tiles, budget: int, *, stash: bool, outputs: tuple[str, ...] = (), reserved: int = 0
) -> int:
    """Rows of one tile within budget bytes, of which `reserved` are taken; 0 where not one row
    fits.
    """
    return max(0, budget - reserved - tiles.fixed_bytes) // tiles.row_bytes(
        stash=stash, outputs=outputs
    )


def tile_step(tiles, budget: int, **kwargs) -> int:
    """Rows of each tile of a longer run: what the budget holds (`check_budget`: at least one), as
    far as it helps.
    """
    return max(1, min(tiles.max_rows, tile_rows(tiles, budget, **kwargs)))


def check_budget(tiles, budget: int, *, stash: bool, outputs: tuple[str, ...] = ()) -> None:
    """ValueError where the budget does not hold a tile of one row, without a stash and (if needed)
    with one.
    """
    sizes = [tiles.row_bytes(stash=False, outputs=outputs)]
    if stash:
        sizes.append(tiles.row_bytes(stash=True, outputs=outputs))
    least = tiles.fixed_bytes + max(sizes)
    if budget < least:
        V = tiles.head.weight.shape[0]
        raise ValueError(
            f"memory_budget: expected at least {least} bytes (one row at V={V}), got {budget}"
        )


def sees_values(x: Tensor) -> bool:
    """Whether a tensor's values may be looked at: not while a CUDA graph is captured.

    Elsewhere a GPU is waited for, once in the forward and once in the backward: what that costs is
    far less than the products of prompts and padding.
    """
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def scored_rows(target: Tensor, ignore_index: int) -> Tensor | None:
    """Rows with a target; None for all of them, and where nobody may look."""
    if not sees_values(target):
        return None
    scored = target != ignore_index
    return None if bool(scored.all()) else scored.nonzero().squeeze(1)


def check_same_rows(rows: Tensor | None, left_out: Tensor) -> None:
    """RuntimeError where a backward finds other rows than its forward, which noted whether some
    were left out.
    """
    if (rows is not None) != bool(left_out):
        raise RuntimeError(
            "target: expected forward and backward both inside the capture of a CUDA graph, or both outside, got one "
            "of each: ignored tokens are left out outside alone"
        )


def local_target(target: Tensor, start: int, count: int, ignore_index: int) -> Tensor:
    """Targets as a part of the vocabulary numbers them, start..start+count-1: else ABSENT; IGNORED
    where not scored.
    """
    here = (target >= start) & (target < start + count)
    return torch.where(here, target - start, ABSENT).masked_fill_(target == ignore_index, IGNORED)


def part_of(tiles, columns: slice):
    """The same tiles for a part of the vocabulary, whose targets are `local_target`'s."""
    head = tiles.head
    bias = None if head.bias is None else head.bias[columns]
    return type(tiles)(
        replace(head, weight=head.weight[columns], bias=bias, ignore_index=IGNORED),
        tiles.logits_dtype,
    )


def on_device(x: Tensor):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def pieces(rows: Rows, n: int) -> Iterator[tuple[slice, slice | Tensor]]:
    """n rows as parts that index a tensor: where each lies among the n, and which rows it has."""
    if not isinstance(rows, tuple):
        yield slice(0, n), rows
        return
    at = 0
    for r in rows:
        yield slice(at, at := at + r.stop - r.start), r


def chunks(
    rows: Tensor | None, n: int, step: int, *, start: int = 0, stop: int | None = None
) -> Iterator[slice | Tensor]:
    """Successive selections of at most `step` of n rows, or of the rows listed; from the start-th
    to the stop-th.
    """
    stop = stop if stop is not None else n if rows is None else rows.shape[0]
    for i in range(start, stop, max(1, step)):
        piece = slice(i, min(i + step, stop))
        yield piece if rows is None else rows[piece]


def empty_rows(hidden: Tensor, tiles, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Zeros [N] for what `forward` of the tiles gives of each row, by name; "tops" has a number a
    block of columns.
    """
    dtypes = {"is_top1": torch.bool}
    blocks = {"tops": (-(-tiles.head.weight.shape[0] // tiles.top_width),)}
    return {
        n: hidden.new_zeros(hidden.shape[0], *blocks.get(n, ()), dtype=dtypes.get(n, tiles.compute))
        for n in names
    }


class HeadGradients:
    """dhidden, dweight and dbias, added up tile by tile.

    dhidden is kept without its row factors (`row_scale`, [N]), which are multiplied in once, at the
    end, together with the upstream gradient. dweight and dbias are float32 sums unless a single
    tile makes them at once.
    """

    def __init__(
        self,
        hidden: Tensor,
        tiles,
        needs: tuple[bool, bool, bool],
        *,
        complete: bool,
        single: bool = False,
    ):
        """complete: every row of hidden [N, D] will be added (else the others stay 0). single: by
        one tile.
        """
        self.hidden, self.head, self.columns = hidden, tiles.head, tiles.scaled_columns
        need_hidden, need_weight, need_bias = needs
        weight, bias = self.head.weight, self.head.bias
        make = hidden.new_empty if complete else hidden.new_zeros
        self.dhidden = make(hidden.shape) if need_hidden else None
        self.row_scale = hidden.new_zeros(hidden.shape[0], dtype=tiles.compute)
        sums = (
            weight.dtype if single and not widened(weight.dtype, weight.device) else tiles.compute
        )
        self.dweight = (
            torch.empty(weight.shape, dtype=sums, device=weight.device) if need_weight else None
        )
        self.dbias = torch.empty_like(bias, dtype=tiles.compute) if need_bias else None
        self.empty = True

    def add(self, tile: Tensor, rows: Rows, scale: Tensor | None = None) -> None:
        """Add a tile G [n, V] of d L / d a = scale[:, None] * G at these rows (scale None: 1).

        A row whose scale is 0 adds nothing, whatever hidden holds there (NaN even).
        """
        n = tile.shape[0]
        for at, r in pieces(rows, n):
            self.row_scale[r] = 1.0 if scale is None else scale[at]
            if self.dhidden is not None:
                self._add_hidden(tile[at], r)
        if self.dweight is not None:
            for first in range(0, self.hidden.shape[1], self.columns):
                columns = slice(first, first + self.columns)
                add_transposed(
                    self.dweight[:, columns],
                    tile,
                    self._scaled(rows, n, scale, columns),
                    first=self.empty,
                )
        if self.dbias is not None:
            ones = tile.new_ones(n) if scale is None else scale.to(tile.dtype)
            add_transposed(self.dbias.unsqueeze(-1), tile, ones.unsqueeze(-1), first=self.empty)
        self.empty = False

    def apart(self) -> "HeadGradients":
        """New sums of dweight and dbias, whose rows go into the same dhidden."""
        other = copy.copy(self)
        other.dweight = None if self.dweight is None else torch.empty_like(self.dweight)
        other.dbias = None if self.dbias is None else torch.empty_like(self.dbias)
        other.empty = True
        return other

    def finish(self) -> None:
        """After the last tile: the sums of no tile are 0."""
        for total in (self.dweight, self.dbias):
            if self.empty and total is not None:
                total.zero_()

    def _add_hidden(self, tile: Tensor, rows: slice | Tensor) -> None:
        if isinstance(rows, slice):
            times_weight(tile, self.head.weight, self.dhidden[rows])
        else:
            out = self.dhidden.new_empty(tile.shape[0], self.dhidden.shape[1])
            times_weight(tile, self.head.weight, out)
            self.dhidden[rows] = out

    def _scaled(self, rows: Rows, n: int, scale: Tensor | None, columns: slice) -> Tensor:
        """scale[:, None] * hidden[rows, columns] in hidden's dtype, and 0 where scale is."""
        if scale is None and not isinstance(rows, tuple):
            return self.hidden[:, columns][rows]
        hidden = self.hidden[:, columns]
        out = hidden.new_empty(n, hidden.shape[1])
        for at, r in pieces(rows, n):
            if scale is None:
                out[at] = hidden[r]
            else:
                torch.mul(hidden[r], scale[at].unsqueeze(-1), out=out[at])
        if scale is not None and not sees_values(scale):
            out.masked_fill_((scale == 0.0).unsqueeze(-1), 0.0)
        return out
