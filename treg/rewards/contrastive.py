"""T-REG's token rewards: a model judges each token of a response by two opposite requests to
rewrite it.

    rhat_t = sigmoid( log p(y_t | better, y_<t) - log p(y_t | worse, y_<t) ) - 0.5      in [-0.5, 0.5]

`better` and `worse` are the same conversation, response included, followed by a request to rewrite
the response so that it is better, or worse. A token that only the worse rewriting would contain
gets a negative reward.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import jinja2
import jinja2.sandbox
import torch
from torch import Tensor

from treg.files import read_yaml

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

Rewrite the last answer of the assistant. Stay close to the original: keep its wording, order and length wherever \
possible. Write only the new answer, between <answer> and </answer>. The new answer must be \
{% if better %}better: helpful, correct, coherent and concise.{% else %}worse: unhelpful, incorrect, incoherent and \
verbose.{% endif %}
"""
PREFILL = "<answer>\n"


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
                "instruction: expected a template that depends on `better`, got the same text for both"
            )
        if "\x00a" not in better or "\x00a" not in worse:
            raise ValueError(
                "instruction: expected a template that shows the response, the last of `messages`, to both requests"
            )

    @classmethod
    def load(cls, path: str | Path) -> "ContrastivePrompts":
        """From a YAML file with the keys `instruction` and, optionally, `prefill`."""
        values = read_yaml(path)
        if (
            not isinstance(values, dict)
            or "instruction" not in values
            or values.keys() - {"instruction", "prefill"}
        ):
            got = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
            raise ValueError(
                f"{path}: expected the keys 'instruction' and, optionally, 'prefill', got {got}"
            )
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
            f"worse_logps: expected the shape of better_logps {list(better_logps.shape)}, got {list(worse_logps.shape)}"
        )
    return (torch.tanh((better_logps - worse_logps) / 2) / 2).detach()
