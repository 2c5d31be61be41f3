"""verl's fused head by treg: log-probs and entropies of labels, without [N, V] logits.

N tokens, V vocabulary, D hidden size.
"""

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from treg.checks import check_number, check_tensor
from treg.integrations.verl.modules import imported, replaced_everywhere, version
from treg.ops import VocabShard, linear_logprobs
from treg.ops.entropy import differentiable_entropy
from treg.ops.head import Head
from treg.ops.head.head import autocast_dtype

KERNEL = "verl.utils.kernel.linear_cross_entropy"
SIGNATURE = ["hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"]
REDUCTIONS = {"none": lambda x: x, "sum": Tensor.sum, "mean": Tensor.mean}


def install_op() -> None:
    """Put `linear_cross_entropy` where verl looks its own up.

    That is in its module, and in those that have imported it.

    Raises:
        ImportError: verl is not installed, or has no such kernel. RuntimeError: a version with
            another signature.
    """
    kernel = imported(KERNEL)
    function = getattr(kernel, "LinearCrossEntropy", None)
    found = list(inspect.signature(function.forward).parameters)[1:] if function else None
    if found != SIGNATURE:
        raise RuntimeError(
            f"verl: expected linear_cross_entropy({', '.join(SIGNATURE)}), as of verl 0.9, "
            f"got {found} in version {version()}"
        )
    original = kernel.linear_cross_entropy
    replaced_everywhere("linear_cross_entropy", original, linear_cross_entropy)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl's fused head by treg: log-probs of labels and entropies, without [N, V] logits.

        z = h W^T / temperature          lp = z[y] - logsumexp_v z[v]
        H = - sum_v p_v log p_v          dH / dz_v = - p_v (log p_v + H)

    Both have exact gradients. The one through H (entropy_coeff) costs three more matrix products a
    row, and nothing where it is 0 throughout. Any D is fine; verl's kernel wants a multiple of 128.

    Args:
        hidden: [N, D], or [..., D] with labels [...].
        weight: [V, D]; with a group, this process' V / size rows.
        labels: int64, already rolled. -100: log-prob and entropy are 0, which verl leaves
            undefined; what hidden holds there has no part in any gradient.
        temperature: > 0. A number or a tensor of one element; or a tensor of the shape of labels,
            or [N], with one for each row. Rows of equal temperature go through the head together:
            few distinct values cost little. None: 1. With a group it is the same in all processes.
        reduction: of the log-probs: "none", "sum" or "mean".
        dist_process_group: over which the vocabulary is split evenly, or None. As in verl, each
            process then gets all log-probs and a share of the gradient of hidden, and the gradient
            is the sum over the group, which Megatron takes with sequence_parallel=True.
    Returns:
        log-probs [N] (or a scalar) and entropies [N], float32, nats; flat, whatever hidden's shape.
    Raises:
        ValueError: another reduction, a temperature of another shape or one that is not finite and
            > 0, and what `treg.ops.linear_logprobs` refuses.
    """
    reduction = "none" if reduction is None else str(reduction).lower()
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected 'none', 'sum' or 'mean', got {reduction!r}")
    groups = _rows_of_temperatures(1.0 if temperature is None else temperature, labels)
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if len(groups) == 1:
        ((number, _),) = groups
        logps, entropy = _scores(hidden, weight, labels, number, dist_process_group)
    else:
        parts = [
            _scores(hidden[rows], weight, labels[rows], number, dist_process_group)
            for number, rows in groups
        ]
        place = torch.cat([rows for _, rows in groups]).argsort()
        logps = torch.cat([part[0] for part in parts])[place]
        entropy = torch.cat([part[1] for part in parts])[place]
    return REDUCTIONS[reduction](logps), entropy


def _rows_of_temperatures(
    temperature: float | Tensor, labels: Tensor
) -> list[tuple[float, Tensor | slice]]:
    """Each distinct temperature in increasing order, with the numbers of its rows."""
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, positive=True)
        return [(float(temperature), slice(None))]
    check_tensor("temperature", temperature)
    if temperature.dtype == torch.bool or temperature.is_complex():
        raise ValueError(
            "temperature: expected a number or a tensor of numbers, got a tensor of "
            f"{temperature.dtype}"
        )
    if temperature.requires_grad:
        raise ValueError(
            "temperature: expected no gradient through it, got a tensor that requires one; "
            "detach it"
        )
    if temperature.numel() == 1:
        return _rows_of_temperatures(temperature.item(), labels)
    if temperature.shape not in (labels.shape, (labels.numel(),)):
        raise ValueError(
            f"temperature: expected a number, or a tensor of shape {list(labels.shape)} (that of "
            f"labels), [{labels.numel()}] or one element, got {list(temperature.shape)}"
        )
    # They are few: which rows have which is found on the host.
    numbers, which = temperature.reshape(-1).double().cpu().unique(return_inverse=True)
    bad = ~(numbers.isfinite() & (numbers > 0))
    if bool(bad.any()):
        raise ValueError(f"temperature: expected finite values > 0, got {numbers[bad][0].item()}")
    if len(numbers) <= 1:  # none where there are no rows
        return [(number, slice(None)) for number in numbers.tolist() or [1.0]]
    return [
        (number, (which == i).nonzero().squeeze(1).to(labels.device))
        for i, number in enumerate(numbers.tolist())
    ]


def _scores(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, group: Any
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] of hidden [N, D], both differentiable; see
    `linear_cross_entropy`.
    """
    rows, shard = hidden, None
    size = 1 if group is None else dist.get_world_size(group)
    if size > 1:
        shard, rows = VocabShard.even(weight, group), hidden.view_as(hidden)
        if rows.requires_grad:
            # The op sums this gradient over the group: each process is to have a share of it.
            rows.register_hook(lambda grad: grad / size)
    dtype = autocast_dtype(hidden, weight) or hidden.dtype
    rounded = hidden.device.type == "cpu" and dtype == torch.bfloat16
    found = linear_logprobs(
        rows,
        weight,
        labels,
        temperature=temperature,
        outputs=("lse", "entropy"),
        shard=shard,
        # Log-probs and entropies of logits that are not rounded to 16 bits.
        logits_dtype=torch.float32 if rounded else None,
    )
    entropy = differentiable_entropy(
        found.entropy,
        hidden,
        labels,
        Head(weight, temperature=temperature),
        lse=None if shard is None else found.lse,
    )
    return found.logprobs, entropy
