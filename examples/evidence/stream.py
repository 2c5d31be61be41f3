"""Make another stream of an annotated file its token rewards, so that one annotation serves several
training runs.

    python stream.py several.parquet --stream standard --output standard.parquet

The file's description still tells how all of its streams were made.
"""

import argparse

import pandas as pd

from treg.data.annotated import read_annotated, streams_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="what treg annotate --rewards several wrote")
    parser.add_argument("--stream", required=True)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    streams = streams_of(read_annotated(args.file)[1])
    if args.stream not in streams:
        parser.error(f"--stream: expected one of {', '.join(streams)}, got {args.stream!r}")
    frame = pd.read_parquet(args.file)
    for side in ("chosen", "rejected"):
        frame[f"{side}_token_rewards"] = frame[f"{side}_{args.stream}"]
    # rows are changed on purpose: their checksums do not hold any more
    frame.drop(columns="treg_checksum").to_parquet(args.output)
    print(f"{args.output}: token_rewards are {args.stream}")


if __name__ == "__main__":
    main()
