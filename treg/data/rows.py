"""Rows of preferences, in every form in which people keep them, read into one form: `Preference`.

A row is one of

    {prompt, chosen, rejected}          text, or lists of messages {role, content}
    {chosen, rejected}                  whole dialogues that begin alike: messages, or text with
                                        the turns "\\n\\nHuman:" and "\\n\\nAssistant:" (HH)
    {conversations, chosen, rejected}   ShareGPT: {from, value}

under the names that `treg.data.names` knows (question, instruction and input, ...), or that
`columns` gives. Messages may be a string of JSON, and exchanges {input, output}. A row may have
`system`, `history` (pairs of question and answer that precede the prompt), `tools` and
`chat_template_kwargs`, of which the last two go on to the chat template. A column of text that
nothing reads is refused by name.

Text is taken as it is, blanks included, but for the turns of an HH dialogue.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from treg.data.messages import (
    HH_ANSWER,
    Messages,
    as_messages,
    common_prefix,
    decoded_messages,
    hh_messages,
    is_exchange,
    kind,
    says_something,
    turn,
)
from treg.data.names import Columns, compared, named_columns
from treg.data.reading import parse_json
from treg.data.report import RowProblem

SIDES = ("chosen", "rejected")


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
    # whether the row had text, which became messages here
    text: bool = field(default=False, compare=False, repr=False)

    @property
    def chat(self) -> bool:
        return not isinstance(self.prompt, str)


def parse_row(
    row: dict,
    where: str = "",
    *,
    chat: bool,
    columns: Columns | None = None,
    known: Collection[str] = (),
) -> Preference:
    """A row in any known form as a Preference.

    Args:
        chat: whether plain text is to become messages: the prompt a user's turn, the completions an
            assistant's, an HH dialogue its turns. Rows of messages stay messages.
        columns: new names of columns, see `treg.data.names`.
        known: names of columns beside these that somebody reads.
    Raises:
        RowProblem: the row cannot be used.
    """
    try:
        return _parse_row(row, where, chat, columns or {}, known)
    except RowProblem as problem:
        raise RowProblem(problem.reason, problem.detail, where) from None
    except RecursionError:
        raise RowProblem("nested too deeply", where=where) from None


def _parse_row(
    row: dict, where: str, chat: bool, columns: Columns, known: Collection[str]
) -> Preference:
    named, others = named_columns(row, columns, known)
    for name in SIDES:
        if named.get(name) is None:
            there = ", ".join(map(str, row)) or "none"
            raise RowProblem(f"no column {name!r}", f"the columns are {there}")
    given = {name: decoded_messages(named[name]) for name in SIDES}
    chosen, rejected = given["chosen"], given["rejected"]
    prompt = _prompt_of(named, given)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowProblem("mixed types", f"chosen is {kind(chosen)}, rejected is {kind(rejected)}")

    before = turns_before(named)
    left_out: dict[str, str] = {}
    text = isinstance(chosen, str) and (prompt is None or isinstance(prompt, str))
    if text:
        if prompt is None:
            prompt, chosen, rejected = _split_dialogues(chosen, rejected)
        if chat:
            if hh_messages(prompt) is not None:
                left_out = {x: given[x] for x in SIDES if given[x] != given[x].strip()}
            prompt, (chosen, rejected) = as_turns(prompt, chosen, rejected)
    else:
        prompt, chosen, rejected = _parse_messages(prompt, chosen, rejected)
    _check_usable(prompt, chosen, rejected)
    if before:
        prompt = _after(before, prompt)

    tools = decoded("tools", named.get("tools"))
    kwargs = decoded("chat_template_kwargs", named.get("chat_template_kwargs")) or {}
    if not isinstance(kwargs, dict):
        raise RowProblem("mixed types", f"chat_template_kwargs is {kind(kwargs)}")
    if not isinstance(_prompt_of(named, given), str):
        left_out = {}  # whole dialogues: their answers are the last turns
    return Preference(
        prompt, chosen, rejected, where, tools or None, kwargs, others, left_out, text
    )


def as_turns(prompt: str, *answers: str) -> tuple[Messages, list[Messages]]:
    """Text as messages: the prompt a user's turn, or the turns of an HH dialogue, whose answers are
    without the blanks around them, which are the format's; the answers an assistant's turns.
    """
    turns = hh_messages(prompt)
    if turns is not None:
        answers = tuple(answer.strip() for answer in answers)
    elif prompt:
        turns = [turn("user", prompt)]
    return turns or [], [[turn("assistant", answer)] for answer in answers]


def _are_dialogues(chosen: Any, rejected: Any) -> bool:
    """Whether answers are whole dialogues, which bring their prompt."""
    both = (chosen, rejected)
    if all(isinstance(x, str) for x in both):
        return all(HH_ANSWER.search(x) for x in both)
    return all(isinstance(x, list) and len(x) > 1 for x in both)


def _prompt_of(named: dict[str, Any], answers: dict[str, Any]) -> Any:
    """The prompt of a row; an instruction and its input are one; None where there is none."""
    prompt, more = decoded_messages(named.get("prompt")), named.get("input")
    if prompt == "" and not more and _are_dialogues(*(answers[side] for side in SIDES)):
        return None
    return prompt_and_input(prompt, more)


def prompt_and_input(prompt: Any, more: Any) -> Any:
    """A prompt with its column `input`: text on a line of its own.

    Raises:
        RowProblem: an input that is no text, or beside messages.
    """
    if not more:
        return prompt
    if not isinstance(more, str):
        raise RowProblem("mixed types", f"input is {kind(more)}, expected text")
    if not prompt:
        return more
    if not isinstance(prompt, str):
        raise RowProblem("mixed types", f"input is text beside a prompt that is {kind(prompt)}")
    return f"{prompt}\n{more}"


def turns_before(named: dict[str, Any]) -> Messages:
    """The messages of the columns `system` and `history`."""
    system, history = named.get("system"), decoded("history", named.get("history"))
    turns = []
    if system is not None and not isinstance(system, str):
        raise RowProblem("mixed types", f"system is {kind(system)}, expected text")
    if system and system.strip():
        turns.append(turn("system", system))
    if not history:
        return turns
    if not isinstance(history, list):
        raise RowProblem("mixed types", f"history is {kind(history)}, expected a list")
    for i, item in enumerate(history):
        if isinstance(item, dict):
            turns += as_messages(f"history[{i}]", item, "user")
        elif isinstance(item, list) and len(item) == 2 and all(isinstance(x, str) for x in item):
            turns += [turn("user", item[0]), turn("assistant", item[1])]
        else:
            raise RowProblem(
                "mixed types", f"history[{i}] is {kind(item)}, expected [question, answer]"
            )
    return turns


def _after(before: Messages, prompt: Messages | str) -> Messages:
    """A prompt after the turns of other columns."""
    if isinstance(prompt, str):
        raise RowProblem(
            "turns beside plain text",
            "system or history beside a prompt of plain text, for which there is no chat template; "
            "leave them out with --columns system=,history=",
        )
    roles = [message["role"] for message in prompt]
    if "system" in roles and any(message["role"] == "system" for message in before):
        raise RowProblem(
            "two columns of one meaning",
            "system, and a system turn in the prompt; leave one out with --columns system=",
        )
    if len(before) > 1 and "system" in roles:
        raise RowProblem("two columns of one meaning", "history before a system turn of the prompt")
    return [*before, *prompt]


def _parse_messages(prompt: Any, chosen: Any, rejected: Any) -> tuple[Messages, Messages, Messages]:
    """Prompt and completions of a row in which at least one is no plain text."""
    chosen = as_messages("chosen", chosen, "assistant")
    rejected = as_messages("rejected", rejected, "assistant")
    exchanges = isinstance(prompt, list) and any(map(is_exchange, prompt))
    prompt = [] if prompt is None else as_messages("prompt", prompt, "user")
    found = _split_messages(prompt, chosen, rejected)
    if exchanges and found[0][-1]["role"] == "assistant":
        raise RowProblem(
            "answered already", "the last input of the prompt has an output beside the answers"
        )
    return found


def _check_usable(prompt: Messages | str, chosen: Messages | str, rejected: Messages | str) -> None:
    """RowProblem where there is nothing to prefer: an empty or equal completion, no prompt."""
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if not says_something(completion):
            raise RowProblem("empty completion", name)
    if _without_blanks(chosen) == _without_blanks(rejected):
        raise RowProblem("identical completions")
    if not prompt:
        raise RowProblem("empty prompt")


def _without_blanks(completion: Messages | str) -> Any:
    """A completion without the blanks around its texts."""
    if isinstance(completion, str):
        return completion.strip()
    return [{**message, "content": message["content"].strip()} for message in compared(completion)]


def decoded(name: str, value: Any) -> Any:
    """A column that some files keep as a string of JSON."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return parse_json(value)
    except ValueError as error:
        raise RowProblem("broken JSON", f"in column {name!r}: {error}") from None


# -- where the prompt ends


def _split_messages(
    prompt: Messages, chosen: Messages, rejected: Messages
) -> tuple[Messages, Messages, Messages]:
    """The prompt, and what each completion has beyond it.

    Without a prompt it is the messages that both dialogues begin with.
    """
    length = common_prefix(compared(chosen), compared(rejected))
    if length == min(len(chosen), len(rejected)):
        # one dialogue is the beginning of the other, or they are one: leave it a last turn
        length = max(0, length - 1)
    if prompt:
        asked, count = compared(prompt), len(prompt)
        if all(compared(dialogue[:count]) == asked for dialogue in (chosen, rejected)):
            # the completions are whole dialogues, which repeat the prompt
            chosen, rejected = chosen[count:], rejected[count:]
        elif count == 1 and length > 1 and compared(chosen[length - 1 : length]) == asked:
            # the prompt is the last question of dialogues that have more before it
            prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    else:
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if completion and completion[0]["role"] != "assistant":
            # a differing user turn: the two dialogues answer different questions
            role = completion[0]["role"]
            raise RowProblem("prompts differ", f"{name} goes on with a turn of {role!r}")
    return prompt, chosen, rejected


def _split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and completions of two HH dialogues: the prompt goes up to the last "Assistant:".

    Texts without such turns may begin alike by chance: their prompt is not guessed.
    """
    ends = []
    for dialogue in (chosen, rejected):
        ends.append(max((x.end() for x in HH_ANSWER.finditer(dialogue)), default=None))
    if ends[0] is None or ends[1] is None:
        raise RowProblem(
            "no prompt",
            "no column for it, and the answers are no dialogues; name it with --columns "
            "prompt=NAME",
        )
    prompt = chosen[: ends[0]]
    if prompt != rejected[: ends[1]]:
        raise RowProblem("prompts differ", "the dialogues differ before their last 'Assistant:'")
    return prompt, chosen[ends[0] :], rejected[ends[1] :]
