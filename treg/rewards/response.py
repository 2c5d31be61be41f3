"""An answer as sources see it: token ids, text, and which token holds what of the text."""

from __future__ import annotations

import datetime
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treg.data import (
    SIDES,
    Messages,
    Pair,
    Renderer,
    RowProblem,
    answer_end,
    common_prefix,
    conversation,
    text_of,
)
from treg.data.pieces import content_places, text_spans, token_pieces
from treg.data.prompted import PromptedIds


@dataclass(frozen=True, eq=False)
class Response:
    """One answer, as token ids and as text.

    prompt: what was asked, as messages or as plain text.
    completion: the answer as the row has it, messages or plain text; without an end-of-sequence
        token that the plain text ends with, as where TRL has added it.
    text: the contents of the answer's messages. Of an answer that was cut at max_length: what its
        tokens say. If it was cut after the first of several messages, that has the template's words
        in it: sources that read text refuse it (`cut_messages`).
    prompt_ids, ids: [P] and [T] int32; ids are the answer's.
    content: how many of the T tokens precede what ends the answer.
    says, scored: [T] bool: tokens of what the answer says, and those that the assistant writes,
        which are more: the ends of its turns. The others are the template's own words and turns of
        others. None: all before `content`, and all.
    shown: the answer as the chat template writes it, tool calls and thoughts included, for whom it
        is shown to. None: text.
    side: "chosen" or "rejected". where: "file:line" of the row.
    row: the other columns of the row. row_text: the answer's text as the row has it, where blanks
        around it were left out; else None.
    other_ids: the ids of the pair's other answer, [T'] int32; None of a response that comes without
        one.
    cut: whether the answer was cut at max_length.
    tools, template_kwargs, date: what goes on to the chat template: date is what it takes for
        today, None: today.
    """

    prompt: Messages | str
    completion: Messages | str
    text: str
    prompt_ids: np.ndarray
    ids: np.ndarray
    content: int
    tokenizer: Any = field(repr=False)
    side: str = "chosen"
    where: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)
    row_text: str | None = None
    other_ids: np.ndarray | None = None
    cut: bool = False
    tools: list | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    says: np.ndarray | None = None
    scored: np.ndarray | None = None
    shown: str | None = None
    date: datetime.date | None = None

    @classmethod
    def of_pair(cls, pair: Pair, side: str, tokenizer: Any) -> Response:
        """The chosen or the rejected answer of a pair."""
        row = pair.row
        ids = {x: getattr(pair, f"{x}_ids") for x in SIDES}
        found = PromptedIds(pair.prompt_ids, ids, pair.answers, pair.cut)
        return cls.of_ids(
            found,
            side,
            tokenizer,
            prompt=row.prompt,
            completion=getattr(row, side),
            where=row.where,
            row=row.columns,
            row_text=row.given.get(side),
            tools=row.tools,
            template_kwargs=row.template_kwargs,
            date=pair.date,
        )

    @classmethod
    def of_ids(
        cls,
        found: PromptedIds,
        name: str,
        tokenizer: Any,
        *,
        completion: Messages | str,
        **more: Any,
    ) -> Response:
        """One of the answers that were encoded after a prompt.

        Args:
            name: of the answer in found, and its side, "chosen" or "rejected".
            completion: the answer as the row has it.
            more: the fields prompt, where, row, row_text, tools, template_kwargs, date.
        """
        ids = found.ids[name]
        if isinstance(completion, str) and tokenizer.eos_token:
            completion = completion.removesuffix(tokenizer.eos_token)
        answer = found.answers.get(name)
        says = None if answer is None else answer.content
        if says is not None and says.any():
            first, content = int(np.argmax(says)), len(says) - int(np.argmax(says[::-1]))
        else:
            first, content = 0, content_length(ids.tolist(), tokenizer)
        text, cut = text_of(completion), name in found.cut
        shown = None if answer is None else answer.said
        if cut:
            text = tokenizer.decode(ids[first:content], skip_special_tokens=True)
            shown = None
        return cls(
            completion=completion,
            text=text,
            prompt_ids=found.prompt_ids,
            ids=ids,
            content=content,
            tokenizer=tokenizer,
            side=name,
            other_ids=next((x for key, x in found.ids.items() if key != name), None),
            cut=cut,
            says=says,
            scored=None if answer is None else answer.scored,
            shown=shown,
            **more,
        )

    @classmethod
    def sampled(
        cls,
        prompt: Messages | str,
        prompt_ids: Sequence[int],
        ids: Sequence[int],
        tokenizer: Any,
        **more: Any,
    ) -> Response:
        """A completion that a policy has sampled: it stands alone, and says what its tokens say.

        more: the fields where, row, tools, template_kwargs.
        """
        ids = [int(x) for x in ids]
        content = content_length(ids, tokenizer)
        return cls(
            prompt=prompt,
            completion="" if isinstance(prompt, str) else [{"role": "assistant", "content": ""}],
            text=tokenizer.decode(ids[:content], skip_special_tokens=True),
            prompt_ids=np.array(prompt_ids, dtype=np.int32),
            ids=np.array(ids, dtype=np.int32),
            content=content,
            tokenizer=tokenizer,
            cut=True,
            **more,
        )

    @cached_property
    def assistants(self) -> np.ndarray:
        """[T] bool: the tokens that are the assistant's, which are those that are scored; where
        that is not known, all but those of messages of others.
        """
        if self.scored is not None:
            return self.scored
        if isinstance(self.completion, str):
            return np.ones(len(self.ids), dtype=bool)
        own = np.array([message["role"] == "assistant" for message in self.completion])
        return np.ones(len(self.ids), dtype=bool) if own.all() else own[self.messages]

    @cached_property
    def stretches(self) -> list[Tensor]:
        """Places in ids, int64, of the tokens that rewards are of: those of what the answer says,
        in runs without a gap. Between two runs stand words of the template, or turns of others.
        """
        if self.says is None:
            places = np.flatnonzero(self.assistants[: self.content])
        else:
            places = np.flatnonzero(self.says)
        gaps = np.flatnonzero(np.diff(places) > 1) + 1
        return [torch.from_numpy(x) for x in np.split(places, gaps) if len(x)]

    @cached_property
    def judged(self) -> Tensor:
        """[n] int64: the places of all stretches, one after the other."""
        return torch.cat([torch.empty(0, dtype=torch.int64), *self.stretches])

    def numbered(self, number: Callable[[Tensor], Tensor]) -> Tensor:
        """Numbers, from 0, of segments of what the answer says; none goes beyond a stretch.

        Args:
            number: places of a stretch, [k] int64 -> from 0, the segment that each token is in.
        Returns:
            [n] int64, for the tokens of `judged`.
        """
        found, count = [torch.empty(0, dtype=torch.int64)], 0
        for places in self.stretches:
            found.append(number(places) + count)
            count = int(found[-1].max()) + 1
        return torch.cat(found)

    @cached_property
    def end(self) -> int:
        """The place of the token that ends the answer: the first of the assistant's after what it
        says; where there is none, as in one that was cut, the last that it says, or the last.
        """
        after = np.flatnonzero(self.assistants[self.content :])
        if len(after):
            return self.content + int(after[0])
        return int(self.judged[-1]) if len(self.judged) else len(self.ids) - 1

    def ends(self, rewards: Tensor) -> Tensor:
        """Places of the tokens that end the answer, up to the last one with a reward other than 0.

        Args:
            rewards: [T] floating.
        Returns:
            [n] int64.
        """
        until = max([self.content, *(rewards.nonzero()[-1:, 0] + 1).tolist()])
        own = np.flatnonzero(self.assistants[self.content : until])
        return torch.from_numpy(own) + self.content

    @cached_property
    def pieces(self) -> list[str]:
        """What each of the T tokens adds to the decoded text, see `token_pieces`. Where the text is
        what the tokens say, special tokens within it say nothing.
        """
        ids, special = self.ids.tolist(), set(self.tokenizer.all_special_ids) if self.cut else set()
        said = [i for i, x in enumerate(ids) if i >= self.content or x not in special]
        found = [""] * len(ids)
        pieces = token_pieces([ids[i] for i in said], self.tokenizer)
        for i, piece in zip(said, pieces, strict=True):
            found[i] = piece
        return found

    @cached_property
    def spans(self) -> np.ndarray | None:
        """[T, 2] int32: the characters of `text` that each token holds, see `text_spans`; None
        where the text cannot be found in what the tokens say.
        """
        completion = self.completion
        if isinstance(completion, str) or self.text != text_of(completion):
            return text_spans(self.pieces, [self.text])
        parts = [text_of([message]) for message in completion]
        start = len(self.prompt_ids)
        tokens = content_places(self._rendered, self._whole, *self._turns)
        ends = list(accumulate(map(len, self.pieces), initial=0))
        places = [[ends[max(0, x - start)] for x in of_message] for of_message in tokens]
        return text_spans(self.pieces, parts, places)

    @cached_property
    def messages(self) -> np.ndarray:
        """[T] int32: which message of the answer each token is in, counted from 0.

        The bounds are found by rendering the first messages alone: what their tokens have in common
        with the whole belongs to them.
        """
        if isinstance(self.completion, str):
            return np.zeros(len(self.ids), dtype=np.int32)
        bounds = []
        prompt, answer = self._turns
        for count in range(1, len(answer)):
            ids = self._rendered([*prompt, *answer[:count]])
            bounds.append(common_prefix(ids, self._whole) - len(self.prompt_ids))
        return np.searchsorted(bounds, np.arange(len(self.ids)), side="right").astype(np.int32)

    @property
    def _whole(self) -> list[int]:
        return [*self.prompt_ids.tolist(), *self.ids.tolist()]

    @cached_property
    def _turns(self) -> tuple[Messages, Messages]:
        """Prompt and answer of messages, as whole turns."""
        prompt: Any = [] if isinstance(self.prompt, str) else self.prompt
        answer: Any = [] if isinstance(self.completion, str) else self.completion
        prompt, answer, _ = conversation(prompt, answer)
        return prompt, answer

    def _rendered(self, messages: Messages, **more: Any) -> list[int]:
        """The ids of messages through the chat template."""
        text = self._renderer(messages, **more)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.tools, self.template_kwargs, self.date)


def content_length(ids: list[int], tokenizer: Any) -> int:
    """Tokens of a response before what ends it, for one whose ids come from elsewhere: what the
    chat template writes after an answer, or special tokens, and blanks after them.
    """
    special = set(tokenizer.all_special_ids)
    end = len(ids)
    for ending in _endings(tokenizer, str(tokenizer.chat_template)):
        if tuple(ids[-len(ending) :]) == ending:
            end -= len(ending)
            while end and ids[end - 1] in special:
                end -= 1
            return end
    while end and (ids[end - 1] in special or not tokenizer.decode([ids[end - 1]]).strip()):
        end -= 1
    return next((i for i in range(end, len(ids)) if ids[i] in special), len(ids))


@lru_cache(maxsize=16)
def _endings(tokenizer: Any, template: str) -> tuple[tuple[int, ...], ...]:
    """The ids that a chat template writes after an answer, and their beginnings, which an engine
    that stops at the end of a turn returns; the longest first.
    """
    if tokenizer.chat_template is None:
        return ()
    try:
        ids = tokenizer(answer_end(tokenizer), add_special_tokens=False)["input_ids"]
    except RowProblem:
        return ()
    # a beginning of blanks alone may be the answer's own
    marks = [i + 1 for i in range(len(ids)) if tokenizer.decode(ids[: i + 1]).strip()]
    return tuple(tuple(ids[:n]) for n in reversed(marks))


def differs(response: Response) -> str:
    """What there is to say of a text that is not found in what its tokens say."""
    found = "its text differs from what its tokens say"
    composed = unicodedata.normalize("NFC", response.text)
    if composed != response.text and composed in "".join(response.pieces):
        return f"{found}: the tokenizer writes it in Unicode's form NFC; normalize the data to NFC"
    return found


def cut_messages(response: Response) -> RowProblem | None:
    """Why a source that reads an answer's text cannot read this one: it was cut after the first of
    several messages, and its tokens do not say where the words of the template end. None if it can.
    """
    if not response.cut or response.messages[-1] == 0:
        return None
    detail = f"{response.side}: cut after the first of its messages; raise max_length"
    return RowProblem("several messages, cut", detail, response.where)


class ResponsePairs(Sequence):
    """The responses of pairs, (chosen, rejected) of each, made when they are asked for."""

    def __init__(self, pairs: Sequence[Pair], tokenizer: Any):
        self.pairs = pairs
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        pair = self.pairs[index]
        return tuple(Response.of_pair(pair, side, self.tokenizer) for side in SIDES)
