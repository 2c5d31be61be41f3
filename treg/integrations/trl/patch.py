"""TRL's chunked log-probs by `treg.ops.linear_logprobs`: one function of TRL swapped, nothing
else.
"""

import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

import torch
import trl.trainer.utils
from torch import Tensor

from treg.ops import linear_logprobs

# TRL's names of the statistics -> treg's
STATISTICS = {
    "entropy": "entropy",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
    "log_sum_sq_probs": "log_sum_sq_probs",
}
KERNEL = "_ChunkedLogProbFunction"
ARGUMENTS = [
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
]


def patch_chunked_logprobs(memory_budget: int | None = None) -> Callable[[], None]:
    """Let every TRL trainer of this process compute its chunked log-probs with
    `treg.ops.linear_logprobs`.

    Values and gradients are TRL's within rounding, closer to exact with 16-bit models on a GPU,
    where TRL rounds logits. Heads are read as TRL reads them: for those that it misreads, use
    TRegDPOTrainer.
    Differs: entropy carries no gradient, and asking for it raises (GRPO's entropy_coef); a token
    that ties with the most likely one counts as is_top1.

    Args:
        memory_budget: bytes of temporaries, see `treg.ops.linear_logprobs`.
    Returns:
        A function that puts TRL's own back.
    Raises:
        RuntimeError: this version of TRL has no such function, or one with other arguments.
    """
    installed = importlib.metadata.version("trl")
    original = getattr(trl.trainer.utils, KERNEL, None)
    if isinstance(original, _Chunked):
        original.memory_budget = memory_budget
        return original.undo
    found = [] if original is None else list(inspect.signature(original.forward).parameters)[1:]
    if found != ARGUMENTS:
        raise RuntimeError(
            f"trl {installed}: expected trl.trainer.utils.{KERNEL} with the arguments {', '.join(ARGUMENTS)}, got "
            f"{', '.join(found) or 'none'}; use TRegDPOTrainer, or a version of TRL between 1.15 and 1.16"
        )
    swapped = _Chunked(original, memory_budget)
    setattr(trl.trainer.utils, KERNEL, swapped)
    return swapped.undo


class _Chunked:
    """Stands in for TRL's autograd function."""

    def __init__(self, original: Any, memory_budget: int | None):
        self.original, self.memory_budget = original, memory_budget

    def undo(self) -> None:
        setattr(trl.trainer.utils, KERNEL, self.original)

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ):
        """[N, D], [V, D], [V], [N] -> log-probs, entropy, log_sum_sq_probs, mean_logits, is_top1,
        each [N] or None.
        """
        if hasattr(weight, "ds_shape"):
            raise RuntimeError(
                "patch_chunked_logprobs: expected whole weights, got ZeRO-3's; use TRegDPOTrainer"
            )
        found = linear_logprobs(
            hidden,
            weight.to(hidden.dtype),
            targets,
            bias=bias,
            logit_scale=logit_scale,
            softcap=final_logit_softcapping,
            temperature=temperature,
            memory_budget=self.memory_budget,
            outputs=tuple(STATISTICS[name] for name in outputs if name in STATISTICS),
        )
        logps, entropy = found.logprobs, found.entropy
        if entropy is not None and logps.requires_grad:
            logps, entropy = _WithoutGradient.apply(logps, entropy)
        return logps, entropy, found.log_sum_sq_probs, found.mean_logit, found.is_top1


class _WithoutGradient(torch.autograd.Function):
    """Both as they are; a gradient in the second is refused instead of lost."""

    @staticmethod
    def forward(ctx, logps, entropy):
        ctx.set_materialize_grads(False)
        return logps.view_as(logps), entropy.clone()

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        if grad_entropy is not None:
            fix = "set entropy_coef=0, or undo patch_chunked_logprobs"
            raise NotImplementedError(f"entropy: expected no gradient through it, got one; {fix}")
        return grad, None
