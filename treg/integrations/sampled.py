"""Token rewards of what a policy samples: the options that online trainers share, and the scoring.

T tokens of a response.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from treg.checks import check_count, check_not_negative
from treg.data import RowProblem
from treg.rewards import (
    DEFAULT_SOURCE,
    Context,
    NoReference,
    Response,
    TokenRewardSource,
    load_source,
    make_options,
    options_say,
    streams_given,
)
from treg.rewards.base import check_response, score_checked
from treg.rewards.loading import load_model

log = logging.getLogger(__name__)

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
        check_not_negative(f"{self.prefix}alpha", self.alpha, optional=True)
        check_count(f"{self.prefix}tokens_per_batch", self.tokens_per_batch)

    @property
    def weight(self) -> float:
        """alpha, or what it is where it is not given."""
        if self.alpha is not None:
            return float(self.alpha)
        made = make_options(self.rewards, self.rewards_options)
        return 1.0 if getattr(made, "adds_up_to_a_score", False) else 0.1

    @property
    def add_up_to_a_score(self) -> bool:
        """Whether a reward model's score of the response is within the token rewards."""
        return options_say("adds_up_to_a_score", self.rewards, self.rewards_options)

    @property
    def needs_reference(self) -> bool:
        """Whether the source says that it asks a reference model."""
        return options_say("asks_reference", self.rewards, self.rewards_options)


def scored(source: TokenRewardSource, responses: Sequence[Response]) -> list[Tensor | RowProblem]:
    """Token rewards [T] of each response, float32 on the CPU, or why the source refuses it."""
    problems = [_problem(source, response) for response in responses]
    fine = [x for x, problem in zip(responses, problems, strict=True) if problem is None]
    found = iter(score_checked(source, fine) if fine else ())
    return [next(found)["token_rewards"] if x is None else x for x in problems]


def _problem(source: TokenRewardSource, response: Response) -> RowProblem | None:
    if not len(response.ids):
        return RowProblem("empty response", "it has no token")
    return check_response(source, response)


class Told:
    """Warns of responses that a source refuses, once a reason. what: that follows from it."""

    def __init__(self, what: str):
        self.what = what
        self.reasons: set[str] = set()

    def __call__(self, problem: RowProblem) -> None:
        if problem.reason not in self.reasons:
            self.reasons.add(problem.reason)
            text = "%s: %s: %s; further ones of this kind are only counted"
            log.warning(text, self.what, problem.reason, problem.detail)


class SampledRewards:
    """Scores responses one by one. Its models are loaded when the first one comes.

    Args:
        options: see `SampledOptions`. tokenizer: the policy's.
    """

    def __init__(self, options: SampledOptions, tokenizer: Any):
        self.options = options
        self.tokenizer = tokenizer
        self.source: TokenRewardSource | None = None
        self._told = Told("a response gets no token rewards")

    @torch.inference_mode()
    def __call__(self, response: Response) -> Tensor | None:
        """Token rewards [T], float32 on the CPU; None if the source refuses the response and
        refused="zero" says that this is no error.

        Raises:
            ValueError: a response that the source refuses; what it cannot load.
        """
        if self.source is None:
            self.source = self._loaded()
        (found,) = scored(self.source, [response])
        return self._refused(found) if isinstance(found, RowProblem) else found.clone()

    def _loaded(self) -> TokenRewardSource:
        options, model = self.options, None
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if options.model is None:
            fix = f"give {options.prefix}model"
            model = NoReference(f"{options.prefix}rewards", device, fix)
        else:
            model = reference_at(options.model, device)
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
        self._told(problem)


def reference_at(path: str, device: Any) -> Any:
    """The causal LM of a folder or hub name, frozen, on a device."""
    from transformers import AutoModelForCausalLM

    what = "a causal language model (AutoModelForCausalLM)"
    return load_model(AutoModelForCausalLM, "model", path, what, dtype="auto")[0].to(device)
