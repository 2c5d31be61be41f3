"""UltraFeedback's pairs for the scripts of this folder: those that say something, and fit.

    python pairs.py --data train.jsonl --model MODEL --number 64 --output pairs.jsonl

A row has prompt, chosen, rejected and metadata with score_chosen and score_rejected. Rows with
equal answers or equal scores have no better answer, and are left out.
"""

import argparse
import ast
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from transformers import AutoTokenizer

from treg.data import RowProblem, read_rows

SIDES = ("chosen", "rejected")


def scores(row: dict[str, Any]) -> tuple[float, float]:
    """Of the chosen and the rejected answer. `metadata` is an object, JSON, or a Python literal."""
    found = row["metadata"]
    if isinstance(found, str):
        found = ast.literal_eval(found)
    return float(found["score_chosen"]), float(found["score_rejected"])


def usable_rows(file: str) -> Iterator[dict[str, Any]]:
    """Rows of a file whose answers differ, and whose scores do.

    Raises:
        SystemExit: a row that cannot be read, or lacks what is needed.
    """
    for where, row in read_rows(file):
        if isinstance(row, RowProblem):
            raise SystemExit(f"{where}: {row}")
        missing = [x for x in ("prompt", *SIDES, "metadata") if x not in row]
        if missing:
            raise SystemExit(
                f"{where}: expected UltraFeedback's columns prompt, chosen, rejected, metadata; "
                f"found no {', '.join(missing)}"
            )
        better, worse = scores(row)
        if better != worse and row["chosen"] != row["rejected"]:
            yield row


def conversation_ids(tokenizer: Any, row: dict[str, Any], side: str) -> tuple[list[int], int]:
    """Token ids of prompt and answer by the chat template, and how many precede the answer."""
    asked = [{"role": "user", "content": row["prompt"]}]
    whole = [*asked, {"role": "assistant", "content": row[side]}]
    texts = [
        tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True),
        tokenizer.apply_chat_template(whole, tokenize=False),
    ]
    before, ids = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in texts)
    return ids, len(before)


def fitting_rows(file: str, tokenizer: Any, most_tokens: int) -> list[dict[str, Any]]:
    """The usable rows, both of whose conversations have at most `most_tokens` tokens."""
    return [
        row
        for row in usable_rows(file)
        if max(len(conversation_ids(tokenizer, row, side)[0]) for side in SIDES) <= most_tokens
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="UltraFeedback's pairs as JSONL")
    parser.add_argument("--model", required=True, help="folder or hub name, for its tokenizer")
    parser.add_argument("--most_tokens", type=int, default=256, help="of prompt and answer")
    parser.add_argument("--number", type=int, default=64, help="of pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = fitting_rows(args.data, tokenizer, args.most_tokens)
    taken = Random(args.seed).sample(rows, min(args.number, len(rows)))
    with args.output.open("w") as file:
        file.writelines(json.dumps({x: row[x] for x in ("prompt", *SIDES)}) + "\n" for row in taken)
    print(f"{args.output}: {len(taken)} of {len(rows)} pairs of at most {args.most_tokens} tokens")


if __name__ == "__main__":
    main()
