"""What the columns of a row mean: one place decides it.

A column has one of the names below, or is given one by `columns`, or is passed on untouched if it
holds no text. A column of text or of messages that nothing reads is refused by name: it may be a
part of the question, and what is trained on would not be what the person wrote.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from treg.data.messages import as_messages, decoded_messages, is_exchange
from treg.data.report import RowProblem, described

# a dialogue: the prompt, or the whole, which some datasets keep beside the pair
DIALOGUES = ("conversations", "conversation", "messages")
# names of a column, the usual one first
ALIASES = {
    "prompt": ("prompt", "question", "query", "instruction", *DIALOGUES),
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "input": ("input",),
    "tools": ("tools",),
    "chat_template_kwargs": ("chat_template_kwargs",),
}
READ_COLUMNS = {name for names in ALIASES.values() for name in names}
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# columns about a row: their text is no part of the question
ABOUT = re.compile(
    r"(.*[_. -])?(ids?|idx|index|uuid|hash|md5|sha1|sha256|source|sources|dataset|datasets|origin"
    r"|model|models|category|categories|type|subset|split|lang|language|license|url|domain"
    r"|date|time|timestamp|created|score|scores|rating|ratings|label|labels|tag|tags|metadata|meta"
    r"|annotator|rationale|preference|spans|generations|all_generated_responses)",
    re.IGNORECASE,
)
Columns = Mapping[str, str]  # new name: name in the data; "" drops the column of that name


def parse_columns(given: Any) -> dict[str, str]:
    """`columns` as "new=old,new=old", a list of those, or by name.

    Raises:
        ValueError: something else, or a name that is given twice.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        items = [(new, "" if old is None else old) for new, old in given.items()]
    else:
        texts = [given] if isinstance(given, str) else given
        parts = [x.strip() for text in texts for x in str(text).split(",")]
        items = [(a.strip(), b.strip()) for a, _, b in (x.partition("=") for x in parts if x)]
        if any("=" not in x for x in parts if x):
            raise ValueError(
                f"columns: expected NEW=OLD, such as prompt=question, or NAME= to leave a column "
                f"out, got {given!r}"
            )
    found: dict[str, str] = {}
    for new, old in items:
        if not isinstance(new, str) or not isinstance(old, str) or not new or new in found:
            raise ValueError(
                f"columns: expected each new name once and the name of a column for it, got "
                f"{given!r}"
            )
        found[new] = old
    return found


def named_columns(
    row: Mapping[str, Any],
    columns: Columns,
    known: Collection[str] = (),
    named: Mapping[str, tuple[str, ...]] = ALIASES,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a row has of named columns, by their usual names, and its other columns.

    Args:
        columns: new names of columns, and those that are left out.
        known: names of other columns that somebody reads.
        named: the columns that are looked for, by their usual names, with all names of each.
    Raises:
        RowProblem: a column that `columns` names is missing; two columns have one meaning; a column
            of text, of messages, or of pictures that nobody reads.
    """
    row = _renamed(row, columns)
    found: dict[str, Any] = {}
    others = dict(row)
    for name, aliases in named.items():
        if name in columns:
            aliases = (name,)
        there = {x: others.pop(x) for x in aliases if x in others}
        holding = [x for x, value in there.items() if not _is_empty(value)]
        if name == "prompt":
            holding = _without_copies(holding, there, row)
        if len(holding) > 1:
            raise RowProblem(
                "two columns of one meaning",
                f"{' and '.join(holding)} are both a {name}; {_leave_out(holding[-1])}",
            )
        given = [x for x in there if there[x] is not None]
        if holding or given:
            found[name] = there[(holding or given)[0]]
    _check_unread({name: value for name, value in others.items() if name not in known})
    return found, others


def _renamed(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """A row with its new names; columns that a new name hides are gone."""
    if not columns:
        return dict(row)
    taken = set(columns) | set(columns.values())
    found = {name: value for name, value in row.items() if name not in taken}
    for new, old in columns.items():
        if not old:
            continue
        if old not in row:
            there = ", ".join(map(str, row)) or "none"
            raise RowProblem(f"no column {old!r}", f"the columns are {there}")
        found[new] = row[old]
    return found


def _without_copies(holding: list[str], there: Mapping[str, Any], row: Mapping) -> list[str]:
    """Prompts without dialogues that repeat an answer or another column."""
    answers = [row[x] for side in ("chosen", "rejected") for x in ALIASES[side] if x in row]
    kept = []
    for i, name in enumerate(holding):
        if name in DIALOGUES and len(holding) > 1:
            value = _dialogue(name, there[name])
            copies = [*answers, *(there[x] for x in holding[:i])]
            if any(value == _dialogue(name, x) for x in copies):
                continue
        kept.append(name)
    return kept


def _dialogue(name: str, value: Any) -> Any:
    """A value as the messages that it is, to be compared; one that is none as it is."""
    try:
        found = decoded_messages(value)
        return found if isinstance(found, str) else compared(as_messages(name, found, "user"))
    except RowProblem:
        return value


def _check_unread(others: Mapping[Any, Any]) -> None:
    """RowProblem for what may be a part of the question."""
    unread = []
    for name, value in others.items():
        if name in MEDIA and not _is_empty(value):
            raise RowProblem("not text", f"{name!r} is not read; {_leave_out(name)}")
        if not ABOUT.fullmatch(str(name)) and _is_text(value):
            unread.append(name)
    if not unread:
        return
    name, value = unread[0], others[unread[0]]
    what = "messages" if isinstance(value, list) and _is_messages(value[0]) else "text"
    detail = (
        f"it holds {what}; say what it is with "
        f"--columns NEW={name}, such as prompt={name}, or leave it out with --columns {name}="
    )
    if len(unread) > 1:
        every = ",".join(f"{x}=" for x in unread)
        detail += f"; or leave out all that nothing reads with --columns {every}"
    raise RowProblem(f"unknown column {described(name)}", detail)


def _leave_out(name: Any) -> str:
    return f"leave one out with --columns {name}="


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _is_text(value: Any) -> bool:
    """Whether a value holds text or messages: strings, and words within lists and objects."""
    if isinstance(value, str):
        return bool(value.strip())
    items = value if isinstance(value, list) else [value]
    return any(_is_messages(x) or _has_words(x) for x in items)


def _has_words(value: Any) -> bool:
    """Whether a value is words, or an object of a list or of a column that has some."""
    if isinstance(value, dict):
        return any(isinstance(x, str) and " " in x.strip() for x in value.values())
    return isinstance(value, str) and " " in value.strip()


def _is_messages(value: Any) -> bool:
    return isinstance(value, dict) and bool({"role", "from"} & value.keys() or is_exchange(value))


def compared(value: Any) -> Any:
    """Messages as they are compared: without what is about a message, such as its id, by the same
    names as columns, and weights of training. Any other value as it is.
    """
    if not isinstance(value, list):
        return value
    return [
        {name: x for name, x in message.items() if name == "tool_call_id" or not _is_about(name)}
        for message in value
    ]


def _is_about(name: Any) -> bool:
    return name in ("weight", "train") or bool(ABOUT.fullmatch(str(name)))
