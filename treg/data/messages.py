"""Messages in the forms in which datasets keep them, read into one: {role, content, ...}."""

import json
import re
from collections.abc import Sequence
from typing import Any

from treg.data.reading import parse_json
from treg.data.report import RowProblem, described

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    "system": "system",
}
HH_TURN = re.compile(r"(?:\A|\r?\n\r?\n)(Human|Assistant):")
HH_ANSWER = re.compile(r"\r?\n\r?\nAssistant:")
KINDS = {"str": "text", "list": "a list", "dict": "an object", "NoneType": "missing"}
# parts of a message beside its content that the model says; what is in them is rendered as it is
REASONING = ("reasoning_content", "reasoning", "thinking")

# text that is meant as messages, by its beginning: a list, or an object of both keys
OPENS = re.compile(r"\[?\s*\{")
LIKE_MESSAGES = re.compile(
    r"\[\s*\{\s*['\"](role|from|content|value)['\"]\s*:"
    r"|\{\s*['\"](role|from)['\"]\s*:.*['\"](content|value)['\"]\s*:",
    re.DOTALL,
)

PROBES = [chr(x) for x in range(9)]  # contents that hardly any other begins or ends like
PROBE = PROBES[0]

Messages = list[dict[str, Any]]


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def probe(message: dict[str, Any]) -> str:
    """A content that begins and ends like nothing in a message.

    Raises:
        RowProblem: the message has all of PROBES in it.
    """
    said = str(message)
    found = next((x for x in PROBES if repr(x)[1:-1] not in said), None)
    if found is None:
        raise RowProblem("control characters", "all from U+0000 to U+0008 in one message")
    return found


def kind(value: Any) -> str:
    """What a value is, in the words of a message to people."""
    name = type(value).__name__
    return KINDS.get(name, name)


def text_of(value: Messages | str) -> str:
    """The text of a completion or a prompt: the contents of its messages, one a line."""
    if isinstance(value, str):
        return value
    return "\n".join(str(message.get("content") or "") for message in value)


def shown_text(message: dict[str, Any]) -> str:
    """A message of any template as a person or a judge reads it: thoughts, content, tool calls."""
    parts = [str(message[name]) for name in REASONING[:1] if message.get(name)]
    parts += [str(message[name]) for name in REASONING[1:] if message.get(name) and not parts]
    if str(message.get("content") or "").strip():
        parts.append(str(message["content"]))
    for call in message.get("tool_calls") or []:
        parts.append(json.dumps(call, ensure_ascii=False, default=str))
    return "\n".join(parts)


def common_prefix(a: Sequence, b: Sequence) -> int:
    """How many elements both begin with; a and b are lists or strings."""
    low, high = 0, min(len(a), len(b))
    # slices are compared at once, and the one that differs is halved
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def common_suffix(a: str, b: str) -> int:
    """How many characters both end with."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[len(a) - middle : len(a) - low] == b[len(b) - middle : len(b) - low]:
            low = middle
        else:
            high = middle - 1
    return low


def has_tool_calls(messages: Messages | str) -> bool:
    return not isinstance(messages, str) and any(x.get("tool_calls") for x in messages)


def says_something(messages: Messages | str) -> bool:
    """Whether there is a text, a tool call or a thought in it."""
    if text_of(messages).strip() or has_tool_calls(messages):
        return True
    return not isinstance(messages, str) and any(
        str(message.get(name) or "").strip() for message in messages for name in REASONING
    )


def decoded_messages(value: Any) -> Any:
    """Messages that a file keeps as a string of JSON, a list or one; any other value as it is.

    Raises:
        RowProblem: messages that are no JSON, such as those that Python writes; a list of which
            some are messages.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not OPENS.match(text) or not text.endswith(("]", "}")):
        return value
    try:
        found = parse_json(text)
    except ValueError:
        if LIKE_MESSAGES.match(text):
            found = f"messages as Python writes them, or cut short, got {described(text)}"
            raise RowProblem("broken JSON", found) from None
        return value
    if isinstance(found, dict):
        speaker = found.get("role", found.get("from"))
        known = isinstance(speaker, str) and speaker.lower() in ROLES
        return found if known and _is_message(found) else value
    messages = [isinstance(x, dict) and _is_message(x) for x in found]
    if any(messages) and not all(messages):
        raise RowProblem(
            "mixed types",
            f"a list of which some are messages, got {described(found[messages.index(False)])}",
        )
    return found if any(messages) else value


def _is_message(value: dict) -> bool:
    if value.keys() >= {"from", "value"}:
        return True
    return "role" in value and bool(value.keys() & {"content", "tool_calls", *REASONING})


def as_messages(name: str, value: Any, role: str) -> Messages:
    """Text (as one turn of `role`), one message, or a list of messages, as {role, content}."""
    if isinstance(value, str):
        return [turn(role, value)]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowProblem("mixed types", f"{name} is {kind(value)}, expected text or messages")
    given = [(f"{name}[{i}]", x) for i, x in enumerate(value)]
    messages = []
    for where, item in (turn for x in given for turn in _turns_of(*x)):
        message = _as_message(where, item)
        # an empty system turn would replace the one that a template has of its own
        if message["role"] != "system" or message["content"].strip():
            messages.append(message)
    return messages


def is_exchange(value: Any) -> bool:
    """Whether a value is a question and its answer, {input, output}."""
    return isinstance(value, dict) and "input" in value and value.keys() <= {"input", "output"}


def _turns_of(name: str, given: Any) -> list[tuple[str, Any]]:
    """A message with its name, or of an exchange both turns."""
    if not is_exchange(given):
        return [(name, given)]
    turns = [(f"{name}.input", turn("user", given["input"]))]
    if given.get("output") not in (None, ""):
        turns.append((f"{name}.output", turn("assistant", given["output"])))
    return turns


def _as_message(name: str, message: Any) -> dict[str, Any]:
    """One message of the form {role, content} or {from, value}, as {role, content}."""
    if not isinstance(message, dict):
        raise RowProblem("mixed types", f"{name} is {kind(message)}, expected a message")
    # keys that are None are as good as not there: content beside tool calls, and what Arrow adds
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message and "from" in message:
        message = _from_sharegpt(name, message)
    role = message.get("role")
    if not isinstance(role, str):
        keys = ", ".join(map(str, message)) or "none"
        raise RowProblem("no role", f"{name} has the keys {keys}")
    content = message.get("content", "")
    if isinstance(content, list):
        content = _text_of_parts(name, content)
    if not isinstance(content, str):
        raise RowProblem("mixed types", f"the content of {name} is {kind(content)}")
    return {**message, "role": ROLES.get(role.lower(), role), "content": content}


def _from_sharegpt(name: str, message: dict[str, Any]) -> dict[str, Any]:
    """{from, value} as {role, content}; the other keys stay."""
    others = dict(message)
    speaker = others.pop("from")
    if not isinstance(speaker, str) or speaker.lower() not in ROLES:
        raise RowProblem("unknown role", f"{name} is from {described(speaker)}")
    content = others.pop("value", "")
    return {"role": ROLES[speaker.lower()], "content": content, **others}


def _text_of_parts(name: str, parts: list) -> str:
    """Content that is a list of parts {type: "text", text}, as one text."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise RowProblem("not text", f"{name} has content that is no text")
    return "".join(part["text"] for part in parts)


def hh_messages(prompt: str) -> Messages | None:
    """The turns of an HH dialogue; None for any other text."""
    before, *parts = HH_TURN.split(prompt)
    if parts and before.strip() and parts[-2] == "Assistant" and not parts[-1].strip():
        raise RowProblem("a dialogue after other text", described(before))
    if not parts or before.strip():
        return None
    turns = []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        turns.append(turn(ROLES[speaker.lower()], text.strip()))
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()  # the turn that the completion fills
    return turns
