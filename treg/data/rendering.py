"""Messages through a chat template.

A template is a program, and a row may tell it things: it is bounded in time and in what it writes,
its clock stands still for a run, and a row sets only variables that it reads.
"""

import contextlib
import datetime
import functools
import inspect
import json
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

from treg.data.messages import (
    PROBE,
    Messages,
    has_tool_calls,
    turn,
)
from treg.data.report import RowProblem, described

GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
SECONDS = 10.0  # that a template may take for one conversation
GROWTH, ROOM = (
    50,
    1_000_000,
)  # characters that it may write: for each that it gets, and beside these
# variables that a conversation has anyway, and that no row may set
OWN_VARIABLES = {"messages", "raise_exception", "strftime_now", "loop", "bos_token", "eos_token"}
Span = tuple[int, int]


class Renderer:
    """A row's conversations through the chat template.

    Args:
        date: what the template takes for today, if it asks.
        strict: refuse template_kwargs that the template does not read; else they are left out.
    Raises:
        RowProblem: tools or template_kwargs that the template does not take.
    """

    def __init__(
        self,
        tokenizer: Any,
        tools: list | None = None,
        template_kwargs: dict[str, Any] | None = None,
        date: datetime.date | None = None,
        *,
        strict: bool = True,
    ):
        self.template = tokenizer.get_chat_template(None, tools)
        self.tools = tools
        self.special: dict[str, Any] = {
            name: value
            for name, value in tokenizer.special_tokens_map.items()
            if isinstance(value, (str, list))
        }
        self.tokens = tuple(str(x) for x in tokenizer.get_added_vocab())
        reads = template_variables(self.template)
        self.kwargs = _checked_kwargs(template_kwargs or {}, reads, tokenizer, strict)
        if "strftime_now" in reads:
            self.template = dated(self.template, date or datetime.date.today())

    def __call__(self, messages: Messages, **more: Any) -> str:
        """Messages as text.

        Raises:
            RowProblem: the template raises, takes too long or writes too much.
        """
        text, _ = self._render(messages, False, more)
        return text

    def marked(self, messages: Messages) -> tuple[str, list[Span]]:
        """Messages as text, and the characters that the template marks as generated; none if it has
        no such marks.
        """
        return self._render(messages, bool(GENERATION.search(self.template)), {})

    def prompt(self, messages: Messages) -> str:
        """Messages up to where the assistant's next words begin."""
        on = goes_on(messages)
        return self(messages, add_generation_prompt=not on, continue_final_message=on)

    def bound(self, text: str, place: int, *, after: bool = False) -> int:
        """A place of a text, or where it lies inside a special token, that token's beginning or
        (after) end: characters that two tokens share are no part of what the texts share.
        """
        for token in self.tokens:
            length = len(token)
            start = text.rfind(token, max(0, place - length + 1), place + length - 1)
            if 0 <= start < place < start + length:
                return start + length if after else start
        return place

    def _render(self, messages: Messages, marks: bool, more: dict) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _at_most(SECONDS):
                (text,), spans = render_jinja_template(
                    conversations=[messages],
                    tools=self.tools,
                    chat_template=self.template,
                    return_assistant_tokens_mask=marks,
                    **self.special | self.kwargs | more,
                )
            given = 0
            if len(text) > ROOM:
                given = len(json.dumps([messages, self.tools, self.kwargs], default=str))
        except RecursionError:
            raise RowProblem("nested too deeply") from None
        except Exception as error:  # a template is a program: it raises anything
            raise RowProblem("chat template", f"{type(error).__name__}: {error}") from None
        if len(text) > GROWTH * given + ROOM:
            raise RowProblem("chat template", f"it writes {len(text)} characters for {given}")
        return text, [(int(a), int(b)) for a, b in spans[0]] if marks else []


def default_template(tokenizer: Any) -> str | None:
    """The chat template of conversations without tools; None: there is none."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:  # no template at all, or named ones without a "default"
        return None


def prompt_text(
    tokenizer: Any,
    messages: Messages,
    tools: list | None = None,
    kwargs: dict | None = None,
    date: datetime.date | None = None,
    *,
    strict: bool = True,
) -> str:
    """Messages through the chat template, up to where the assistant's next words begin.

    date: what the template takes for today; None: today. strict: as in `Renderer`.
    """
    return Renderer(tokenizer, tools, kwargs, date, strict=strict).prompt(messages)


def asks_for_date(tokenizer: Any) -> bool:
    """Whether a chat template of a tokenizer asks for the date."""
    template = tokenizer.chat_template
    if template is None:
        return False
    templates = template.values() if isinstance(template, dict) else [template]
    return any("strftime_now" in template_variables(x) for x in templates)


def goes_on(messages: Messages) -> bool:
    """Whether the last message is the beginning of the assistant's turn."""
    return messages[-1]["role"] == "assistant" and not has_tool_calls(messages[-1:])


def conversation(prompt: Messages, answer: Messages) -> tuple[Messages, Messages, str]:
    """Prompt and answer as whole turns, and how the first turn of the answer begins already: a
    prompt that ends with the assistant's words goes on in the same turn.
    """
    if not prompt or not answer or not goes_on(prompt) or answer[0]["role"] != "assistant":
        return prompt, answer, ""
    begun = prompt[-1]["content"]
    first = {**answer[0], "content": begun + answer[0]["content"]}
    return prompt[:-1], [first, *answer[1:]], begun


@functools.lru_cache(maxsize=64)
def template_variables(template: str) -> frozenset[str]:
    """The names that a template reads and does not set. ValueError: it cannot be parsed."""
    import jinja2.meta

    return frozenset(jinja2.meta.find_undeclared_variables(_parsed(template)))


def _parsed(template: str) -> Any:
    import jinja2

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return environment.parse(GENERATION.sub("", template))
    except jinja2.TemplateError as error:
        raise ValueError(f"chat_template: expected a Jinja template, got: {error}") from error


@functools.cache
def _parameters(kind: type) -> frozenset[str]:
    """Arguments of apply_chat_template, which no row may set."""
    return frozenset(inspect.signature(kind.apply_chat_template).parameters) - {"documents"}


def _checked_kwargs(
    given: dict, reads: frozenset[str], tokenizer: Any, strict: bool
) -> dict[str, Any]:
    """What a row gives the template beside its messages: variables that the template reads."""
    own = OWN_VARIABLES | set(tokenizer.special_tokens_map) | _parameters(type(tokenizer))
    found = {}
    for name, value in given.items():
        unread = name not in reads and value is not None
        if name in own or (unread and strict):
            variables = ", ".join(sorted(reads - own)) or "none"
            raise RowProblem(
                "chat template",
                f"chat_template_kwargs: expected variables that the template reads ({variables}), "
                f"got {described(name)}; leave them all out with --columns chat_template_kwargs=",
            )
        if name in reads:
            found[name] = value
    return found


@functools.lru_cache(maxsize=64)
def dated(template: str, date: datetime.date) -> str:
    """A template whose `strftime_now` is at the beginning of a day.

    Raises:
        RowProblem: it asks for the time in a way that is no constant.
    """
    import jinja2.nodes

    midnight = datetime.datetime.combine(date, datetime.time())
    found = {}
    for call in _parsed(template).find_all(jinja2.nodes.Call):
        if isinstance(call.node, jinja2.nodes.Name) and call.node.name == "strftime_now":
            try:
                (text,) = (x.as_const() for x in call.args)
            except (ValueError, jinja2.nodes.Impossible):
                raise RowProblem("chat template", "strftime_now of no constant") from None
            found[text] = midnight.strftime(text)
    said = json.dumps(found, ensure_ascii=False)
    name = "strftime_now"
    # the newline after a block is left out: the template begins as it did
    macro = f"{{% macro {name}(format) -%}}{{{{ {said}[format] }}}}{{%- endmacro %}}\n"
    return macro + template


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds, where a signal can be had: in the main thread, and if
    nobody else has set an alarm.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getitimer(signal.ITIMER_REAL)[0] > 0:
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end after {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def answer_end(tokenizer: Any) -> str:
    """What a chat template writes after an answer. RowProblem: it raises for a plain one."""
    messages = [turn("user", "?"), turn("assistant", PROBE)]
    return Renderer(tokenizer)(messages).rpartition(PROBE)[2]
