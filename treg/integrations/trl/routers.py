"""The load-balancing loss of a mixture of experts, beside a head that is treg's."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from treg.heads import HeadSpec, SharedRows


@contextlib.contextmanager
def router_logits(spec: HeadSpec, wanted: bool) -> Iterator[list]:
    """What the backbone returns as router_logits meanwhile."""
    found: list = []
    if not wanted:
        yield found
        return
    hook = spec.backbone.register_forward_hook(
        lambda module, args, output: found.append(getattr(output, "router_logits", None))
    )
    try:
        yield found
    finally:
        hook.remove()


def balance(
    spec: HeadSpec,
    router_logits: Any,
    attention_mask: Tensor | None,
    shared: SharedRows | None = None,
) -> Tensor:
    """The load-balancing loss of a mixture of experts, as its own forward computes it.

    router_logits: [tokens, experts] of each layer; with shared of the rows that sequences share,
        and what they share counts for each of them nevertheless.
    """
    config = spec.model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if router_logits is None or experts is None:
        raise ValueError(
            f"router_aux_loss_coef: expected 0 for {type(spec.model).__name__}, which returns no "
            "router_logits that a balancing loss can be made of"
        )
    if shared is not None:
        places = shared.places.flatten()
        router_logits = tuple(
            x.reshape(-1, x.shape[-1])[places.to(x.device)] for x in router_logits
        )
    return load_balancing_loss_func(
        router_logits, experts, config.num_experts_per_tok, attention_mask
    )
