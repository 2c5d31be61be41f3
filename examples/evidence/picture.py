"""The picture of the evidence: AUROC of every source and baseline, with intervals, by set.

    python picture.py --records 'FineGrainedRLHF, SmolLM2-135M=finegrained.json' \\
        'its factual errors=finegrained.json:factual' 'BLiMP, SmolLM2-135M=blimp.json' \\
        --output evidence.svg

A panel a record, or one type of its errors; a line a score. The thick line is all answers, the thin
one with an open mark their second half, on which nothing was chosen.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from measure import BASELINES

# the same results give the same bytes
matplotlib.rcParams |= {"svg.hashsalt": "treg", "svg.fonttype": "none"}
ALL, SECOND = 0.16, -0.2  # where in a line's height they stand
NAMES = {
    "paper": "contrastive (T-REG's paper)",
    "hidden": "contrastive, answer hidden",
    "word": "contrastive, by word",
    "spread": "contrastive, standardised",
    "red": "reward model (RED)",
    "implicit": "trained pair (implicit)",
    "surprise": "surprise",
    "surprise_by_word": "surprise by word",
    "entropy": "entropy",
    "position": "position in the answer",
    "length": "length of the token",
    "random": "random",
}
SOURCE, BASELINE = "C0", "0.45"


def draw(records: dict[str, tuple[dict[str, Any], str]], path: Path) -> None:
    """A panel a record, beside one another; the names stand at the first.

    records: by title, a record and the type of errors that is drawn; "": all.
    """
    figure, axes = plt.subplots(
        1,
        len(records),
        figsize=(2.6 + 2.6 * len(records), 4.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    shown = [name for name in NAMES if any(name in of_half(x, "all") for x, _ in records.values())]
    for ax, (title, (record, label)) in zip(axes[0], records.items(), strict=True):
        panel(ax, record, label, shown)
        whole = record["halves"]["all"]
        count = whole["labels"][label]["tokens"] if label else whole["wrong"]
        ax.set_title(f"{title}\n{whole['answers']} answers, {count:,} wrong tokens", size=9)
    first = axes[0][0]
    first.set_yticks(range(len(shown)), [NAMES[name] for name in shown])
    first.invert_yaxis()
    for label, name in zip(first.get_yticklabels(), shown, strict=True):
        label.set_color(BASELINE if name in BASELINES else "black")
    figure.supxlabel(
        "AUROC as a detector of wrong tokens, 95 % intervals over documents; dashed: chance; "
        "grey: baselines\nfilled: all answers; open: their second half",
        size=8,
    )
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def of_half(record: dict[str, Any], half: str) -> dict[str, Any]:
    return record["halves"][half]["scores"]


def panel(ax: Any, record: dict[str, Any], label: str, shown: list[str]) -> None:
    """The lines of one record."""
    ax.axvline(0.5, color="0.3", lw=0.8, ls="--")
    for y, name in enumerate(shown):
        colour = BASELINE if name in BASELINES else SOURCE
        for half, up, width, face in (("all", ALL, 2.2, colour), ("second", SECOND, 1.0, "white")):
            scores = of_half(record, half).get(name, {})
            found = scores.get("labels", {}).get(label) if label else scores.get("auroc")
            if found is None:
                continue
            value, low, high = found
            if low is not None:
                ax.plot([low, high], [y - up, y - up], color=colour, lw=width)
            ax.plot(value, y - up, "o", ms=4.5, mec=colour, mfc=face)
    ax.set_xlim(0.28, 0.9)
    ax.tick_params(labelsize=8, length=2)
    ax.grid(axis="x", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", nargs="+", required=True, help="TITLE=FILE[:TYPE]")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    records = {}
    for given in args.records:
        title, _, file = given.rpartition("=")
        file, _, label = file.partition(":")
        records[title] = json.loads(Path(file).read_text()), label
    draw(records, args.output)


if __name__ == "__main__":
    main()
