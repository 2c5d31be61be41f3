"""Training curves as one picture."""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
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
    *(f"shift/{kind}{side}" for side in ("", "_chosen", "_rejected") for kind in ("good", "bad")),
    "treg/reg_loss",
    "treg/alignment",
    "learning_rate",
)
# what has one panel for good and bad tokens, also in evaluations: eval_shift/bad_chosen
SHIFT = re.compile("(?P<before>.*)shift/(?P<kind>good|bad)(?P<side>|_chosen|_rejected)$")
SHIFT_TITLES = {
    "": "shift of good and bad tokens",
    "_chosen": "shift in chosen answers",
    "_rejected": "shift in rejected answers",
}
BAD_STYLE = (0, (4, 2.5))  # dashes of bad tokens
NO_CURVE = re.compile("(step|epoch|total_flos|train_.*|.*_runtime|.*_per_second)$")


@dataclass(frozen=True)
class Panel:
    """What has one pair of axes: the lines of a quantity; or lines of good tokens, and with them
    bad, those of bad tokens, drawn dashed, and a line at 0.
    """

    lines: Lines = field(default_factory=dict)
    bad: Lines | None = None


def plot_curves(
    history: History, path_or_buffer: str | os.PathLike | IO[bytes], *, dark: bool = False
) -> None:
    """Draw every number logged more than once over the optimizer steps: a panel a quantity, a line
    a run, one PNG. Shifts of good and of bad tokens have a panel together, good ones solid and bad
    ones dashed, whatever the style of their method is elsewhere.

    Args:
        history: log records by run; runs named "dpo/0" and "dpo/1" are seeds of one method and
            share its colour. Numbers that are not finite are gaps.
        dark: light on dark. The size is PANEL pixels a panel, and LEGEND more for the legend at the
            foot.
    Raises:
        ValueError: no number beside a "step" in any record.
    """
    from matplotlib.figure import Figure  # no pyplot, so no global state; savefig draws with Agg

    panels = panels_of(history)
    method_of, seeds = methods_of(history)
    looks = _looks(list(seeds))

    columns, rows = min(3, len(panels)), -(-len(panels) // 3)
    size = columns * PANEL[0] / DPI, (rows * PANEL[1] + LEGEND) / DPI
    ink, ground = ("#dfe3ea", "#1b1e24") if dark else ("#14171c", "white")
    figure = Figure(size, DPI, facecolor=ground, layout="constrained")
    drawn = {}  # a line of each method, for the legend
    for n, (name, panel) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, n + 1, facecolor=ground)
        styles = {} if panel.bad is None else {"ls": "-"}
        for run, points in panel.lines.items():
            line = _drawn(axes, points, looks[method_of[run]] | styles)
            drawn.setdefault(method_of[run], line)
        for run, points in (panel.bad or {}).items():
            line = _drawn(axes, points, looks[method_of[run]] | {"ls": BAD_STYLE})
            drawn.setdefault(method_of[run], line)
        if panel.bad is not None:
            _mark_zero(axes, ink)
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


def _drawn(axes: Any, points: list[tuple[float, float]], look: dict[str, Any]) -> Any:
    """The line of a run."""
    steps, values = zip(*points, strict=True)
    (line,) = axes.plot(steps, values, **look, lw=1.4, marker="" if len(points) > 12 else "o", ms=3)
    return line


def _mark_zero(axes: Any, ink: str) -> None:
    """A line where no token has moved, and what solid and dashed lines are."""
    axes.axhline(0.0, color=ink, lw=0.8, alpha=0.6, zorder=1)
    axes.set_ylabel("nats", fontsize=9, color=ink)
    handles = [axes.plot([], [], color=ink, lw=1.4, ls=ls)[0] for ls in ("-", BAD_STYLE)]
    axes.legend(handles, ["good", "bad"], fontsize=8, frameon=False, labelcolor=ink, handlelength=3)


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


def panels_of(history: History) -> dict[str, Panel]:
    """The panels of a history by their titles, in the order of `quantities_of`."""
    panels: dict[str, Panel] = {}
    together: dict[str, tuple[Lines, Lines]] = {}
    for name, lines in quantities_of(history).items():
        found = SHIFT.match(name)
        if found is None:
            panels[name] = Panel(lines)
            continue
        title = found["before"] + SHIFT_TITLES[found["side"]]
        good, bad = together.setdefault(title, ({}, {}))
        (good if found["kind"] == "good" else bad).update(lines)
        panels[title] = Panel(good, bad)
    return panels


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
