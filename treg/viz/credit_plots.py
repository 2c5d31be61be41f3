"""Pictures of how good scores are against marks: intervals, distributions, calibration."""

import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from treg.evaluate.evaluation import Bin, Evaluation
from treg.evaluate.scored import Scored
from treg.evaluate.told import WORDS
from treg.viz.curves import DPI, PALETTE

WIDTH = 9.0  # of the picture, in inches
ROW, LINE, HEAD = 2.1, 0.3, 1.1  # heights: of a score's panels, of a line of intervals, and around
BINS = 40  # of a histogram
OUTER = 0.005  # share of tokens beyond each end of a histogram, which the last bins hold
BLUE, ORANGE, GREEN, RED, *_, GREY = PALETTE
SUFFIXES = (".svg", ".png", ".html")
# of an SVG: letters as letters, and nothing that changes from run to run
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "treg"}


def check_plots_path(path: str) -> None:
    """ValueError for a file whose name does not end as a picture's that can be written."""
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"plots: expected a path that ends in {', '.join(SUFFIXES)}, got {path!r}")


def plot_credit(
    found: Evaluation, scored: Scored, path: str | Path, *, title: str, lines: Sequence[str] = ()
) -> None:
    """Draw the intervals of all scores; and of each its distribution over wrong and other tokens,
    and the share of wrong tokens by tenths of its tokens.

    Args:
        path: ends in .svg, .png or .html, which is one page with the picture and the lines.
        title: of the page. lines: what the terminal shows.
    """
    check_plots_path(str(path))
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    picture = drawn(found, scored, "svg" if kind == "html" else kind)
    if kind == "html":
        path.write_text(_page(picture.decode(), title, lines), encoding="utf-8")
    else:
        path.write_bytes(picture)


def drawn(found: Evaluation, scored: Scored, kind: str) -> bytes:
    """The picture, as "svg" or "png"."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    told_apart = bool(found.wrong) and found.wrong < found.tokens
    rows = len(found.results) if told_apart else 0
    heights = [HEAD + LINE * len(found.results), *[ROW] * rows]
    figure = Figure((WIDTH, sum(heights)), DPI, facecolor="white", layout="constrained")
    made: Any = figure.subfigures(1 + rows, 1, height_ratios=heights, squeeze=False)
    parts = made[:, 0]
    _forest(parts[0].add_subplot(), found)
    for part, result in zip(parts[1:], found.results, strict=False):
        left, right = part.subplots(1, 2, width_ratios=(1.15, 1))
        _distribution(left, scored.of(result.name), scored.wrong, result.name)
        _calibration(right, result.calibration, found.base_rate or 0.0)
        if result is found.results[0]:
            left.legend(frameon=False, fontsize=8, loc="upper left")
    buffer = io.BytesIO()
    with rc_context(STYLE):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, metadata=metadata)
    return _numbered(buffer.getvalue()) if kind == "svg" else buffer.getvalue()


def _numbered(picture: bytes) -> bytes:
    """An SVG whose clip paths are numbered: matplotlib names them by a hash of the layout's floats,
    whose last bits are not always the same.
    """
    text = picture.decode()
    for number, name in enumerate(dict.fromkeys(re.findall(r'<clipPath id="(\w+)"', text))):
        text = text.replace(f'id="{name}"', f'id="clip{number}"')
        text = text.replace(f"url(#{name})", f"url(#clip{number})")
    return text.encode()


def _forest(axes: Any, found: Evaluation) -> None:
    """A line a score: the headline measure with its interval."""
    headline = found.headline or "auroc"
    chance = found.chance if headline == "first_error" and found.chance is not None else 0.5
    axes.axvline(chance, color="#555555", lw=0.8, ls="--")
    for y, result in enumerate(found.results):
        measure = result.measures[headline]
        if measure.value is None:
            continue
        colour = GREY if result.baseline else BLUE
        if measure.low is not None and measure.high is not None:
            axes.plot(
                [measure.low, measure.high], [y, y], color=colour, lw=2, solid_capstyle="butt"
            )
        axes.plot(measure.value, y, "o", color=colour, ms=5)
        text = f"{measure.value:.3f}"
        axes.annotate(
            text,
            (1.01, y),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=colour,
        )
    axes.set_yticks(range(len(found.results)), [_plain(x.name) for x in found.results])
    for label, result in zip(axes.get_yticklabels(), found.results, strict=True):
        label.set_color(GREY if result.baseline else "#14171c")
    axes.set_ylim(len(found.results) - 0.4, -0.6)
    word = WORDS.get(headline, headline)
    axes.set_title(f"{word}, 95 % intervals; grey: baselines; dashed: chance", **_title())
    _plainly(axes)


def _distribution(axes: Any, values: np.ndarray, wrong: np.ndarray, name: str) -> None:
    """Shares of the wrong tokens and of the others in each bin of the score."""
    low, high = np.quantile(values, [OUTER, 1 - OUTER])
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    for word, mask, colour in (("others", ~wrong, BLUE), ("wrong", wrong, RED)):
        counts, _ = np.histogram(np.clip(values[mask], low, high), edges)
        axes.stairs(counts / max(mask.sum(), 1), edges, color=colour, label=word, lw=1.3)
    axes.set_yscale("log")
    low_share, high_share = axes.get_ylim()
    # whole decades, whose labels are all that is needed
    axes.set_ylim(10 ** np.floor(np.log10(low_share)), 10 ** np.ceil(np.log10(high_share)))
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g} %")
    axes.yaxis.set_minor_formatter(lambda share, _: "")
    axes.set_title(f"{_plain(name)}: share of wrong and of other tokens", **_title())
    _plainly(axes)


def _calibration(axes: Any, bins: Sequence[Bin], base_rate: float) -> None:
    """The share of wrong tokens in each bin, with its interval."""
    axes.axhline(base_rate, color="#555555", lw=0.8, ls="--")
    for x, one in enumerate(bins):
        if one.wrong.low is not None and one.wrong.high is not None:
            axes.plot([x, x], [one.wrong.low, one.wrong.high], color=ORANGE, lw=2)
        axes.plot(x, one.wrong.value, "o", color=ORANGE, ms=4)
    labels = [f"{one.low:.2g}" for one in bins]
    axes.set_xticks(range(len(bins)), labels, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    axes.set_title("share of wrong tokens, by tenths: from this score on", **_title())
    _plainly(axes)


def _title() -> dict[str, Any]:
    return {"loc": "left", "fontsize": 9}


def _plainly(axes: Any) -> None:
    axes.tick_params(labelsize=8, length=2)
    axes.grid(alpha=0.25)
    axes.spines[:].set_visible(False)


def _plain(text: str) -> str:
    """Text in which "$" does not begin a formula."""
    return text.replace("$", r"\$")


def _page(svg: str, title: str, lines: Sequence[str]) -> str:
    """One page that loads nothing."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    text = escape("\n".join(lines))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        "</title><style>body{font:15px system-ui,sans-serif;max-width:70rem;margin:2rem auto;"
        "padding:0 1rem;color:#14171c;background:#fff}pre{overflow-x:auto;font-size:13px}"
        "svg{width:100%;height:auto}</style></head>\n"
        f"<body><h1>{escape(title)}</h1><pre>{text}</pre>\n{svg}\n</body></html>\n"
    )
