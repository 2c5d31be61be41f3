"""Per-token log-probs of a Hugging Face causal LM, without its logits: what a trainer's loss starts
from.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from treg.heads.install import run_head
from treg.heads.sharing import SharedRows, share_prompts
from treg.heads.spec import Operands
from treg.ops import LinearLogprobs, linear_logprobs
from treg.ops.entropy import differentiable_entropy
from treg.ops.head import Head

# what a batch has for each token, and shared rows can have too
BATCH = ("input_ids", "attention_mask", "position_ids")


def token_logprobs(
    model: nn.Module,
    labels: Tensor,
    *,
    outputs: tuple[str, ...] = (),
    memory_budget: int | None = None,
    share_prompt: bool | SharedRows = False,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
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
        share_prompt: whether S is 2B sequences, the B chosen ones first, and the model sees what i
            and B + i begin with once (`treg.heads.share_prompts`): it is the same up to rounding,
            and a model where it is not is refused. Or the rows that `share_prompts` made of these
            inputs already, of pairs or of other sequences, which serve policy and reference alike.
        temperature: > 0, at which answers were sampled: the model's own logits (with its scale and
            softcap) are divided by it.
        entropy_gradient: whether the output "entropy" has its exact gradient too. Where a loss uses
            it, that is 3 more matrix products a row; else it costs nothing.
        inputs: of the model's forward: input_ids [S, T], attention_mask, position_ids, ...; with
            share_prompt these three alone, beside flags such as use_cache.
    Returns:
        LinearLogprobs of shape [S, T-1], 0 where not scored.
    Raises:
        ValueError: labels of another shape than input_ids; a model without an installed head; with
            share_prompt an odd number of rows, other inputs, or a model that cannot; a temperature
            that is not > 0; entropy_gradient without "entropy" among outputs.
    """
    if entropy_gradient and "entropy" not in outputs:
        raise ValueError(
            f'entropy_gradient: expected "entropy" among outputs, got {outputs!r}; add it, or '
            "leave entropy_gradient out"
        )

    def score(rows: Tensor, target: Tensor, operands: Operands) -> dict[str, Tensor]:
        found = linear_logprobs(
            rows,
            target=target,
            outputs=outputs,
            memory_budget=memory_budget,
            temperature=temperature,
            **operands,
        )
        given = {name: x for name, x in found._asdict().items() if x is not None}
        if entropy_gradient:
            head = Head(**operands, temperature=temperature)
            given["entropy"] = differentiable_entropy(
                given["entropy"], rows, target, head, memory_budget=memory_budget
            )
        return given

    found = score_tokens(model, labels, score, share_prompt=share_prompt, **inputs)
    return LinearLogprobs(**found)


def score_tokens(
    model: nn.Module,
    labels: Tensor,
    score: Callable[[Tensor, Tensor, Operands], Mapping[str, Tensor]],
    *,
    share_prompt: bool | SharedRows = False,
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
    shared = None
    if share_prompt:
        shared, inputs = shared_inputs(inputs, share_prompt)

    def head_fn(hidden: Tensor, operands: Operands) -> dict[str, Tensor]:
        found = score(*scored_rows(hidden, labels, shared), operands)
        return {name: _spread(x, scored.to(x.device)) for name, x in found.items()}

    return run_head(model, head_fn, **inputs)


def shared_inputs(
    inputs: Mapping[str, Any], rows: bool | SharedRows = True
) -> tuple[SharedRows, dict[str, Any]]:
    """The rows that sequences share, made here unless they are given, and what the model's forward
    takes in place of inputs.

    Raises:
        ValueError: inputs beside input_ids, attention_mask, position_ids and flags.
    """
    given = {name: x for name, x in inputs.items() if x is not None}
    flags = {name: x for name, x in given.items() if isinstance(x, bool)}
    batch = {name: x for name, x in given.items() if name not in flags}
    others = sorted(batch.keys() - BATCH)
    if "input_ids" not in batch or others:
        raise ValueError(
            f"share_prompt: expected {', '.join(BATCH)}, whose tokens can be moved, got "
            f"{', '.join(sorted(batch))}; set share_prompt=False"
        )
    shared = rows if isinstance(rows, SharedRows) else share_prompts(**batch)
    return shared, shared.inputs | flags


def scored_rows(
    hidden: Tensor, labels: Tensor, shared: SharedRows | None = None
) -> tuple[Tensor, Tensor]:
    """hidden [N, D] and target [N] of the tokens that labels [S, T] score, row after row.

    Args:
        hidden: [S, T, D]; virtual tokens of prompt-learning adapters may stand before the sequence.
        labels: [S, T] int64, not shifted, -100 where not scored.
        shared: rows that the S sequences share; hidden is then of these.
    Raises:
        ValueError: shared rows of a batch of another shape than labels.
    """
    if shared is not None and shared.places.shape != labels.shape:
        raise ValueError(
            f"labels: expected the shape of the batch in shared rows {list(shared.places.shape)}, "
            f"got {list(labels.shape)}"
        )
    target = labels[:, 1:]
    scored = target != -100
    if shared is None:
        states = hidden[:, -labels.shape[1] :][:, :-1][scored.to(hidden.device)]
    else:
        places = shared.places[:, :-1]
        states = shared.apart(hidden, places[scored.to(places.device)])
    return states, target[scored].to(hidden.device)


def _spread(x: Tensor, scored: Tensor) -> Tensor:
    """x [N] at the places that are scored, 0 elsewhere; without any scored one still a function of
    x.
    """
    return torch.zeros(scored.shape, dtype=x.dtype, device=x.device).masked_scatter(scored, x)
