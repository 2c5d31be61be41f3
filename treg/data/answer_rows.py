"""Rows of one answer to a prompt: {prompt, answer}, in the forms in which people keep them.

The prompt has the names and forms that it has in a row of preferences (`treg.data.rows`), `system`,
`history`, `input` and `tools` included, and may be missing: a text that stands alone. The answer is
text, or one message of the assistant. Without a column for it, it is the last turn of the dialogue
that the prompt's column holds.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from treg.data.messages import Messages, as_messages, decoded_messages, kind
from treg.data.names import ALIASES, Columns, named_columns
from treg.data.report import RowProblem
from treg.data.rows import as_turns, decoded, prompt_and_input, turns_before

SIDES = ("chosen", "rejected")
ANSWERS = ("answer", "response", "completion", "output", "generation", "prediction")
ONE_ANSWER = {name: x for name, x in ALIASES.items() if name not in SIDES} | {"answer": ANSWERS}


@dataclass(frozen=True)
class AnsweredRow:
    """A prompt, "" where there is none, and the text of its answer.

    columns: the other columns of the row.
    """

    prompt: Messages | str
    answer: str
    tools: list | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)


def parse_answer(
    row: Mapping[str, Any], columns: Columns | None = None, known: Collection[str] = ()
) -> AnsweredRow:
    """A row of one answer.

    Args:
        columns: new names of columns, see `treg.data.names`.
        known: names of columns beside these that somebody reads.
    Raises:
        RowProblem: the row cannot be used; it does not say where.
    """
    named, others = named_columns(row, columns or {}, known, ONE_ANSWER)
    prompt = prompt_and_input(decoded_messages(named.get("prompt")), named.get("input"))
    answer = decoded_messages(named.get("answer"))
    if not isinstance(prompt, str) and prompt is not None:
        prompt = as_messages("prompt", prompt, "user")
        if answer is None and prompt and prompt[-1]["role"] == "assistant":
            prompt, answer = prompt[:-1], prompt[-1:]
    if answer is None:
        there = ", ".join(map(str, row)) or "none"
        raise RowProblem(
            "no column 'answer'", f"the columns are {there}; name it with --columns answer=NAME"
        )
    text = answer_text("answer", answer)
    before = turns_before(named)
    if before:
        asked = as_turns(prompt)[0] if isinstance(prompt, str) else prompt or []
        prompt = [*before, *asked]
    kwargs = decoded("chat_template_kwargs", named.get("chat_template_kwargs")) or {}
    if not isinstance(kwargs, dict):
        raise RowProblem("mixed types", f"chat_template_kwargs is {kind(kwargs)}")
    tools = decoded("tools", named.get("tools")) or None
    return AnsweredRow(prompt or "", text, tools, kwargs, others)


def answer_text(name: str, answer: Any) -> str:
    """The text of an answer, which is text or one message of the assistant.

    Raises:
        RowProblem: it is something else, or says nothing.
    """
    if not isinstance(answer, str):
        messages = as_messages(name, answer, "assistant")
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise RowProblem(
                "several messages",
                f"{name}: expected text or one message of the assistant, got {len(messages)} "
                "messages; marks count characters of one text",
            )
        more = [key for key in messages[0] if key not in ("role", "content", "id", "name")]
        if any(messages[0][key] for key in more):
            raise RowProblem(
                "several texts", f"{name}: expected a message of a content alone, got {more[0]} too"
            )
        answer = messages[0]["content"]
    if not answer.strip():
        raise RowProblem("empty answer", name)
    return answer
