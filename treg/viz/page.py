"""Annotated pairs as one self-contained HTML page."""

import base64
import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treg.data import common_prefix
from treg.files import replacing
from treg.viz.curves import FIRST_CURVES, History, plot_curves
from treg.viz.tokens import (
    HIDDEN,
    IMPLICIT_LIMIT,
    REWARD_LIMIT,
    SYMBOLS,
    PairView,
    agreement_of,
    numbers_of,
    pair_data,
    visible,
)

PageTable = tuple[str, Sequence[str], Sequence[Sequence[object]]]  # title, header, rows


def write_page(
    path: str | os.PathLike,
    pairs: Sequence[PairView],
    *,
    title: str,
    settings: dict[str, str],
    history: History | None = None,
    tables: Sequence[PageTable] | None = None,
    implicit_limit: float = IMPLICIT_LIMIT,
) -> None:
    """Write one HTML file that needs nothing else: pairs side by side, coloured by token, with
    `agreement` above.

    No text can run: it is escaped, or JSON that the page's script turns into text nodes, and the
    page's policy lets only that script run. The address may end in #pair-3 (opens the third),
    #sort=-margin, #color=implicit, or several of them joined by "&". The file appears whole or not
    at all.

    Args:
        title: of the page.
        settings, tables: shown above the pairs.
        history: its curves are shown too (see `plot_curves`); only FIRST_CURVES, if it has any.
        implicit_limit: where the colours of implicit rewards end; those of the products end at a
            quarter of it.
    Raises:
        ValueError: as `agreement` and `plot_curves`; a table row that is not as long as its header.
    """
    from markupsafe import Markup

    tables = tables or ()
    _check_tables(tables)
    numbers = numbers_of(pairs)
    rows = [pair_data(pair, x) for pair, x in zip(pairs, numbers, strict=True)]
    limits = _colour_limits(rows, implicit_limit)
    payload = _json({"hidden": HIDDEN, "symbols": SYMBOLS, "limits": limits, "pairs": rows})

    start = _first_difference([pair.prompt for pair in pairs])
    listed = []
    for row in rows:
        snippet = " ".join(row["prompt"][start:].split())[:200]
        listed.append({"lowest": None} | row | {"snippet": snippet})

    source = Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8")
    template = _environment().from_string(source)
    html = template.render(
        title=title,
        stream=pairs[0].stream,
        settings=settings,
        agreement=agreement_of(numbers),
        tables=tables,
        curves=[] if history is None else _curves(history),
        limits=limits,
        rows=listed,
        payload=Markup(payload),
    )
    with replacing(os.fspath(path)) as temporary:
        temporary.write_bytes(html.encode("utf-8", "replace"))


def _check_tables(tables: Sequence[PageTable]) -> None:
    for name, header, cells in tables:
        if any(len(row) != len(header) for row in cells):
            raise ValueError(
                f"tables: {name!r}: expected {len(header)} cells in every row, as in the header"
            )


def _colour_limits(rows: Sequence[dict[str, Any]], implicit_limit: float) -> dict[str, float]:
    """Where the colours end, for each kind of number that some response has."""
    known: set[str] = set()
    for row in rows:
        known |= row["chosen"].keys() | row["rejected"].keys()
    limits = {}
    if "rewards" in known:
        limits["rewards"] = REWARD_LIMIT
    if "implicit" in known:
        limits["implicit"] = implicit_limit
    if "mean_product" in known:
        limits["product"] = implicit_limit / 4
    return limits


def _json(data: dict[str, Any]) -> str:
    """JSON that may stand in a script element. It is ASCII, so U+2028, U+2029 and lone surrogates
    are escapes; without <, > and & no markup can begin or end.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _first_difference(prompts: Sequence[str]) -> int:
    """Where the first line begins in which prompts differ: the opening lines of a chat template are
    the same in all of them. 0 where all prompts are the same.
    """
    first, last = min(prompts), max(prompts)
    if first == last:
        return 0
    return first.rfind("\n", 0, common_prefix(first, last)) + 1


def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    # every text but Markup, which is a subclass of str
    environment.finalize = lambda x: visible(x) if type(x) is str else x
    environment.filters["sha256"] = _sha256
    return environment


def _sha256(text: str) -> str:
    """The hash of a script or style, as the page's policy names it."""
    return _base64(hashlib.sha256(text.encode()).digest())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _curves(history: History) -> list[str]:
    """The curves light and dark, as PNGs in base64."""
    shown = _first_curves(history)
    images = []
    for dark in (False, True):
        png = io.BytesIO()
        plot_curves(shown, png, dark=dark)
        images.append(_base64(png.getvalue()))
    return images


def _first_curves(history: History) -> History:
    """Of history, the FIRST_CURVES alone; all of it where there are none of them."""
    shown: History = {}
    found = False
    for run, records in history.items():
        shown[run] = []
        for record in records:
            few = {name: record[name] for name in FIRST_CURVES if name in record}
            found = found or bool(few)
            if "step" in record:
                few["step"] = record["step"]
            shown[run].append(few)
    return shown if found else history
