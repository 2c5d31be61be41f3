"""T-REG's token rewards: a model judges each token of a response by two opposite requests to
rewrite it.

    rhat_t = sigmoid( log p(y_t | better, y_<t) - log p(y_t | worse, y_<t) ) - 0.5

which lies in [-0.5, 0.5]. `better` and `worse` are the same conversation, response included,
followed by a request to rewrite the response so that it is better, or worse. A token that only the
worse rewriting would contain gets a negative reward. The ids of the response are the same in both
contexts, and in the pair itself; what ends a response (end-of-turn tokens) is no part of a
rewritten answer and gets the reward 0.

Paper: T-REG, arXiv 2412.02685, section 3.1 and Eq. 3.

Other readings of the same log-ratio are options; the paper's stays the default. Measured with
models up to 0.5B parameters, none of these readings, the paper's among them, told marked tokens
(wrong facts, ungrammatical words, wrong steps) from the others better than chance: what did so on
one set of marks did not on another. Models as large as the paper's were not measured.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, get_args
from weakref import WeakKeyDictionary

import jinja2
import jinja2.sandbox
import torch
from torch import Tensor

from treg.data import RowProblem, prompt_text, shown_text
from treg.files import read_yaml
from treg.rewards.base import Context, check_number
from treg.rewards.response import Response, cut_messages
from treg.rewards.shaping import means_over, standardise
from treg.rewards.units import Unit, unit_numbers

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
HIDDEN_INSTRUCTION = """\
Here is a conversation.

<conversation>
{% for message in messages %}
[{{ message.role }}]
{{ message.content }}

{% endfor %}
</conversation>

Write the next answer of the assistant. Write only the answer, between <answer> and </answer>. \
The answer must be \
{% if better %}good: helpful, correct, coherent and concise.\
{% else %}bad: unhelpful, incorrect, incoherent and verbose.{% endif %}
"""
PREFILL = "<answer>\n"
Contexts = tuple[list[int], list[int]]


@dataclass(frozen=True)
class ContrastivePrompts:
    """The two requests that judge a response.

    instruction: a Jinja template of the user turn; it sees `messages` (the conversation, the
        response last; each with `role` and `content`) and `better` (True or False).
    prefill: a Jinja template of how the assistant's turn begins, before the response is scored as
        the rewritten answer; it sees the same.

    Paper: T-REG, arXiv 2412.02685, section 3.1: both prompts show the conversation, name the
    aspects (helpfulness, correctness, coherence, verbosity) and a format with start and end
    markers.
    Differs: the wording is our own. The paper does not say how the prompts meet a chat template,
    nor whether the start marker precedes the scored tokens: here the instruction is a user turn and
    the marker is prefilled.
    """

    instruction: str = INSTRUCTION
    prefill: str = PREFILL

    shows_response: ClassVar[bool] = True

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not isinstance(value, str):
                raise ValueError(f"{name}: expected a string, got {type(value).__name__}")
        question = {"role": "user", "content": "\x00q"}
        answer = {"role": "assistant", "content": "\x00a"}
        probe = [question, answer] if self.shows_response else [question]
        better, worse = self.render(probe, better=True), self.render(probe, better=False)
        begins = [self.beginning(probe, better=x) for x in (True, False)]
        if better == worse and begins[0] == begins[1]:
            raise ValueError(
                "instruction: expected a template that depends on `better`, got the same text for "
                "both"
            )
        if self.shows_response and ("\x00a" not in better or "\x00a" not in worse):
            raise ValueError(
                "instruction: expected a template that shows the response, the last of "
                "`messages`, to both requests; show_response=False takes one that does not"
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

    def render(self, messages: list[dict], *, better: bool) -> str:
        """The user turn that asks for a rewriting of the last of messages."""
        try:
            return self._instruction.render(messages=messages, better=better).strip()
        except Exception as error:  # a template is a program: it raises anything
            raise ValueError(f"instruction: {type(error).__name__}: {error}") from error

    def beginning(self, messages: list[dict], *, better: bool) -> str:
        """How the assistant's turn begins."""
        try:
            return self._prefill.render(messages=messages, better=better)
        except Exception as error:
            raise ValueError(f"prefill: {type(error).__name__}: {error}") from error

    @cached_property
    def _instruction(self) -> jinja2.Template:
        return _environment().from_string(self.instruction)

    @cached_property
    def _prefill(self) -> jinja2.Template:
        # its end is where the response begins: a newline there stays
        return _environment(keep_trailing_newline=True).from_string(self.prefill)


def _environment(**more: Any) -> jinja2.Environment:
    return jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, **more
    )


@dataclass(frozen=True)
class HiddenPrompts(ContrastivePrompts):
    """Two requests that do not show the response: they ask for a good and for a bad answer.

    The fields are those of `ContrastivePrompts`; `messages` is the conversation without the
    response.
    """

    instruction: str = HIDDEN_INSTRUCTION

    shows_response: ClassVar[bool] = False


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
    show_response: False: requests that do not show the response (`HiddenPrompts`), which condition
        on quality alone.
    unit: "word" or "sentence": the log-ratio is averaged over the tokens of each before the
        sigmoid (see `treg.rewards.units`).
    spread: None, or the log-ratios of a response are centred and scaled to this standard deviation
        before the sigmoid, after they were averaged.
    skip_first: so many tokens get the reward 0 and take no part in unit and spread: the first one
        alone may hold a fifth of all that the two requests differ by.

    Differs: all but prompts are readings of our own, off by default.
    """

    asks_reference: ClassVar[bool] = True

    prompts: str | ContrastivePrompts | None = field(
        default=None,
        metadata={
            "help": "YAML file with `instruction` and `prefill`: your own contrastive prompts."
        },
    )
    show_response: bool = field(
        default=True, metadata={"help": "Whether the two requests show the response."}
    )
    unit: Unit = field(
        default="token", metadata={"help": "What a log-ratio is of: token, word or sentence."}
    )
    spread: float | None = field(
        default=None,
        metadata={"help": "Standard deviation that the log-ratios of a response are scaled to."},
    )
    skip_first: int = field(default=0, metadata={"help": "So many first tokens get 0."})

    def __post_init__(self):
        _ = self.requests  # a file that cannot be read is refused here
        if self.unit not in get_args(Unit):
            raise ValueError(
                f"unit: expected one of {', '.join(get_args(Unit))}, got {self.unit!r}"
            )
        if self.spread is not None:
            check_number("spread", self.spread, positive=True)
        whole = isinstance(self.skip_first, int) and not isinstance(self.skip_first, bool)
        if not whole or self.skip_first < 0:
            raise ValueError(f"skip_first: expected a whole number >= 0, got {self.skip_first!r}")

    @cached_property
    def requests(self) -> ContrastivePrompts:
        kind = ContrastivePrompts if self.show_response else HiddenPrompts
        if not isinstance(self.prompts, ContrastivePrompts):
            return kind() if self.prompts is None else kind.load(self.prompts)
        if self.prompts.shows_response != self.show_response:
            raise ValueError(
                f"prompts: expected {kind.__name__} with show_response={self.show_response}, got "
                f"{type(self.prompts).__name__}"
            )
        return self.prompts


class ContrastiveSource:
    """Token rewards by the reference model itself, asked twice to rewrite a response."""

    Options: ClassVar[type] = ContrastiveOptions
    streams: ClassVar[tuple[str, ...]] = ("token_rewards",)

    def __init__(self, options: ContrastiveOptions, context: Context):
        self.options = options
        self.prompts = options.requests
        self.context = context
        # check and score both need the contexts of a response: they are made once
        self._contexts: WeakKeyDictionary[Response, Contexts] = WeakKeyDictionary()

    def settings(self) -> dict[str, Any]:
        """The prompts, and of the other options those that are not the default."""
        own = {x.name: getattr(self.options, x.name) for x in fields(self.options)}
        default = ContrastiveOptions()
        changed = {
            name: value
            for name, value in own.items()
            if name != "prompts" and value != getattr(default, name)
        }
        return {"prompts": asdict(self.prompts)} | changed

    def check(self, response: Response) -> RowProblem | None:
        """A response is refused whose prompt or requests the model's positions do not hold, one
        whose requests the chat template does not take, and one that was cut after the first of
        several messages.
        """
        problem = cut_messages(response)
        if problem is not None:
            return problem
        try:
            better, worse = self.contexts(response)
        except RowProblem as found:
            return RowProblem(found.reason, f"request: {found.detail}", response.where)
        longest_context = max(len(response.prompt_ids), len(better), len(worse))
        need = longest_context + len(response.ids) - 1
        longest = self.context.longest
        if need <= longest:
            return None
        detail = f"{need} tokens, the model has {longest} positions; lower max_length"
        return RowProblem("contrastive prompt too long", detail, response.where)

    def score(self, responses: Sequence[Response]) -> list[dict[str, Tensor]]:
        # two sources with the same prompts run the model once
        scored = self.context.once(("contrastive", self.prompts), responses, self._score_both)
        found = []
        for response, (better, worse) in zip(responses, scored, strict=True):
            places, ratios = self._read(better - worse, response)
            rewards = torch.zeros_like(better)
            rewards[places] = contrastive_rewards(ratios, torch.zeros_like(ratios))
            found.append({"token_rewards": rewards})
        return found

    @torch.no_grad()
    def _score_both(self, responses: Sequence[Response]) -> list[tuple[Tensor, Tensor]]:
        """Log-probs of each response after its better and after its worse context."""
        rows = []
        for response in responses:
            better, worse = self.contexts(response)
            rows += [(better, response.ids.tolist()), (worse, response.ids.tolist())]
        scored = self.context.scorer.score(rows)
        return list(zip(scored[::2], scored[1::2], strict=True))

    def _read(self, ratios: Tensor, response: Response) -> tuple[Tensor, Tensor]:
        """Places [n] of the tokens that have a reward, and their log-ratios as the options say they
        are read.

        Args:
            ratios: [T].
        """
        options = self.options
        places = response.judged[options.skip_first :]
        read = ratios[places]
        if options.unit != "token":
            read = means_over(read, unit_numbers(response, options.unit)[options.skip_first :])
        if options.spread is not None and len(read):
            read = standardise(read, options.spread)
        return places, read

    def contexts(self, response: Response) -> Contexts:
        """Token ids of the two contexts in which a response is judged: better, worse."""
        if response not in self._contexts:
            self._contexts[response] = self._make_contexts(response)
        return self._contexts[response]

    def _make_contexts(self, response: Response) -> Contexts:
        prompt = response.prompt
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        messages = [{"role": x["role"], "content": shown_text(x)} for x in prompt]
        if response.tools:
            tools = json.dumps(response.tools, ensure_ascii=False, default=str)
            messages.insert(0, {"role": "tools", "content": tools})
        if self.prompts.shows_response:
            said = response.text if response.shown is None else response.shown
            messages.append({"role": "assistant", "content": said})
        better = self._context(messages, response, better=True)
        worse = self._context(messages, response, better=False)
        return better, worse

    def _context(self, messages: list[dict], response: Response, *, better: bool) -> list[int]:
        tokenizer = self.context.tokenizer
        request = self.prompts.render(messages, better=better)
        beginning = self.prompts.beginning(messages, better=better)
        if tokenizer.chat_template is not None:
            asked = [{"role": "user", "content": request}]
            # the row's variables may be read by the template of tools alone
            kwargs, date = response.template_kwargs, response.date
            text = prompt_text(tokenizer, asked, None, kwargs, date, strict=False) + beginning
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = tokenizer(f"{request}\n\n{beginning}", verbose=False)["input_ids"]
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
