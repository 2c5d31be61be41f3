"""Where scores come from: a source of token rewards, an annotated file, or baselines.

Each gives every token of a response one number for each of its names, and says of a response that
it cannot judge why that is so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from treg.data import RowProblem
from treg.data.annotated import streams_of
from treg.evaluate.documents import MarkedAnswer
from treg.rewards import Context, NoReference, Response, TokenRewardSource, nearest
from treg.rewards.base import check_response
from treg.rewards.controls import RandomOptions, RandomSource
from treg.rewards.shaping import Step, score_shaped
from treg.rewards.surprise import surprise_rewards

Given = tuple[MarkedAnswer, Response]


class Columns(Protocol):
    """Scores of several names."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def check(self, answer: MarkedAnswer, response: Response) -> RowProblem | None:
        """Why a response cannot be scored; None if it can."""
        ...

    def score(self, given: Sequence[Given]) -> list[dict[str, Tensor]]:
        """[T] floating by name, of each response; only of those that `check` lets through."""
        ...


class SourceColumns:
    """The streams of a source of token rewards.

    Args:
        name: of the source; its column has it where the source gives one stream alone, else the
            columns have the streams' names.
        steps: of shaping.
    """

    def __init__(self, name: str, source: TokenRewardSource, steps: Sequence[Step] = ()):
        self.source = source
        self.steps = tuple(steps)
        streams = source.streams
        self.stream_of = {name: streams[0]} if len(streams) == 1 else {x: x for x in streams}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.stream_of)

    def check(self, answer: MarkedAnswer, response: Response) -> RowProblem | None:
        return check_response(self.source, response)

    def score(self, given: Sequence[Given]) -> list[dict[str, Tensor]]:
        found = score_shaped(self.source, [response for _, response in given], self.steps)
        return [{name: x[stream] for name, stream in self.stream_of.items()} for x in found]


class FileColumns:
    """Streams of an annotated file, joined by the number of the source's row and the side.

    Args:
        examples, meta: as `treg.data.annotated.read_annotated` gives them. path: for errors.
        streams: those that are wanted; None: all that the file names.
    Raises:
        ValueError: a stream that the file does not have.
    """

    def __init__(
        self,
        examples: Sequence[Mapping[str, Any]],
        meta: Mapping[str, Any],
        path: str,
        streams: Sequence[str] | None = None,
    ):
        there = streams_of(meta)
        for stream in streams or ():
            if stream not in there:
                raise ValueError(
                    f"streams: expected some of {', '.join(there)}, which {path} has, got "
                    f"{stream!r}{nearest(stream, there)}"
                )
        self.stream_of = {x: x for x in streams or there}
        self.path = path
        self.rows = {int(example["index"]): example for example in examples}
        # whether it keeps the log-probs of the reference, from which surprise is known
        self.has_logprobs = "ref_chosen_token_logps" in examples[0]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.stream_of)

    def check(self, answer: MarkedAnswer, response: Response) -> RowProblem | None:
        if answer.index is None or answer.side is None:
            detail = "answers need the number of a row and a side, chosen or rejected"
            return RowProblem("cannot be joined to the annotated file", detail, answer.where)
        row = self.rows.get(answer.index)
        if row is None:
            detail = f"{self.path} has no row of the number {answer.index}"
            return RowProblem("not in the annotated file", detail, answer.where)
        own = {"prompt_ids": response.prompt_ids, f"{answer.side}_ids": response.ids}
        for name, ids in own.items():
            if not np.array_equal(row[name], ids):
                detail = f"{name}: {_first_difference(row[name], ids, response.tokenizer)}"
                return RowProblem("other tokens in the annotated file", detail, answer.where)
        return None

    def score(self, given: Sequence[Given]) -> list[dict[str, Tensor]]:
        found = []
        for answer, _ in given:
            row = self._row(answer)
            columns = {x: row[f"{answer.side}_{s}"] for x, s in self.stream_of.items()}
            found.append({x: torch.from_numpy(np.array(v)) for x, v in columns.items()})
        return found

    def logprobs(self, answer: MarkedAnswer) -> Tensor:
        """The reference's log-prob of each token, [T] float32."""
        values = self._row(answer)[f"ref_{answer.side}_token_logps"]
        return torch.from_numpy(np.array(values))

    def _row(self, answer: MarkedAnswer) -> Mapping[str, Any]:
        return self.rows[int(answer.index or 0)]


def _first_difference(was: np.ndarray, now: np.ndarray, tokenizer: Any) -> str:
    """Where two lists of ids part, as text."""
    shared = min(len(was), len(now))
    differ = np.flatnonzero(np.asarray(was)[:shared] != np.asarray(now)[:shared])
    at = int(differ[0]) if len(differ) else shared
    texts = [tokenizer.decode(ids[max(0, at - 3) : at + 8]) for ids in (was, now)]
    return f"from token {at} on it has {texts[0]!r}, here it is {texts[1]!r}"


class BaselineColumns:
    """Scores that any source must beat. As rewards, so that what they find is what is low:

        surprise            log pi_ref(y_t | x, y_<t)
        surprise_by_word    the lowest of those of the word's tokens
        entropy             minus that of the distribution from which the token comes, in nats
        position            -t / n for the t-th of n judged tokens, from 0: late tokens are found
        length              minus the token's characters: long tokens are found
        random              normal random numbers

    The first three need a model that runs here, or the first two the log-probs of a file.

    Args:
        context: of the run; its model may be a `NoReference`.
        seed: of the random numbers.
        file: an annotated file that keeps the reference's log-probs, for a run without a model.
    """

    def __init__(self, context: Context, seed: int, file: FileColumns | None = None):
        self.context = context
        self.runs = not isinstance(context.model, NoReference)
        self.file = file if file is not None and file.has_logprobs and not self.runs else None
        if self.runs:
            context.want("entropy")
        self.random = RandomSource(RandomOptions(seed), context)

    @property
    def names(self) -> tuple[str, ...]:
        surprise = ("surprise", "surprise_by_word") if self.runs or self.file else ()
        entropy = ("entropy",) if self.runs else ()
        return (*surprise, *entropy, "position", "length", "random")

    def check(self, answer: MarkedAnswer, response: Response) -> RowProblem | None:
        return self.context.too_long(response) if self.runs else None

    def score(self, given: Sequence[Given]) -> list[dict[str, Tensor]]:
        responses = [response for _, response in given]
        said: Sequence[Mapping[str, Tensor]] = [{} for _ in given]
        if self.runs:
            said = self.context.reference(responses)
        elif self.file is not None:
            said = [{"logprobs": self.file.logprobs(answer)} for answer, _ in given]
        drawn = self.random.score(responses)
        found = []
        for response, known, numbers in zip(responses, said, drawn, strict=True):
            columns = _of_text(response)
            columns["random"] = numbers["token_rewards"]
            if "logprobs" in known:
                by_unit = {"surprise": "token", "surprise_by_word": "word"}
                for name, unit in by_unit.items():
                    columns[name] = surprise_rewards(response, known["logprobs"], unit)
            if "entropy" in known:
                columns["entropy"] = -known["entropy"]
            found.append({name: columns[name] for name in self.names})
        return found


def _of_text(response: Response) -> dict[str, Tensor]:
    """The columns that no model has a part in."""
    judged = response.judged
    position = torch.zeros(len(response.ids))
    position[judged] = -torch.arange(len(judged)) / max(len(judged), 1)
    lengths = [-float(len(piece)) for piece in response.pieces]
    return {"position": position, "length": torch.tensor(lengths)}


@dataclass(frozen=True, eq=False)
class Named:
    """Columns under names that no other has.

    shown: the columns' own names by those that are shown.
    """

    columns: Columns
    shown: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.shown)

    def check(self, answer: MarkedAnswer, response: Response) -> RowProblem | None:
        return self.columns.check(answer, response)

    def score(self, given: Sequence[Given]) -> list[dict[str, Tensor]]:
        return [
            {name: found[own] for name, own in self.shown.items()}
            for found in self.columns.score(given)
        ]


def with_own_names(given: Sequence[tuple[str, Columns]]) -> list[Named]:
    """Columns whose names are all different: one that others have as well gets the word of its
    columns behind it, such as "surprise (file)".

    Args:
        given: words and columns.
    """
    every = [name for _, columns in given for name in columns.names]
    found = []
    for word, columns in given:
        shown = {x if every.count(x) == 1 else f"{x} ({word})": x for x in columns.names}
        found.append(Named(columns, shown))
    return found
