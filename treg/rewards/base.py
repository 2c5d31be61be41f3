"""The seam of token-reward sources: what a source is given, and what it must do.

A source gives every token of a response one number, or several: its streams. `treg annotate`, the
trainers that make rewards themselves and verl's reward manager all use its methods `check` and
`score`; its `settings` go into the annotated file. A new source is one class in one file; it is
found by its name in `treg.rewards.SOURCES`, or by "package.module:Class" where it lies outside this
library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from treg.data import RowProblem, described
from treg.data.batches import WEIGHT_STREAMS
from treg.rewards.engines import Engine
from treg.rewards.response import Response


def _ignore(tokens: int) -> None:
    pass


class NoReference:
    """Stands where a run has no reference model. It has a device; a source that asks it for
    anything else is refused.

    Args:
        option: that says the source, and fix: what to do instead, for the error.
    """

    def __init__(self, option: str, device: Any, fix: str):
        self.device = device
        self._refusal = (
            f"{option}: expected a source that needs no reference model, since there is none here; "
            f"{fix}"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ValueError(self._refusal)


@dataclass(frozen=True, eq=False)
class Context:
    """What a source may use. It is made once for a run; no weight of the model in it is changed.

    model: the reference, a Hugging Face causal LM on its device, or an `Engine` that has it
        elsewhere. tokenizer: its tokenizer.
    tokens_per_batch: tokens of one forward, with padding, that fit into memory.
    share_prefix: whether beginnings that contexts share may be run once.
    on_tokens: is told how many tokens went through a model, for the progress bar.
    pairs: the responses of every pair of the run, the longest pair first, so that every process can
        try out on the same ones what a model can do. Empty where they are not known, as in verl,
        whose responses come one by one.
    """

    model: Any
    tokenizer: Any
    tokens_per_batch: int = 16384
    share_prefix: bool = True
    on_tokens: Callable[[int], None] = _ignore
    pairs: Sequence[tuple[Response, ...]] = ()

    @cached_property
    def scorer(self) -> Any:
        """Log-probs by the reference; made when a source first asks for it.

        What the rows of one call begin with is run once, where log-probs are then the same; that is
        tried on the longest pair of the run and on the shortest, by every process.
        """
        if isinstance(self.model, Engine):
            return self.model.scorer(self.on_tokens)
        from treg.rewards.scorer import Scorer

        return Scorer(
            self.model,
            self.tokenizer,
            tokens_per_batch=self.tokens_per_batch,
            share_prefix=self.share_prefix,
            on_tokens=self.on_tokens,
            trial=self.trial,
        )

    def trial(self) -> list[tuple[list[int], list[int]]]:
        """Answers after their prompts: of the longest pair that the model's positions hold, and of
        the shortest pair.
        """
        last = len(self.pairs) - 1
        fitting = (i for i in range(last + 1) if self.too_long(*self.pairs[i]) is None)
        found = []
        for i in {next(fitting, last): None, last: None} if self.pairs else ():
            if self.too_long(*self.pairs[i]) is None:
                found += [(x.prompt_ids.tolist(), x.ids.tolist()) for x in self.pairs[i]]
        return found

    @property
    def longest(self) -> int:
        """How many positions the reference has."""
        return self.scorer.longest

    @cached_property
    def _wanted(self) -> set[str]:
        return set()

    @cached_property
    def _kept(self) -> WeakKeyDictionary[Response, dict[Hashable, Any]]:
        return WeakKeyDictionary()

    @cached_property
    def _shared(self) -> dict[Hashable, Any]:
        return {}

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """make(), once a key: models that several sources have in common."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    @cached_property
    def loaded(self) -> list[tuple[str, Any, TokenRewardSource]]:
        """Name, Options and source of those that `load_source` has made for this context."""
        return []

    def want(self, *outputs: str) -> None:
        """Let `reference` give these as well: names of `linear_logprobs`, such as "entropy". A
        source says so when it is made, before anything is scored.
        """
        self._wanted.update(outputs)

    def reference(self, responses: Sequence[Response]) -> list[dict[str, Tensor]]:
        """What the reference says at each token of each response, computed once.

        Returns:
            A dict for each response: "logprobs", log pi_ref(y_t | x, y_<t) in nats, and what is
            wanted by any source, [T] float32 on the CPU. They are shared: change a clone.
        """
        outputs = sorted(self._wanted)

        def score(missing: Sequence[Response]) -> list[dict[str, Tensor]]:
            rows = [(x.prompt_ids.tolist(), x.ids.tolist()) for x in missing]
            with torch.no_grad():
                return self.scorer.statistics(rows, outputs)

        return self.once(("reference", *outputs), responses, score)

    def once(
        self,
        key: Hashable,
        responses: Sequence[Response],
        compute: Callable[[Sequence[Response]], Sequence[Any]],
    ) -> list[Any]:
        """compute(responses), one result a response, kept under a key for as long as the responses
        are: only those without a result are computed.
        """
        kept = [self._kept.setdefault(response, {}) for response in responses]
        missing = [i for i, results in enumerate(kept) if key not in results]
        if missing:
            found = compute([responses[i] for i in missing])
            for i, result in zip(missing, found, strict=True):
                kept[i][key] = result
        return [results[key] for results in kept]

    def too_long(self, *responses: Response) -> RowProblem | None:
        """Why a response does not fit the reference after its prompt; None if all fit."""
        need = max(len(x.prompt_ids) + len(x.ids) - 1 for x in responses)
        if need <= self.longest:
            return None
        detail = f"{need} tokens, the model has {self.longest} positions; lower max_length"
        return RowProblem("pair too long", detail, responses[0].where)

    def unknown_token(self, *responses: Response) -> RowProblem | None:
        """Why a response is not the model's: a token that it has no embedding of; None if all are
        its own.
        """
        rows = self._embeddings
        for response in responses:
            ids = np.concatenate([response.prompt_ids, response.ids])
            if rows is not None and int(ids.max()) >= rows:
                token = described(self.tokenizer.decode([int(ids.max())]))
                detail = (
                    f"{response.side}: {token} is token {ids.max()}, the model has embeddings of "
                    f"{rows}; use the model's own tokenizer, or resize the embeddings"
                )
                return RowProblem("token beyond the embeddings", detail, response.where)
        return None

    @cached_property
    def _embeddings(self) -> int | None:
        """How many tokens the model has embeddings of."""
        if isinstance(self.model, Engine):
            return None  # it refuses such ids itself
        layer = self.model.get_input_embeddings()
        return None if layer is None else int(layer.weight.shape[0])


# what Options may say of their source, as a class attribute or a property; not said: False
# asks_reference: it needs the reference model. adds_up_to_a_score: the token rewards of a response
# add up to what a reward model says of it, so that the same score beside them would count twice
FACTS = ("asks_reference", "adds_up_to_a_score")


class TokenRewardSource(Protocol):
    """What `treg annotate` and the trainers ask of a source of token rewards."""

    # a frozen dataclass; its fields, of the types str, int, float, bool and lists of them, become
    # options of the command line and of YAML files; it may say some of FACTS
    Options: ClassVar[type]

    def __init__(self, options: Any, context: Context): ...

    @property
    def streams(self) -> tuple[str, ...]:
        """What it gives: ("token_rewards",), ("token_weights",), both, or names of its own. Of the
        class; where the options decide, they have a property of that name as well.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """All that changes the numbers, as JSON: it goes into the file, and a file that was made
        with other settings is refused.
        """
        ...

    def check(self, response: Response) -> RowProblem | None:
        """Why a response cannot be scored; None if it can. The row is filled in by the caller."""
        ...

    def score(self, responses: Sequence[Response]) -> list[dict[str, Tensor]]:
        """The streams of each response by name, [T] floating. Only responses that `check` lets
        through are given.
        """
        ...


def check_response(source: TokenRewardSource, response: Response) -> RowProblem | None:
    """`source.check(response)`, held against what the source promises; the row is filled in.

    Raises:
        ValueError: it returns something else than None or a RowProblem.
    """
    problem = source.check(response)
    if problem is None:
        return None
    if not isinstance(problem, RowProblem):
        raise ValueError(
            f"{type(source).__name__}.check: {response.where}: {response.side}: expected None or a "
            f"RowProblem, got {problem!r}"
        )
    return RowProblem(problem.reason, problem.detail, response.where)


def score_checked(
    source: TokenRewardSource, responses: Sequence[Response]
) -> list[dict[str, Tensor]]:
    """`source.score(responses)`, held against what the source promises.

    Returns:
        A dict for each response: stream -> [T] float32 on the CPU, finite.
    Raises:
        ValueError: not one dict a response, another set of streams, not one finite number a token,
            negative weights.
    """
    name = type(source).__name__
    found = source.score(responses)
    if len(found) != len(responses):
        raise ValueError(
            f"{name}.score: expected {len(responses)} results, one for each response, got "
            f"{len(found)}"
        )
    checked = []
    for response, streams in zip(responses, found, strict=True):
        where = f"{name}.score: {response.where}: {response.side}"
        if streams.keys() != set(source.streams):
            raise ValueError(
                f"{where}: expected the streams {', '.join(source.streams)}, got "
                f"{', '.join(map(str, streams)) or 'none'}"
            )
        found_here = {}
        for stream in source.streams:
            values = _one_number_a_token(streams[stream], len(response.ids), where, stream)
            found_here[stream] = of_the_answer(response, stream, values)
        checked.append(found_here)
    return checked


def of_the_answer(response: Response, stream: str, values: Tensor) -> Tensor:
    """Numbers of a stream, 0 for tokens that are not the answer's: turns of others, and for rewards
    the words of the template before and between what it says.
    """
    kept = response.assistants
    if stream == "token_rewards" and response.says is not None:
        within = np.arange(len(kept)) < response.content
        kept = kept & ~(within & ~response.says)
    if kept.all():
        return values
    return torch.where(torch.from_numpy(kept), values, 0.0)


def score_once(
    source: TokenRewardSource, responses: Sequence[Response], context: Context
) -> list[dict[str, Tensor]]:
    """`score_checked`, once a response for a source that several others take numbers of. They are
    shared: change a clone.
    """
    return context.once(
        ("scored", id(source)), responses, lambda missing: score_checked(source, missing)
    )


def _one_number_a_token(values: Any, length: int, where: str, stream: str) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != (length,):
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"{where}: expected {stream} as a tensor of shape [{length}], one number a token, got "
            f"{got}"
        )
    values = values.detach().float().cpu()
    check_finite(values, where, stream)
    if stream in WEIGHT_STREAMS and bool((values < 0).any()):
        raise ValueError(f"{where}: expected {stream} >= 0, got {values.min().item()}")
    return values


def check_finite(values: Tensor, where: str, stream: str) -> None:
    """ValueError where a number of a stream is not finite."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"{where}: expected finite {stream}, got {values.tolist()}")


def check_number(name: str, value: Any, *, positive: bool = False) -> None:
    """ValueError unless an option is a finite number, and > 0 if it must be positive."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or (positive and value <= 0):
        more = " > 0" if positive else ""
        raise ValueError(f"{name}: expected a finite number{more}, got {value!r}")
