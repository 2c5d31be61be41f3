"""Annotated pairs as one self-contained HTML page."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treg.data import common_prefix
from treg.files import replacing
from treg.viz.by_token import disagreement, rms_of, standing_out, token_table
from treg.viz.charts import MOST_POINTS, histogram, line_chart, scatter, short
from treg.viz.curves import FIRST_CURVES, History, method_label, methods_of, panels_of
from treg.viz.prompts import folded
from treg.viz.signal import correlation_interval, detection_of, signal_of, verdict
from treg.viz.tokens import (
    COLOUR_QUANTILE,
    HIDDEN,
    SYMBOLS,
    PairNumbers,
    PairView,
    agreement_of,
    arrays_of,
    limit_of,
    numbers_of,
    pair_data,
    visible,
)

PageTable = tuple[str, Sequence[str], Sequence[Sequence[object]]]  # title, header, rows
QUANTILES = (0.8, 0.9, COLOUR_QUANTILE, 0.99, 1.0)  # at which the reader may let colours end
FAR = 0.995  # the quantile of |x| where the charts end
SHIFT_CAPTION = "log π − log π_ref, nats; solid good, dashed bad"
SNIPPET = 240  # characters of a prompt in the list


def write_page(
    path: str | os.PathLike,
    pairs: Sequence[PairView],
    *,
    title: str,
    settings: dict[str, str],
    history: History | None = None,
    tables: Sequence[PageTable] | None = None,
    notes: Sequence[str] = (),
    alpha: float = 0.25,
    truth: str | None = None,
) -> None:
    """Write one HTML file that needs nothing else: what was rewarded, whether it is a signal, and
    where it is wrong; over all pairs, by token, and pair by pair.

    No text can run: it is escaped, or JSON that the page's script turns into text nodes, and the
    page's policy lets only that script run. The address keeps what is shown: #pair-3 opens the
    third pair, #sort=-margin&color=implicit&q=Paris&margin=-1:0 sorts, colours, searches and
    filters. The file appears whole or not at all. Absolute paths are shortened: see `short_paths`.

    Args:
        title: of the page.
        settings, tables: what the pairs were made with, and results, in words.
        history: its curves are shown too; only FIRST_CURVES, if it has any.
        notes: what a reader must know of these numbers, one sentence or two each.
        alpha: of the regularizer, for what the size of the rewards means to training.
        truth: what the marked tokens are (`Side.marked`), such as "states a wrong fact"; None:
            "wrong".
    Raises:
        ValueError: as `agreement` and `plot_curves`; a table row that is not as long as its header.
    """
    from markupsafe import Markup

    tables = tables or ()
    _check_tables(tables)
    numbers = numbers_of(pairs)
    kinds = [kind for kind in ("rewards", "implicit", "product") if arrays_of(numbers, kind)]
    rms = {kind: rms_of(arrays_of(numbers, kind)) for kind in ("rewards", "implicit")}
    data = {
        "hidden": HIDDEN,
        "symbols": SYMBOLS,
        "limits": {kind: _limits(arrays_of(numbers, kind)) for kind in kinds},
        "rms": rms,
        "pairs": _rows(pairs, numbers, rms),
        "by_token": token_table(pairs, numbers),
        "lists": standing_out(numbers, rms),
    }
    signal = signal_of(numbers)
    compared = numbers[0].compared
    html = _rendered(
        "page.html.jinja",
        title=title,
        stream=pairs[0].stream,
        settings={name: _short_path(str(value)) for name, value in settings.items()},
        agreement=agreement_of(numbers),
        interval=correlation_interval(numbers) if compared else None,
        signal=signal if compared else {},
        verdict=verdict(signal, alpha) if compared else [],
        detection=detection_of(pairs, numbers),
        truth=truth or "wrong",
        marked=any(x.marked is not None for pair in pairs for x in (pair.chosen, pair.rejected)),
        notes=notes,
        tables=tables,
        charts=[(name, Markup(svg), text) for name, svg, text in _charts(pairs[0], numbers)],
        curves=_curves(history),
        kinds=kinds,
        quantile=COLOUR_QUANTILE,
        lists=list(data["lists"]),
        by_token=data["by_token"],
        payload=Markup(_json(data)),
        style=_source("page.css"),
        script=_source("page.js"),
    )
    with replacing(os.fspath(path)) as temporary:
        temporary.write_bytes(html.encode("utf-8", "replace"))


def _check_tables(tables: Sequence[PageTable]) -> None:
    for name, header, cells in tables:
        if any(len(row) != len(header) for row in cells):
            raise ValueError(
                f"tables: {name!r}: expected {len(header)} cells in every row, as in the header"
            )


def _limits(arrays: Sequence[np.ndarray]) -> dict[str, float]:
    """Where colours may end, by the share of the numbers that lie within."""
    return {f"{quantile:g}": limit_of(arrays, quantile) for quantile in QUANTILES}


def _rows(
    pairs: Sequence[PairView], numbers: Sequence[PairNumbers], rms: dict[str, float]
) -> list[dict[str, Any]]:
    """What the script shows of each pair: `pair_data`; where, shortened; prompt, of `folded`;
    snippet; disagreement, the mean over the tokens of both responses.
    """
    wheres = short_paths([pair.where for pair in pairs])
    start = _first_difference([pair.prompt for pair in pairs])
    rows = []
    for pair, pair_numbers, where in zip(pairs, numbers, wheres, strict=True):
        row = pair_data(pair, pair_numbers) | {"where": where}
        row["prompt"] = folded(pair.prompt, pair.template)
        said = " ".join(row["prompt"][::2]) if len(row["prompt"]) > 1 else pair.prompt[start:]
        row["snippet"] = " ".join(said.split())[:SNIPPET]
        products = arrays_of([pair_numbers], "product")
        if products:
            row["disagreement"] = float(disagreement(np.concatenate(products), rms).mean())
        for key, value in row.items():
            row[key] = float(f"{value:.6g}") if isinstance(value, float) else value
        rows.append(row)
    return rows


def short_paths(places: Sequence[str]) -> list[str]:
    """Places such as file:line without the folder that all absolute ones of them share."""
    absolute = {os.path.dirname(place) for place in places if os.path.isabs(place)}
    if not absolute:
        return list(places)
    shared = os.path.commonpath(absolute)
    found = []
    for place in places:
        found.append(os.path.relpath(place, shared) if os.path.isabs(place) else place)
    return found


def _short_path(text: str) -> str:
    """An absolute path as seen from the working folder, or its last part if it lies elsewhere."""
    if not os.path.isabs(text):
        return text
    relative = os.path.relpath(text)
    return os.path.basename(text.rstrip("/")) if relative.startswith("..") else relative


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


def _source(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _rendered(name: str, **values: Any) -> str:
    """A template beside this file, in which every text is escaped but Markup, style and script."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    # every text but Markup, which is a subclass of str
    environment.finalize = lambda x: visible(x) if type(x) is str else x
    environment.filters["sha256"] = _sha256
    environment.filters["short"] = short
    for trusted in ("style", "script"):
        values[trusted] = Markup(values[trusted])
    return environment.from_string(_source(name)).render(**values)


def _sha256(text: str) -> str:
    """The hash of a script or style, as the page's policy names it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _charts(pair: PairView, numbers: Sequence[PairNumbers]) -> list[tuple[str, str, str]]:
    """Title, picture and caption of what is drawn over all tokens."""
    stream = "token reward" if numbers[0].compared else pair.stream
    drawn = []
    for kind, label in (("rewards", stream), ("implicit", "implicit reward")):
        groups = {}
        for side in ("chosen", "rejected"):
            known = [getattr(getattr(x, side), kind) for x in numbers]
            groups[side] = np.concatenate([np.empty(0), *(x for x in known if x is not None)])
        if any(x.size for x in groups.values()):
            picture = histogram(groups, limit_of(list(groups.values()), FAR), label)
            text = f"Share of the tokens, on a logarithmic scale. {_counts(groups)}"
            drawn.append((f"{label[0].upper()}{label[1:]}s", picture, text))
    if arrays_of(numbers, "product"):
        points = {}
        for side in ("chosen", "rejected"):
            both = [getattr(x, side) for x in numbers]
            both = [x for x in both if x.product(True) is not None]
            columns = [
                [np.empty(0), *(getattr(x, k) for x in both)] for k in ("rewards", "implicit")
            ]
            points[side] = np.concatenate(columns[0]), np.concatenate(columns[1])
        limits = tuple(limit_of([x[i] for x in points.values()], FAR) for i in (0, 1))
        picture = scatter(points, (limits[0], limits[1]), ("token reward", "implicit reward"))
        total = sum(len(x) for x, _ in points.values())
        drawn_at_most = (
            f"{MOST_POINTS:,} of {total:,} tokens, at random."
            if (total > MOST_POINTS)
            else f"All {total:,} tokens."
        )
        text = f"{drawn_at_most} In the shaded quarters both have the same sign."
        drawn.append(("One against the other", picture, text))
    return drawn


def _counts(groups: dict[str, np.ndarray]) -> str:
    counts = [f"{len(values):,} {name}" for name, values in groups.items()]
    return f"{' and '.join(counts)} tokens."


def _curves(history: History | None) -> dict[str, Any] | None:
    """The curves of a history: charts, (title, picture, caption) each, and methods, the labels of
    the colours.
    """
    from markupsafe import Markup

    if history is None:
        return None
    panels = panels_of(_first_curves(history))
    method_of, seeds = methods_of(history)
    place = {method: n for n, method in enumerate(seeds)}
    looks = {run: place[method] for run, method in method_of.items()}
    drawn = {looks[run] for x in panels.values() for run in (*x.lines, *(x.bad or ()))}
    charts = []
    for title, panel in panels.items():
        caption = "" if panel.bad is None else SHIFT_CAPTION
        charts.append((title, Markup(line_chart(title, panel, looks)), caption))
    return {
        "charts": charts,
        "methods": [(n, method_label(x, seeds)) for n, x in enumerate(seeds) if n in drawn],
    }


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
