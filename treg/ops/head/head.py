"""A language-model head, and what an implementation offers on a tile of its rows."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from treg.checks import HEAD_DTYPES

# Targets as a part of the vocabulary sees them (`local_target`).
IGNORED = -1  # not scored
ABSENT = -2  # scored, and held by another part
NOTHING = contextlib.nullcontext()


@dataclass(frozen=True)
class Head:
    """z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature, or without a softcap
    z = logit_scale * (h W^T + b) / temperature.
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100

    @property
    def scale(self) -> float:
        """dz / da where a softcap's slope is 1, a = h W^T + b."""
        return self.logit_scale / self.temperature

    def part(self, columns: slice) -> "Head":
        """The head of these words alone, for targets from `local_target`."""
        bias = None if self.bias is None else self.bias[columns]
        return replace(self, weight=self.weight[columns], bias=bias, ignore_index=IGNORED)


def local_target(target: Tensor, start: int, count: int, ignore_index: int) -> Tensor:
    """Targets as the words start .. start+count-1 number them; ABSENT where another part has the
    target, IGNORED where the row is not scored.
    """
    here = (target >= start) & (target < start + count)
    local = torch.where(here, target - start, ABSENT)
    return local.masked_fill_(target == ignore_index, IGNORED)


def without_autocast(x: Tensor):
    """A context in which products keep the dtypes that they are given."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return NOTHING


def autocast_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype of products under autocast, as for a linear layer; None where nothing is cast.

    float64 operands are left as they are.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and {hidden.dtype, weight.dtype} <= set(HEAD_DTYPES):
        return torch.get_autocast_dtype(device)
    return None


def on_device(x: Tensor):
    """A context for Triton, which launches on the current device and not on the tensors' one."""
    return torch.cuda.device(x.device) if x.is_cuda else NOTHING


class Tiles(Protocol):
    """A head on a tile of n rows: scores, and gradients of the logits.

    The stash E [n, V] of a row is the unscaled gradient: d lp_t / d a_t = factor_t * E_t. The norm
    of a row, [2], is its lse in this implementation's unit, and the rounding error of that number:
    a common offset of the logits would otherwise cost the probabilities their last digits.
    """

    @property
    def impl(self) -> str:
        """ "torch" or "triton"."""
        ...

    @property
    def head(self) -> Head: ...

    @property
    def logits_dtype(self) -> torch.dtype | None: ...

    @property
    def compute(self) -> torch.dtype:
        """Of log-probs, statistics and sums."""
        ...

    @property
    def stash_dtype(self) -> torch.dtype: ...

    @property
    def row_multiple(self) -> int:
        """Rows of a stash or of a tile begin at multiples of so many elements (`stash_rows`)."""
        ...

    @property
    def norm_per_nat(self) -> float:
        """The unit of norm and of "tops"."""
        ...

    @property
    def max_rows(self) -> int:
        """Rows of a tile beyond which nothing gets faster, or that one launch takes at most."""
        ...

    @property
    def fixed_bytes(self) -> int:
        """Temporaries that do not depend on the rows of a tile."""
        ...

    def row_bytes(self, *, stash: bool, outputs: tuple[str, ...] = ()) -> int:
        """Temporaries of each row of a tile, its stash included."""
        ...

    def column_bytes(self, rows: int) -> int:
        """Temporaries of each word of a tile that has a part of the vocabulary."""
        ...

    @property
    def top_width(self) -> int:
        """Words of which the output "tops" has one number; a multiple of 128."""
        ...

    @property
    def scaled_columns(self) -> int:
        """Columns of hidden of which a scaled copy is made at a time."""
        ...

    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        outputs: tuple[str, ...] = (),
        stash: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Log-probs and statistics of n rows; fills stash [n, V] where there is one.

        Args: hidden [n, D], target [n].
        Returns: "logprobs" [n], "norm" [n, 2], the outputs [n] ("tops" [n, blocks]), and beside a
            stash "factor" [n]; 0 in rows that are not scored.
        """
        ...

    def gradient(
        self, hidden: Tensor, target: Tensor, norm: Tensor, coef: Tensor, out: Tensor
    ) -> None:
        """Fill out [n, V] with d L / d a for coef [n] = d L / d lp and norm [n, 2] from `forward`;
        0 in rows that are not scored, whatever coef and hidden hold there.

        A target that is negative and not ignore_index is in none of these columns: the row is
        -coef * scale * slope * p alone.
        """
        ...

    def scale_rows(
        self,
        hidden: Tensor,
        rows: slice | Tensor | None,
        factors: Sequence[Tensor],
        out: Tensor,
        *,
        clean: bool,
    ) -> Tensor:
        """Fill out [n, D] with scale[:, None] * hidden[rows], rounded to its dtype; returns scale
        [n].

        rows: a range, a list of row numbers, or None for all rows of hidden. factors: scale is the
        product of these, each [n], or [1] for a number of all rows. clean: where the last one is
        0, scale and out are 0, whatever the others and hidden hold.
        """
        ...

    def readable(self, hidden: Tensor) -> Tensor:
        """hidden [n, D] as `forward` and `gradient` read it without a copy of their own: itself, or
        a copy.
        """
        ...

    def release(self) -> None:
        """Free the buffers kept between tiles."""
        ...
