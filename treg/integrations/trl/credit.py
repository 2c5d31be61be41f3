"""The advantage of each token of a batch of completions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treg.data.pieces import token_pieces
from treg.rewards.units import SENTENCE, WORD, numbers_of
from treg.rl import (
    at_end,
    ngram_units,
    perplexity_units,
    random_ngram_units,
    token_advantages,
    with_kl,
)

CREDITS = ("sequence", "returns", "gae", "macro")


@dataclass(frozen=True)
class Completions:
    """What a policy has written, in one process.

    ids: of each completion. mask: [B, C] bool, its tokens that the policy wrote. logprobs,
    ref_logprobs: [B, C] of the policy and of the reference, where they are needed.
    """

    ids: Sequence[Sequence[int]]
    mask: Tensor
    logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None


def own_tokens(
    ids: Sequence[Sequence[int]], kept: Sequence[Sequence[int]] | None, width: int, device: Any
) -> Tensor:
    """[B, width] bool: the tokens of completions that the policy wrote.

    kept: 1 of a token of its own, 0 of a tool's; None: all are its own.
    """
    mask = torch.zeros(len(ids), width, dtype=torch.bool)
    for i, row in enumerate(ids):
        own = [1] * len(row) if kept is None else kept[i]
        mask[i, : len(row)] = torch.tensor(own[: len(row)], dtype=torch.bool)
    return mask.to(device)


def _ngrams(given: Completions, args: Any, tokenizer: Any) -> Tensor:
    return ngram_units(args.macro_length, mask=given.mask)


def _random(given: Completions, args: Any, tokenizer: Any) -> Tensor:
    return random_ngram_units(mask=given.mask)


def _by_perplexity(given: Completions, args: Any, tokenizer: Any) -> Tensor:
    logprobs = given.logprobs if given.ref_logprobs is None else given.ref_logprobs
    assert logprobs is not None
    return perplexity_units(logprobs, mask=given.mask)


def _of_text(beginning: Any) -> Callable[..., Tensor]:
    def units(given: Completions, args: Any, tokenizer: Any) -> Tensor:
        found = torch.zeros(given.mask.shape, dtype=torch.int64)
        for i, ids in enumerate(given.ids):
            numbers = numbers_of(token_pieces(list(ids), tokenizer), beginning)
            found[i, : len(ids)] = torch.tensor(numbers, dtype=torch.int64)
        return found.to(given.mask.device)

    return units


# what a macro action is -> the number of the one that each token is in, [B, C]
MACROS = {
    "ngram": _ngrams,
    "random": _random,
    "perplexity": _by_perplexity,
    "word": _of_text(WORD),
    "sentence": _of_text(SENTENCE),
}


def needs_logprobs(args: Any) -> bool:
    """Whether advantages are made of the policy's log-probs."""
    return args.kl_in_reward or (args.credit == "macro" and args.macro == "perplexity")


def units_of(given: Completions, args: Any, tokenizer: Any) -> Tensor | None:
    """The macro action that each token is in, [B, C] int64; None: each is alone."""
    if args.credit != "macro":
        return None
    return MACROS[args.macro](given, args, tokenizer)


def reward_of_tokens(
    given: Completions, token_rewards: Tensor, scores: Tensor, args: Any
) -> Tensor:
    """r_t = token_rewards_t + [t is the last] * scores - beta * (log pi - log pi_ref)_t, [B, C].

    The last term is there with kl_in_reward.

    Args:
        token_rewards: [B, C] float64, weighted. scores: [B] of whole completions, weighted.
    """
    rewards = token_rewards + at_end(scores, mask=given.mask)
    if args.kl_in_reward:
        rewards = with_kl(rewards, given.logprobs, given.ref_logprobs, args.beta, mask=given.mask)
    return rewards


def advantages_of(
    rewards: Tensor, mask: Tensor, units: Tensor | None, group: int, args: Any
) -> Tensor:
    """`treg.rl.token_advantages` as a TRegGRPOConfig says, [B, C], of all processes' completions.

    Args:
        rewards: [B, C]. mask: [B, C] bool. units: [B, C] or None. group: completions of a prompt,
            which stand one after the other.
    """
    return token_advantages(
        rewards,
        group,
        units=units,
        gamma=args.credit_gamma,
        lam=1.0 if args.credit == "returns" else args.credit_lambda,
        baseline=args.credit_baseline,
        scale=args.scale,
        mask=mask,
    )


def share_within(advantages: Tensor, mask: Tensor) -> float:
    """How much of the advantages' sum of squares lies within completions: 0 where all tokens of
    each have one advantage, 1 where the means of all completions are 0.
    """
    count = mask.sum(1).clamp(min=1)
    mean = (advantages * mask).sum(1) / count
    within = ((advantages - mean[:, None]) * mask).square().sum()
    total = (advantages * mask).square().sum()
    return (within / total).item() if total > 0 else 0.0
