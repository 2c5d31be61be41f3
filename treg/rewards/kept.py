"""Columns of the source that `treg annotate` passes on into the annotated file."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from treg.data import Pair, RowProblem
from treg.data.annotated import kept_types, stream_columns
from treg.data.batches import BATCH_STREAMS
from treg.data.columns import OWN_COLUMNS
from treg.data.examples import check_columns
from treg.data.names import READ_COLUMNS


class KeptColumns:
    """Some columns of pairs' rows.

    Args:
        names: of the columns. pairs: all that are annotated, whose rows give each column its type.
    Raises:
        ValueError: columns that no row has; a column that is neither numbers nor strings nor lists
            of one of them.
    """

    def __init__(self, names: Sequence[str], pairs: Sequence[Pair]):
        self.names = tuple(names)
        self.pairs = pairs
        check_columns(self.names, pairs, "data: expected, to be kept,")
        kept = (pair for pair in pairs if self.problem(pair) is None)
        self.types = kept_types(self.names, (pair.row.columns for pair in kept))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what all pairs have in them."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            digest.update(json.dumps(self.of(pair), default=str).encode())
        return digest.hexdigest()[:16]

    def of(self, pair: Pair) -> dict[str, Any]:
        """What a pair's row has in them."""
        return {name: pair.row.columns.get(name) for name in self.names}

    def problem(self, pair: Pair) -> RowProblem | None:
        """Why a pair cannot be kept: its row lacks one of the columns, or has in it a list with
        nothing in a place, or text that is no UTF-8.
        """
        for name, value in self.of(pair).items():
            if value is None:
                columns = ", ".join(map(str, pair.row.columns)) or "none"
                detail = f"the other columns are {columns}"
                return RowProblem(f"no column {name!r}", detail, pair.row.where)
            held = value if isinstance(value, (list, tuple)) else [value]
            if any(x is None for x in held):
                detail = f"expected a value in every place, got {value!r}"
                return RowProblem(f"null in column {name!r}", detail, pair.row.where)
            if not all(_is_utf8(x) for x in held):
                detail = f"expected text that UTF-8 can hold, got {value!r}"
                return RowProblem(f"broken text in column {name!r}", detail, pair.row.where)
        return None


def _is_utf8(value: Any) -> bool:
    """Whether a value is no text, or one without half of a surrogate pair."""
    return not isinstance(value, str) or not any("\ud800" <= x <= "\udfff" for x in value)


def check_names(names: Sequence[str], streams: Sequence[str]) -> None:
    """ValueError for names that the annotated file gives its own columns, or that are no others.

    streams: of the file.
    """
    if isinstance(names, str):
        raise ValueError(f"keep_columns: expected a list of columns, got {names!r}")
    own = set(OWN_COLUMNS)
    for stream in (*BATCH_STREAMS, *streams):
        own |= set(stream_columns(stream))
    for name in names:
        if name in own or name in READ_COLUMNS:
            raise ValueError(
                f"keep_columns: expected columns beside the prompt and the answers, whose names "
                f"the annotated file does not use, got {name!r}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"keep_columns: expected each column once, got {', '.join(names)}")
