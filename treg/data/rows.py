"""Rows of preferences, in every form in which people keep them, as one form: `Preference`.

    {prompt, chosen, rejected}          text, or lists of messages {role, content}
    {chosen, rejected}                  whole dialogues that share their beginning: messages, text with the turns
                                        "\\n\\nHuman:" and "\\n\\nAssistant:" (HH), or plain text
    {conversations, chosen, rejected}   ShareGPT: {from, value}; `messages` is read like `conversations`
    tools, chat_template_kwargs         go on to the chat template

from .jsonl, .json, .parquet (.jsonl and .json also as .gz), a folder of these or of
`datasets.save_to_disk`, a dataset object, a list of dicts, or a name on the hub.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treg.data.report import RowProblem

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".json.gz", ".parquet")
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    "system": "system",
}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
READ_COLUMNS = {
    *("prompt", "conversations", "messages", "chosen", "rejected"),
    *("tools", "chat_template_kwargs"),
}
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

    @property
    def chat(self) -> bool:
        return not isinstance(self.prompt, str)


def read_rows(source: Any, split: str = "train") -> Iterator[tuple[str, dict | RowProblem]]:
    """(where, row) of every row of a source; where is "file:line" or "row i". A row that cannot be
    read is a problem.

    Args:
        source: a path, a hub name, a `datasets` dataset (or dict of them), or an iterable of dicts.
        split: of a hub name, a saved dataset dict, or a dict of datasets.
    Raises:
        ValueError, FileNotFoundError: the source as a whole cannot be read.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            return _folder(path, split)
        if path.is_file():
            return _file(path)
        name = str(source)
        if name.endswith(SUFFIXES) or name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise FileNotFoundError(f"data: no such file: {name}")
        import datasets

        return _records(datasets.load_dataset(name, split=split), f"{name}[{split}]:")
    if isinstance(source, dict):
        if split not in source:
            raise ValueError(f"split: expected one of {sorted(source)}, got {split!r}")
        source = source[split]
    if not isinstance(source, Iterable):
        raise TypeError(
            f"data: expected a path, a dataset or an iterable of rows, got {type(source).__name__}"
        )
    return _records(source, "row ")


def _records(rows: Iterable, prefix: str) -> Iterator[tuple[str, dict | RowProblem]]:
    for i, row in enumerate(rows):
        yield f"{prefix}{i}", row if isinstance(row, dict) else _not_a_row(row, f"{prefix}{i}")


def _not_a_row(value: Any, where: str) -> RowProblem:
    return RowProblem(
        "not an object", f"expected an object with columns, got {type(value).__name__}", where
    )


def _folder(path: Path, split: str) -> Iterator[tuple[str, dict | RowProblem]]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        import datasets

        yield from read_rows(datasets.load_from_disk(str(path)), split)
        return
    files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
    if not files:
        raise ValueError(
            f"data: expected files ending in {', '.join(SUFFIXES)} in {path}, found none"
        )
    for file in files:
        yield from _file(file)


def _file(path: Path) -> Iterator[tuple[str, dict | RowProblem]]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        return _parquet(path)
    if name.endswith(".json"):
        return _json(path)
    if name.endswith((".jsonl", ".ndjson")):
        return _lines(path)
    raise ValueError(f"data: expected a file ending in {', '.join(SUFFIXES)}, got {path}")


def _parquet(path: Path) -> Iterator[tuple[str, dict | RowProblem]]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=256) for row in _values(batch))
            for i, row in enumerate(rows):
                where = f"{path}:row {i}"
                yield (
                    where,
                    RowProblem(row.reason, row.detail, where)
                    if isinstance(row, RowProblem)
                    else row,
                )
    except (OSError, pyarrow.lib.ArrowException) as error:
        raise ValueError(f"{path}: expected a parquet file, got: {error}") from error


def _values(batch: Any) -> list[dict | RowProblem]:
    """The rows of an Arrow batch; one whose text is no UTF-8 is a problem."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [RowProblem("broken text", str(error))]
        return [row for i in range(batch.num_rows) for row in _values(batch.slice(i, 1))]


def _loads(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _open(path: Path):
    return gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")


def _lines(path: Path) -> Iterator[tuple[str, dict | RowProblem]]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not line.strip():
                    continue
                try:
                    row = _loads(line)
                except ValueError as error:
                    yield where, RowProblem("broken JSON", str(error), where)
                    continue
                yield where, row if isinstance(row, dict) else _not_a_row(row, where)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        where = f"{path}:{number + 1}"
        yield where, RowProblem("broken gzip", str(error), where)


def _json(path: Path) -> Iterator[tuple[str, dict | RowProblem]]:
    try:
        with _open(path) as file:
            text = file.read().removeprefix(b"\xef\xbb\xbf")
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    try:
        rows = _loads(text)
    except ValueError as error:
        if text.lstrip().startswith(b"["):
            raise ValueError(f"{path}: broken JSON: {error}") from error
        yield from _lines(path)  # JSON lines under the name .json are common
        return
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows, got {type(rows).__name__}")
    yield from _records(rows, f"{path}:row ")


def parse_row(row: dict, where: str = "", *, chat: bool) -> Preference:
    """A row in any known form as a Preference.

    Args:
        chat: whether plain text is to become messages: the prompt a user's turn, the completions an
            assistant's, an HH dialogue its turns. Rows of messages stay messages.
    Raises:
        RowProblem: the row cannot be used.
    """
    try:
        return _parse(row, where, chat)
    except RowProblem as problem:
        raise RowProblem(problem.reason, problem.detail, where) from None
    except RecursionError:
        raise RowProblem("nested too deeply", where=where) from None


def _parse(row: dict, where: str, chat: bool) -> Preference:
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise RowProblem(
                f"no column {name!r}", f"the columns are {', '.join(map(str, row)) or 'none'}"
            )
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowProblem("mixed types", f"chosen is {_kind(chosen)}, rejected is {_kind(rejected)}")
    prompt = next(
        (row[k] for k in ("prompt", "conversations", "messages") if row.get(k) is not None), None
    )

    if isinstance(chosen, str) and (prompt is None or isinstance(prompt, str)):
        if prompt is None:
            prompt, chosen, rejected = _split_dialogues(chosen, rejected)
        if chat:
            turns = _hh_messages(prompt)
            prompt, chosen, rejected = (
                turns,
                *([_turn("assistant", x.strip())] for x in (chosen, rejected)),
            )
    else:
        chosen, rejected = (
            _messages("chosen", chosen, "assistant"),
            _messages("rejected", rejected, "assistant"),
        )
        prompt = [] if prompt is None else _messages("prompt", prompt, "user")
        prompt, chosen, rejected = _split_messages(prompt, chosen, rejected)
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not text_of(value).strip() and not (
            isinstance(value, list) and any(m.get("tool_calls") for m in value)
        ):
            raise RowProblem("empty completion", name)
    if chosen == rejected:
        raise RowProblem("identical completions")
    if not prompt:
        raise RowProblem("empty prompt")
    tools, kwargs = (_decoded(name, row.get(name)) for name in ("tools", "chat_template_kwargs"))
    if not isinstance(kwargs or {}, dict):
        raise RowProblem("mixed types", f"chat_template_kwargs is {_kind(kwargs)}")
    kwargs = _without_none(kwargs or {})
    others = {name: value for name, value in row.items() if name not in READ_COLUMNS}
    return Preference(prompt, chosen, rejected, where, tools or None, kwargs, others)


def text_of(value: Messages | str) -> str:
    """The text of a completion or a prompt, for people and for prompts."""
    return (
        value if isinstance(value, str) else "\n".join(str(m.get("content") or "") for m in value)
    )


def common_prefix(a: Sequence, b: Sequence) -> int:
    """How many elements both begin with; a and b are lists or strings."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


def _kind(value: Any) -> str:
    name = type(value).__name__
    return {"str": "text", "list": "a list", "dict": "an object", "NoneType": "missing"}.get(
        name, name
    )


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _decoded(name: str, value: Any) -> Any:
    """A column that some files keep as a string of JSON."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return _loads(value)
    except ValueError as error:
        raise RowProblem("broken JSON", f"in column {name!r}: {error}") from None


def _without_none(value: Any) -> Any:
    """Parquet fills the keys that only other rows have with None."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def _messages(name: str, value: Any, role: str) -> Messages:
    """Text, one message or a list of messages, in the form {role, content} or {from, value}, as
    {role, content}.
    """
    if isinstance(value, str):
        return [_turn(role, value)]
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise RowProblem("mixed types", f"{name} is {_kind(value)}, expected text or messages")
    found = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise RowProblem("mixed types", f"{name}[{i}] is {_kind(message)}, expected a message")
        message = _without_none(message)
        if "role" not in message and "from" in message:
            given = message.pop("from")
            if not isinstance(given, str) or given not in SHAREGPT_ROLES:
                raise RowProblem("unknown role", f"{name}[{i}] is from {given!r}")
            message = {
                "role": SHAREGPT_ROLES[given],
                "content": message.pop("value", ""),
                **message,
            }
        if not isinstance(message.get("role"), str):
            raise RowProblem(
                "no role", f"{name}[{i}] has the keys {', '.join(map(str, message)) or 'none'}"
            )
        content = message.get("content", "")
        if isinstance(content, list):
            if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
                raise RowProblem("not text", f"{name}[{i}] has content that is no text")
            content = "".join(p["text"] for p in content)
        if not isinstance(content, str):
            raise RowProblem("mixed types", f"the content of {name}[{i}] is {_kind(content)}")
        if message["role"] == "system" and not content.strip():
            continue  # an empty system turn would replace a template's own
        found.append({**message, "content": content})
    return found


def _split_messages(
    prompt: Messages, chosen: Messages, rejected: Messages
) -> tuple[Messages, Messages, Messages]:
    """The prompt, and what each completion has beyond it."""
    n = len(prompt)
    if prompt and chosen[:n] == prompt and rejected[:n] == prompt:
        chosen, rejected = chosen[n:], rejected[n:]  # the prompt is given twice
    elif not prompt:
        same = common_prefix(chosen, rejected)
        if same == min(
            len(chosen), len(rejected)
        ):  # one dialogue is the beginning of the other, or they are one
            same = max(0, same - 1)
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if value and value[0]["role"] != "assistant":
            # a differing user turn: the two dialogues answer different questions
            raise RowProblem(
                "prompts differ", f"{name} goes on with a turn of {value[0]['role']!r}"
            )
    return prompt, chosen, rejected


def _split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Whole dialogues as text: up to the last "Assistant:" of an HH dialogue, else the longest
    common beginning.
    """
    marker = "\n\nAssistant:"
    if marker in chosen and marker in rejected:
        at = [x.rindex(marker) + len(marker) for x in (chosen, rejected)]
        if chosen[: at[0]] != rejected[: at[1]]:
            raise RowProblem(
                "prompts differ", "the dialogues differ before their last 'Assistant:'"
            )
        return chosen[: at[0]], chosen[at[0] :], rejected[at[1] :]
    same = common_prefix(chosen, rejected)
    same = max(
        chosen.rfind(" ", 0, same), chosen.rfind("\n", 0, same), 0
    )  # not in the middle of a word
    if not same and chosen != rejected:
        raise RowProblem(
            "prompts differ", "no column 'prompt', and the two texts share no beginning"
        )
    return chosen[:same], chosen[same:], rejected[same:]


def _hh_messages(prompt: str) -> Messages:
    """The turns of an HH dialogue; any other text is one turn of the user."""
    parts = HH_TURN.split(prompt)
    if len(parts) < 3 or parts[0].strip():
        return [_turn("user", prompt)] if prompt else []
    said = zip(parts[1::2], parts[2::2], strict=True)
    turns = [_turn(SHAREGPT_ROLES[who.lower()], text.strip()) for who, text in said]
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()  # the turn that the completion fills
    return turns
