"""Rows through a chat template: where an answer begins and ends in the text that it writes.

A template is a program. What it wrote of which message is found by asking it again: the prompt
alone, and the conversation with another content in the place of one message's. What agrees is the
template's own, what differs is what the message says. The result is held against the messages: a
row whose prompt is written otherwise before its answer, or whose answer is not in what is written,
is refused by name.
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
from dataclasses import dataclass
from typing import Any

from treg.data.messages import (
    REASONING,
    Messages,
    common_prefix,
    common_suffix,
    has_tool_calls,
    turn,
)
from treg.data.report import RowProblem, described

PROBE = "\x00"  # a content that no other begins or ends like
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
SECONDS = 10.0  # that a template may take for one conversation
GROWTH, ROOM = (
    50,
    1_000_000,
)  # characters that it may write: for each that it gets, and beside these
# variables that a conversation has anyway, and that no row may set
OWN_VARIABLES = {"messages", "raise_exception", "strftime_now", "loop", "bos_token", "eos_token"}
Span = tuple[int, int]


@dataclass(frozen=True)
class RenderedAnswer:
    """Prompt and answer as text, one after the other.

    scored: characters of the answer that the assistant writes, the ends of its turns included;
        between them are turns of others.
    content: of these, characters that its messages say: the template's own are left out.
    notes: what a person should know, as that the template leaves out a part of the answer.
    """

    prompt: str
    answer: str
    scored: tuple[Span, ...]
    content: tuple[Span, ...]
    notes: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """What the answer says as it is written, its messages one a line."""
        return "\n".join(self.answer[a:b] for a, b in self.content)


class Renderer:
    """A row's conversations through the chat template.

    Args:
        date: what the template takes for today, if it asks.
    Raises:
        RowProblem: tools or template_kwargs that the template does not take.
    """

    def __init__(
        self,
        tokenizer: Any,
        tools: list | None = None,
        template_kwargs: dict[str, Any] | None = None,
        date: datetime.date | None = None,
    ):
        self.tokenizer = tokenizer
        self.template = tokenizer.get_chat_template(None, tools)
        self.tools = tools
        self.tokens = tuple(str(x) for x in tokenizer.get_added_vocab())
        reads = template_variables(self.template)
        self.kwargs = _checked_kwargs(template_kwargs or {}, reads, tokenizer)
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
            start = text.rfind(token, 0, place + len(token) - 1)
            if 0 <= start < place < start + len(token):
                return start + len(token) if after else start
        return place

    def _render(self, messages: Messages, marks: bool, more: dict) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        special: dict[str, Any] = {
            name: value
            for name, value in self.tokenizer.special_tokens_map.items()
            if isinstance(value, (str, list))
        }
        try:
            with _at_most(SECONDS):
                (text,), spans = render_jinja_template(
                    conversations=[messages],
                    tools=self.tools,
                    chat_template=self.template,
                    return_assistant_tokens_mask=marks,
                    **special | self.kwargs | more,
                )
            given = len(json.dumps([messages, self.tools, self.kwargs], default=str))
        except RecursionError:
            raise RowProblem("nested too deeply") from None
        except Exception as error:  # a template is a program: it raises anything
            raise RowProblem("chat template", f"{type(error).__name__}: {error}") from None
        if len(text) > GROWTH * given + ROOM:
            raise RowProblem("chat template", f"it writes {len(text)} characters for {given}")
        return text, [(int(a), int(b)) for a, b in spans[0]] if marks else []


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


def _checked_kwargs(given: dict, reads: frozenset[str], tokenizer: Any) -> dict[str, Any]:
    """What a row gives the template beside its messages: variables that the template reads."""
    own = OWN_VARIABLES | set(tokenizer.special_tokens_map) | _parameters(type(tokenizer))
    found = {}
    for name, value in given.items():
        if name in own or (name not in reads and value is not None):
            variables = ", ".join(sorted(reads - own)) or "none"
            raise RowProblem(
                "chat template",
                f"chat_template_kwargs: expected variables that the template reads ({variables}), "
                f"got {described(name)}",
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


# -- one row


def render_prompt(render: Renderer, prompt: Messages) -> str:
    """The prompt of a row, checked: all turns are in it.

    Raises:
        RowProblem: a turn is not in what the template writes.
    """
    text = render.prompt(prompt)
    for i, message in enumerate(prompt):
        _check_written(text, message, f"turn {i} of the prompt")
    return text


def render_answer(
    render: Renderer, prompt: Messages, alone: str, answer: Messages, *, all_turns: bool = False
) -> RenderedAnswer:
    """An answer after its prompt.

    Args:
        alone: `render_prompt` of the prompt.
        all_turns: whether turns of others within the answer are scored too.
    Raises:
        RowProblem: the template writes the prompt otherwise before this answer, a message of the
            answer is not in what it writes, or it does not say where its turns end.
    """
    prompt, answer, begun = conversation(prompt, answer)
    whole, marks = render.marked([*prompt, *answer])
    start = render.bound(whole, common_prefix(alone, whole))
    before = alone[:start]
    if start < len(alone):
        # up to here it is the prompt's messages, beyond it what opens the assistant's turn
        floor = len(alone.rstrip()) if begun else common_prefix(render(prompt), alone)
        if start < floor:
            start, before = _begins(render, whole, prompt, answer, alone, floor), alone
            marks = []
        elif not begun:
            # an answer may begin like what opens a turn: <think> and <b>
            own = common_prefix(_probed(render, prompt, answer, 0)[0], whole)
            start = max(floor, min(start, render.bound(whole, own)))
            before = alone[:start]
    turns = _turns(render, whole, prompt, answer, start)
    said, notes = [], []
    for i in (i for i, message in enumerate(answer) if message["role"] == "assistant"):
        content = _content(render, whole, prompt, answer, i, turns[i])
        notes.append(_check_said(answer[i], whole[slice(*turns[i])], whole[slice(*content)], begun))
        said.append(content)
        begun = ""
    own = [span for x, span in zip(answer, turns, strict=True) if x["role"] == "assistant"]
    if marks:
        own = _by_marks(marks, own, said, whole)
    if own[-1][1] <= said[-1][1]:
        notes.append("the template writes no end of a turn after the answer")
    return RenderedAnswer(
        before,
        whole[start:],
        ((0, len(whole) - start),) if all_turns else _from(start, own),
        _from(start, said),
        tuple(note for note in notes if note),
    )


def _from(start: int, spans: list[Span]) -> tuple[Span, ...]:
    return tuple((a - start, b - start) for a, b in spans)


def _begins(
    render: Renderer, whole: str, prompt: Messages, answer: Messages, alone: str, floor: int
) -> int:
    """Where the answer begins in a conversation whose prompt is written in another way than alone:
    after what opens the assistant's turn.

    Raises:
        RowProblem: it cannot be told.
    """
    opening = alone[floor:]
    place = -1
    if len(answer) == 1 and opening.strip():
        content = common_prefix(render([*prompt, turn("assistant", PROBE)]), whole)
        place = whole.rfind(opening, 0, content)
    if place < 0:
        at = common_prefix(alone, whole)
        raise RowProblem(
            "prompt rendered otherwise",
            "the template writes the prompt in another way before this answer: "
            f"{described(whole[at : at + 30])} in the place of {described(alone[at : at + 30])}",
        )
    return place + len(opening)


def _turns(
    render: Renderer, whole: str, prompt: Messages, answer: Messages, start: int
) -> list[Span]:
    """The characters of each message of the answer, the ends of turns included; an assistant's
    without what opens its turn.

    Where a message ends is found by what the template writes after it when it is the last one, and
    where it begins by another content in its place: a template may write the last turn in a way of
    its own.
    """
    turns: list[Span] = []
    last = len(answer) - 1
    place = start
    for i, message in enumerate(answer):
        begin, end = _content(render, whole, prompt, answer, i, (place, len(whole)))
        if i > 0 and message["role"] == "assistant":
            closed = render([*prompt, *answer[:i]])
            opened = render([*prompt, *answer[:i]], add_generation_prompt=True)
            opening = opened[common_prefix(closed, opened) :]
            at = whole.rfind(opening, place, begin) if opening.strip() else -1
            place = begin if at < 0 else at + len(opening)
        if i == last:
            end = len(whole)
        else:
            upto = [*prompt, *answer[: i + 1]]
            alone = render(upto)
            probed, _ = _probed(render, prompt, answer[: i + 1], i)
            ending = alone[len(alone) - common_suffix(alone, probed) :]
            end = render.bound(whole, end + common_prefix(ending, whole[end:]))
        turns.append((place, end))
        place = end
    for i, (message, span) in enumerate(zip(answer, turns, strict=True)):
        if message["role"] != "assistant":
            _check_written(whole[slice(*span)], message, f"turn {i} of the answer")
    return turns


def _probed(render: Renderer, prompt: Messages, answer: Messages, i: int) -> tuple[str, Messages]:
    """A conversation with another content in the place of message i of the answer, and the messages
    after it: they are left out where the template does not take them without what i says.
    """
    before, other = [*prompt, *answer[:i]], turn(answer[i]["role"], PROBE)
    after = answer[i + 1 :]
    try:
        return render([*before, other, *after]), after
    except RowProblem:
        return render([*before, other]), []


def _content(
    render: Renderer, whole: str, prompt: Messages, answer: Messages, i: int, span: Span
) -> Span:
    """The characters of what message i of the answer says."""
    text, after = _probed(render, prompt, answer, i)
    if len(after) < len(answer) - i - 1:
        return _content_of_last(render, whole, prompt, answer[: i + 1], span)
    start = render.bound(whole, common_prefix(text, whole), after=True)
    start = max(span[0], start)
    end = render.bound(whole, len(whole) - common_suffix(text, whole))
    end = max(start, min(span[1], end))
    content = answer[i]["content"].strip()
    if content and content not in whole[start:end]:
        # it begins or ends like the template's own words, such as <think>
        at = whole.find(content, max(span[0], start - len(content)), span[1])
        if at >= 0:
            return min(at, start), max(at + len(content), end)
    return start, end


def _content_of_last(
    render: Renderer, whole: str, prompt: Messages, answer: Messages, span: Span
) -> Span:
    """The characters of what the last message of an answer says, which begins a longer one, by how
    it is written as the last.
    """
    alone = render([*prompt, *answer])
    text, _ = _probed(render, prompt, answer, len(answer) - 1)
    start = render.bound(alone, common_prefix(text, alone), after=True)
    end = render.bound(alone, len(alone) - common_suffix(text, alone))
    said = alone[start:end]
    at = whole.find(said, span[0], span[1])
    if not said or at < 0:
        raise RowProblem("answer not rendered", f"where {described(said)} ends cannot be told")
    return at, at + len(said)


def _check_said(message: dict[str, Any], written: str, said: str, begun: str) -> str:
    """A note where the template leaves out a part of an answer's message, else "".

    Args:
        written: the message's turn. said: what of it the message says. begun: how the content
            begins, if that is the prompt's.
    Raises:
        RowProblem: the message is not in what the template writes.
    """
    content = message["content"].removeprefix(begun).strip()
    for call in message.get("tool_calls") or []:
        name = call.get("function", call).get("name") if isinstance(call, dict) else None
        if isinstance(name, str) and name not in written:
            raise RowProblem("answer not rendered", f"no call of {described(name)} is written")
    for name in REASONING:
        thought = message.get(name)
        if isinstance(thought, str) and not _holds(written, thought):
            return f"the template leaves out the answer's {name}"
    if not content or _holds(written, content):
        return ""
    if said.strip() and said.strip() in content:
        return "the template leaves out a part of the answer"
    raise RowProblem(
        "answer not rendered",
        f"the template writes {described(said)} where the answer is {described(content)}",
    )


def _check_written(text: str, message: dict[str, Any], name: str) -> None:
    """RowProblem unless a turn of others is in a text."""
    role, content = message["role"], message["content"]
    if _holds(text, content):
        return
    if role in ("assistant", "tool"):
        # thoughts of earlier turns are left out, results written in another notation
        words = re.findall(r"\w+", content.rpartition("</think>")[2])
        if all(word in text for word in words):
            return
    raise RowProblem("turn not rendered", f"the template does not write {name}, {described(role)}")


def _holds(text: str, content: str) -> bool:
    """Whether a text holds a content, blanks aside."""
    return content.strip() in text or "".join(content.split()) in "".join(text.split())


def _by_marks(marks: list[Span], turns: list[Span], said: list[Span], whole: str) -> list[Span]:
    """Of turns, what the template marks as generated.

    Raises:
        RowProblem: the marks do not hold what the messages say.
    """
    found = []
    for (begin, end), (start, stop) in zip(turns, said, strict=True):
        mine = [(max(a, begin), min(b, end)) for a, b in marks if a < end and b > begin]
        text = whole[start:stop]
        start += len(text) - len(text.lstrip())
        covered = start
        for a, b in mine:
            covered = max(covered, b) if a <= covered else covered
        if covered < start + len(text.strip()) or not mine:
            raise RowProblem(
                "generation marks",
                "the template marks other characters as generated than the answer's",
            )
        found += mine
    return found
