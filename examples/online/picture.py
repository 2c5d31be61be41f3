"""The picture of the online run: wrong facts of held-out answers against steps.

python examples/online/picture.py benchmarks/results/cpu/online.json docs/images/online.svg
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

from treg.demo.records import half_width

# the same results give the same bytes
matplotlib.rcParams |= {"svg.hashsalt": "treg", "svg.fonttype": "none"}
# method: what it is called in the picture, colour, style
LINES = {
    "sequence": ("reward model, one number an answer", "black", "-"),
    "RED": ("reward model, token by token (RED)", "C0", "-"),
    "RED, macro": ("RED, macro actions of 5 tokens", "C9", "--"),
    "RED, shuffled": ("RED, shuffled over the tokens", "C7", ":"),
    "truth, sequence": ("the truth, one number an answer", "C1", "--"),
    "truth, tokens": ("the truth, token by token", "C2", "-"),
}


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A line a method, the mean over its seeds, with a band of the 95 % interval and its name where
    it ends.
    """
    figure, ax = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    ends: list[tuple[float, str, str]] = []
    last = 0
    for name, (label, colour, style) in LINES.items():
        curves = [x["curve"] for x in rows if x["method"] == name]
        if not curves:
            continue
        steps = [x["step"] for x in curves[0]]
        values = [[100 * curve[i]["wrong facts"] for curve in curves] for i in range(len(steps))]
        means = [statistics.mean(x) for x in values]
        if len(curves) > 1:
            widths = [half_width(x) for x in values]
            low = [max(0.0, m - w) for m, w in zip(means, widths, strict=True)]
            high = [m + w for m, w in zip(means, widths, strict=True)]
            ax.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
        ax.plot(steps, means, color=colour, ls=style, lw=2)
        ends.append((means[-1], label, colour))
        last = max(last, steps[-1])
    top = ax.get_ylim()[1]
    ax.set_ylim(0, top)
    for height, label, colour in apart(sorted(ends), 0.05 * top):
        place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        ax.annotate(label, (last, height), color=colour, fontsize=9, annotation_clip=False, **place)
    ax.set_xlim(0, last)
    ax.set_xlabel("optimizer steps, each on 32 sampled answers")
    ax.set_ylabel("wrong facts of answers, %")
    ax.set_title(
        "Online RL where it is known which facts are wrong: towns that were not trained on\n"
        "mean over seeds, band: 95 % interval; lower is better",
        fontsize=10,
        loc="left",
    )
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.25)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def apart(ends: Sequence[tuple[float, str, str]], space: float) -> list[tuple[float, str, str]]:
    """Labels from low to high, moved up until each has its space."""
    placed: list[tuple[float, str, str]] = []
    for height, label, colour in ends:
        lowest = placed[-1][0] + space if placed else 0.0
        placed.append((max(height, lowest), label, colour))
    return placed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.record.read_text())["rows"], args.picture)


if __name__ == "__main__":
    main()
