"""What was changed between an answer and its revision, token by token.

The ids of the original (the rejected answer) and of the revised one (the chosen answer) are aligned
by as few insertions, deletions and replacements of tokens as possible (Levenshtein). Then

    r_t = added      in the chosen answer, where token t was inserted or stands for another
    r_t = removed    in the rejected one, where token t was deleted or replaced
    r_t = 0          elsewhere

Of several alignments with as few edits one is taken that keeps the most tokens; of these, read
from the end, the one that keeps or replaces a token where that can be, else deletes, else inserts.

With `column` the original is each answer itself and the revision the text in that column of its
row: tokens that the revision deletes or replaces get `removed`. None of the answer's own tokens is
an inserted one.

Paper: FIGA, arXiv 2311.04072: edits between an initial and a revised response, a weighted
likelihood with positive weights on the revised and negative ones on the initial response.
Differs: the revision here is what the data have; the paper has a language model write it. What ends
an answer gets 0; the paper counts the end of the revised one as an addition, and so does end=True.
The paper's weights, and its gate by the policy's own loss, belong to its objective. Of answers that
are cut at max_length the tokens that are left are aligned.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from treg.data import SIDES, EncodeOptions, Preference, RowProblem, encode
from treg.rewards.base import Context, check_number
from treg.rewards.columns import columns_fingerprint, side_column
from treg.rewards.response import Response, content_length

KEPT_OR_REPLACED, DELETED, INSERTED = 0, 1, 2


def edits(original: np.ndarray, revised: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens an alignment with the fewest edits removes, and which it adds. Of several it is
    one that keeps the most tokens.

    Args:
        original: [n] integers. revised: [m] integers.
    Returns:
        [n] bool: deleted or replaced. [m] bool: inserted, or in place of another. A replacement is
        one edit.
    """
    moves = _moves(np.asarray(original), np.asarray(revised))
    i, j = len(original), len(revised)
    removed, added = np.zeros(i, dtype=bool), np.zeros(j, dtype=bool)
    while i or j:
        move = moves[i, j]
        i -= move != INSERTED
        j -= move != DELETED
        if move == KEPT_OR_REPLACED:
            removed[i] = added[j] = original[i] != revised[j]
        elif move == DELETED:
            removed[i] = True
        else:
            added[j] = True
    return removed, added


def _moves(original: np.ndarray, revised: np.ndarray) -> np.ndarray:
    """[n + 1, m + 1] uint8: the last move of a cheapest alignment of the first i with the first j
    tokens.

    A deletion or insertion costs `edit`, a replacement one more: that decides between alignments
    with as many edits, and never makes up for an edit. The costs of row i follow from those of row
    i - 1 but for the insertions along the row, cost_j = min over k <= j of
    (other_k + (j - k) * edit): a running minimum.
    """
    edit = len(original) + len(revised) + 1
    along = np.arange(len(revised) + 1) * edit
    moves = np.full((len(original) + 1, len(revised) + 1), DELETED, dtype=np.uint8)
    moves[0, 1:] = INSERTED
    above = along
    for i, token in enumerate(original, 1):
        replaced = above[:-1] + (revised != token) * (edit + 1)
        deleted = above + edit
        other = np.append(deleted[:1], np.minimum(replaced, deleted[1:]))
        cost = np.minimum.accumulate(other - along) + along
        last = np.where(cost[1:] == deleted[1:], DELETED, INSERTED)
        moves[i, 1:] = np.where(cost[1:] == replaced, KEPT_OR_REPLACED, last)
        above = cost
    return moves


@dataclass(frozen=True)
class EditsOptions:
    """added, removed: the two rewards. column: of the revision, None: the pair's other answer; it
    may have {side} for chosen and rejected. end: whether what ends a chosen answer counts as added.
    """

    added: float = field(
        default=1.0, metadata={"help": "Reward of tokens that the chosen answer has instead."}
    )
    removed: float = field(
        default=-1.0, metadata={"help": "Reward of tokens that the rejected answer had."}
    )
    column: str | None = field(
        default=None,
        metadata={"help": "Column of a revised text. Default: the chosen answer is the revision."},
    )
    end: bool = field(
        default=False, metadata={"help": "Count the end of a chosen answer as added, as FIGA."}
    )

    def __post_init__(self):
        check_number("added", self.added)
        check_number("removed", self.removed)
        if self.column is not None and self.end:
            raise ValueError(
                f"end: expected False beside a column, whose revision adds nothing to an answer, "
                f"got True with column={self.column!r}"
            )


class EditsSource:
    """Token rewards by what a revision changed."""

    Options: ClassVar[type] = EditsOptions
    streams: ClassVar[tuple[str, ...]] = ("token_rewards",)

    def __init__(self, options: EditsOptions, context: Context):
        self.options = options
        self.context = context

    def settings(self) -> dict[str, Any]:
        settings = asdict(self.options)
        if self.options.column is not None:
            settings["rows"] = columns_fingerprint(self.context.pairs, self.options.column)
        return settings

    def check(self, response: Response) -> RowProblem | None:
        try:
            self._other(response)
        except RowProblem as problem:
            return problem
        return None

    def score(self, responses: Sequence[Response]) -> list[dict[str, Tensor]]:
        return [{"token_rewards": self._of(response)} for response in responses]

    def _of(self, response: Response) -> Tensor:
        options, n = self.options, response.content
        mine, other = response.ids[:n], self._other(response)
        revised = options.column is None and response.side == SIDES[0]
        rewards = np.zeros(len(response.ids), dtype=np.float32)
        if revised:
            rewards[:n] = np.where(edits(other, mine)[1], options.added, 0.0)
            if options.end and response.end >= n:
                rewards[response.end] = options.added
        else:
            rewards[:n] = np.where(edits(mine, other)[0], options.removed, 0.0)
        return torch.from_numpy(rewards)

    def _other(self, response: Response) -> np.ndarray:
        """The ids that a response is compared with, without what ends them.

        Raises:
            RowProblem: there are none.
        """
        other = response.other_ids
        if self.options.column is not None:
            other = _revision(response, *side_column(response, self.options.column))
        if other is None:
            raise RowProblem("no other answer", response.side, response.where)
        return other[: content_length(other.tolist(), response.tokenizer)]


def _revision(response: Response, column: str, text: Any) -> np.ndarray:
    """The ids of a revised text in the place of the answer."""
    if not isinstance(text, str) or not text.strip():
        detail = f"{column}: expected text, got {text!r}"
        raise RowProblem("no revision", detail, response.where)
    revision: Any = text
    if not isinstance(response.completion, str):
        revision = [{"role": "assistant", "content": text}]
    row = Preference(
        response.prompt,
        response.completion,
        revision,
        response.where,
        response.tools,
        response.template_kwargs,
    )
    try:
        day = None if response.date is None else response.date.isoformat()
        pair = encode(row, response.tokenizer, options=EncodeOptions(date=day))
    except RowProblem as problem:
        if problem.reason == "identical completions":
            return response.ids
        raise
    whole = np.concatenate([pair.prompt_ids, pair.rejected_ids])
    return whole[len(response.prompt_ids) :]
