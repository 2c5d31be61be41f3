"""Annotated pairs as `treg.viz` shows them, with the implicit rewards of a trained policy where
there is one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from treg.data import SIDES
from treg.data.examples import check_vocabulary
from treg.rewards.scorer import Scorer
from treg.viz import PairView, Side


def pair_views(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    policy: Any = None,
    reference: Any = None,
    beta: float = 0.1,
    tokens_per_batch: int = 16384,
    stream: str = "token_rewards",
) -> list[PairView]:
    """Examples of an annotated file (see `treg.data.annotated`) as pairs to show.

    Args:
        policy: a causal LM; its implicit rewards are beta * (log pi_t - log pi_ref,t). None: none
            are shown.
        reference: the model that pi_ref comes from; None: the log-probs that the examples keep of
            each token.
        stream: the per-token signal that is shown; only token rewards are compared with implicit
            rewards.
    Raises:
        ValueError: no such stream; a policy and no reference log-probs of each token.
    """
    columns = [f"{side}_{stream}" for side in SIDES]
    for example in examples[:1]:
        if not example.keys() >= set(columns):
            raise ValueError(
                f"stream: expected the columns {', '.join(columns)}, got {', '.join(example)}"
            )
    implicit: list[Any] = [None] * (2 * len(examples))
    if policy is not None:
        ref = _reference_logps(reference, examples, tokenizer, tokens_per_batch)
        now = _token_logps(policy, examples, tokenizer, tokens_per_batch)
        implicit = [(beta * (a - b)).tolist() for a, b in zip(now, ref, strict=True)]
    views = []
    for i, example in enumerate(examples):
        sides = [
            Side.from_ids(
                example[f"{side}_ids"].tolist(),
                tokenizer,
                example[f"{side}_{stream}"].tolist(),
                implicit[2 * i + j],
            )
            for j, side in enumerate(SIDES)
        ]
        prompt = tokenizer.decode(
            example["prompt_ids"], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        views.append(PairView(example["where"], prompt, *sides, stream=stream))
    return views


def _reference_logps(
    reference: Any, examples: Sequence[Mapping[str, Any]], tokenizer: Any, tokens_per_batch: int
) -> list[torch.Tensor]:
    """The reference's log-prob of each token: by the model, or those that the examples keep."""
    if reference is not None:
        return _token_logps(reference, examples, tokenizer, tokens_per_batch)
    if "ref_chosen_token_logps" not in examples[0]:
        raise ValueError(
            "reference: expected the reference model, because the annotated file keeps no log-prob "
            "of each token; give it (--ref_model), or annotate with per_token (--per_token)"
        )
    return [
        torch.from_numpy(example[f"ref_{side}_token_logps"].copy())
        for example in examples
        for side in SIDES
    ]


@torch.inference_mode()
def _token_logps(
    model: Any, examples: Sequence[Mapping[str, Any]], tokenizer: Any, tokens_per_batch: int
) -> list[torch.Tensor]:
    check_vocabulary("data", examples, model)
    scorer = Scorer(model, tokenizer, tokens_per_batch=tokens_per_batch, share_prefix=False)
    return scorer.score(
        [(x["prompt_ids"].tolist(), x[f"{side}_ids"].tolist()) for x in examples for side in SIDES]
    )
