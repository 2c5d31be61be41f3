"""How ultrafeedback_lengths.csv was made: token lengths of real preference pairs, and nothing of
their text.

    python benchmarks/make_lengths.py --data ultrafeedback_train.jsonl --tokenizer Qwen2.5

data: rows {prompt, chosen, rejected}, here 1000 drawn at random from binarized UltraFeedback.
tokenizer: a folder or a hub name, here that of Qwen2.5 with its chat template. Rows are read as
`treg annotate` reads them: the prompt ends where the tokens of both dialogues cease to agree, a
dialogue is cut at 1024 tokens, rows that cannot be used are left out. The order is shuffled with a
fixed seed, so that the first k rows are a random batch.
"""

import argparse
import csv
import random
from pathlib import Path

LENGTHS = Path(__file__).parent / "ultrafeedback_lengths.csv"
COLUMNS = ("prompt", "chosen", "rejected")


def main() -> None:
    from transformers import AutoTokenizer

    from treg.data import load_pairs

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    args = parser.parse_args()
    pairs, report = load_pairs(args.data, AutoTokenizer.from_pretrained(args.tokenizer))
    rows = [[len(getattr(pair, f"{name}_ids")) for name in COLUMNS] for pair in pairs]
    random.Random(0).shuffle(rows)
    with LENGTHS.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    print(report)


if __name__ == "__main__":
    main()
