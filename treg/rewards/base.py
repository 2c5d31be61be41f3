"""The seam of token-reward sources: what a source is given, and what it must do.

A source gives every token of a response one number, or several: its streams. `treg annotate`, the
trainers that make rewards themselves and verl's reward manager all use its methods `check` and
`score`; its `settings` go into the annotated file. A new source is one class in one file; it is
found by its name in `treg.rewards.SOURCES`, or by "package.module:Class" where it lies outside this
library.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from treg.data import SIDES, Pair, RowProblem, common_prefix, text_of
from treg.data.batches import WEIGHT_STREAMS
from treg.data.pieces import content_places, text_spans, token_pieces
from treg.data.rows import Messages

if TYPE_CHECKING:
    from treg.rewards.scorer import Scorer


@dataclass(frozen=True, eq=False)
class Response:
    """One answer, as token ids and as text.

    prompt: what was asked, as messages or as plain text.
    completion: the answer as the row has it, messages or plain text; without an end-of-sequence
        token that the plain text ends with, as where TRL has added it.
    text: the text of the answer. Of an answer that was cut at max_length: what its tokens say. If
        it was cut after the first of several messages, that has the template's words in it: sources
        that read text refuse it (`cut_messages`).
    prompt_ids, ids: [P] and [T] int32; ids are the answer's.
    content: how many of the T tokens precede what ends the answer (special tokens, and blanks after
        them).
    side: "chosen" or "rejected". where: "file:line" of the row.
    row: the other columns of the row. row_text: the answer's text as the row has it, where blanks
        around it were left out; else None.
    other_ids: the ids of the pair's other answer, [T'] int32; None of a response that comes without
        one.
    cut: whether the answer was cut at max_length.
    tools, template_kwargs: what goes on to the chat template.
    """

    prompt: Messages | str
    completion: Messages | str
    text: str
    prompt_ids: np.ndarray
    ids: np.ndarray
    content: int
    tokenizer: Any = field(repr=False)
    side: str = "chosen"
    where: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)
    row_text: str | None = None
    other_ids: np.ndarray | None = None
    cut: bool = False
    tools: list | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_pair(cls, pair: Pair, side: str, tokenizer: Any) -> Response:
        """The chosen or the rejected answer of a pair."""
        row = pair.row
        ids = getattr(pair, f"{side}_ids")
        completion = getattr(row, side)
        if isinstance(completion, str) and tokenizer.eos_token:
            completion = completion.removesuffix(tokenizer.eos_token)
        content = content_length(ids.tolist(), tokenizer)
        text, cut = text_of(completion), side in pair.cut
        if cut:
            text = tokenizer.decode(ids[:content], skip_special_tokens=True)
        return cls(
            prompt=row.prompt,
            completion=completion,
            text=text,
            prompt_ids=pair.prompt_ids,
            ids=ids,
            content=content,
            tokenizer=tokenizer,
            side=side,
            where=row.where,
            row=row.columns,
            row_text=row.given.get(side),
            other_ids=getattr(pair, f"{SIDES[side == SIDES[0]]}_ids"),
            cut=cut,
            tools=row.tools,
            template_kwargs=row.template_kwargs,
        )

    @cached_property
    def pieces(self) -> list[str]:
        """What each of the T tokens adds to the decoded text, see `token_pieces`."""
        return token_pieces(self.ids.tolist(), self.tokenizer)

    @cached_property
    def spans(self) -> np.ndarray | None:
        """[T, 2] int32: the characters of `text` that each token holds, see `text_spans`; None
        where the text cannot be found in what the tokens say.
        """
        completion = self.completion
        if isinstance(completion, str) or self.text != text_of(completion):
            return text_spans(self.pieces, [self.text])
        parts = [text_of([message]) for message in completion]
        start = len(self.prompt_ids)
        tokens = content_places(self._rendered, self._whole, self._prompt, completion)
        ends = list(accumulate(map(len, self.pieces), initial=0))
        places = [[ends[max(0, x - start)] for x in of_message] for of_message in tokens]
        return text_spans(self.pieces, parts, places)

    @cached_property
    def messages(self) -> np.ndarray:
        """[T] int32: which message of the answer each token is in, counted from 0.

        The bounds are found by rendering the first messages alone: what their tokens have in common
        with the whole belongs to them.
        """
        if isinstance(self.completion, str):
            return np.zeros(len(self.ids), dtype=np.int32)
        bounds = []
        for count in range(1, len(self.completion)):
            ids = self._rendered([*self._prompt, *self.completion[:count]])
            bounds.append(common_prefix(ids, self._whole) - len(self.prompt_ids))
        return np.searchsorted(bounds, np.arange(len(self.ids)), side="right").astype(np.int32)

    @property
    def _whole(self) -> list[int]:
        return [*self.prompt_ids.tolist(), *self.ids.tolist()]

    @property
    def _prompt(self) -> Messages:
        """The prompt of an answer of messages."""
        return [] if isinstance(self.prompt, str) else self.prompt

    def _rendered(self, messages: Messages, **more: Any) -> list[int]:
        """The ids of messages through the chat template."""
        text = self.tokenizer.apply_chat_template(
            messages, tools=self.tools, tokenize=False, **more, **self.template_kwargs
        )
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def content_length(ids: list[int], tokenizer: Any) -> int:
    """Tokens of a response before what ends it: special tokens, and blanks after them."""
    special = set(tokenizer.all_special_ids)
    end = len(ids)
    while end and (ids[end - 1] in special or not tokenizer.decode([ids[end - 1]]).strip()):
        end -= 1
    return next((i for i in range(end, len(ids)) if ids[i] in special), len(ids))


def differs(response: Response) -> str:
    """What there is to say of a text that is not found in what its tokens say."""
    found = "its text differs from what its tokens say"
    composed = unicodedata.normalize("NFC", response.text)
    if composed != response.text and composed in "".join(response.pieces):
        return f"{found}: the tokenizer writes it in Unicode's form NFC; normalize the data to NFC"
    return found


def cut_messages(response: Response) -> RowProblem | None:
    """Why a source that reads an answer's text cannot read this one: it was cut after the first of
    several messages, and its tokens do not say where the words of the template end. None if it can.
    """
    if not response.cut or response.messages[-1] == 0:
        return None
    detail = f"{response.side}: cut after the first of its messages; raise max_length"
    return RowProblem("several messages, cut", detail, response.where)


class ResponsePairs(Sequence):
    """The responses of pairs, (chosen, rejected) of each, made when they are asked for."""

    def __init__(self, pairs: Sequence[Pair], tokenizer: Any):
        self.pairs = pairs
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        pair = self.pairs[index]
        return tuple(Response.of_pair(pair, side, self.tokenizer) for side in SIDES)


def _ignore(tokens: int) -> None:
    pass


@dataclass(frozen=True, eq=False)
class Context:
    """What a source may use. It is made once for a run; no weight of the model in it is changed.

    model: the reference, a Hugging Face causal LM on its device. tokenizer: its tokenizer.
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
    def scorer(self) -> Scorer:
        """Log-probs by the reference; made when a source first asks for it.

        Its `score_both` runs the common beginning of two contexts once as soon as a source has let
        `try_sharing` find the same log-probs that way.
        """
        from treg.rewards.scorer import Scorer

        return Scorer(
            self.model,
            self.tokenizer,
            tokens_per_batch=self.tokens_per_batch,
            share_prefix=self.share_prefix,
            on_tokens=self.on_tokens,
        )

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


class TokenRewardSource(Protocol):
    """What `treg annotate` and the trainers ask of a source of token rewards."""

    # a frozen dataclass; its fields, of the types str, int, float, bool and lists of them, become
    # options of the command line and of YAML files
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
        checked.append(
            {
                stream: _one_number_a_token(streams[stream], len(response.ids), where, stream)
                for stream in source.streams
            }
        )
    return checked


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
