"""Whether the model that trains is the one that a server had when it annotated.

Nothing of a server's weights is known but what it said of a short text: its log-probs, which the
file keeps. The model that trains gives its own of the same token ids.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)

# Mean absolute difference of the log-probs, in nats, up to which two models may be one. Those of
# SmolLM2-135M in float32 differ from bfloat16's by 0.05, from those with 8 bits a weight by 0.05,
# with 5 bits by 0.5, and after 20 steps of training at 1e-5 by 0.09
# (benchmarks/probe_distances.py).
SAME_MODEL = 0.1


def distance(first: Sequence[float], second: Sequence[float]) -> float:
    """The mean absolute difference of log-probs, in nats; infinite where they are not as many."""
    if len(first) != len(second) or not first:
        return float("inf")
    return sum(abs(a - b) for a, b in zip(first, second, strict=True)) / len(first)


def check_served(
    path: str, served: Mapping[str, Any], reference: Any, *, adapters: bool, fix: str
) -> None:
    """ValueError where a server's model, which annotated a file, is not the reference of training.

    A warning where this cannot be found out: a file without the log-probs, or a model that cannot
    be run yet.

    Args:
        served: what the file says of the server. adapters: whether those on the reference count.
        fix: how to train all the same.
    """
    probe = served.get("probe") or {}
    said = f"{path} was annotated by the model {served.get('model')!r} of a server"
    try:
        found = _logprobs(reference, probe["ids"], adapters=adapters)
    except Exception as error:  # whatever a model raises that is not there as a whole
        log.warning(
            "%s, which cannot be compared with the model that trains (%s: %s): they must be the "
            "same, or the first margins are not 0",
            *(said, type(error).__name__, error),
        )
        return
    apart = distance(probe.get("logprobs", ()), found)
    if apart > SAME_MODEL:
        raise ValueError(
            f"{said}, whose log-probs of a text differ by {apart:.3g} nats a token from those of "
            f"the model that training starts from, where roundings differ by less than "
            f"{SAME_MODEL}; train the model that was served, give it as ref_model, or {fix}"
        )
    log.info("%s; its log-probs of a text are %.3g nats a token from training's", said, apart)


def _logprobs(model: Any, ids: Sequence[int], *, adapters: bool) -> list[float]:
    """log p of ids[1:], each after those before it."""
    if any(x.is_meta for x in model.parameters()):
        raise ValueError("its weights are not there yet")
    given = torch.tensor([list(ids)], device=next(model.parameters()).device)
    with torch.no_grad(), _evaluated(model), _adapters(model, adapters):
        logits = model(input_ids=given).logits[0, :-1]
    found = logits.float().log_softmax(-1).gather(-1, given[0, 1:, None].to(logits.device))
    return found[:, 0].tolist()


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """The model without dropout."""
    trained = [x for x in model.modules() if x.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def _adapters(model: Any, kept: bool) -> Any:
    """With the adapters of a PEFT model, or without them."""
    if kept or not hasattr(model, "disable_adapter"):
        return contextlib.nullcontext()
    return model.disable_adapter()
