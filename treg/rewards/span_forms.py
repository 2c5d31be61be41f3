"""Spans of characters in the forms in which people keep them.

[start, end]                         no value and no label
[start, end, number]                 a value
[start, end, "label"]                a label
{"start": s, "end": e, ...}          a number under "value", or a label under one of LABELS; other
                                     keys are passed over
"""

from collections.abc import Mapping
from typing import Any

from treg.data import RowProblem
from treg.data.reading import parse_json

LABELS = ("label", "severity", "type", "error_type", "error type", "category")


def span_list(column: str, given: Any, where: str) -> list:
    """What a column holds as a list, also where it is a string of JSON.

    Raises:
        RowProblem: it is none.
    """
    if isinstance(given, str):
        try:
            given = parse_json(given)
        except ValueError as error:
            raise RowProblem("broken JSON", f"{column}: {error}", where) from None
    if not isinstance(given, (list, tuple)):
        detail = f"{column}: expected a list of spans, got {type(given).__name__}"
        raise RowProblem("no spans", detail, where)
    return list(given)


def span_fields(item: Any) -> tuple[Any, Any, Any, str | None]:
    """start, end, value and label of a span; None for what it does not have.

    Raises:
        RowProblem: it has none of the forms.
    """
    if isinstance(item, Mapping):
        labels = {key: item[key] for key in LABELS if item.get(key) is not None}
        if len(labels) > 1:
            raise RowProblem("bad span", f"expected one label, found {', '.join(labels)}")
        start, end, value = (item.get(key) for key in ("start", "end", "value"))
        label = next(iter(labels.values()), None)
    elif isinstance(item, (list, tuple)) and len(item) in (2, 3):
        start, end, *more = item
        label = more[0] if more and isinstance(more[0], str) else None
        value = more[0] if more and label is None else None
        if more and more[0] is None:
            raise RowProblem("bad span", "expected a number or a label beside start and end")
    else:
        raise RowProblem("bad span", "expected [start, end], [start, end, value] or an object")
    if label is not None and not isinstance(label, str):
        raise RowProblem("bad span", "expected text as its label")
    return start, end, value, label


def check_bounds(start: Any, end: Any, length: int, *, shortest: int = 1) -> None:
    """RowProblem unless start and end bound characters of a text of that length.

    shortest: characters that a span has at least.
    """
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (start, end))
    if not whole or not 0 <= start <= end - shortest or end > length:
        order = "start < end" if shortest else "start <= end"
        raise RowProblem("bad span", f"expected whole numbers 0 <= {order} <= {length}")
