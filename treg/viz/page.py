"""Annotated pairs as one self-contained HTML page."""

import base64
import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

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
        settings, tables: shown above the pairs. history: see `plot_curves`; of FIRST_CURVES, if
            there are any.
        implicit_limit: where the colours of implicit rewards end; those of the products end at a
            quarter of it.
    Raises:
        ValueError: as `agreement` and `plot_curves`; a table row that is not as long as its header.
    """
    import jinja2
    from markupsafe import Markup

    for name, header, cells in tables or ():
        if any(len(row) != len(header) for row in cells):
            raise ValueError(
                f"tables: {name!r}: expected {len(header)} cells in every row, as in the header"
            )
    numbers = numbers_of(pairs)
    rows = [pair_data(pair, x) for pair, x in zip(pairs, numbers, strict=True)]
    limits = {"rewards": REWARD_LIMIT, "implicit": implicit_limit, "product": implicit_limit / 4}
    known = {
        key.replace("mean_", "")
        for row in rows
        for name in ("chosen", "rejected")
        for key in row[name]
    }
    limits = {name: limit for name, limit in limits.items() if name in known}
    # ASCII, so U+2028, U+2029 and lone surrogates are escapes; without <, > and & no markup can
    # begin or end
    data = {"hidden": HIDDEN, "symbols": SYMBOLS, "limits": limits, "pairs": rows}
    payload = json.dumps(data, separators=(",", ":"), allow_nan=False)
    payload = re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", payload)

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.finalize = lambda x: (
        visible(x) if type(x) is str else x
    )  # not of Markup, a subclass
    environment.filters["sha256"] = lambda text: base64.b64encode(
        hashlib.sha256(text.encode()).digest()
    ).decode()
    # the opening lines of a chat template are the same in every prompt: what differs tells pairs
    # apart
    first, last = min(pair.prompt for pair in pairs), max(pair.prompt for pair in pairs)
    start = first.rfind("\n", 0, common_prefix(first, last)) + 1 if first != last else 0
    curves = [io.BytesIO(), io.BytesIO()] if history is not None else []
    few = {
        run: [{k: x[k] for k in ("step", *FIRST_CURVES) if k in x} for x in records]
        for run, records in (history or {}).items()
    }
    if any(x.keys() & set(FIRST_CURVES) for records in few.values() for x in records):
        history = few
    for dark, png in enumerate(curves):
        plot_curves(history or {}, png, dark=bool(dark))
    template = Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8")
    html = environment.from_string(template).render(
        title=title,
        settings=settings,
        agreement=agreement_of(numbers),
        tables=tables or (),
        curves=[base64.b64encode(png.getvalue()).decode() for png in curves],
        limits=limits,
        rows=[row | {"snippet": " ".join(row["prompt"][start:].split())[:200]} for row in rows],
        payload=Markup(payload),
    )
    with replacing(path) as temporary:
        temporary.write_bytes(html.encode("utf-8", "replace"))
