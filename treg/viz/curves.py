"""Training curves as one picture."""

import os
import re
from collections import Counter
from typing import IO, Any

# the `state.log_history` of a transformers Trainer, by run
History = dict[str, list[dict[str, Any]]]
# the points (step, value) of one quantity, by run
Lines = dict[str, list[tuple[float, float]]]

# in pixels
PANEL = (480, 330)  # width and height
LEGEND = 40  # height
DPI = 120
# Okabe and Ito's colours, which stay apart for colour-blind readers; grey for their black, unseen
# on a dark ground
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#808080")
LINE_STYLES = ("-", "--", ":")  # of the first seven methods, of the next seven, ...
FIRST_CURVES = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "treg/reg_loss",
    "treg/alignment",
    "learning_rate",
)
NO_CURVE = re.compile("(step|epoch|total_flos|train_.*|.*_runtime|.*_per_second)$")


def plot_curves(
    history: History, path_or_buffer: str | os.PathLike | IO[bytes], *, dark: bool = False
) -> None:
    """Draw every number logged more than once over the optimizer steps: a panel a quantity, a line
    a run, one PNG.

    Args:
        history: log records by run; runs named "dpo/0" and "dpo/1" are seeds of one method and
            share its colour. Numbers that are not finite are gaps.
        dark: light on dark. The size is PANEL pixels a panel, and LEGEND more for the legend at the
            foot.
    Raises:
        ValueError: no number beside a "step" in any record.
    """
    from matplotlib.figure import Figure  # no pyplot, so no global state; savefig draws with Agg

    quantities = quantities_of(history)
    method_of, seeds = methods_of(history)
    looks = _looks(list(seeds))

    columns, rows = min(3, len(quantities)), -(-len(quantities) // 3)
    size = columns * PANEL[0] / DPI, (rows * PANEL[1] + LEGEND) / DPI
    ink, ground = ("#dfe3ea", "#1b1e24") if dark else ("#14171c", "white")
    figure = Figure(size, DPI, facecolor=ground, layout="constrained")
    drawn = {}  # a line of each method, for the legend
    for n, (name, lines) in enumerate(quantities.items()):
        axes = figure.add_subplot(rows, columns, n + 1, facecolor=ground)
        for run, points in lines.items():
            method = method_of[run]
            steps, values = zip(*points, strict=True)
            marker = "" if len(points) > 12 else "o"
            (drawn[method],) = axes.plot(
                steps, values, **looks[method], lw=1.4, marker=marker, ms=3
            )
        axes.set_title(_plain(name), loc="left", fontsize=10, color=ink)
        axes.set_xlabel("optimizer step", fontsize=9, color=ink)
        axes.tick_params(labelsize=8, colors=ink)
        axes.yaxis.set_major_formatter("{x:.4g}")
        axes.grid(alpha=0.25)
        axes.spines[:].set_visible(False)

    labels = [_plain(method_label(method, seeds)) for method in drawn]
    figure.legend(
        list(drawn.values()),
        labels,
        loc="outside lower center",
        ncols=6,
        frameon=False,
        labelcolor=ink,
    )
    figure.savefig(path_or_buffer, format="png")


def methods_of(history: History) -> tuple[dict[str, str], Counter[str]]:
    """The method of each run, and how many runs (seeds) each method has."""
    method_of = {run: re.sub(r"/\d+$", "", run) for run in history}
    return method_of, Counter(method_of.values())


def method_label(method: str, seeds: Counter[str]) -> str:
    return f"{method} ({seeds[method]} seeds)" if seeds[method] > 1 else method


def quantities_of(history: History) -> dict[str, Lines]:
    """The lines of each quantity, FIRST_CURVES first: of those logged more than once or, where
    there are none, of all. ValueError where there is no number beside a "step".
    """
    quantities: dict[str, Lines] = {name: {} for name in FIRST_CURVES}
    for run, records in history.items():
        for record in records:
            if "step" not in record:
                continue
            for name, value in record.items():
                if isinstance(value, (int, float)) and not NO_CURVE.match(name):
                    points = quantities.setdefault(name, {}).setdefault(run, [])
                    points.append((record["step"], value))
    logged, logged_more_than_once = {}, {}
    for name, lines in quantities.items():
        if lines:
            logged[name] = lines
        if any(len(points) > 1 for points in lines.values()):
            logged_more_than_once[name] = lines
    if not logged:
        raise ValueError(
            "history: expected a number beside a 'step' in at least one record, got none"
        )
    return logged_more_than_once or logged


def _looks(methods: list[str]) -> dict[str, dict[str, Any]]:
    """Colour and line style of each method."""
    looks = {}
    for n, method in enumerate(methods):
        style = LINE_STYLES[n // len(PALETTE) % len(LINE_STYLES)]
        looks[method] = {"color": PALETTE[n % len(PALETTE)], "ls": style}
    return looks


def _plain(text: str) -> str:
    """Text in which "$" does not begin a formula."""
    return text.replace("$", r"\$")
