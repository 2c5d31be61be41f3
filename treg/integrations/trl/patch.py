"""TRL's chunked log-probs by `treg.ops.linear_logprobs`: one function of TRL is swapped."""

import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

import trl.trainer.utils
from torch import Tensor

from treg.ops import linear_logprobs
from treg.ops.entropy import differentiable_entropy
from treg.ops.head import Head

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
    """Let every TRL trainer of this process compute its chunked log-probs by treg.

    Values and gradients (those of log-probs and of entropies, as GRPO's entropy_coef needs them)
    are TRL's within rounding, closer to exact with 16-bit models on a GPU, where TRL rounds logits.
    Heads are read as TRL reads them: for those that it misreads, use TRegDPOTrainer.
    Differs: a token that ties with the most likely one counts as is_top1. Where a loss has a
    gradient in both log-probs and entropies, the logits are computed once more for the second.

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
            f"trl {installed}: expected trl.trainer.utils.{KERNEL} with the arguments "
            f"{', '.join(ARGUMENTS)}, got {', '.join(found) or 'none'}; use TRegDPOTrainer, "
            "or a version of TRL between 1.15 and 1.16"
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
        weight = weight.to(hidden.dtype)
        found = linear_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            logit_scale=logit_scale,
            softcap=final_logit_softcapping,
            temperature=temperature,
            memory_budget=self.memory_budget,
            outputs=tuple(STATISTICS[name] for name in outputs if name in STATISTICS),
        )
        entropy = found.entropy
        if entropy is not None:
            head = Head(weight, bias, logit_scale, final_logit_softcapping, temperature)
            entropy = differentiable_entropy(
                entropy, hidden, targets, head, memory_budget=self.memory_budget
            )
        return found.logprobs, entropy, found.log_sum_sq_probs, found.mean_logit, found.is_top1
