"""Annotated pairs as `treg.viz` shows them, with the implicit rewards of a trained policy where
there is one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from treg.data import SIDES
from treg.rewards import ContrastivePrompts
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
) -> list[PairView]:
    """Examples of an annotated file (see `treg.data.annotated`) as pairs to show.

    Args:
        policy: a causal LM; its implicit rewards are beta * (log pi_t - log pi_ref,t). None: none
            are shown.
        reference: the model that pi_ref comes from; None: the log-probs that the examples keep of
            each token.
    Raises:
        ValueError: a policy and no reference log-probs of each token.
    """
    ref = None
    if policy is not None:
        kept = "ref_chosen_token_logps" in examples[0]
        if reference is None and not kept:
            raise ValueError(
                "reference: expected the reference model, because the annotated file keeps no log-prob of each token; "
                "give it (--ref_model), or annotate with per_token (--per_token)"
            )
        if reference is None:
            ref = [
                torch.from_numpy(x[f"ref_{side}_token_logps"].copy())
                for x in examples
                for side in SIDES
            ]
        else:
            ref = _token_logps(reference, examples, tokenizer, tokens_per_batch)
    implicit: list = [None] * (2 * len(examples))
    if ref is not None:
        now = _token_logps(policy, examples, tokenizer, tokens_per_batch)
        implicit = [(beta * (a - b)).tolist() for a, b in zip(now, ref, strict=True)]
    views = []
    for i, x in enumerate(examples):
        chosen, rejected = (
            Side.from_ids(
                x[f"{side}_ids"].tolist(),
                tokenizer,
                x[f"{side}_token_rewards"].tolist(),
                implicit[2 * i + j],
            )
            for j, side in enumerate(SIDES)
        )
        prompt = tokenizer.decode(
            x["prompt_ids"], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        views.append(PairView(x["where"], prompt, chosen, rejected))
    return views


@torch.inference_mode()
def _token_logps(
    model: Any, examples: Sequence[Mapping], tokenizer: Any, tokens_per_batch: int
) -> list[torch.Tensor]:
    scorer = Scorer(
        model,
        tokenizer,
        ContrastivePrompts(),
        tokens_per_batch=tokens_per_batch,
        share_prefix=False,
    )
    return scorer.score(
        [(x["prompt_ids"].tolist(), x[f"{side}_ids"].tolist()) for x in examples for side in SIDES]
    )
