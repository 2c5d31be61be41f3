"""The pictures of a record of the study: what the methods reach, and what happens to the tokens.

python examples/study/study_picture.py benchmarks/results/cpu/study.json docs/images
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from study_methods import ALPHA, ALPHAS, MAIN, NOISES, NOISY

from treg.demo.records import half_width

# the same results give the same bytes
matplotlib.rcParams |= {"svg.hashsalt": "treg", "svg.fonttype": "none", "font.size": 9}
Rows = Sequence[Mapping[str, Any]]
CONTROLS = ("oracle", "random", "sign-flipped", "shuffled", "DPO, twice the rate")
SHOWN = ("DPO", "DPO-REG", "oracle", "sign-flipped")  # whose tokens are watched
COLOURS = dict(zip(SHOWN, ("black", "C0", "C2", "C3"), strict=True))


def draw_all(rows: Rows, folder: Path, stem: str = "study") -> list[Path]:
    """Every picture that the rows allow, in folder; their names begin with stem."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in (
        (stem, draw_methods),
        (f"{stem}-shift", draw_shift),
        (f"{stem}-frontier", draw_frontier),
        (f"{stem}-sweeps", draw_sweeps),
    ):
        figure = draw(rows)
        if figure is None:
            continue
        drawn.append(folder / f"{name}.svg")
        figure.savefig(drawn[-1], metadata={"Date": None})
        plt.close(figure)
    return drawn


def values_of(rows: Rows, method: str, measure: str) -> list[float]:
    return [x[measure] for x in rows if x["method"] == method and measure in x]


def draw_methods(rows: Rows) -> Any:
    """A line a method: wrong facts, how far its look has moved, pairs against the decoys."""
    names = [x for x in ("before", *MAIN) if values_of(rows, x, "wrong facts")]
    if not names:
        return None
    names.sort(key=lambda x: statistics.mean(values_of(rows, x, "wrong facts")), reverse=True)
    measures = {
        "wrong facts": "wrong facts, %",
        "ornate": "ornate words, %: a decoy",
        "against decoys": "pairs ranked right where\nthe decoys point the other way, %",
    }
    size = (9.5, 1.3 + 0.27 * len(names))
    figure, axes = plt.subplots(1, len(measures), figsize=size, sharey=True, layout="constrained")
    for ax, (measure, label) in zip(axes, measures.items(), strict=True):
        for y, name in enumerate(names):
            values = [100 * x for x in values_of(rows, name, measure)]
            if not values:
                continue
            colour = "0.6" if name in (*CONTROLS, "before") else "C0"
            colour = "black" if name == "DPO" else colour
            width = half_width(values) if len(values) > 1 else 0.0
            ax.errorbar(statistics.mean(values), y, xerr=width, fmt="o", ms=4, color=colour)
        dpo = values_of(rows, "DPO", measure)
        if dpo:
            ax.axvline(100 * statistics.mean(dpo), color="black", lw=0.8, ls=":")
        ax.set_xlabel(label)
        ax.set_yticks(range(len(names)), names)
        ax.grid(axis="both", alpha=0.2)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "After the same steps on the same pairs: mean over seeds and 95 % interval; grey: controls",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    return figure


def draw_shift(rows: Rows) -> Any:
    """How far the log-probs of right and of wrong values have moved, against steps."""
    shown = [x for x in SHOWN if any(row["method"] == x and row["curve"] for row in rows)]
    if not shown:
        return None
    kinds = {"good": "values that are right", "bad": "values that are wrong", "other": "the rest"}
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.6), sharey=True, layout="constrained")
    for ax, (kind, title) in zip(axes, kinds.items(), strict=True):
        for name in shown:
            curves = [x["curve"] for x in rows if x["method"] == name]
            steps = [x["step"] for x in curves[0]]
            by_step = [[curve[i][kind] for curve in curves] for i in range(len(steps))]
            means = [statistics.mean(x) for x in by_step]
            ax.plot(steps, means, color=COLOURS[name], lw=2, label=name)
            if len(curves) > 1:
                widths = [half_width(x) for x in by_step]
                low = [m - w for m, w in zip(means, widths, strict=True)]
                high = [m + w for m, w in zip(means, widths, strict=True)]
                ax.fill_between(steps, low, high, color=COLOURS[name], alpha=0.12, lw=0)
        ax.axhline(0, color="0.5", lw=0.8)
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlabel("optimizer step")
        ax.grid(alpha=0.2)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mean of log π − log π_ref, nats")
    axes[0].legend(frameon=False)
    return figure


def draw_frontier(rows: Rows) -> Any:
    """Wrong facts against what they cost: how far the policy has gone, and malformed answers.
    Methods below DPO's line do better than DPO with another learning rate.
    """
    names = [x for x in MAIN if values_of(rows, x, "KL")]
    line = [x for x in ("before", "DPO", "DPO, twice the rate") if values_of(rows, x, "KL")]
    if len(line) < 3:
        return None
    costs = {"KL": (1, "KL from the start, nats an answer"), "malformed": (100, "malformed, %")}
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 5.2), sharey=True, layout="constrained")
    for ax, (cost, (factor, label)) in zip(axes, costs.items(), strict=True):

        def place(name: str, cost: str = cost, factor: int = factor) -> tuple[float, float]:
            x = statistics.mean(values_of(rows, name, cost))
            return factor * x, 100 * statistics.mean(values_of(rows, name, "wrong facts"))

        ax.plot(*zip(*map(place, line), strict=True), color="black", lw=1, ls=":")
        places = {name: place(name) for name in ("before", *names)}
        for name, (x, y) in places.items():
            colour = "0.6" if name in (*CONTROLS, "before") else "C0"
            colour = "black" if name in line else colour
            ax.plot(x, y, "o", ms=5, color=colour)
        for group in close_together(places):
            text = "; ".join(group)
            where = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
            ax.annotate(text, places[group[0]], fontsize=7.5, **where)
        ax.set_xlabel(label)
        ax.grid(alpha=0.2)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.2)
    axes[0].set_ylabel("wrong facts, %")
    figure.suptitle(
        "What fewer wrong facts cost; dotted: DPO before, at its learning rate, and at twice the "
        "rate",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    return figure


def close_together(places: Mapping[str, tuple[float, float]]) -> list[list[str]]:
    """Names whose points are so close that they have one label: within 10 % of the width and 5 % of
    the height of the first one's.
    """
    width, height = (max(x) - min(x) for x in zip(*places.values(), strict=True))
    groups: list[list[str]] = []
    for name, (x, y) in places.items():
        for group in groups:
            a, b = places[group[0]]
            if abs(x - a) < 0.1 * width and abs(y - b) < 0.05 * height:
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def draw_sweeps(rows: Rows) -> Any:
    """Wrong facts against alpha and against the share of wrong labels."""
    sweeps = {"alpha": _alpha_lines(rows), "share of wrong labels, %": _noise_lines(rows)}
    sweeps = {label: lines for label, lines in sweeps.items() if lines}
    if not sweeps:
        return None
    figure, axes = plt.subplots(
        1, len(sweeps), figsize=(4.9 * len(sweeps), 3.6), layout="constrained", squeeze=False
    )
    for ax, (label, lines) in zip(axes[0], sweeps.items(), strict=True):
        for name, points in lines.items():
            x = list(points)
            means = [100 * statistics.mean(values) for values in points.values()]
            widths = [100 * half_width(v) if len(v) > 1 else 0 for v in points.values()]
            ax.errorbar(x, means, widths, marker="o", ms=4, lw=1.6, capsize=2, label=name)
        if label == "alpha":
            ax.set_xscale("log")
            ax.set_xticks(ALPHAS, [f"{x:g}" for x in ALPHAS])
            ax.minorticks_off()
            dpo = values_of(rows, "DPO", "wrong facts")
            if dpo:
                ax.axhline(100 * statistics.mean(dpo), color="black", lw=0.8, ls=":", label="DPO")
        ax.set_xlabel(label)
        ax.set_ylabel("wrong facts, %")
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False)
        ax.grid(alpha=0.2)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


Lines = dict[str, dict[float, list[float]]]


def _alpha_lines(rows: Rows) -> Lines:
    lines: Lines = {}
    for name in ("DPO-REG", "oracle"):
        points = {}
        for alpha in ALPHAS:
            method = name if alpha == ALPHA else f"{name}, alpha {alpha:g}"
            found = values_of(rows, method, "wrong facts")
            if found:
                points[alpha] = found
        if len(points) > 1:
            lines[name] = points
    return lines


def _noise_lines(rows: Rows) -> Lines:
    lines: Lines = {}
    for name in NOISY:
        points = {}
        for noise in (0.0, *NOISES):
            method = f"{name}, noise {100 * noise:.0f} %" if noise else name
            found = values_of(rows, method, "wrong facts")
            if found:
                points[100 * noise] = found
        if len(points) > 1:
            lines[name] = points
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    for path in draw_all(json.loads(args.record.read_text())["rows"], args.folder):
        print(path)


if __name__ == "__main__":
    main()
