"""What is fixed in a run of an operator and is no tensor, and the rows that one call computes."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from treg.losses import LossOptions
from treg.ops.head import Head, Tiles, make_tiles
from treg.ops.head.gemm import widened
from treg.ops.head.gradients import Needs
from treg.ops.head.selection import RowSelection, scored_rows

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "": None,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Call:
    """Everything of a call that is fixed in a run; an operator takes it as one string.

    The numbers that a schedule may change come beside it: see `HeadOptions.numbers`.
    """

    impl: str  # "torch" or "triton"
    dtype: torch.dtype  # of the matrix products: hidden's, or autocast's
    logits_dtype: torch.dtype | None
    ignore_index: int
    outputs: tuple[str, ...]  # statistics of each token
    needs: Needs
    budget: int  # bytes of temporaries
    least: bool = False  # memory_budget="least"
    filter_eps: float | None = None
    softcapped: bool = False  # whether the head's numbers hold a softcap
    loss: str = ""  # LossOptions.text(), where the rows are pairs whose loss is known
    summed: bool = False  # all pairs' losses get the same upstream gradient
    # The options of that loss where they need not be made again from text and numbers.
    loss_options: LossOptions | None = field(default=None, compare=False)

    def text(self) -> str:
        fields = (
            self.impl,
            NAMES[self.dtype],
            NAMES[self.logits_dtype],
            str(self.ignore_index),
            ",".join(self.outputs),
            "".join("1" if need else "0" for need in self.needs),
            str(self.budget),
            "1" if self.least else "",
            "" if self.filter_eps is None else str(float(self.filter_eps)),
            "1" if self.softcapped else "",
            self.loss,
            "1" if self.summed else "",
        )
        return "|".join(fields)

    @classmethod
    def of(cls, given: "str | Call") -> "Call":
        """From `text`; a call is itself."""
        return _read(given) if isinstance(given, str) else given

    def head(self, weight: Tensor, bias: Tensor | None, numbers: Sequence[float]) -> Head:
        """The head that these tensors and the first of an operator's numbers make."""
        logit_scale, softcap, temperature = numbers[:HEAD_NUMBERS]
        cap = softcap if self.softcapped else None
        return Head(weight, bias, logit_scale, cap, temperature, self.ignore_index)


def loss_of_call(options: LossOptions | None) -> tuple[str, LossOptions | None]:
    """`loss` and `loss_options` of a call; options: None where the loss is not known."""
    if options is None:
        return "", None
    loss = options.text()
    if "|" in loss:
        raise ValueError(f"loss_type: expected a name without '|', got {loss!r}")
    # other kinds of numbers become floats where the operator runs
    floats = all([type(x) is float for x in options.numbers()])
    return loss, options if floats else None


@functools.lru_cache(maxsize=1024)
def _read(text: str) -> Call:
    impl, dtype, logits, ignored, outputs, needs, budget, least, eps, capped, loss, summed = (
        text.split("|")
    )
    return Call(
        impl=impl,
        dtype=DTYPES[dtype],
        logits_dtype=DTYPES[logits],
        ignore_index=int(ignored),
        outputs=tuple(outputs.split(",")) if outputs else (),
        needs=Needs(*(need == "1" for need in needs)),
        budget=int(budget),
        least=bool(least),
        filter_eps=float(eps) if eps else None,
        softcapped=bool(capped),
        loss=loss,
        summed=bool(summed),
    )


HEAD_NUMBERS = 3  # logit_scale, softcap (anything where there is none), temperature


@dataclass(frozen=True)
class Batch:
    """The rows of one call, and the head that they go through.

    N rows, D hidden size, V vocabulary.
    """

    call: Call
    tiles: Tiles
    hidden: Tensor  # [N, D] in call.dtype
    target: Tensor  # [N] int64
    rows: RowSelection  # the rows that are scored
    hidden_dtype: torch.dtype  # of the caller's hidden, and so of its gradient
    weight_dtype: torch.dtype

    @classmethod
    def of(
        cls,
        call: Call,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        numbers: Sequence[float],
    ) -> "Batch":
        """From an operator's arguments."""
        rows = scored_rows(target, call.ignore_index)
        return cls.of_shapes(call, hidden, weight, bias, target, numbers, rows=rows)

    @classmethod
    def of_shapes(
        cls,
        call: Call,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        numbers: Sequence[float] = (1.0, 1.0, 1.0),
        *,
        rows: RowSelection | None = None,
        cast: bool = True,
    ) -> "Batch":
        """The same from shapes alone: no value is looked at, and all rows count as scored.

        rows: those that are scored, where they are known.

        cast: False for a backward that multiplies by neither hidden nor weight, and so needs no
            copy of them in call.dtype.
        """
        hidden_dtype, weight_dtype = hidden.dtype, weight.dtype
        if cast and not hidden_dtype == weight_dtype == call.dtype:
            hidden, weight = hidden.to(call.dtype), weight.to(call.dtype)
        head = call.head(weight, bias, numbers)
        return cls(
            call=call,
            tiles=make_tiles(call.impl, head, call.logits_dtype),
            hidden=hidden,
            target=target,
            rows=RowSelection.all(hidden.shape[0]) if rows is None else rows,
            hidden_dtype=hidden_dtype,
            weight_dtype=weight_dtype,
        )

    @property
    def dweight_dtype(self) -> torch.dtype:
        """Of a dweight that is written at once: the weight's, where a product can have it."""
        possible = self.weight_dtype in (self.call.dtype, torch.float32)
        if possible and not widened(self.call.dtype, self.hidden.device):
            return self.weight_dtype
        return self.tiles.compute

    @property
    def head(self) -> Head:
        return self.tiles.head
