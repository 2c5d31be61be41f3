"""One seeded sample of a set with marks, as a file that `treg evaluate-credit` reads.

    python sample.py finegrained --data dev_feedback.json --model MODEL --output finegrained.json
    python sample.py blimp --data BLiMP.zip --number 2 --output blimp.jsonl

finegrained: rows as they are, whose passages, question and marked answer have at most --most_tokens
tokens, since a forward on a CPU costs time by the token; the first --number of them in an order
drawn by the seed. blimp: --number pairs of each paradigm, drawn by the seed and the paradigm; the
sentences answer --prompt, since a reward model reads no answer without a request.
"""

import argparse
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from transformers import AutoTokenizer


def tokens_of(row: dict[str, Any], tokenizer: Any) -> int:
    """About as many as the prompt and the marked answer have."""
    passages = [text for passage in row["passages"] for text in passage]
    text = "\n".join([*passages, row["question"], row["prediction 1"]])
    return len(tokenizer(text)["input_ids"])


def finegrained(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of the rows that fit."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = json.loads(Path(args.data).read_text())
    fitting = [row for row in rows if tokens_of(row, tokenizer) <= args.most_tokens]
    print(f"{len(fitting)} of {len(rows)} answers have at most {args.most_tokens} tokens")
    Random(args.seed).shuffle(fitting)
    return fitting[: args.number]


def paradigms(data: str) -> Iterator[tuple[str, str]]:
    """Name and text of every JSONL file of a folder or a zip."""
    if zipfile.is_zipfile(data):
        with zipfile.ZipFile(data) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".jsonl") and not Path(name).name.startswith("."):
                    yield Path(name).stem, archive.read(name).decode()
    else:
        for file in sorted(Path(data).rglob("*.jsonl")):
            yield file.stem, file.read_text()


def blimp(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of every paradigm."""
    found = []
    for name, text in paradigms(args.data):
        rows = [json.loads(line) for line in io.StringIO(text)]
        found += Random(f"{args.seed} {name}").sample(rows, args.number)
    return [{"prompt": args.prompt, **row} for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=("finegrained", "blimp"))
    parser.add_argument("--data", required=True, help="dev_feedback.json; BLiMP's folder or zip")
    parser.add_argument("--model", help="of finegrained: folder or hub name, for its tokenizer")
    parser.add_argument("--prompt", default="Write a sentence.", help="of blimp")
    parser.add_argument("--most_tokens", type=int, default=640)
    parser.add_argument("--number", type=int, default=85, help="answers; pairs of each paradigm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if args.set == "finegrained" and args.model is None:
        parser.error("--model: expected a model, whose tokens are counted, got none")
    if not Path(args.data).exists():
        parser.error(f"--data: no such file or folder: {args.data}; the README says where it is")
    rows = finegrained(args) if args.set == "finegrained" else blimp(args)
    if args.set == "finegrained":
        args.output.write_text(json.dumps(rows))
    else:
        args.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{args.output}: {len(rows)} rows")


if __name__ == "__main__":
    main()
