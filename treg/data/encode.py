"""Preferences as token ids: through the chat template, split at the longest common token prefix,
truncated.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from treg.data.annotated import ID_COLUMNS, is_annotated
from treg.data.report import Report, RowProblem
from treg.data.rows import Messages, Preference, common_prefix, parse_row, read_rows


@dataclass(frozen=True)
class Pair:
    """A preference as token ids, int32. A sequence is prompt_ids followed by chosen_ids or
    rejected_ids.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    row: Preference
    index: int  # of the row in its source, counting rows that were dropped
    truncated: bool = False

    @property
    def example(self) -> dict[str, np.ndarray]:
        """What `PairCollator` needs of it."""
        return {name: getattr(self, name) for name in ID_COLUMNS}


@dataclass(frozen=True)
class EncodeOptions:
    """max_length: tokens of prompt and completion together; a completion keeps its start, a prompt
    must fit whole.

    chat: whether text without roles becomes messages (see `parse_row`); None: if the tokenizer has
    a chat template.
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
    chat = tokenizer.chat_template is not None if options.chat is None else options.chat
    report, pairs = Report(strict), []
    for i, (where, row) in enumerate(itertools.islice(read_rows(source, split), limit)):
        report.seen += 1
        try:
            if isinstance(row, RowProblem):
                raise row
            pair = encode(parse_row(row, where, chat=chat), tokenizer, options.max_length, i)
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
    Raises:
        RowProblem: the row cannot be used. ValueError: the tokenizer cannot serve such rows.
    """
    try:
        prompt, chosen, rejected = (
            _chat_ids(row, tokenizer) if row.chat else _text_ids(row, tokenizer)
        )
    except UnicodeEncodeError as error:
        raise RowProblem("broken text", str(error), row.where) from None
    start = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
    if not start:
        raise RowProblem("empty prompt", "the prompt and the completions share no token", row.where)
    longest = max(len(chosen), len(rejected))
    if max_length is not None:
        if start >= max_length:
            raise RowProblem(
                "prompt too long", f"{start} tokens, max_length is {max_length}", row.where
            )
        chosen, rejected = chosen[:max_length], rejected[:max_length]
    if len(chosen) == start or len(rejected) == start:
        raise RowProblem("empty completion", "no token after the prompt", row.where)
    if chosen == rejected:
        raise RowProblem(
            "identical completions", "after truncation" if longest > len(chosen) else "", row.where
        )
    ids = (
        np.asarray(x, dtype=np.int32) for x in (chosen[:start], chosen[start:], rejected[start:])
    )
    return Pair(*ids, row, index, max_length is not None and longest > max_length)


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


def _chat_ids(row: Preference, tokenizer: Any) -> list[list[int]]:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"chat_template: {row.where} holds messages, and the tokenizer has no chat template to render them; give "
            "one with chat_template, or use a tokenizer of a chat model"
        )
    try:
        texts = [prompt_text(tokenizer, row.prompt, row.tools, row.template_kwargs)]
        for completion in (row.chosen, row.rejected):
            messages = [*row.prompt, *completion]
            texts.append(
                tokenizer.apply_chat_template(
                    messages, tools=row.tools, tokenize=False, **row.template_kwargs
                )
            )
    except Exception as error:  # a template is a program: it raises anything
        raise RowProblem("chat template", f"{type(error).__name__}: {error}", row.where) from None
    return [_ids(tokenizer, text, add_special_tokens=False) for text in texts]


def _text_ids(row: Preference, tokenizer: Any) -> list[list[int]]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            "tokenizer: expected one with an end-of-sequence token for rows of plain text, got none"
        )
    prompt, *full = (
        _ids(tokenizer, text)
        for text in (row.prompt, row.prompt + row.chosen, row.prompt + row.rejected)
    )
    return [prompt, *(ids if ids[-1:] == [eos] else [*ids, eos] for ids in full)]


def _ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    text.encode()  # UnicodeEncodeError for a lone surrogate, of which tokenizers say nothing of use
    return tokenizer(text, verbose=False, **options)[
        "input_ids"
    ]  # quiet about lengths: max_length is seen to later
