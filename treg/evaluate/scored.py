"""Scores of marked answers: of each token what every score gives it, and what the marks say.

A score is a reward: the higher it is, the better the token should be. What finds wrong tokens is
minus the score.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

NO_STEP = -1


@dataclass(frozen=True, eq=False)
class ScoredAnswer:
    """One answer that says n tokens.

    document: what the bootstrap draws; answers of one document are drawn together.
    scores: by name, [n] floating, finite.
    wrong: [n] bool: marked as wrong. right: [n] bool: marked as right.
    judged: [n] bool: the tokens that somebody looked at; None: all. Only they count in measures of
        tokens; sums over answers and steps take all.
    labels: by error type, [n] bool: the tokens that are marked as wrong with this type.
    steps: [n] int: the step that each token is in, counted from 0; NO_STEP: in none.
    first_wrong: the first wrong step; None: there is none, or no steps are known.
    pair: answers of one pair share it. preferred: whether it is the better one of its pair.
    ends: by score, the sum over the tokens that end the answer; they are not judged, and belong to
        what the whole answer gets.
    """

    document: str
    scores: Mapping[str, np.ndarray]
    wrong: np.ndarray
    right: np.ndarray
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)
    steps: np.ndarray | None = None
    first_wrong: int | None = None
    pair: str | None = None
    preferred: bool | None = None
    ends: Mapping[str, float] = field(default_factory=dict)
    judged: np.ndarray | None = None

    def __post_init__(self):
        count = len(self.wrong)
        arrays = {"wrong": self.wrong, "right": self.right, **self.scores, **self.labels}
        for name in ("steps", "judged"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        for name, values in arrays.items():
            if values.shape != (count,):
                raise ValueError(
                    f"{name}: expected one value for each of the {count} tokens, got an "
                    f"array of shape {list(values.shape)}"
                )
        masks = {name: values for name, values in arrays.items() if name not in self.scores}
        for name, values in masks.items():
            if values.dtype != bool and name != "steps":
                raise ValueError(
                    f"{name}: expected an array of bool, got {values.dtype}; give {name}.astype("
                    "bool)"
                )
        for name, mask in self.labels.items():
            if (mask & ~self.wrong).any():
                raise ValueError(
                    f"labels: expected {name!r} on tokens that are wrong alone, got it on others "
                    f"in the document {self.document!r}; mark these as wrong"
                )
        if (self.right & self.wrong).any():
            raise ValueError(
                "right: expected tokens that are not wrong, got some that are both in the document "
                f"{self.document!r}"
            )
        for name, values in self.scores.items():
            if not np.isfinite(values).all():
                raise ValueError(
                    f"{name}: expected finite scores, got others in the document {self.document!r}"
                )

    def of_judged(self, values: np.ndarray) -> np.ndarray:
        """Those of [n] values that belong to judged tokens."""
        return values if self.judged is None else values[self.judged]


@dataclass(frozen=True, eq=False)
class Scored:
    """All answers, and their judged tokens one after the other: N tokens of D documents.

    answers: at least one, each with the same scores.
    """

    answers: Sequence[ScoredAnswer]

    def __post_init__(self):
        if not self.answers:
            raise ValueError("answers: expected at least one scored answer, got none")
        for answer in self.answers:
            if answer.scores.keys() != self.answers[0].scores.keys():
                raise ValueError(
                    f"scores: expected the scores {', '.join(self.names)} of every answer, got "
                    f"{', '.join(answer.scores) or 'none'} in the document {answer.document!r}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the scores."""
        return tuple(self.answers[0].scores)

    def of(self, name: str) -> np.ndarray:
        """[N] float64: a score of every judged token."""
        parts = [answer.of_judged(answer.scores[name]) for answer in self.answers]
        return np.concatenate(parts).astype(np.float64)

    @cached_property
    def wrong(self) -> np.ndarray:
        """[N] bool."""
        return np.concatenate([x.of_judged(x.wrong) for x in self.answers])

    @cached_property
    def right(self) -> np.ndarray:
        """[N] bool."""
        return np.concatenate([x.of_judged(x.right) for x in self.answers])

    @cached_property
    def documents(self) -> dict[str, int]:
        """The number of each document, from 0, in the order in which they first come."""
        names = dict.fromkeys(answer.document for answer in self.answers)
        return {name: i for i, name in enumerate(names)}

    @cached_property
    def document_of_answer(self) -> np.ndarray:
        """[answers] int64."""
        return np.array([self.documents[answer.document] for answer in self.answers])

    @cached_property
    def document(self) -> np.ndarray:
        """[N] int64: the document of each token."""
        return np.repeat(self.document_of_answer, self.lengths)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[answers] int64: judged tokens of each answer."""
        return np.array([len(x.of_judged(x.wrong)) for x in self.answers])

    @cached_property
    def labels(self) -> dict[str, np.ndarray]:
        """[tokens] int64 by error type: the numbers of the tokens marked with it; the type with the
        most tokens comes first.
        """
        found: dict[str, list[np.ndarray]] = {}
        starts = np.cumsum(self.lengths) - self.lengths
        for start, answer in zip(starts, self.answers, strict=True):
            for label, mask in answer.labels.items():
                found.setdefault(label, []).append(np.flatnonzero(answer.of_judged(mask)) + start)
        joined = {label: np.concatenate(parts) for label, parts in found.items()}
        order = sorted(joined, key=lambda label: (-len(joined[label]), label))
        return {label: joined[label] for label in order if len(joined[label])}


def check_half(half: str) -> None:
    """ValueError for a word that names no half of the data."""
    if half not in ("first", "second", "all"):
        raise ValueError(f"half: expected first, second or all, got {half!r}")


def in_half(document: str, half: str, seed: int) -> bool:
    """Whether a document is in a half of the data: "first", "second", or "all".

    A hash of the document's name and the seed decides. So a document stays in its half when others
    are added or left out, and answers of one document stay together.
    """
    check_half(half)
    digest = hashlib.sha256(f"{seed} {document}".encode()).digest()
    return half == "all" or (digest[0] % 2 == 0) == (half == "first")


def sampled(names: Sequence[str], count: int | None, seed: int) -> list[str]:
    """So many of the names, drawn by the seed, in the order in which they are given; None: all."""
    if count is None or count >= len(names):
        return list(names)
    drawn = np.random.default_rng(seed).choice(len(names), count, replace=False)
    return [names[int(i)] for i in sorted(drawn)]
