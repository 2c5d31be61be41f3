"""Tables of the records in Markdown: every score, on all answers and on both halves.

python tables.py 'FineGrainedRLHF=finegrained.json' 'BLiMP=blimp.json'
"""

import argparse
import json
from pathlib import Path
from typing import Any

from picture import NAMES

HALVES = ("all", "first", "second")
TITLES = {
    "average_precision": "avg. precision",
    "sign_agreement": "signs",
    "within_document": "within document",
    "pair_accuracy": "pairs, by sum",
}


def interval(found: list[float | None] | None) -> str:
    """0.541 [0.519, 0.570]"""
    if found is None:
        return ""
    value, low, high = found
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table(title: str, record: dict[str, Any]) -> list[str]:
    """AUROC of the halves, then the other measures on all answers, then types of errors."""
    halves = {half: record["halves"][half] for half in HALVES}
    whole = halves["all"]
    labels = list(whole["labels"])
    others = [x for x in TITLES if any(x in y for y in whole["scores"].values())]
    counts = ", ".join(
        f"{half}: {x['answers']} answers, {x['tokens']:,} tokens, {x['wrong']:,} wrong"
        for half, x in halves.items()
    )
    heads = ["", *(f"AUROC, {half}" for half in HALVES), *(TITLES[x] for x in others), *labels]
    lines = [f"**{title}** ({counts})", "", row(*heads), row(*["---"] * len(heads))]
    for name in NAMES:
        scores = whole["scores"].get(name)
        if scores is None:
            continue
        cells = [interval(x["scores"][name].get("auroc")) for x in halves.values()]
        cells += [f"{scores[x][0]:.3f}" if x in scores else "" for x in others]
        cells += [interval(scores["labels"].get(x)) for x in labels]
        lines.append(row(NAMES[name], *cells))
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="+", help="TITLE=FILE")
    args = parser.parse_args()
    for given in args.records:
        title, _, file = given.rpartition("=")
        print(*table(title, json.loads(Path(file).read_text())), sep="\n")


if __name__ == "__main__":
    main()
