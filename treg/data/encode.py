"""Preferences as token ids: rendered, split into prompt and completions, truncated.

The completions start where the tokens of prompt and completion cease to agree with those of the
prompt alone.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from treg.data.annotated import ID_COLUMNS, is_annotated
from treg.data.batches import SIDES
from treg.data.reading import read_rows
from treg.data.report import Report, RowProblem
from treg.data.rows import Messages, Preference, common_prefix, parse_row


@dataclass(frozen=True)
class Pair:
    """A preference as token ids, int32.

    A sequence is prompt_ids followed by chosen_ids or by rejected_ids.
    cut: the sides that max_length cut, of "chosen" and "rejected".
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    row: Preference
    index: int  # of the row in its source, counting rows that were dropped
    cut: tuple[str, ...] = ()

    @property
    def truncated(self) -> bool:
        """Whether max_length cut a completion."""
        return bool(self.cut)

    @property
    def example(self) -> dict[str, np.ndarray]:
        """What `PairCollator` needs of a pair."""
        return {name: getattr(self, name) for name in ID_COLUMNS}


@dataclass(frozen=True)
class EncodeOptions:
    """How rows become token ids.

    Args:
        max_length: >= 2, tokens of prompt and completion together, or None. A completion keeps its
            start; a prompt must fit whole.
        chat: whether text without roles becomes messages (see `parse_row`). None: it does if the
            tokenizer has a chat template.
    """

    max_length: int | None = 1024
    chat: bool | None = None

    def __post_init__(self):
        if self.max_length is not None and (
            not isinstance(self.max_length, int) or self.max_length < 2
        ):
            raise ValueError(
                f"max_length: expected an integer >= 2 or None, got {self.max_length!r}"
            )


def load_pairs(
    source: Any,
    tokenizer: Any,
    options: EncodeOptions = EncodeOptions(),
    *,
    split: str = "train",
    strict: bool = False,
    limit: int | None = None,
) -> tuple[list[Pair], Report]:
    """Every usable pair of a source, and what became of the other rows.

    Args:
        source, split: see `read_rows`. limit: only so many rows are looked at.
        strict: raise RowProblem at the first row that cannot be used, instead of counting it.
    Raises:
        ValueError: the source cannot be read, or holds no usable row; the message says what became
            of the rows.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected a positive number of rows, got {limit}")
    if is_annotated(source):
        raise ValueError(
            f"data: expected rows of text or messages, got {source}, which is annotated already"
        )
    chat = options.chat
    if chat is None:
        chat = tokenizer.chat_template is not None
    report = Report(strict)
    pairs = []
    rows = itertools.islice(read_rows(source, split), limit)
    for index, (where, row) in enumerate(rows):
        report.seen += 1
        try:
            if isinstance(row, RowProblem):
                raise row
            preference = parse_row(row, where, chat=chat)
            pair = encode(preference, tokenizer, options.max_length, index)
        except RowProblem as problem:
            report.problem(problem)
            continue
        report.kept += 1
        report.truncated += pair.truncated
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"data: expected at least one usable row, found none: {report}")
    return pairs, report


def encode(row: Preference, tokenizer: Any, max_length: int | None = None, index: int = 0) -> Pair:
    """Token ids of a preference.

    The completion starts where the tokens of prompt + chosen, prompt + rejected and of the prompt
    alone (with the template's generation prompt) cease to agree, so that no token is shared between
    a prompt and a completion. Plain text gets the tokenizer's special tokens, and its
    end-of-sequence token at the end.

    Args:
        max_length: as in `EncodeOptions`. index: of the row in its source, kept in the pair.
    Raises:
        RowProblem: the row cannot be used. ValueError: the tokenizer cannot serve such rows.
    """
    try:
        if row.chat:
            prompt, chosen, rejected = _chat_ids(row, tokenizer)
        else:
            prompt, chosen, rejected = _text_ids(row, tokenizer)
    except UnicodeEncodeError as error:
        raise RowProblem("broken text", str(error), row.where) from None
    start = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
    if start == 0:
        raise RowProblem("empty prompt", "the prompt and the completions share no token", row.where)

    cut: tuple[str, ...] = ()
    if max_length is not None:
        if start >= max_length:
            raise RowProblem(
                "prompt too long", f"{start} tokens, max_length is {max_length}", row.where
            )
        both = zip(SIDES, (chosen, rejected), strict=True)
        cut = tuple(side for side, ids in both if len(ids) > max_length)
        chosen, rejected = chosen[:max_length], rejected[:max_length]
    if len(chosen) == start or len(rejected) == start:
        raise RowProblem("empty completion", "no token after the prompt", row.where)
    if chosen == rejected:
        detail = "after truncation" if cut else ""
        raise RowProblem("identical completions", detail, row.where)
    return Pair(
        prompt_ids=np.asarray(chosen[:start], dtype=np.int32),
        chosen_ids=np.asarray(chosen[start:], dtype=np.int32),
        rejected_ids=np.asarray(rejected[start:], dtype=np.int32),
        row=row,
        index=index,
        cut=cut,
    )


def prompt_text(
    tokenizer: Any, messages: Messages, tools: list | None = None, kwargs: dict | None = None
) -> str:
    """Messages through the chat template, up to where the assistant's next words begin."""
    goes_on = messages[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        messages,
        tools=tools,
        tokenize=False,
        add_generation_prompt=not goes_on,
        continue_final_message=goes_on,
        **(kwargs or {}),
    )


def _chat_ids(row: Preference, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """Ids of prompt, prompt + chosen and prompt + rejected through the chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"chat_template: {row.where} holds messages, and the tokenizer has no chat template to "
            "render them; give one with chat_template, or use a tokenizer of a chat model"
        )
    try:
        prompt = _messages(row.prompt)
        prompt_alone = prompt_text(tokenizer, prompt, row.tools, row.template_kwargs)
        with_chosen = _dialogue_text(tokenizer, [*prompt, *_messages(row.chosen)], row)
        with_rejected = _dialogue_text(tokenizer, [*prompt, *_messages(row.rejected)], row)
    except Exception as error:  # a template is a program: it raises anything
        raise RowProblem("chat template", f"{type(error).__name__}: {error}", row.where) from None
    # the template has written the special tokens already
    return (
        _ids(tokenizer, prompt_alone, add_special_tokens=False),
        _ids(tokenizer, with_chosen, add_special_tokens=False),
        _ids(tokenizer, with_rejected, add_special_tokens=False),
    )


def _dialogue_text(tokenizer: Any, messages: Messages, row: Preference) -> str:
    return tokenizer.apply_chat_template(
        messages, tools=row.tools, tokenize=False, **row.template_kwargs
    )


def _text_ids(row: Preference, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """Ids of prompt, prompt + chosen and prompt + rejected of plain text."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer: expected one with an end-of-sequence token for rows of plain text, got none"
        )
    prompt = _text(row.prompt)
    return (
        _ids(tokenizer, prompt),
        _ended(tokenizer, _ids(tokenizer, prompt + _text(row.chosen))),
        _ended(tokenizer, _ids(tokenizer, prompt + _text(row.rejected))),
    )


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """Ids with the end-of-sequence token at the end, which some tokenizers add by themselves."""
    eos = tokenizer.eos_token_id
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _messages(value: Messages | str) -> Messages:
    if isinstance(value, str):
        raise TypeError("expected messages beside a prompt of messages, got text")
    return value


def _text(value: Messages | str) -> str:
    if not isinstance(value, str):
        raise TypeError("expected text beside a prompt of text, got messages")
    return value


def _ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Token ids of a text.

    Raises:
        UnicodeEncodeError: the text holds half of a surrogate pair, of which tokenizers say
            nothing of use.
    """
    text.encode()
    # verbose=False: no warning about lengths, which max_length sees to later
    return tokenizer(text, verbose=False, **options)["input_ids"]
