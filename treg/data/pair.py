"""Pairs as token ids, and how rows become such pairs."""

import dataclasses
import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from treg.data.annotated import ID_COLUMNS
from treg.data.batches import SIDES
from treg.data.messages import text_of
from treg.data.names import Columns, parse_columns
from treg.data.rendering import asks_for_date
from treg.data.rows import Preference

Turns = Literal["assistant", "all"]


@dataclass(frozen=True)
class AnswerTokens:
    """Which of the T tokens of a completion are what.

    scored: [T] bool, what the assistant writes: what its messages say and the ends of its turns,
        but no turn of others in between.
    content: [T] bool, of these, what its messages say.
    said: what the messages say, as the template writes it (tool calls and thoughts included), also
        where the tokens are cut.
    """

    scored: np.ndarray
    content: np.ndarray
    said: str


@dataclass(frozen=True)
class Pair:
    """A preference as token ids, int32.

    A sequence is prompt_ids followed by chosen_ids or by rejected_ids.
    cut: the sides that max_length cut, of "chosen" and "rejected".
    answers: by side; empty where the ids come from elsewhere.
    date: what the chat template took for today; None: it is not known.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    row: Preference
    index: int  # of the row in its source, counting rows that were dropped
    cut: tuple[str, ...] = ()
    answers: dict[str, AnswerTokens] = field(default_factory=dict, compare=False, repr=False)
    date: datetime.date | None = field(default=None, compare=False, repr=False)

    def of_row(self, row: Preference) -> "Pair":
        """The same pair with this row, whose texts it does not hold twice."""
        answers = {}
        for side, answer in self.answers.items():
            text = text_of(getattr(row, side))
            same = answer.said == text
            answers[side] = dataclasses.replace(answer, said=text) if same else answer
        return dataclasses.replace(self, row=row, answers=answers)

    @property
    def truncated(self) -> bool:
        """Whether max_length cut a completion."""
        return bool(self.cut)

    @property
    def masked(self) -> bool:
        """Whether tokens of a completion are not scored: those of other people's turns."""
        return not all(answer.scored.all() for answer in self.answers.values())

    @property
    def example(self) -> dict[str, np.ndarray]:
        """What `PairCollator` needs of a pair; masks only where tokens are not scored."""
        found = {name: getattr(self, name) for name in ID_COLUMNS}
        if self.masked:
            found |= self.masks
        return found

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """The columns chosen_scored and rejected_scored, [T] bool."""
        found = {}
        for side in SIDES:
            every = np.ones(len(getattr(self, f"{side}_ids")), dtype=bool)
            found[f"{side}_scored"] = self.answers[side].scored if self.answers else every
        return found


@dataclass(frozen=True)
class EncodeOptions:
    """How rows become token ids.

    Args:
        max_length: >= 2, tokens of prompt and completion together, or None. A completion keeps its
            start; a prompt must fit whole.
        chat: whether text without roles becomes messages (see `parse_row`). None: it does if the
            tokenizer has a chat template, and text that was rendered already is refused. False:
            text is taken as it is.
        columns: new names of columns, as in `treg.data.names`: by name, or "prompt=question".
        turns: which turns of a completion of several messages are scored: the assistant's, or all
            of them, as TRL does.
        date: what a chat template takes for today, as YYYY-MM-DD. None: today.
    """

    max_length: int | None = 1024
    chat: bool | None = None
    columns: Columns = field(default_factory=dict)
    turns: Turns = "assistant"
    date: str | None = None

    def __post_init__(self):
        if self.max_length is not None and (
            not isinstance(self.max_length, int) or self.max_length < 2
        ):
            raise ValueError(
                f"max_length: expected an integer >= 2 or None, got {self.max_length!r}"
            )
        if self.turns not in get_args(Turns):
            raise ValueError(f"turns: expected assistant or all, got {self.turns!r}")
        object.__setattr__(self, "columns", parse_columns(self.columns))
        _ = self.day

    @property
    def day(self) -> datetime.date:
        if self.date is None:
            return datetime.date.today()
        try:
            return datetime.date.fromisoformat(self.date)
        except (TypeError, ValueError) as error:
            raise ValueError(f"date: expected YYYY-MM-DD, got {self.date!r}") from error

    def dated(self, tokenizer: Any, today: str | None = None) -> "EncodeOptions":
        """These with a date, if they have none and the tokenizer's chat template asks for one.

        today: YYYY-MM-DD, such as the day on which a run began; None: today.
        """
        if self.date is not None or not asks_for_date(tokenizer):
            return self
        return dataclasses.replace(self, date=today or self.day.isoformat())


@dataclass(frozen=True)
class EncodeWork:
    """How the work of encoding is done, which changes nothing of what comes out.

    Args:
        num_proc: >= 1, processes that encode. A script that asks for several needs
            `if __name__ == "__main__":` around what it does, as it is imported by each of them.
        cache: a folder in which encoded rows are kept for the next time (see
            `treg.data.row_cache`); None: they are not kept.
        first: whether this process encodes what is not kept yet, where several have one cache. The
            others wait for it, and find it there.
        wait: called by all of them, returns once all have come there.
        run: a name that they have in common, and with no other run; None: there is one process.
    """

    num_proc: int = 1
    cache: str | Path | None = None
    first: bool = True
    wait: Callable[[], Any] = lambda: None
    run: str | None = None

    def __post_init__(self):
        if not isinstance(self.num_proc, int) or self.num_proc < 1:
            raise ValueError(f"num_proc: expected a positive integer, got {self.num_proc!r}")
