"""Annotated pairs as `treg.viz` shows them, with the implicit rewards of a trained policy where
there is one.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from treg.data import SIDES
from treg.data.examples import check_vocabulary
from treg.rewards.scorer import Scorer
from treg.viz.prompts import template_texts
from treg.viz.tokens import PairView, Side


def pair_views(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    policy: Any = None,
    reference: Any = None,
    beta: float = 0.1,
    tokens_per_batch: int = 16384,
    stream: str = "token_rewards",
    progress: bool = False,
) -> list[PairView]:
    """Examples of an annotated file (see `treg.data.annotated`) as pairs to show.

    Args:
        policy: a causal LM; its implicit rewards are beta * (log pi_t - log pi_ref,t). None: none
            are shown.
        reference: the model that pi_ref comes from; None: the log-probs that the examples keep of
            each token. Where it is the policy itself, all implicit rewards are 0.
        stream: the per-token signal that is shown; only token rewards are compared with implicit
            rewards.
        progress: show a bar over the tokens that the models have to read.
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
        models = 2 if reference is not None and reference is not policy else 1
        total = models * _count(examples)
        with tqdm(
            total=total, unit="token", unit_scale=True, desc="log-probs", disable=not progress
        ) as bar:
            scorer = partial(
                _token_logps, examples, tokenizer, tokens_per_batch=tokens_per_batch, bar=bar
            )
            now = scorer(policy)
            if reference is policy:
                ref = now
            elif reference is not None:
                ref = scorer(reference)
            else:
                ref = _kept_logps(examples)
        implicit = [(beta * (a - b)).tolist() for a, b in zip(now, ref, strict=True)]
    template = template_texts(tokenizer)
    views = []
    for i, example in enumerate(examples):
        sides = [
            Side.from_ids(
                example[f"{side}_ids"].tolist(),
                tokenizer,
                example[f"{side}_{stream}"].tolist(),
                implicit[2 * i + j],
                example.get(f"{side}_scored"),
            )
            for j, side in enumerate(SIDES)
        ]
        prompt = tokenizer.decode(
            example["prompt_ids"], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        views.append(PairView(example["where"], prompt, *sides, stream=stream, template=template))
    return views


def _kept_logps(examples: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """The reference's log-prob of each token, which the examples keep."""
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


def _sequences(examples: Sequence[Mapping[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of each side of each example."""
    return [
        (example["prompt_ids"].tolist(), example[f"{side}_ids"].tolist())
        for example in examples
        for side in SIDES
    ]


def _count(examples: Sequence[Mapping[str, Any]]) -> int:
    """Tokens that a model reads to score the examples: all but the last one of each sequence."""
    return sum(len(prompt) + len(response) - 1 for prompt, response in _sequences(examples))


@torch.inference_mode()
def _token_logps(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    model: Any,
    *,
    tokens_per_batch: int,
    bar: Any,
) -> list[torch.Tensor]:
    check_vocabulary("data", examples, model)
    scorer = Scorer(
        model,
        tokenizer,
        tokens_per_batch=tokens_per_batch,
        share_prefix=False,
        on_tokens=bar.update,
    )
    return scorer.score(_sequences(examples))
