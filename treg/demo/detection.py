"""Token rewards and the model's surprise as detectors of wrong facts, where the truth is known."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treg.data import SIDES
from treg.data.annotated import read_annotated
from treg.evaluate import auroc
from treg.rewards.response import content_length
from treg.viz import token_pieces

REWARD, SURPRISE = "-rhat", "-log pi_ref"
ALL, STATED = "all tokens", "stated values"


def detection(file: Path, rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, dict]:
    """AUROC of -rhat and of -log pi_ref as detectors of the tokens of wrong values.

    A token is positive if its text overlaps the span of a wrong value. Tokens that end a response
    are left out.

    Args:
        file: annotated, with the reference's log-prob of each token. rows: of the world, in whose
            order `index` of the file counts.
    Returns:
        By REWARD and SURPRISE, of the wrong tokens against: ALL others; STATED, those of right
        values alone; and by the kind of fact, where the world has several, the wrong ones of the
        kind against the right ones of the kind.
    """
    scores: dict[str, list[np.ndarray]] = {REWARD: [], SURPRISE: []}
    wrong, right = [], []
    for example in read_annotated(file)[0]:
        row = rows[example["index"]]
        for side in SIDES:
            ids = example[f"{side}_ids"]
            n = content_length(ids.tolist(), tokenizer)
            pieces = token_pieces(ids[:n], tokenizer)
            scores[REWARD].append(-example[f"{side}_token_rewards"][:n])
            scores[SURPRISE].append(-example[f"ref_{side}_token_logps"][:n])
            wrong.append(_kinds(row[f"{side}_marks"], pieces, wrong=True))
            right.append(_kinds(row[f"{side}_marks"], pieces, wrong=False))
    is_wrong, is_right = np.concatenate(wrong), np.concatenate(right)
    kinds = sorted({*is_wrong, *is_right} - {""})
    found = {}
    for name, parts in scores.items():
        values = np.concatenate(parts)
        stated = (is_wrong != "") | (is_right != "")
        found[name] = {ALL: auroc(values, is_wrong != "")}
        found[name][STATED] = auroc(values[stated], is_wrong[stated] != "")
        for kind in kinds if len(kinds) > 1 else ():
            own = (is_wrong == kind) | (is_right == kind)
            found[name][kind] = auroc(values[own], is_wrong[own] != "")
    return found


def _kinds(marks: Iterable[Mapping[str, Any]], pieces: Sequence[str], *, wrong: bool) -> np.ndarray:
    """[T] of text: the kind of the wrong, or right, fact whose value a token states; "" of none."""
    kinds = np.full(len(pieces), "", dtype=object)
    for mark in marks:
        if (mark["value"] < 0) == wrong:
            kinds[in_spans([[mark["start"], mark["end"]]], pieces)] = mark["label"]
    return kinds


def in_spans(spans: Iterable[Sequence[int]], pieces: Sequence[str]) -> np.ndarray:
    """[T] bool: the tokens whose text overlaps one of the character spans [start, end)."""
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = np.concatenate([[0], ends[:-1]])
    inside = np.zeros(len(pieces), bool)
    for start, end in spans:
        inside |= (starts < end) & (ends > start)
    return inside
