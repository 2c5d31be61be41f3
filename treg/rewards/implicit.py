"""The reward that is implicit in a pair of models: how much more likely one finds each token.

    r_t = beta (log pi(y_t | x, y_<t) - log pi_base(y_t | x, y_<t)),  cut to [-clip, clip]

Where pi was trained with DPO from pi_base, this is DPO's own reward of a token (DPO, arXiv
2305.18290, Eq. 5, token by token). It is the token reward of RTO (arXiv 2404.18922: beta 0.05, clip
0.05) and of TGDPO (arXiv 2506.14574: rhat_t, beta 0.1), the score of TIS-DPO before its transform
(arXiv 2410.04350: base is the model trained on swapped pairs, beta 1) and of SePO's oracle (arXiv
2408.13518: beta 1).

Differs: nothing is left out of the sum, so that the tokens which end an answer have their reward
too. RTO's other terms, the penalty for leaving the reference and the reward of the whole answer,
belong to its training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from treg.data import RowProblem
from treg.data.annotated import PROBE, model_fingerprint
from treg.rewards.base import Context, NoReference, check_number
from treg.rewards.loading import (
    check_whole,
    is_adapter,
    load_model,
    load_tokenizer,
    with_adapter,
)
from treg.rewards.response import Response
from treg.rewards.scorer import Scorer

WHAT = "a causal LM"


@dataclass(frozen=True)
class ImplicitOptions:
    """model: pi, a causal LM with the run's tokenizer, or a PEFT adapter on the run's model, which
        then costs no second copy of its weights.
    base: pi_base, likewise; None: the run's model.
    beta: > 0. clip: > 0, the largest reward, after beta; None: no limit.
    """

    model: str = field(
        metadata={
            "help": "Folder or hub name of a causal LM, or of a PEFT adapter on the run's model."
        }
    )
    base: str | None = field(
        default=None,
        metadata={"help": "The same of the model it is compared with. Default: the run's model."},
    )
    beta: float = field(default=0.1, metadata={"help": "Scale of the rewards."})
    clip: float | None = field(
        default=None, metadata={"help": "Largest reward of a token, either way. Default: no limit."}
    )

    def __post_init__(self):
        check_number("beta", self.beta, positive=True)
        if self.clip is not None:
            check_number("clip", self.clip, positive=True)

    @property
    def asks_reference(self) -> bool:
        """Without a base of its own."""
        return self.base is None


class ImplicitSource:
    """Token rewards by two causal LMs, one of which may be the run's own."""

    Options: ClassVar[type] = ImplicitOptions
    streams: ClassVar[tuple[str, ...]] = ("token_rewards",)

    def __init__(self, options: ImplicitOptions, context: Context):
        self.options = options
        self.context = context
        self._policy = self._scorer("model", options.model)
        self._base = None if options.base is None else self._scorer("base", options.base)

    def settings(self) -> dict[str, Any]:
        base = self._base
        return {
            "model": _fingerprint(self._policy),
            "base": "reference" if base is None else _fingerprint(base),
            "beta": self.options.beta,
            "clip": self.options.clip,
            "dtype": str(self._policy.dtype),
        }

    def check(self, response: Response) -> RowProblem | None:
        """A response is refused that the positions of either model do not hold."""
        base = self.context if self._base is None else self._base
        need = len(response.prompt_ids) + len(response.ids) - 1
        longest = min(self._policy.longest, base.longest)
        if need <= longest:
            return None
        detail = f"{need} tokens, the models have {longest} positions; lower max_length"
        return RowProblem("pair too long", detail, response.where)

    def score(self, responses: Sequence[Response]) -> list[dict[str, Tensor]]:
        with torch.inference_mode():
            policy = self._policy.score(_rows(responses))
            base = self._base_logps(responses)
        return [
            {"token_rewards": implicit_rewards(a, b, self.options.beta, self.options.clip)}
            for a, b in zip(policy, base, strict=True)
        ]

    def _base_logps(self, responses: Sequence[Response]) -> list[Tensor]:
        if self._base is None:
            return [x["logprobs"] for x in self.context.reference(responses)]
        return self._base.score(_rows(responses))

    def _scorer(self, option: str, path: str) -> Scorer:
        """Log-probs by the model that lies at path."""
        return self.context.shared(("causal LM", path), lambda: self._made(option, path))

    def _made(self, option: str, path: str) -> Scorer:
        context = self.context
        if is_adapter(option, path):
            model = with_adapter(context.model, option, path)
        else:
            model = _causal_lm(context, option, path)
        return Scorer(
            model,
            context.tokenizer,
            tokens_per_batch=context.tokens_per_batch,
            share_prefix=context.share_prefix,
            on_tokens=context.on_tokens,
            trial=context.trial,
        )


def _rows(responses: Sequence[Response]) -> list[tuple[list[int], list[int]]]:
    """What a scorer takes."""
    return [(x.prompt_ids.tolist(), x.ids.tolist()) for x in responses]


def implicit_rewards(
    policy: Tensor, base: Tensor, beta: float = 0.1, clip: float | None = None
) -> Tensor:
    """beta (policy - base), cut to [-clip, clip].

    Args:
        policy, base: of one shape, floating, nats: log-probs of the same tokens.
        beta: > 0. clip: > 0 or None.
    Returns:
        Like policy.
    Raises:
        ValueError: shapes that differ.
    """
    if policy.shape != base.shape:
        raise ValueError(
            f"base: expected the shape of policy {list(policy.shape)}, got {list(base.shape)}"
        )
    rewards = beta * (policy - base)
    return rewards if clip is None else rewards.clamp(-clip, clip)


def _causal_lm(context: Context, option: str, path: str) -> Any:
    """A whole model, in the dtype of the run's model and on its device; where the run has none, in
    its checkpoint's.

    Raises:
        ValueError: another tokenizer than the run's, or another size of the vocabulary.
    """
    own = context.model
    alone = isinstance(own, NoReference)
    dtype = "auto" if alone else own.dtype
    model, missing = load_model(AutoModelForCausalLM, option, path, WHAT, dtype=dtype)
    check_whole(missing, option, path, WHAT)
    sizes = [x.get_output_embeddings().weight.shape[0] for x in (model, model if alone else own)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"rewards.{option}: expected the vocabulary of the run's model, {sizes[1]} tokens, got "
            f"{path!r} with {sizes[0]}"
        )
    _check_tokenizer(context.tokenizer, option, path)
    return model.to(own.device)


def _check_tokenizer(own: Any, option: str, path: str) -> None:
    """ValueError for a model with another tokenizer than the run's: the same ids would be other
    words. Templates do not matter, and a folder without a tokenizer is taken at its word.
    """
    if Path(path).is_dir() and not any(Path(path).glob("tokenizer*")):
        return
    other = load_tokenizer(f"rewards.{option}", path)
    vocabularies = [x.get_vocab() for x in (own, other)]
    probes = [x(PROBE, add_special_tokens=False)["input_ids"] for x in (own, other)]
    if vocabularies[0] != vocabularies[1] or probes[0] != probes[1]:
        raise ValueError(
            f"rewards.{option}: expected a model with the run's tokenizer, got {path!r}, whose "
            "tokenizer gives other ids"
        )


def _fingerprint(scorer: Scorer) -> str:
    return model_fingerprint(scorer.spec.model, adapters=True)
