"""The scored tokens of a batch side by side.

Everything in `treg.rl` that runs along a sequence sees rows [B, W] that hold scored tokens alone,
from the left: column j is the j-th scored token of a sequence. So a hole of the mask (the result of
a tool, say) is skipped, and padded and packed tensors are the same from here on.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from treg.checks import (
    check_device,
    check_ends,
    check_finite,
    check_floating,
    check_mask,
    check_shape,
    check_tensor,
    values_visible,
)
from treg.rl.steps import Steps, one_to_the_right


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the scored tokens of a tensor are.

    Attributes:
        scored: [B, T], or [N] where sequences are packed, bool.
        place: like scored, int64: the index in flat rows [B, W + 1]. Column W is where tokens that
            are not scored go; it is cut off, and 0 when they come back.
        lengths: [B] int64, scored tokens of each sequence.
        width: W >= 1, no less than any length.
    """

    scored: Tensor
    place: Tensor
    lengths: Tensor
    width: int

    @staticmethod
    def of(name: str, like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> "Layout":
        """The layout of a tensor of tokens.

        Args:
            name: of the argument `like`, for errors.
            like: [B, T], or [N] with cu_seqlens.
            mask: [B, T] bool, or None: every token is scored.
            cu_seqlens: [B + 1] int32 or int64, or None: the tensor is padded.
        Raises:
            TypeError: an argument that must be a tensor is none. ValueError: both mask and
                cu_seqlens; shapes, dtypes, devices or ends of sequences that do not fit.
        """
        check_tensor(name, like)
        check_tensor("mask", mask, optional=True)
        check_tensor("cu_seqlens", cu_seqlens, optional=True)
        if cu_seqlens is not None:
            if mask is not None:
                raise ValueError(
                    "mask: expected None beside cu_seqlens, got both; packed sequences hold scored "
                    "tokens alone: leave the others out, or pass padded tensors with mask"
                )
            return _packed(name, like, cu_seqlens)
        if like.ndim != 2:
            raise ValueError(
                f"{name}: expected [B, T], or [N] with cu_seqlens, got {list(like.shape)} without"
            )
        if mask is None:
            mask = torch.ones_like(like, dtype=torch.bool)
        check_mask(mask, like)
        return _padded(mask)

    @staticmethod
    def where(mask: Tensor | None, cu_seqlens: Tensor | None) -> "Layout":
        """The layout that a mask or cu_seqlens states where there is no tensor of tokens."""
        if mask is None and cu_seqlens is None:
            raise ValueError(
                "mask: expected mask [B, T], or cu_seqlens [B+1], which say what shape the result "
                "has, got neither"
            )
        if cu_seqlens is None or mask is not None:
            check_tensor("mask", mask)
            return Layout.of("mask", mask, mask, cu_seqlens)  # type: ignore[arg-type]
        check_tensor("cu_seqlens", cu_seqlens)
        _check_cu_seqlens(cu_seqlens)
        like = torch.empty(max(int(cu_seqlens[-1]), 0), device=cu_seqlens.device)
        return _packed("tokens", like, cu_seqlens)

    @staticmethod
    def of_targets(target: Tensor, ignored: int, cu_seqlens: Tensor | None) -> "Layout":
        """The layout of targets, [B, T], or [N] with cu_seqlens; those that equal `ignored` are not
        scored.
        """
        check_tensor("target", target)
        scored = target != ignored
        if cu_seqlens is None:
            return Layout.of("target", target, scored if target.ndim == 2 else None, None)
        check_tensor("cu_seqlens", cu_seqlens)
        return _packed("target", target, cu_seqlens, scored)

    @property
    def there(self) -> Tensor:
        """[B, W] bool: whether a row holds a token there."""
        columns = torch.arange(self.width, device=self.lengths.device)
        return columns < self.lengths[:, None]

    def check(self, name: str, x: Tensor) -> None:
        """One number a token, on the same device."""
        check_tensor(name, x)
        check_shape(name, x, self.scored.shape, "one per token")
        check_device(name, x, self.scored)

    def take(self, name: str, x: Tensor) -> Tensor:
        """[B, W] float64: the numbers of the scored tokens, which must be finite; 0 beyond."""
        self.check(name, x)
        check_floating(name, x)
        check_finite(name, x, self.scored)
        return self.rows(x.detach().double())

    def take_sequences(self, name: str, x: Tensor) -> Tensor:
        """[B] float64: a number of each sequence, finite where it has a scored token; else 0."""
        check_tensor(name, x)
        check_shape(name, x, self.lengths.shape, "one per sequence")
        check_device(name, x, self.scored)
        check_floating(name, x)
        check_finite(name, x, self.lengths > 0)
        return torch.where(self.lengths > 0, x.detach().double(), 0.0)

    def rows(self, x: Tensor) -> Tensor:
        """[B, W] in x's dtype: the scored tokens from the left, 0 beyond."""
        flat = x.new_zeros(len(self.lengths) * (self.width + 1))
        flat[self.place] = x  # what is not scored goes to the column that is cut off
        return flat.view(-1, self.width + 1)[:, : self.width]

    def back(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T] or [N]: what rows [B, W] hold at each scored token, 0 at the others."""
        flat = torch.cat([rows, torch.zeros_like(rows[:, :1])], 1).reshape(-1)
        return flat[self.place].to(dtype)

    def steps(self, units: Tensor | None) -> Steps:
        """The steps that units make.

        Args:
            units: like the tokens, int64: the number of each token's unit, from 0, non-decreasing
                in a sequence. A number that no scored token has is no step. None: each token is a
                step of its own.
        """
        there = self.there
        if units is None:
            return Steps(there, there.double(), None)
        self.check("units", units)
        if units.dtype != torch.int64:
            raise ValueError(f"units: expected torch.int64, got {units.dtype}")
        rows = self.rows(units)
        if values_visible(units):
            _check_units(rows, there)
        begins = there & (rows != one_to_the_right(rows))
        begins[:, 0] = there[:, 0]
        index = torch.where(there, begins.cumsum(1) - 1, self.width)
        steps = Steps(there, there.double(), (index, begins))
        tokens = steps.sums(there.double())
        return Steps(tokens > 0, tokens, (index, begins))


def _padded(mask: Tensor) -> Layout:
    count, width = mask.shape[0], max(mask.shape[1], 1)
    column = torch.where(mask, mask.cumsum(1) - 1, width)
    row = torch.arange(count, device=mask.device)[:, None]
    return Layout(mask, row * (width + 1) + column, mask.sum(1), width)


def _packed(name: str, like: Tensor, cu_seqlens: Tensor, scored: Tensor | None = None) -> Layout:
    """scored: [N] bool, or None: all are."""
    if like.ndim != 1:
        raise ValueError(f"{name}: expected [N] beside cu_seqlens, got {list(like.shape)}")
    _check_cu_seqlens(cu_seqlens)
    if cu_seqlens.device.type != "cpu":
        check_device("cu_seqlens", cu_seqlens, like)
    if values_visible(cu_seqlens):
        check_ends(cu_seqlens.tolist(), name, len(like))
    if scored is None:
        scored = torch.ones_like(like, dtype=torch.bool)
    ends = cu_seqlens.long().to(like.device)
    before = F.pad(scored.cumsum(0), (1, 0))  # scored tokens before each place
    width = max(int(ends.diff().max()), 1) if len(ends) > 1 else 1
    row = torch.repeat_interleave(ends.diff(), output_size=len(like))
    column = torch.where(scored, before[:-1] - before[ends[row]], width)
    return Layout(scored, row * (width + 1) + column, before[ends].diff(), width)


def _check_cu_seqlens(cu_seqlens: Tensor) -> None:
    integers = cu_seqlens.dtype in (torch.int32, torch.int64)
    if not integers or cu_seqlens.ndim != 1 or not len(cu_seqlens):
        raise ValueError(
            "cu_seqlens: expected [B+1] int32 or int64, got "
            f"{list(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )


def _check_units(rows: Tensor, there: Tensor) -> None:
    if bool((rows < 0).any()):
        raise ValueError(f"units: expected numbers >= 0, got {int(rows.min())}")
    falls = there[:, 1:] & (rows[:, 1:] < rows[:, :-1])
    if bool(falls.any()):
        s, j = falls.nonzero()[0].tolist()
        raise ValueError(
            "units: expected numbers that do not decrease in a sequence, got "
            f"{int(rows[s, j + 1])} after {int(rows[s, j])} in sequence {s}; make them with "
            "treg.rl.units_from_starts"
        )
