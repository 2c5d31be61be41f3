"""Training curves as one picture."""

import os
import re
from collections import Counter
from typing import IO, Any

History = dict[
    str, list[dict[str, Any]]
]  # the `state.log_history` of a transformers Trainer, by run

PANEL, LEGEND, DPI = (
    (480, 330),
    40,
    120,
)  # width and height of a panel, height of the legend, in pixels
# Okabe and Ito's colours, which stay apart for colour-blind readers; grey for their black, unseen
# on a dark ground
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#808080")
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

    series: dict[str, dict[str, list]] = {key: {} for key in FIRST_CURVES}
    for run, record in (
        (run, record) for run, records in history.items() for record in records if "step" in record
    ):
        for key, value in record.items():
            if isinstance(value, (int, float)) and not NO_CURVE.match(key):
                series.setdefault(key, {}).setdefault(run, []).append((record["step"], value))
    series = {key: runs for key, runs in series.items() if runs}
    curves = {key: runs for key, runs in series.items() if max(map(len, runs.values())) > 1}
    series = curves or series
    if not series:
        raise ValueError(
            "history: expected a number beside a 'step' in at least one record, got none"
        )
    methods = {run: re.sub(r"/\d+$", "", run) for run in history}
    counts = Counter(methods.values())
    looks = {
        m: {"color": PALETTE[n % 7], "ls": ("-", "--", ":")[n // 7 % 3]}
        for n, m in enumerate(counts)
    }
    columns, rows = min(3, len(series)), -(-len(series) // 3)
    size = columns * PANEL[0] / DPI, (rows * PANEL[1] + LEGEND) / DPI
    ink, ground = ("#dfe3ea", "#1b1e24") if dark else ("#14171c", "white")
    figure, lines = Figure(size, DPI, facecolor=ground, layout="constrained"), {}
    for n, (key, runs) in enumerate(series.items()):
        axes = figure.add_subplot(rows, columns, n + 1, facecolor=ground)
        for run, points in runs.items():
            m, (x, y) = methods[run], zip(*points, strict=True)
            (lines[m],) = axes.plot(
                x, y, **looks[m], lw=1.4, marker="" if len(x) > 12 else "o", ms=3
            )
        # "$" would begin a formula
        axes.set_title(key.replace("$", r"\$"), loc="left", fontsize=10, color=ink)
        axes.set_xlabel("optimizer step", fontsize=9, color=ink)
        axes.tick_params(labelsize=8, colors=ink)
        axes.yaxis.set_major_formatter("{x:.4g}")
        axes.grid(alpha=0.25)
        axes.spines[:].set_visible(False)
    labels = [
        (f"{m} ({counts[m]} seeds)" if counts[m] > 1 else m).replace("$", r"\$") for m in lines
    ]
    figure.legend(
        list(lines.values()),
        labels,
        loc="outside lower center",
        ncols=6,
        frameon=False,
        labelcolor=ink,
    )
    figure.savefig(path_or_buffer, format="png")
