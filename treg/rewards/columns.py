"""Columns of a row that a source reads."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from treg.data import RowProblem
from treg.rewards.response import Response


def side_column(response: Response, column: str) -> tuple[str, Any]:
    """The name of a column of a response's row, in which {side} stands for the response's side, and
    what it holds.

    Raises:
        RowProblem: the row has no such column, or nothing in it.
    """
    name = column.replace("{side}", response.side)
    if response.row.get(name) is None:
        columns = ", ".join(map(str, response.row)) or "none"
        raise RowProblem(f"no column {name!r}", f"the other columns are {columns}", response.where)
    return name, response.row[name]


def columns_fingerprint(pairs: Sequence[tuple[Response, ...]], column: str) -> str:
    """SHA-256 of what all responses have in a column, so that other contents are other settings."""
    digest = hashlib.sha256()
    for responses in pairs:
        for response in responses:
            held = response.row.get(column.replace("{side}", response.side))
            digest.update(json.dumps(held, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]
