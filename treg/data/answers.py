"""Where an answer begins and ends in the text that a chat template writes.

A template is a program. What it wrote of which message is found by asking it again: the prompt
alone, and the conversation with another content in the place of one message's. What agrees is the
template's own, what differs is what the message says. The result is held against the messages: a
row whose prompt is written otherwise before its answer, or whose answer is not in what is written,
is refused by name.
"""

import re
from dataclasses import dataclass
from typing import Any

from treg.data.messages import (
    PROBE,
    REASONING,
    Messages,
    common_prefix,
    common_suffix,
    probe,
    turn,
)
from treg.data.rendering import Renderer, Span, conversation, template_variables
from treg.data.report import RowProblem, described


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


def render_prompt(render: Renderer, prompt: Messages) -> str:
    """The prompt of a row, checked: all turns are in it.

    Raises:
        RowProblem: a turn is not in what the template writes, or the template opens the assistant's
            turn after an answer too.
    """
    _check_opens_on_request(render)
    text = render.prompt(prompt)
    for i, message in enumerate(prompt):
        _check_written(text, message, f"turn {i} of the prompt")
    return text


def _check_opens_on_request(render: Renderer) -> None:
    """RowProblem for a template that opens the assistant's turn at the end of any conversation:
    what ends an answer could not be told from what opens the next turn.
    """
    if "add_generation_prompt" in template_variables(render.template):
        return
    user, answer = turn("user", "?"), turn("assistant", PROBE)
    try:
        asked = render([user])
        last = render([user, answer]).rpartition(PROBE)[2]
        followed = render([user, answer, user]).rpartition(PROBE)[2]
    except RowProblem:
        return
    own = last[common_prefix(last, followed) :]
    if own.strip() and asked.endswith(own):
        raise RowProblem(
            "chat template",
            f"it writes {described(own)}, which opens the assistant's turn, after an answer too; "
            "give one that writes it if add_generation_prompt alone, with --chat_template FILE",
        )


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
    own, said, notes = [], [], []
    # what opens the turn matters where the answer is not all beyond it as it is
    thinks = any(answer[0].get(name) for name in REASONING)
    opening = ""
    if not begun and (thinks or answer[0]["content"].strip() not in whole[start:]):
        opening = before[common_prefix(before, render(prompt)) :]
    turns = _turns(render, whole, prompt, answer, (opening, start))
    for message, (opening, span, content) in zip(answer, turns, strict=True):
        if message["role"] == "assistant":
            # what opens the turn may be what the answer begins with, such as <think>
            written = opening + whole[slice(*span)]
            notes.append(_check_said(message, written, whole[slice(*content)], begun))
            own.append(span)
            said.append(content)
            begun = ""
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
        content = common_prefix(_probed(render, prompt, answer, 0)[0], whole)
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
    render: Renderer, whole: str, prompt: Messages, answer: Messages, first: tuple[str, int]
) -> list[tuple[str, Span, Span]]:
    """Of each message of the answer what opens its turn; its characters, the ends of turns
    included, an assistant's without what opens it; and of these, what the message says.

    Where a message ends is found by what the template writes after it when it is the last one, and
    where it begins by another content in its place: a template may write the last turn in a way of
    its own.

    first: what opens the first turn, and where it begins.
    """
    turns = []
    last = len(answer) - 1
    (opening, place), closed = first, ""
    for i, message in enumerate(answer):
        differs, begin, stop = _content(render, whole, prompt, answer, i, (place, len(whole)))
        if i > 0 and message["role"] == "assistant":
            opened = render([*prompt, *answer[:i]], add_generation_prompt=True)
            opening = opened[common_prefix(closed, opened) :]
            at = whole.rfind(opening, place, begin + len(opening) - 1) if opening.strip() else -1
            # the message may begin like what opens it
            place = begin if at < 0 else min(at + len(opening), differs)
            begin = max(begin, place)
        own = message["role"] == "assistant" and opening.strip()
        if own and _writes_thoughts(whole[place:stop], message):
            # thoughts are said together with what marks them, wherever the message keeps them;
            # where nothing opens the turn, its header may stand before them
            begin = min(begin, stop - len(whole[place:stop].lstrip()))
        end = len(whole)
        if i < last:
            upto = [*prompt, *answer[: i + 1]]
            closed = render(upto)
            probed, _ = _probed(render, prompt, answer[: i + 1], i)
            ending = closed[len(closed) - common_suffix(closed, probed) :]
            end = render.bound(whole, stop + common_prefix(ending, whole[stop:]))
        if message["role"] != "assistant":
            _check_written(whole[place:end], message, f"turn {i} of the answer")
        turns.append((opening, (place, end), (begin, stop)))
        place = end
    return turns


def _probed(render: Renderer, prompt: Messages, answer: Messages, i: int) -> tuple[str, Messages]:
    """A conversation with another content in the place of message i of the answer, and the messages
    after it: they are left out where the template does not take them without what i says.
    """
    before, other = [*prompt, *answer[:i]], turn(answer[i]["role"], probe(answer[i]))
    after = answer[i + 1 :]
    try:
        return render([*before, other, *after]), after
    except RowProblem:
        return render([*before, other]), []


def _content(
    render: Renderer, whole: str, prompt: Messages, answer: Messages, i: int, span: Span
) -> tuple[int, int, int]:
    """Where another content in the place of message i of the answer would differ, and the
    characters [start, end) of what the message says.
    """
    text, after = _probed(render, prompt, answer, i)
    if len(after) < len(answer) - i - 1:
        start, end = _content_of_last(render, whole, prompt, answer[: i + 1], span)
        return start, start, end
    start = render.bound(whole, common_prefix(text, whole), after=True)
    start = max(span[0], start)
    end = render.bound(whole, len(whole) - common_suffix(text, whole))
    end = max(start, min(span[1], end))
    content = answer[i]["content"].strip()
    if content and content not in whole[start:end]:
        # it begins or ends like the template's own words, such as <think>
        at = whole.find(content, max(span[0], start - len(content)), span[1])
        if at >= 0:
            return start, min(at, start), max(at + len(content), end)
    return start, start, end


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


def _writes_thoughts(text: str, message: dict[str, Any]) -> bool:
    """Whether a text holds the thoughts of a message, and not just because it holds its content."""
    content = message["content"].strip()
    at = text.rfind(content)
    before = text[:at] if at >= 0 else text
    thoughts = [message.get(name) for name in REASONING]
    if at < 0:
        inline, closed, _ = content.partition("</think>")
        thoughts.append(inline.strip().removeprefix("<think>") if closed else "")
    return any(isinstance(x, str) and x.strip() and _holds(before, x) for x in thoughts)


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
