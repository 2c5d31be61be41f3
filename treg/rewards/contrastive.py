"""T-REG's token rewards: a model judges each token of a response by two opposite requests to
rewrite it.

    rhat_t = sigmoid( log p(y_t | better, y_<t) - log p(y_t | worse, y_<t) ) - 0.5

which lies in [-0.5, 0.5]. `better` and `worse` are the same conversation, response included,
followed by a request to rewrite the response so that it is better, or worse. A token that only the
worse rewriting would contain gets a negative reward. The ids of the response are the same in both
contexts, and in the pair itself; what ends a response (end-of-turn tokens) is no part of a
rewritten answer and gets the reward 0.

Paper: T-REG, arXiv 2412.02685, section 3.1 and Eq. 3.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import jinja2
import jinja2.sandbox
import torch
from torch import Tensor

from treg.data import RowProblem, prompt_text
from treg.files import read_yaml
from treg.rewards.base import Context, Response

# better and worse differ in their last sentence only, so that what precedes it is computed once for
# both
INSTRUCTION = """\
Here is a conversation that ends with an answer of the assistant.

<conversation>
{% for message in messages %}
[{{ message.role }}]
{{ message.content }}

{% endfor %}
</conversation>

Rewrite the last answer of the assistant. Stay close to the original: keep its wording, order \
and length wherever possible. Write only the new answer, between <answer> and </answer>. \
The new answer must be \
{% if better %}better: helpful, correct, coherent and concise.\
{% else %}worse: unhelpful, incorrect, incoherent and verbose.{% endif %}
"""
PREFILL = "<answer>\n"
Contexts = tuple[list[int], list[int]]


@dataclass(frozen=True)
class ContrastivePrompts:
    """The two requests that judge a response.

    instruction: a Jinja template of the user turn; it sees `messages` (the conversation, the
        response last; each with `role` and `content`) and `better` (True or False).
    prefill: how the assistant's turn begins before the response is scored as the rewritten answer.

    Paper: T-REG, arXiv 2412.02685, section 3.1: both prompts show the conversation, name the
    aspects (helpfulness, correctness, coherence, verbosity) and a format with start and end
    markers.
    Differs: the wording is our own. The paper does not say how the prompts meet a chat template,
    nor whether the start marker precedes the scored tokens: here the instruction is a user turn and
    the marker is prefilled.
    """

    instruction: str = INSTRUCTION
    prefill: str = PREFILL

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not isinstance(value, str):
                raise ValueError(f"{name}: expected a string, got {type(value).__name__}")
        probe = [{"role": "user", "content": "\x00q"}, {"role": "assistant", "content": "\x00a"}]
        better, worse = self.render(probe, better=True), self.render(probe, better=False)
        if better == worse:
            raise ValueError(
                "instruction: expected a template that depends on `better`, got the same text for "
                "both"
            )
        if "\x00a" not in better or "\x00a" not in worse:
            raise ValueError(
                "instruction: expected a template that shows the response, the last of "
                "`messages`, to both requests"
            )

    @classmethod
    def load(cls, path: str | Path) -> "ContrastivePrompts":
        """From a YAML file with the keys `instruction` and, optionally, `prefill`."""
        values = read_yaml(path)
        expected = f"{path}: expected the keys 'instruction' and, optionally, 'prefill'"
        if not isinstance(values, dict):
            raise ValueError(f"{expected}, got {type(values).__name__}")
        if "instruction" not in values or values.keys() - {"instruction", "prefill"}:
            raise ValueError(f"{expected}, got {sorted(map(str, values))}")
        return cls(**values)

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        return environment.from_string(self.instruction)

    def render(self, messages: list[dict], *, better: bool) -> str:
        """The user turn that asks for a rewriting of the last of messages."""
        try:
            return self._template.render(messages=messages, better=better).strip()
        except Exception as error:  # a template is a program: it raises anything
            raise ValueError(f"instruction: {type(error).__name__}: {error}") from error


def contrastive_rewards(better_logps: Tensor, worse_logps: Tensor) -> Tensor:
    """rhat = sigmoid(better - worse) - 0.5, in [-0.5, 0.5].   T-REG, arXiv 2412.02685 Eq. 3.

    Args:
        better_logps, worse_logps: of one shape, floating, nats: log-probs of the same tokens after
            the two requests.
    Returns:
        Like better_logps; detached. Computed as tanh((better - worse) / 2) / 2, which keeps small
        differences.
    """
    if better_logps.shape != worse_logps.shape:
        raise ValueError(
            f"worse_logps: expected the shape of better_logps {list(better_logps.shape)}, got "
            f"{list(worse_logps.shape)}"
        )
    return (torch.tanh((better_logps - worse_logps) / 2) / 2).detach()


@dataclass(frozen=True)
class ContrastiveOptions:
    """prompts: the two requests, or a YAML file of them (`ContrastivePrompts.load`); None: those of
    this file.
    """

    prompts: str | ContrastivePrompts | None = field(
        default=None,
        metadata={
            "help": "YAML file with `instruction` and `prefill`: your own contrastive prompts."
        },
    )

    def __post_init__(self):
        _ = self.requests  # a file that cannot be read is refused here

    @cached_property
    def requests(self) -> ContrastivePrompts:
        if isinstance(self.prompts, ContrastivePrompts):
            return self.prompts
        return (
            ContrastivePrompts() if self.prompts is None else ContrastivePrompts.load(self.prompts)
        )


class ContrastiveSource:
    """Token rewards by the reference model itself, asked twice to rewrite a response."""

    Options: ClassVar[type] = ContrastiveOptions
    streams: ClassVar[tuple[str, ...]] = ("token_rewards",)

    def __init__(self, options: ContrastiveOptions, context: Context):
        self.prompts = options.requests
        self.context = context
        self._sharing_tried = False
        # check and score both need the contexts of a response: they are made once
        self._contexts: WeakKeyDictionary[Response, Contexts] = WeakKeyDictionary()

    def settings(self) -> dict[str, Any]:
        return {"prompts": asdict(self.prompts)}

    def check(self, response: Response) -> RowProblem | None:
        """A response is refused whose prompt or requests the model's positions do not hold."""
        better, worse = self.contexts(response)
        longest_context = max(len(response.prompt_ids), len(better), len(worse))
        need = longest_context + len(response.ids) - 1
        longest = self.context.longest
        if need <= longest:
            return None
        detail = f"{need} tokens, the model has {longest} positions; lower max_length"
        return RowProblem("contrastive prompt too long", detail, response.where)

    def score(self, responses: Sequence[Response]) -> list[dict[str, Tensor]]:
        rows = [self._row(response) for response in responses]
        self._try_sharing(responses)
        found = []
        scored = self.context.scorer.score_both(rows)
        for response, (better, worse) in zip(responses, scored, strict=True):
            rewards = contrastive_rewards(better, worse)
            rewards[response.content :] = 0.0
            found.append({"token_rewards": rewards})
        return found

    def contexts(self, response: Response) -> Contexts:
        """Token ids of the two contexts in which a response is judged: better, worse."""
        if response not in self._contexts:
            self._contexts[response] = self._make_contexts(response)
        return self._contexts[response]

    def _make_contexts(self, response: Response) -> Contexts:
        prompt = response.prompt
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        messages = [
            {"role": message["role"], "content": str(message.get("content") or "")}
            for message in [*prompt, {"role": "assistant", "content": response.text}]
        ]
        better = self._context(messages, response.template_kwargs, better=True)
        worse = self._context(messages, response.template_kwargs, better=False)
        return better, worse

    def _context(self, messages: list[dict], kwargs: dict, *, better: bool) -> list[int]:
        tokenizer = self.context.tokenizer
        request = self.prompts.render(messages, better=better)
        if tokenizer.chat_template is not None:
            text = prompt_text(tokenizer, [{"role": "user", "content": request}], None, kwargs)
            text += self.prompts.prefill
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = tokenizer(f"{request}\n\n{self.prompts.prefill}", verbose=False)["input_ids"]
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids

    def _row(self, response: Response) -> tuple[list[int], list[int], list[int]]:
        """What the scorer takes: better and worse context, and the ids of the response."""
        better, worse = self.contexts(response)
        return better, worse, response.ids.tolist()

    def _try_sharing(self, responses: Sequence[Response]) -> None:
        """Let the scorer find out, once, whether the common beginning of the two contexts may be
        run once.

        It is tried on the longest pair of the run that fits the model's context, since some models
        turn to other positions there (longrope), and on the shortest. Where the run's pairs are not
        known, the responses at hand are tried.
        """
        if self._sharing_tried:
            return
        self._sharing_tried = True
        pairs = self.context.pairs or [tuple(responses)]
        last = len(pairs) - 1
        longest = next((i for i, pair in enumerate(pairs) if self._fits(pair)), last)
        for pair in (pairs[i] for i in dict.fromkeys((longest, last))):
            if self._fits(pair):
                self.context.scorer.try_sharing([self._row(response) for response in pair])

    def _fits(self, responses: Sequence[Response]) -> bool:
        return all(self.check(response) is None for response in responses)
