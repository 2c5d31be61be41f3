"""How engines are asked for the log-probs of token ids, and what they answer.

    vllm      POST /v1/completions with prompt_logprobs: of each position a dict, token id -> number
    sglang    POST /generate with return_logprob: from logprob_start_len on [number, id, text]
    echo      POST /v1/completions with echo and logprobs, as OpenAI had it: a list of numbers

All are given token ids. An answer counts if it has one log-prob for each token of the completion,
of those very ids as far as the engine names them, and if the engine counts as many tokens of the
prompt as it was given: then it has added none, and cut none off.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

COMPLETIONS = "/v1/completions"
NEVER = -9000.0  # JSON has no infinity: vLLM writes -9999 for a token that never comes
ABOVE_ZERO = 1e-3  # nats, of rounding; more is no log-prob


class WrongAnswer(ValueError):
    """An answer that is not one log-prob for each token that was sent."""


class NeverComes(Exception):
    """A token has the probability 0."""


@dataclass(frozen=True)
class Said:
    """What an answer says of a prompt.

    logprobs: of the last so many tokens of the prompt. ids: of these, None where the engine does
    not name them.
    """

    logprobs: list[float | None]
    ids: list[int] | None


@dataclass(frozen=True)
class Next:
    """The token that an engine finds likeliest after a prompt; what it does not say is None."""

    id: int | None
    text: str | None
    logprob: float | None


class Dialect(Protocol):
    """One way to ask."""

    name: ClassVar[str]

    def request(self, model: str, context: list[int], completion: list[int]) -> tuple[str, dict]:
        """Path and body of a request for the log-probs of a completion after a context."""
        ...

    def tokens(self, answer: Any) -> int | None:
        """How many tokens the engine counts in the prompt; None: it does not say."""
        ...

    def said(self, answer: Any, sent: list[int]) -> Said:
        """What an answer to these ids says of them; WrongAnswer where it has another form."""
        ...

    def next(self, answer: Any, sent: list[int]) -> Next:
        """The token that follows them."""
        ...


def logprobs_of(dialect: Dialect, answer: Any, context: list[int], completion: list[int]) -> Tensor:
    """Log-probs [tokens of the completion] float32, nats, of an answer that is held against what
    was sent.

    Raises:
        WrongAnswer: not one finite number for each token, other ids, another count of tokens.
        NeverComes: a token that has the probability 0.
    """
    sent = context + completion
    if not isinstance(answer, dict):
        raise WrongAnswer(f"expected a JSON object, got {type(answer).__name__}")
    tokens = dialect.tokens(answer)
    if tokens is not None and tokens != len(sent):
        raise WrongAnswer(
            f"expected a prompt of {len(sent)} tokens, as it was sent, got one of {tokens}: the "
            f"server {'adds tokens to it' if tokens > len(sent) else 'cuts it'}"
        )
    said = dialect.said(answer, sent)
    if said.ids is not None and said.ids != sent[len(sent) - len(said.ids) :]:
        raise WrongAnswer(f"expected log-probs of the ids that were sent, got {_other(said, sent)}")
    if len(said.logprobs) < len(completion) or len(said.logprobs) > len(sent):
        raise WrongAnswer(
            f"expected log-probs of {len(completion)} tokens of {len(sent)}, got "
            f"{len(said.logprobs)}"
        )
    return _checked(said.logprobs[-len(completion) :])


def _checked(values: Sequence[float | None]) -> Tensor:
    for place, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise WrongAnswer(
                f"expected a log-prob of token {place} of the completion, got {value!r}"
            )
        if value == -math.inf or value <= NEVER:
            raise NeverComes(f"token {place} of the completion has the log-prob {value}")
        if not math.isfinite(value) or value > ABOVE_ZERO:
            raise WrongAnswer(
                f"expected log-probs, numbers <= 0, got {value} for token {place} of the completion"
            )
    return torch.tensor(values, dtype=torch.float32).clamp(max=0.0)


def _other(said: Said, sent: list[int]) -> str:
    """The first id that is not the one that was sent."""
    ids = said.ids or []
    tail = sent[max(0, len(sent) - len(ids)) :]
    for place, (found, wanted) in enumerate(zip(ids, tail, strict=False)):
        if found != wanted:
            return f"{found} instead of {wanted} at place {len(sent) - len(tail) + place}"
    return f"{len(ids)} ids for {len(sent)}"


def _choice(answer: Any) -> Mapping[str, Any]:
    """The one choice of an answer in OpenAI's form."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise WrongAnswer("expected one choice, as /v1/completions gives it")
    return choices[0]


def _count(holder: Any) -> int | None:
    found = holder.get("prompt_tokens") if isinstance(holder, dict) else None
    return found if isinstance(found, int) else None


class VLLM:
    """vLLM's prompt_logprobs, which name the ids."""

    name: ClassVar[str] = "vllm"

    def request(self, model: str, context: list[int], completion: list[int]) -> tuple[str, dict]:
        body = _body(model, context + completion)
        # 0: of the token itself alone
        return COMPLETIONS, body | {"prompt_logprobs": 0, "logprobs": 0}

    def said(self, answer: Any, sent: list[int]) -> Said:
        found = _choice(answer).get("prompt_logprobs")
        if not isinstance(found, list):
            raise WrongAnswer("expected prompt_logprobs in the choice, found none")
        if len(found) != len(sent):
            raise WrongAnswer(f"expected prompt_logprobs of {len(sent)} tokens, got {len(found)}")
        numbers, ids = [], []
        for place, (entry, wanted) in enumerate(zip(found, sent, strict=True)):
            if place == 0 and entry is None:
                numbers.append(None)
                ids.append(wanted)
                continue
            if not isinstance(entry, dict) or str(wanted) not in entry:
                got = ", ".join(map(str, entry)) if isinstance(entry, dict) else repr(entry)
                raise WrongAnswer(f"expected the log-prob of {wanted} at place {place}, got {got}")
            own = entry[str(wanted)]
            numbers.append(own.get("logprob") if isinstance(own, dict) else own)
            ids.append(wanted)
        named = _choice(answer).get("prompt_token_ids")
        return Said(numbers, named if isinstance(named, list) else ids)

    def tokens(self, answer: Any) -> int | None:
        return _count(answer.get("usage"))

    def next(self, answer: Any, sent: list[int]) -> Next:
        return _next(_choice(answer), 0)


class Echo:
    """OpenAI's echo of the prompt with its log-probs, which name no ids."""

    name: ClassVar[str] = "echo"

    def request(self, model: str, context: list[int], completion: list[int]) -> tuple[str, dict]:
        return COMPLETIONS, _body(model, context + completion) | {"echo": True, "logprobs": 1}

    def said(self, answer: Any, sent: list[int]) -> Said:
        choice = _choice(answer)
        numbers = (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(numbers, list):
            raise WrongAnswer("expected logprobs.token_logprobs in the choice, found none")
        # one more is that of the token that was made, which may have been the end
        if len(numbers) not in (len(sent), len(sent) + 1):
            raise WrongAnswer(
                f"expected token_logprobs of {len(sent)} tokens and of the next, got {len(numbers)}"
            )
        named = choice.get("prompt_token_ids")
        if self.tokens(answer) is None and not isinstance(named, list):
            raise WrongAnswer(
                "expected usage.prompt_tokens, by which to know the prompt, found none"
            )
        return Said(numbers[: len(sent)], named if isinstance(named, list) else None)

    def tokens(self, answer: Any) -> int | None:
        return _count(answer.get("usage"))

    def next(self, answer: Any, sent: list[int]) -> Next:
        return _next(_choice(answer), len(sent))


class SGLang:
    """SGLang's own /generate, which gives the log-probs of the completion alone."""

    name: ClassVar[str] = "sglang"

    def request(self, model: str, context: list[int], completion: list[int]) -> tuple[str, dict]:
        return "/generate", {
            "input_ids": context + completion,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            # the first has none, as the first of a prompt
            "logprob_start_len": len(context) - 1,
            "top_logprobs_num": 0,
        }

    def said(self, answer: Any, sent: list[int]) -> Said:
        meta = answer.get("meta_info")
        entries = meta.get("input_token_logprobs") if isinstance(meta, dict) else None
        if not isinstance(meta, dict) or not isinstance(entries, list):
            raise WrongAnswer("expected meta_info.input_token_logprobs, found none")
        if not all(isinstance(x, list) and len(x) >= 2 for x in entries):
            raise WrongAnswer(f"expected [log-prob, id, text] of each token, got {entries[:2]}")
        return Said([x[0] for x in entries], [x[1] for x in entries])

    def tokens(self, answer: Any) -> int | None:
        return _count(answer.get("meta_info"))

    def next(self, answer: Any, sent: list[int]) -> Next:
        made = answer["meta_info"].get("output_token_logprobs") or [[None, None, None]]
        return Next(made[0][1], None, made[0][0])


def _body(model: str, ids: list[int]) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": ids,
        "max_tokens": 1,
        "temperature": 0,
        "return_token_ids": True,
    }


def _next(choice: Mapping[str, Any], place: int) -> Next:
    """The token at a place of the choice's log-probs."""
    logprobs = choice.get("logprobs") or {}
    numbers, texts = logprobs.get("token_logprobs") or [], logprobs.get("tokens") or []
    made = choice.get("token_ids") or []
    return Next(
        made[0] if made else None,
        texts[place] if len(texts) > place else None,
        numbers[place] if len(numbers) > place else None,
    )


BY_NAME: dict[str, Dialect] = {x.name: x for x in (VLLM(), SGLang(), Echo())}
