"""The options that the ops of a head share, checked once."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from treg import checks
from treg.losses import LossOptions
from treg.ops.call import Call, loss_of_call
from treg.ops.head.gradients import Needs
from treg.ops.head.head import autocast_dtype
from treg.ops.head.memory import budget_of
from treg.ops.plans.vocab_parallel import VocabShard


@dataclass(frozen=True)
class HeadOptions:
    """Everything of a call that is no tensor, as the caller gave it; see `linear_logprobs`."""

    logit_scale: float
    softcap: float | None
    temperature: float
    ignore_index: int
    outputs: tuple[str, ...]
    impl: str | None
    memory_budget: int | str | None
    logits_dtype: torch.dtype | None
    shard: VocabShard | None
    filter_eps: float | None

    def numbers(self) -> tuple[float, float, float]:
        """The numbers of the head as an operator takes them; see `Call.softcapped`."""
        cap = 0.0 if self.softcap is None else self.softcap
        if torch.compiler.is_compiling():  # float() would make a constant of the graph
            return self.logit_scale, cap, self.temperature
        return float(self.logit_scale), float(cap), float(self.temperature)

    def call(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        loss: LossOptions | None = None,
        *,
        summed: bool = False,
    ) -> Call:
        """What is fixed in the call, once every argument is checked.

        loss: of pairs whose loss is known. summed: whether all of them get the same upstream
            gradient.
        Raises:
            TypeError: an argument that must be a tensor is none. ValueError: any other bad input,
                by name.
        """
        checks.check_tensor("hidden", hidden)
        checks.check_tensor("target", target)
        found = self.call_of_rows(hidden, weight, bias, loss, summed)
        check_target(target, hidden)
        return found

    def call_of_rows(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: LossOptions | None = None,
        summed: bool = False,
    ) -> Call:
        """The same where rows have no targets."""
        impl = checks.resolve_impl(self.impl, hidden)
        outputs = checks.check_outputs(self.outputs)
        checks.check_tensor("weight", weight)
        checks.check_tensor("bias", bias, optional=True)
        checks.check_transforms(hidden=hidden, weight=weight, bias=bias)
        cast = autocast_dtype(hidden, weight)
        dtype = hidden.dtype if cast is None else cast
        self._check_dtypes(hidden, impl, dtype)
        if cast is None and weight.dtype != hidden.dtype:
            raise ValueError(
                f"weight: expected {hidden.dtype} (hidden's dtype), got {weight.dtype}; convert "
                "one, or use torch.autocast"
            )
        check_operands(hidden, weight, bias)
        check_numbers(self.logit_scale, self.softcap, self.temperature)
        self._check_choices(hidden, impl, dtype)
        grad = torch.is_grad_enabled()  # within an operator it is always off
        needs = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        text, loss_options = loss_of_call(loss)
        return Call(
            impl=impl,
            dtype=dtype,
            logits_dtype=self.logits_dtype,
            ignore_index=int(self.ignore_index),
            outputs=outputs,
            needs=Needs(*needs),
            budget=budget_of(self.memory_budget, hidden.device),
            least=self.memory_budget == "least",
            filter_eps=self.filter_eps,
            softcapped=self.softcap is not None,
            loss=text,
            summed=summed,
            loss_options=loss_options,
        )

    def _check_dtypes(self, hidden: Tensor, impl: str, dtype: torch.dtype) -> None:
        allowed = checks.HEAD_DTYPES if impl == "triton" else checks.FLOATS
        if dtype not in allowed:
            raise ValueError(
                f"hidden: expected one of {[str(d) for d in allowed]} for impl={impl!r}, got "
                f"{hidden.dtype}"
            )
        if self.logits_dtype is None:
            return
        exact = dtype == torch.float64
        if impl != "torch" or exact or self.logits_dtype not in (torch.float32, dtype):
            raise ValueError(
                "logits_dtype: expected None, torch.float32 or hidden's dtype, with impl='torch' "
                f"and 16-bit or float32 inputs, got {self.logits_dtype!r} with impl={impl!r} and "
                f"{dtype}"
            )

    def _check_choices(self, hidden: Tensor, impl: str, dtype: torch.dtype) -> None:
        ignored = self.ignore_index
        if isinstance(ignored, bool) or not isinstance(ignored, int) or abs(ignored) >= 2**63:
            raise ValueError(f"ignore_index: expected an int of 64 bits, got {ignored!r}")
        checks.check_memory_budget(self.memory_budget)
        if self.filter_eps is None:
            return
        checks.check_number("filter_eps", self.filter_eps, optional=True)
        if self.shard is not None:
            raise ValueError(f"filter_eps: expected None beside a shard, got {self.filter_eps}")
        if not 0.0 <= self.filter_eps < 1.0:
            raise ValueError(
                "filter_eps: expected 0 <= value < 1, a share of the largest coefficient, or "
                f"None, got {self.filter_eps}"
            )


def check_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """ValueError for shapes and devices that no head can have. prefix: of the arguments' names."""
    rows, matrix = f"{prefix}hidden", f"{prefix}weight"
    if hidden.ndim < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"{rows}: expected shape [..., D] with D >= 1, got {list(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[0] < 1:
        raise ValueError(f"{matrix}: expected shape [V, D] with V >= 1, got {list(weight.shape)}")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{matrix}: expected [V, {hidden.shape[-1]}] (D of {rows}), got "
            f"{list(weight.shape)}; is it transposed?"
        )
    checks.check_device(matrix, weight, hidden)
    if bias is not None:
        checks.check_shape(f"{prefix}bias", bias, (weight.shape[0],), "V")
        checks.check_floating(f"{prefix}bias", bias)
        checks.check_device(f"{prefix}bias", bias, hidden)


def check_target(target: Tensor, hidden: Tensor) -> None:
    """ValueError for targets that these rows cannot have; their values aside."""
    if target.dtype != torch.int64:
        raise ValueError(f"target: expected torch.int64, got {target.dtype}; use target.long()")
    checks.check_shape("target", target, hidden.shape[:-1], "hidden's without D")
    checks.check_device("target", target, hidden)


def check_numbers(
    logit_scale: float, softcap: float | None, temperature: float, prefix: str = ""
) -> None:
    """ValueError for numbers of a head that no logits can have. prefix: of scale and softcap.

    A graph that is being traced does not know them: its operator checks them when it runs.
    """
    if torch.compiler.is_compiling():
        return
    checks.check_number(f"{prefix}logit_scale", logit_scale)
    checks.check_number(f"{prefix}softcap", softcap, positive=True, optional=True)
    checks.check_number("temperature", temperature, positive=True)
    if not abs(logit_scale / temperature) < 1e30:
        raise ValueError(
            f"temperature: expected |{prefix}logit_scale / temperature| < 1e30, got "
            f"{logit_scale} / {temperature}; float32 logits would overflow"
        )


def check_targets(target: Tensor, words: float, ignore_index: int) -> None:
    """ValueError for a target outside [0, words), where values may be looked at."""
    if not checks.values_visible(target):
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= words))
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        expected = ">= 0" if words == math.inf else f"in [0, {words})"
        raise ValueError(
            f"target: expected values {expected} or ignore_index={ignore_index}, "
            f"got {target[tuple(at)].item()} at index {at}"
        )
