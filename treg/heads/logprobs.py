"""Per-token log-probs of a Hugging Face causal LM, without its logits: what a trainer's loss starts
from.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from treg.heads.install import run_head
from treg.heads.spec import Operands
from treg.ops import LinearLogprobs, linear_logprobs


def token_logprobs(
    model: nn.Module,
    labels: Tensor,
    *,
    outputs: tuple[str, ...] = (),
    memory_budget: int | None = None,
    **inputs,
) -> LinearLogprobs:
    """log p(labels[s, t+1] | tokens up to t) of a model that `treg.heads.install_head` has read.

    Everything runs inside the model's own forward, so that what wraps it (DDP, FSDP, DeepSpeed,
    PEFT, accelerate) sees a forward like any other. Only scored positions go through the head: 1
    matrix product a row without a gradient, 2 with a frozen head, 3 to 4 with a trainable one
    (`treg.ops.linear_logprobs`).

    Args:
        model: the causal LM, wrapped or not.
        labels: [S, T] int64, not shifted: labels[s, t] is the token at t, -100 where it is not
            scored. The first token of a row is never scored.
        outputs: statistics of each token, see `linear_logprobs`.
        memory_budget: bytes of temporaries, see `linear_logprobs`.
        inputs: of the model's forward: input_ids [S, T], attention_mask, position_ids, ...
    Returns:
        LinearLogprobs of shape [S, T-1], 0 where not scored.
    Raises:
        ValueError: labels of another shape than input_ids; a model without an installed head.
    """

    def score(rows: Tensor, target: Tensor, operands: Operands) -> dict[str, Tensor]:
        found = linear_logprobs(
            rows, target=target, outputs=outputs, memory_budget=memory_budget, **operands
        )
        return {name: x for name, x in found._asdict().items() if x is not None}

    return LinearLogprobs(**score_tokens(model, labels, score, **inputs))


def score_tokens(
    model: nn.Module,
    labels: Tensor,
    score: Callable[[Tensor, Tensor, Operands], Mapping[str, Tensor]],
    **inputs,
) -> dict[str, Tensor]:
    """What score(rows [N, D], target [N], operands) gives of each scored token, [S, T-1] each by
    name, 0 where not scored. Arguments as in `token_logprobs`.
    """
    ids = inputs.get("input_ids")
    if ids is not None and ids.shape != labels.shape:
        raise ValueError(
            f"labels: expected the shape of input_ids {list(ids.shape)}, not shifted, "
            f"got {list(labels.shape)}"
        )
    scored = labels[:, 1:] != -100

    def head_fn(hidden: Tensor, operands: Operands) -> dict[str, Tensor]:
        found = score(*scored_rows(hidden, labels), operands)
        return {name: _spread(x, scored.to(x.device)) for name, x in found.items()}

    return run_head(model, head_fn, **inputs)


def scored_rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [N, D] and target [N] of the tokens that labels [S, T] score.

    hidden: [S, T, D]; virtual tokens of prompt-learning adapters may stand before the sequence.
    """
    target = labels[:, 1:]
    scored = target != -100
    states = hidden[:, -labels.shape[1] :][:, :-1]
    return states[scored.to(hidden.device)], target[scored].to(hidden.device)


def _spread(x: Tensor, scored: Tensor) -> Tensor:
    """x [N] at the places that are scored, 0 elsewhere; without any scored one still a function of
    x.
    """
    return torch.zeros(scored.shape, dtype=x.dtype, device=x.device).masked_scatter(scored, x)
