"""LoRA on an output projection, as more columns of one: the ops then see a plain head.

    W h + b + sum_a s_a (B_a A_a x_a + c_a)  =  [W, B_1, ...] [h, s_1 A_1 x_1, ...] + (b + sum_a s_a
    c_a)

x_a is h after the adapter's dropout. Nothing is merged into W, whose dtype may not hold the sum: in
bfloat16 the update of a young adapter is below the rounding of W. It costs a copy of the weight
with the ranks added, [V, D + r], and its gradient (of which B's columns are used) at every step.

V vocabulary, D hidden size, r ranks.
"""

import sys

import torch
from torch import Tensor, nn


def has_adapter(projection: nn.Module) -> bool:
    """Whether PEFT put an adapter on a module, beyond a copy that is trained in its place."""
    peft = sys.modules.get("peft")  # whoever made one of its layers has imported it
    return peft is not None and isinstance(projection, peft.tuners.tuners_utils.BaseTunerLayer)


def read_adapted(projection: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden [..., D + r], weight [V, D + r] and bias [V] of a projection with adapters, as it
    stands.

    Raises:
        ValueError: an adapter that is not B A x.
    """
    peft = sys.modules["peft"]
    base = projection.get_base_layer()
    weight, bias = base.weight, getattr(base, "bias", None)
    if projection.disable_adapters or projection.merged:
        if projection.disable_adapters and projection.merged:
            raise ValueError(
                "adapters: expected unmerged ones to disable, got merged ones; unmerge them first"
            )
        return hidden, weight, bias
    layer, active = projection, None
    while isinstance(
        layer, peft.tuners.tuners_utils.BaseTunerLayer
    ):  # target_parameters nests its wrappers
        kind = f"{type(layer).__module__}.{type(layer).__name__}"
        plain = isinstance(layer, (peft.tuners.lora.Linear, peft.tuners.lora.layer.ParamWrapper))
        if not plain or layer.fan_in_fan_out:
            raise ValueError(f"adapters: expected LoRA on a linear layer, got {kind}")
        if active is not None:
            raise ValueError(f"adapters: expected LoRA on the weight alone, got nested {kind}")
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        layer = layer.base_layer
    columns, rows = [weight], [hidden]
    for name in active or ():
        if name in projection.lora_variant:
            raise ValueError(
                f"adapters: expected plain LoRA, got {type(projection.lora_variant[name]).__name__}"
            )
        down, up, scaling = (
            projection.lora_A[name],
            projection.lora_B[name],
            projection.scaling[name],
        )
        x = projection.lora_dropout[name](hidden)
        rows.append(
            (scaling * nn.functional.linear(x.to(down.weight.dtype), down.weight)).to(hidden.dtype)
        )
        columns.append(up.weight.to(weight.dtype))
        if up.bias is not None:
            extra = scaling * up.bias
            bias = extra if bias is None else bias + extra
    return torch.cat(rows, -1), torch.cat(columns, 1), bias
