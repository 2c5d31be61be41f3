"""What a chat template writes around the messages of a prompt."""

import re
from collections.abc import Callable, Sequence
from typing import Any

# contents that no template writes itself
SYSTEM, FIRST, ANSWER, NEXT = (f"\x00{mark}\x00" for mark in "sfan")


def template_texts(tokenizer: Any) -> list[str]:
    """The texts that the tokenizer's chat template writes before, between and after messages (its
    default system turn is in them), the longest first; none without a template.

    They are found by rendering short conversations of known contents. What a template refuses to
    render, such as a system turn, it does not write.
    """
    if not getattr(tokenizer, "chat_template", None):
        return []
    user = {"role": "user", "content": FIRST}
    system = {"role": "system", "content": SYSTEM}
    answer = {"role": "assistant", "content": ANSWER}
    following = {"role": "user", "content": NEXT}
    found: set[str] = set()
    for messages in ([user], [system, user], [user, answer, following]):
        found |= _around(tokenizer.apply_chat_template, messages)
    return sorted(found, key=lambda text: (-len(text), text))


def _around(render: Callable[..., Any], messages: Sequence[dict[str, str]]) -> set[str]:
    """What stands around the contents of a conversation, as a template renders it."""
    try:
        text = render(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception:  # a template is a program: it raises anything
        return set()
    parts = []
    for message in messages:
        before, content, text = text.partition(message["content"])
        if not content:
            return set()
        parts.append(before)
    return {part for part in (*parts, text) if part.strip()}


def folded(prompt: str, template: Sequence[str]) -> list[str]:
    """A prompt as texts and what the template wrote between them, in turn, a text first.

    Joined they are the prompt. Neighbouring texts of the template are one.

    template: of `template_texts`.
    """
    parts, at = [""], 0
    pattern = "|".join(re.escape(text) for text in template)
    for match in re.finditer(pattern, prompt) if template else ():
        text = prompt[at : match.start()]
        if text or len(parts) == 1:
            parts[-1] += text
            parts += [match[0], ""]
        else:
            parts[-2] += match[0]
        at = match.end()
    parts[-1] += prompt[at:]
    return parts
