"""Token rewards of what a policy samples: the options that online trainers share, and the scoring.

T tokens of a response.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from treg.checks import check_number
from treg.data import RowProblem
from treg.rewards import (
    DEFAULT_SOURCE,
    Context,
    NoReference,
    Response,
    TokenRewardSource,
    load_source,
    make_options,
    streams_given,
)
from treg.rewards.base import check_response, score_checked
from treg.rewards.loading import load_model
from treg.rewards.nested import NestedOptions

log = logging.getLogger(__name__)

# sources that ask the reference model, whatever their options
ASK_THE_REFERENCE = ("contrastive", "entropy", "surprise")
# those whose token rewards add up to a score of the whole response
ADD_UP_TO_A_SCORE = ("redistribution",)
REFUSED = ("error", "zero")


@dataclass(frozen=True)
class SampledOptions:
    """Which token rewards the responses of a policy get.

    rewards: the source, a key of `treg.rewards.SOURCES` or "package.module:Class".
    rewards_options: values of the fields of its Options.
    alpha: >= 0, the weight of the token rewards. None: 1 for redistribution, whose rewards are a
        reward model's score; else 0.1.
    model: a causal LM with the policy's tokenizer, the reference of a source that needs one. None:
        no reference is loaded.
    refused: what becomes of a response that the source cannot judge, such as one that is too long
        for its model. "error": training stops. "zero": its token rewards are 0.
    device, tokens_per_batch: of the models that the source runs.
    """

    rewards: str = DEFAULT_SOURCE
    rewards_options: Mapping[str, Any] = field(default_factory=dict)
    alpha: float | None = None
    model: str | None = None
    refused: str = "error"
    device: str | None = None
    tokens_per_batch: int = 16384

    prefix: ClassVar[str] = ""  # of the options' names, in errors

    def __post_init__(self):
        self._check_numbers()
        if self.refused not in REFUSED:
            raise ValueError(
                f"{self.prefix}refused: expected one of {', '.join(REFUSED)}, got {self.refused!r}"
            )
        # refused here, before a model is loaded
        streams = streams_given(self.rewards, self.rewards_options)
        if "token_rewards" not in streams or "token_weights" in streams:
            raise ValueError(
                f"{self.prefix}rewards: expected a source of token_rewards and no token_weights, "
                f"got {self.rewards!r}, which gives {', '.join(streams)}; the source 'several' "
                "takes one stream of another"
            )

    def _check_numbers(self) -> None:
        check_number(f"{self.prefix}alpha", self.alpha, optional=True)
        if self.alpha is not None and self.alpha < 0:
            raise ValueError(f"{self.prefix}alpha: expected a number >= 0, got {self.alpha!r}")
        tokens = self.tokens_per_batch
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ValueError(
                f"{self.prefix}tokens_per_batch: expected a whole number >= 1, got {tokens!r}"
            )

    @property
    def weight(self) -> float:
        """alpha, or what it is where it is not given."""
        if self.alpha is not None:
            return float(self.alpha)
        return 1.0 if self.rewards in ADD_UP_TO_A_SCORE else 0.1

    @property
    def add_up_to_a_score(self) -> bool:
        """Whether a reward model's score of the response is within the token rewards."""
        return any(
            name in ADD_UP_TO_A_SCORE for name, _ in within(self.rewards, self.rewards_options)
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the source is known to ask a reference model."""
        return any(
            name in ASK_THE_REFERENCE or (name == "implicit" and made.base is None)
            for name, made in within(self.rewards, self.rewards_options)
        )


def within(name: str, options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Name and Options of a source and of all that it takes numbers of."""
    made = make_options(name, options)
    found = [(name, made)]
    for entry in getattr(made, "entries", ()):
        found += within(entry.name, entry.options)
    if isinstance(made, NestedOptions):
        found += within(made.of, made.inner_options)
    return found


class SampledRewards:
    """Scores responses one by one. Its models are loaded when the first one comes.

    Args:
        options: see `SampledOptions`. tokenizer: the policy's.
    """

    def __init__(self, options: SampledOptions, tokenizer: Any):
        self.options = options
        self.tokenizer = tokenizer
        self.source: TokenRewardSource | None = None
        self._told: set[str] = set()

    @torch.inference_mode()
    def __call__(self, response: Response) -> Tensor | None:
        """Token rewards [T], float32 on the CPU; None if the source refuses the response and
        refused="zero" says that this is no error.

        Raises:
            ValueError: a response that the source refuses; what it cannot load.
        """
        if not len(response.ids):
            return self._refused(RowProblem("empty response", "it has no token"))
        if self.source is None:
            self.source = self._loaded()
        problem = check_response(self.source, response)
        if problem is not None:
            return self._refused(problem)
        (streams,) = score_checked(self.source, [response])
        return streams["token_rewards"].clone()

    def _loaded(self) -> TokenRewardSource:
        options, model = self.options, None
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if options.model is None:
            fix = f"give {options.prefix}model"
            model = NoReference(f"{options.prefix}rewards", device, fix)
        else:
            model = _reference(options.model).to(device)
        context = Context(model, self.tokenizer, tokens_per_batch=options.tokens_per_batch)
        return load_source(options.rewards, options.rewards_options, context)

    def _refused(self, problem: RowProblem) -> None:
        options = self.options
        if options.refused == "error":
            raise ValueError(
                f"responses: expected ones that the source {options.rewards!r} can judge, got "
                f"{problem.reason}: {problem.detail}; shorten responses that are too long, or set "
                f"{options.prefix}refused to 'zero'"
            )
        if problem.reason not in self._told:
            self._told.add(problem.reason)
            log.warning(
                "a response gets no token rewards: %s: %s; further ones of this kind are only "
                "counted",
                problem.reason,
                problem.detail,
            )


def _reference(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    what = "a causal language model (AutoModelForCausalLM)"
    return load_model(AutoModelForCausalLM, "model", path, what, dtype="auto")[0]
