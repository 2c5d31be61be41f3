"""Rows of preferences, in every form in which people keep them, read into one form: `Preference`.

A row is one of

    {prompt, chosen, rejected}          text, or lists of messages {role, content}
    {chosen, rejected}                  whole dialogues that begin alike: messages, or text with
                                        the turns "\\n\\nHuman:" and "\\n\\nAssistant:" (HH), or
                                        plain text
    {conversations, chosen, rejected}   ShareGPT: {from, value}; also under the name `messages`

and may have `tools` and `chat_template_kwargs`, which go on to the chat template.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from treg.data.reading import parse_json
from treg.data.report import RowProblem

PROMPT_COLUMNS = ("prompt", "conversations", "messages")  # the first one that a row has
COMPLETION_COLUMNS = ("chosen", "rejected")
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    "system": "system",
}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ANSWER = "\n\nAssistant:"
KINDS = {"str": "text", "list": "a list", "dict": "an object", "NoneType": "missing"}

READ_COLUMNS = {*PROMPT_COLUMNS, *COMPLETION_COLUMNS, "tools", "chat_template_kwargs"}
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Preference:
    """One row. Either all three texts are messages (`chat`), or all are plain text."""

    prompt: Messages | str
    chosen: Messages | str
    rejected: Messages | str
    where: str = ""
    tools: list | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    # the columns of the row that are not read here, for whoever knows them
    columns: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    # the answers by name as the row has them, where blanks around them were left out
    given: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def chat(self) -> bool:
        return not isinstance(self.prompt, str)


def parse_row(row: dict, where: str = "", *, chat: bool) -> Preference:
    """A row in any known form as a Preference.

    Args:
        chat: whether plain text is to become messages: the prompt a user's turn, the completions an
            assistant's, an HH dialogue its turns. Rows of messages stay messages.
    Raises:
        RowProblem: the row cannot be used.
    """
    try:
        return _parse_row(row, where, chat)
    except RowProblem as problem:
        raise RowProblem(problem.reason, problem.detail, where) from None
    except RecursionError:
        raise RowProblem("nested too deeply", where=where) from None


def _parse_row(row: dict, where: str, chat: bool) -> Preference:
    for name in COMPLETION_COLUMNS:
        if row.get(name) is None:
            columns = ", ".join(map(str, row)) or "none"
            raise RowProblem(f"no column {name!r}", f"the columns are {columns}")
    prompt, chosen, rejected = _prompt_of(row), row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowProblem("mixed types", f"chosen is {_kind(chosen)}, rejected is {_kind(rejected)}")

    if isinstance(chosen, str) and (prompt is None or isinstance(prompt, str)):
        prompt, chosen, rejected = _parse_texts(prompt, chosen, rejected, chat)
    else:
        prompt, chosen, rejected = _parse_messages(prompt, chosen, rejected)
    _check_usable(prompt, chosen, rejected)

    tools = _decoded("tools", row.get("tools"))
    kwargs = _decoded("chat_template_kwargs", row.get("chat_template_kwargs")) or {}
    if not isinstance(kwargs, dict):
        raise RowProblem("mixed types", f"chat_template_kwargs is {_kind(kwargs)}")
    kwargs = _without_none(kwargs)
    others = {name: value for name, value in row.items() if name not in READ_COLUMNS}
    found = Preference(prompt, chosen, rejected, where, tools or None, kwargs, others)
    if isinstance(_prompt_of(row), str) and found.chat:
        texts = {name: row[name] for name in COMPLETION_COLUMNS if isinstance(row[name], str)}
        found.given.update({name: x for name, x in texts.items() if x != x.strip()})
    return found


def _prompt_of(row: dict) -> Any:
    """What the first prompt column that is there holds; None where there is none."""
    for name in PROMPT_COLUMNS:
        if row.get(name) is not None:
            return row[name]
    return None


def _parse_texts(
    prompt: str | None, chosen: str, rejected: str, chat: bool
) -> tuple[Messages | str, Messages | str, Messages | str]:
    """Prompt and completions of a row of plain text, as text or (chat) as messages."""
    if prompt is None:
        prompt, chosen, rejected = _split_dialogues(chosen, rejected)
    if not chat:
        return prompt, chosen, rejected
    return (
        _hh_messages(prompt),
        [_turn("assistant", chosen.strip())],
        [_turn("assistant", rejected.strip())],
    )


def _parse_messages(prompt: Any, chosen: Any, rejected: Any) -> tuple[Messages, Messages, Messages]:
    """Prompt and completions of a row in which at least one is no plain text."""
    chosen = _as_messages("chosen", chosen, "assistant")
    rejected = _as_messages("rejected", rejected, "assistant")
    prompt = [] if prompt is None else _as_messages("prompt", prompt, "user")
    return _split_messages(prompt, chosen, rejected)


def _check_usable(prompt: Messages | str, chosen: Messages | str, rejected: Messages | str) -> None:
    """RowProblem where there is nothing to prefer: an empty or equal completion, no prompt."""
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if not text_of(completion).strip() and not _has_tool_calls(completion):
            raise RowProblem("empty completion", name)
    if chosen == rejected:
        raise RowProblem("identical completions")
    if not prompt:
        raise RowProblem("empty prompt")


def _has_tool_calls(completion: Messages | str) -> bool:
    if isinstance(completion, str):
        return False
    return any(message.get("tool_calls") for message in completion)


def text_of(value: Messages | str) -> str:
    """The text of a completion or a prompt, for people and for prompts."""
    if isinstance(value, str):
        return value
    return "\n".join(str(message.get("content") or "") for message in value)


def common_prefix(a: Sequence, b: Sequence) -> int:
    """How many elements both begin with; a and b are lists or strings."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])


def _kind(value: Any) -> str:
    """What a value is, in the words of a message to people."""
    name = type(value).__name__
    return KINDS.get(name, name)


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _decoded(name: str, value: Any) -> Any:
    """A column that some files keep as a string of JSON."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return parse_json(value)
    except ValueError as error:
        raise RowProblem("broken JSON", f"in column {name!r}: {error}") from None


def _without_none(value: Any) -> Any:
    """A value without the keys that are None: parquet adds the keys of other rows that way."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


# -- messages


def _as_messages(name: str, value: Any, role: str) -> Messages:
    """Text (as one turn of `role`), one message, or a list of messages, as {role, content}."""
    if isinstance(value, str):
        return [_turn(role, value)]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowProblem("mixed types", f"{name} is {_kind(value)}, expected text or messages")
    messages = []
    for i, given in enumerate(value):
        message = _as_message(f"{name}[{i}]", given)
        # an empty system turn would replace the one that a template has of its own
        if message["role"] != "system" or message["content"].strip():
            messages.append(message)
    return messages


def _as_message(name: str, message: Any) -> dict[str, Any]:
    """One message of the form {role, content} or {from, value}, as {role, content}."""
    if not isinstance(message, dict):
        raise RowProblem("mixed types", f"{name} is {_kind(message)}, expected a message")
    message = _without_none(message)
    if "role" not in message and "from" in message:
        message = _from_sharegpt(name, message)
    if not isinstance(message.get("role"), str):
        keys = ", ".join(map(str, message)) or "none"
        raise RowProblem("no role", f"{name} has the keys {keys}")
    content = message.get("content", "")
    if isinstance(content, list):
        content = _text_of_parts(name, content)
    if not isinstance(content, str):
        raise RowProblem("mixed types", f"the content of {name} is {_kind(content)}")
    return {**message, "content": content}


def _from_sharegpt(name: str, message: dict[str, Any]) -> dict[str, Any]:
    """{from, value} as {role, content}; the other keys stay."""
    others = dict(message)
    speaker = others.pop("from")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise RowProblem("unknown role", f"{name} is from {speaker!r}")
    content = others.pop("value", "")
    return {"role": SHAREGPT_ROLES[speaker], "content": content, **others}


def _text_of_parts(name: str, parts: list) -> str:
    """Content that is a list of parts {type: "text", text}, as one text."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise RowProblem("not text", f"{name} has content that is no text")
    return "".join(part["text"] for part in parts)


# -- where the prompt ends


def _split_messages(
    prompt: Messages, chosen: Messages, rejected: Messages
) -> tuple[Messages, Messages, Messages]:
    """The prompt, and what each completion has beyond it.

    Without a prompt it is the messages that both dialogues begin with.
    """
    if prompt:
        length = len(prompt)
        if chosen[:length] == prompt and rejected[:length] == prompt:
            # the completions are whole dialogues, which repeat the prompt
            chosen, rejected = chosen[length:], rejected[length:]
    else:
        length = common_prefix(chosen, rejected)
        if length == min(len(chosen), len(rejected)):
            # one dialogue is the beginning of the other, or they are one: leave it a last turn
            length = max(0, length - 1)
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if completion and completion[0]["role"] != "assistant":
            # a differing user turn: the two dialogues answer different questions
            role = completion[0]["role"]
            raise RowProblem("prompts differ", f"{name} goes on with a turn of {role!r}")
    return prompt, chosen, rejected


def _split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and completions of two dialogues as text.

    The prompt goes up to the last "Assistant:" of an HH dialogue; of any other text it is the
    longest common beginning that does not end in the middle of a word.
    """
    if HH_ANSWER in chosen and HH_ANSWER in rejected:
        end_chosen = chosen.rindex(HH_ANSWER) + len(HH_ANSWER)
        end_rejected = rejected.rindex(HH_ANSWER) + len(HH_ANSWER)
        prompt = chosen[:end_chosen]
        if prompt != rejected[:end_rejected]:
            raise RowProblem(
                "prompts differ", "the dialogues differ before their last 'Assistant:'"
            )
        return prompt, chosen[end_chosen:], rejected[end_rejected:]
    same = common_prefix(chosen, rejected)
    end = max(chosen.rfind(" ", 0, same), chosen.rfind("\n", 0, same), 0)
    if end == 0 and chosen != rejected:
        raise RowProblem(
            "prompts differ", "no column 'prompt', and the two texts share no beginning"
        )
    return chosen[:end], chosen[end:], rejected[end:]


def _hh_messages(prompt: str) -> Messages:
    """The turns of an HH dialogue; any other text is one turn of the user."""
    before, *parts = HH_TURN.split(prompt)
    if not parts or before.strip():
        return [_turn("user", prompt)] if prompt else []
    turns = []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        turns.append(_turn(SHAREGPT_ROLES[speaker.lower()], text.strip()))
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()  # the turn that the completion fills
    return turns
