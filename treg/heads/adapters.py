"""LoRA on an output projection, as more columns of one: the ops then see a plain head.

    W h + b + sum_a s_a (B_a A_a x_a + c_a)
        = [W, B_1, ...] [h, s_1 A_1 x_1, ...] + (b + sum_a s_a c_a)

The sum runs over the active adapters a. Adapter a has the matrices A_a [r, D] and B_a [V, r], the
factor s_a and perhaps a bias c_a [V]; x_a is h after its dropout.

Nothing is merged into W, whose dtype may not hold the sum: in bfloat16 the update of a young
adapter is below the rounding of W. It costs a copy of the weight with the ranks added, [V, D + r],
and its gradient (of which B's columns are used) at every step.

V vocabulary, D hidden size, r ranks.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def has_adapter(projection: Any) -> bool:
    """Whether PEFT put an adapter on a module, beyond a copy that is trained in its place."""
    peft = sys.modules.get("peft")  # whoever made one of its layers has imported it
    return peft is not None and isinstance(projection, peft.tuners.tuners_utils.BaseTunerLayer)


def read_adapted(projection: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden [..., D + r], weight [V, D + r] and bias [V] of a projection with adapters, as they
    are now.

    Args:
        projection: a layer of PEFT's.
        hidden: [..., D].
    Raises:
        ValueError: an adapter that is not B A x, or merged adapters that are to be disabled.
    """
    base = projection.get_base_layer()
    weight: Tensor = base.weight
    bias: Tensor | None = getattr(base, "bias", None)
    if projection.disable_adapters and projection.merged:
        raise ValueError(
            "adapters: expected unmerged ones to disable, got merged ones; unmerge them first"
        )
    if projection.disable_adapters or projection.merged:
        return hidden, weight, bias

    rows, columns = [hidden], [weight]
    for name in _active_lora(projection):
        down, up = projection.lora_A[name], projection.lora_B[name]
        scaling = projection.scaling[name]
        x = projection.lora_dropout[name](hidden)
        low_rank = scaling * F.linear(x.to(down.weight.dtype), down.weight)
        rows.append(low_rank.to(hidden.dtype))
        columns.append(up.weight.to(weight.dtype))
        if up.bias is not None:
            extra = scaling * up.bias
            bias = extra if bias is None else bias + extra
    return torch.cat(rows, -1), torch.cat(columns, 1), bias


def _active_lora(projection: Any) -> list[str]:
    """The names of the active adapters. ValueError unless each of them is plain LoRA."""
    lora = sys.modules["peft"].tuners.lora
    plain = isinstance(projection, (lora.Linear, lora.layer.ParamWrapper))
    if not plain or projection.fan_in_fan_out:
        raise ValueError(f"adapters: expected LoRA on a linear layer, got {_kind(projection)}")
    # adapters on parameters (target_parameters) nest one wrapper in another
    if has_adapter(projection.base_layer):
        inner = _kind(projection.base_layer)
        raise ValueError(f"adapters: expected LoRA on the weight alone, got nested {inner}")
    active = [name for name in projection.active_adapters if name in projection.lora_A]
    for name in active:
        if name in projection.lora_variant:
            variant = type(projection.lora_variant[name]).__name__
            raise ValueError(f"adapters: expected plain LoRA, got {variant}")
    return active


def _kind(layer: Any) -> str:
    return f"{type(layer).__module__}.{type(layer).__name__}"
