"""RED: a reward model's verdict on a whole answer, redistributed over the tokens of the answer.

    rtil_t = R(x, y_<=t) - R(x, y_<t),  R(x, y_<1) = R(x, empty)          Eq. 6
    rhat_t = beta_c rtil_t + (1 - beta_c) R(x, y) [t ends the answer]     Eq. 7

R is what an off-the-shelf reward model, a sequence classifier, says of the text so far: its own
head, read at every position. So sum_t rtil_t = R(x, y) - R(x, empty).

Paper: RED, arXiv 2411.08302, Eq. 6-7. Eq. 8, the penalty for leaving the reference, belongs to the
policy's training and is left out.
Differs: the paper's reward model has the policy's tokens. Here it may have a tokenizer and a chat
template of its own, and R is carried over by characters:

- The reward model reads [*prompt, *answer] as its own template writes it, given the row's tools and
  template options; or, where rows are plain text, prompt + answer with the special tokens that its
  tokenizer adds, and no others.
- R(x, empty) is R after the last token that ends before the answer's first character: after the
  header of the assistant's turn. A token that lies on both sides of that place is the answer's.
- That character is where the conversation with another answer differs; if the answer is not found
  from there on, as where a template writes thoughts in a form of its own, it is where the prompt
  and the header end.
- R(x, y_<=t) is R after the last of the reward model's tokens whose characters of the answer are
  all among those that the policy's tokens up to t have completed. A policy's token that completes
  no character gets 0.
- What the reward model reads after the answer's last character, such as the end of the turn, goes
  to the policy's token that ends the answer, the first after its content that is scored, or the
  last one of its content if there is none, as where the answer was cut off. So R(x, y) is the
  number that the reward model gives the whole conversation. The same token gets R(x, y) of Eq. 7.
- Of several messages those of others, such as what a tool returns, are no tokens of the answer. How
  R changes over them goes to the answer's token before them, which led to them; before the first,
  to the first. So the sum stays.
- "After a token" is what the reward model's own forward gives for the beginning that ends there.
  Models that look for the last token that is no padding thus read an earlier one, if their padding
  token is also what ends a turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from treg.data import Renderer, RowProblem, text_of
from treg.data.annotated import tokenizer_fingerprint
from treg.data.pieces import content_places, text_spans
from treg.data.rendering import asks_for_date
from treg.rewards.base import Context
from treg.rewards.response import Response, cut_messages, differs
from treg.rewards.reward_model import DTYPES, RewardModel

PREFIXES = ("together", "separate")


@dataclass(frozen=True)
class RedistributionOptions:
    """model: a sequence classifier (`AutoModelForSequenceClassification`), or a PEFT adapter of
    one, such as what TRL's RewardTrainer saves.
    tokenizer: the reward model's, if it is not in the folder of model.
    prefixes: "together" reads R at all positions in one forward pass, which takes a causal model
        whose head reads one position; that is checked. "separate" runs every beginning by itself,
        through the model's own forward.
    step: with "separate", a beginning ends after every step-th token of the answer; R is linear
        between two of them, so that the tokens of a step share its difference evenly.
    label: the logit that is R, by index or name; it may be left out if there is but one.
    beta_c: in [0, 1], Eq. 7.
    dtype: of the reward model; None: float32 on a CPU, else its checkpoint's.
    """

    adds_up_to_a_score: ClassVar[bool] = True

    model: str = field(
        metadata={"help": "Folder or hub name of the reward model, a sequence classifier."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "The same of its tokenizer, if that is elsewhere."}
    )
    prefixes: Literal["together", "separate"] = field(
        default="together",
        metadata={
            "help": "together: score all beginnings of an answer in one forward pass. separate: "
            "each by itself, for models that are not causal."
        },
    )
    step: int = field(default=1, metadata={"help": "With separate: tokens between two beginnings."})
    label: str | int | None = field(
        default=None, metadata={"help": "Index or name of the logit to use, if there are several."}
    )
    beta_c: float = field(
        default=1.0,
        metadata={"help": "In [0, 1]: how much is redistributed; the rest goes to the end."},
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": f"{', '.join(DTYPES)}. Default: float32 on a CPU, else auto."},
    )

    def __post_init__(self):
        if self.prefixes not in PREFIXES:
            raise ValueError(f"prefixes: expected 'together' or 'separate', got {self.prefixes!r}")
        if not isinstance(self.step, int) or isinstance(self.step, bool) or self.step < 1:
            raise ValueError(f"step: expected a positive integer, got {self.step!r}")
        if self.step > 1 and self.prefixes == "together":
            raise ValueError(
                f"step: expected 1 with prefixes 'together', which reads every token, got "
                f"{self.step}; give prefixes 'separate'"
            )
        if not isinstance(self.beta_c, (int, float)) or not 0 <= self.beta_c <= 1:
            raise ValueError(f"beta_c: expected a number in [0, 1], got {self.beta_c!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected {', '.join(DTYPES)} or None, got {self.dtype!r}")


@dataclass(frozen=True, eq=False)
class Reading:
    """A response as the reward model reads it.

    ids: its tokens of the whole conversation, U of them.
    first: how many precede the answer, at least 1.
    held: [U - first, 2] int32: the characters of the response's text that each of the others holds.
    """

    ids: list[int]
    first: int
    held: np.ndarray


class RedistributionSource:
    """Token rewards by a reward model, whose score of an answer is what they add up to."""

    Options: ClassVar[type] = RedistributionOptions
    streams: ClassVar[tuple[str, ...]] = ("token_rewards",)

    def __init__(self, options: RedistributionOptions, context: Context):
        self.options = options
        self.context = context
        named = (options.model, options.tokenizer, options.label, options.dtype)
        self.reward_model: RewardModel = context.shared(
            ("reward model", *named),
            lambda: RewardModel(
                options.model,
                tokenizer=options.tokenizer,
                label=options.label,
                dtype=options.dtype,
                device=context.model.device,
                tokens_per_batch=context.tokens_per_batch,
                on_tokens=context.on_tokens,
            ),
        )
        self._unchecked = options.prefixes == "together"
        if self._unchecked:
            self.reward_model.check_head()
        # check and score both need what the reward model reads: it is made once
        self._readings: WeakKeyDictionary[Response, Reading] = WeakKeyDictionary()

    def settings(self) -> dict[str, Any]:
        options, judge = self.options, self.reward_model
        return {
            "reward_model": judge.fingerprint,
            "reward_tokenizer": tokenizer_fingerprint(judge.tokenizer),
            # what a model without attention to its padding token reads depends on it
            "pad": judge.pad,
            "label": judge.label,
            "beta_c": options.beta_c,
            "prefixes": options.prefixes,
            "step": options.step,
            "dtype": str(judge.model.dtype),
        } | self._date

    @property
    def _date(self) -> dict[str, str]:
        """What the reward model's template takes for today, if it asks; of the run's rows."""
        pairs = self.context.pairs
        if not pairs or not asks_for_date(self.reward_model.tokenizer):
            return {}
        return {"date": str(pairs[0][0].date)}

    def check(self, response: Response) -> RowProblem | None:
        """A response is refused that is not found in what its tokens say, or in what the reward
        model reads, one that was cut after the first of several messages, and one that the reward
        model's positions do not hold.

        Raises:
            ValueError: messages, and a reward model without a chat template; a tokenizer that is
                not the reward model's.
        """
        problem = cut_messages(response)
        if problem is not None:
            return problem
        try:
            reading = self.reading(response)
        except RowProblem as problem:
            return RowProblem(problem.reason, problem.detail, response.where)
        if response.spans is None:
            return RowProblem("answer not found", differs(response), response.where)
        self.reward_model.check_ids(reading.ids)
        need, longest = len(reading.ids), self.reward_model.longest
        if need <= longest:
            return None
        detail = f"{need} tokens, the reward model has {longest} positions; lower max_length"
        return RowProblem("answer too long for the reward model", detail, response.where)

    def score(self, responses: Sequence[Response]) -> list[dict[str, Tensor]]:
        readings = [self.reading(response) for response in responses]
        if self._unchecked:
            self._check_readings(readings)
        found = []
        for response, reading, scores in zip(
            responses, readings, self._scores(readings), strict=True
        ):
            spans: Any = response.spans
            end = response.end
            rewards = self.options.beta_c * carried_over(scores, reading.held, spans[:, 1], end)
            rewards = for_the_answer(rewards, response.judged.numpy(), end)
            rewards[end] += (1 - self.options.beta_c) * scores[-1]
            found.append({"token_rewards": torch.from_numpy(rewards).float()})
        return found

    def _check_readings(self, readings: Sequence[Reading]) -> None:
        """Check on the longest and the shortest of the first answers that R can be read at all
        positions together.
        """
        by_length = sorted(readings, key=lambda x: len(x.ids))
        for reading in by_length[:: max(1, len(by_length) - 1)]:
            ends = {reading.first, (reading.first + len(reading.ids) + 1) // 2, len(reading.ids)}
            self.reward_model.check_reading(reading.ids, sorted(ends))
        self._unchecked = False

    def _scores(self, readings: Sequence[Reading]) -> list[np.ndarray]:
        """Of each reading, [U - first + 1] float64: R before the answer, and after each token from
        there on.
        """
        if self.options.prefixes == "together":
            scores = self.reward_model.of_beginnings([reading.ids for reading in readings])
            return [x[r.first - 1 :] for x, r in zip(scores, readings, strict=True)]
        step = self.options.step
        found = []
        for reading in readings:  # one by one: the beginnings of an answer are many tokens
            ids, first = reading.ids, reading.first
            ends = [*range(first, len(ids), step), len(ids)]
            known = self.reward_model.of_texts([ids[:end] for end in ends])
            found.append(np.interp(np.arange(first, len(ids) + 1), ends, known))
        return found

    def reading(self, response: Response) -> Reading:
        """A response as the reward model reads it.

        Raises:
            RowProblem: the template refuses it, or the answer is not in what it writes.
        """
        if response not in self._readings:
            self._readings[response] = self._read(response)
        return self._readings[response]

    def _read(self, response: Response) -> Reading:
        plain = isinstance(response.prompt, str)
        if plain:
            text, places = f"{response.prompt}{response.text}", [[len(response.prompt)]]
            parts = [response.text]
        else:
            answer = _messages(response)
            text, places = self._rendered(response, response.prompt, answer)
            parts = [text_of([message]) for message in answer]
        encoded = self.reward_model.tokenizer(
            text, add_special_tokens=plain, return_offsets_mapping=True, verbose=False
        )
        reach, ends = token_ends(encoded["offset_mapping"])
        for place in places[0]:
            first = int(np.searchsorted(reach, place, side="right"))
            if first == 0:
                raise RowProblem("empty prompt", "the reward model has no token before the answer")
            bounds = [place, *ends[first:].tolist(), len(text)]
            begins = [[x - place for x in of_message] for of_message in ([place], *places[1:])]
            # the last piece is what no token holds
            held = text_spans([text[a:b] for a, b in pairwise(bounds)], parts, begins)
            if held is not None and (held[:-1].any() or not response.text.strip()):
                return Reading(encoded["input_ids"], first, held[:-1])
        raise RowProblem(
            "answer not found", "the reward model's chat template does not write it as it is"
        )

    def _rendered(
        self, response: Response, prompt: Any, answer: list[dict]
    ) -> tuple[str, list[list[int]]]:
        """The conversation as the reward model's template writes it, and where each message of the
        answer may begin (`content_places`).
        """
        tokenizer = self.reward_model.tokenizer
        if tokenizer.chat_template is None:
            raise ValueError(
                f"rewards.tokenizer: {response.where} holds messages, and the reward model's "
                "tokenizer has no chat template to render them; save one with it, or give a folder "
                "that has one"
            )

        # the row's variables are for the policy's template: this one may not read them all
        kwargs, date = response.template_kwargs, response.date
        render = Renderer(tokenizer, response.tools, kwargs, date, strict=False)
        text = render([*prompt, *answer])
        return text, content_places(render, text, prompt, answer)


def carried_over(scores: np.ndarray, held: np.ndarray, ends: np.ndarray, end: int) -> np.ndarray:
    """Eq. 6 for the policy's tokens, from R after each of the reward model's.

        rtil_t = Phi(e_t) - Phi(e_{t-1}),  Phi(e_0) = R(x, empty),  + R(x, y) - Phi(e_T) at `end`

    where Phi(e) is R after the last of the reward model's tokens that hold characters and none
    beyond e; R(x, empty) before the first. The sum is R(x, y) - R(x, empty).

    Args:
        scores: [U + 1] float64: R(x, empty), and R after each of the reward model's U tokens.
        held: [U, 2]: the characters of the answer that each of these holds (`text_spans`).
        ends: [T]: e_t, how many characters the policy's tokens up to t have completed.
        end: the policy's token that ends the answer.
    Returns:
        [T] float64.
    """
    holding = np.flatnonzero(held[:, 1] > held[:, 0])
    after = scores[np.concatenate([[0], holding + 1])]
    potential = after[np.searchsorted(held[holding, 1], ends, side="right")]
    rewards = np.diff(potential, prepend=scores[0])
    rewards[end] += scores[-1] - potential[-1]
    return rewards


def for_the_answer(rewards: np.ndarray, judged: np.ndarray, end: int) -> np.ndarray:
    """Rewards of which each token that is not the answer's has given its own to the last one of the
    answer before it, or to the first.

    Args:
        rewards: [T] float64. judged: [n], places of the answer's tokens, in order.
        end: the token that ends the answer: it gets its own and all after it.
    Returns:
        [T] float64, with the sum of rewards.
    """
    places = np.append(judged[judged < end], end)
    owner = places[(np.searchsorted(places, np.arange(len(rewards)), side="right") - 1).clip(0)]
    return np.bincount(owner, weights=rewards, minlength=len(rewards))


def token_ends(offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """How far in a text each token reaches, and up to where it and those before it have completed
    the characters: less, if a character goes on in the next token.

    Args:
        offsets: (start, end) of each token, from a fast tokenizer; (0, 0) of one that is not in the
            text.
    Returns:
        Two of [U] int64, neither of which decreases.
    """
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    reach = np.maximum.accumulate(ends)
    # where the next token begins, or a later one before it
    later = np.where(ends > 0, starts, ends.max(initial=0))
    following = np.minimum.accumulate(np.append(later, ends.max(initial=0))[::-1])[::-1][1:]
    return reach, np.maximum.accumulate(np.minimum(ends, following))


def _messages(response: Response) -> list[dict]:
    """The answer as messages; what is left of one that was cut, as one message."""
    completion = response.completion
    if isinstance(completion, str) or response.text != text_of(completion):
        return [{"role": "assistant", "content": response.text}]
    return completion
